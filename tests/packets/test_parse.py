"""Which packets are read, and what is left alone: every shape of header, in and out as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw, raw

from packets.node import V4, V6, Family, Node, Outcome, finished, translated

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.root

VIP = {4: V4.vip, 6: V6.vip}
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
SYN = TCP(sport=40000, dport=80, flags="S")
ASK = UDP(sport=40000, dport=80)
#: A routing type that nobody uses (RFC 4727).
EXPERIMENT = 253
PAD = [PadN(optdata=bytes(4))]


def ip4(**fields: object) -> Packet:
    return IP(src=V4.client, dst=V4.vip, **fields)


def ip6(**fields: object) -> Packet:
    return IPv6(src=V6.client, dst=V6.vip, **fields)


@dataclass(frozen=True)
class Shape:
    """A packet to a VIP that is read and translated."""

    name: str
    packet: Packet

    def __str__(self) -> str:
        return self.name


READ = [
    Shape("plain IPv4", ETHER / ip4() / SYN),
    Shape("plain IPv6", ETHER / ip6() / SYN),
    Shape("IPv4 option", ETHER / ip4(options=[IPOption_NOP()]) / SYN),
    Shape("longest IPv4 header", ETHER / ip4(options=[IPOption_RR(routers=["0.0.0.0"] * 9)]) / ASK),
    Shape("don't fragment", ETHER / ip4(flags="DF") / SYN),
    Shape("TCP options", ETHER / ip4() / TCP(sport=4, dport=80, flags="S", options=[("MSS", 1460)])),
    Shape("customer tag", ETHER / Dot1Q(vlan=7) / ip4() / SYN),
    Shape("customer tag, IPv6", ETHER / Dot1Q(vlan=7) / ip6() / SYN),
    Shape("service and customer tag", ETHER / Dot1AD(vlan=9) / Dot1Q(vlan=7) / ip4() / ASK),
    Shape("two customer tags, IPv6", ETHER / Dot1Q(vlan=9) / Dot1Q(vlan=7) / ip6() / ASK),
    Shape("hop-by-hop options", ETHER / ip6() / IPv6ExtHdrHopByHop(options=PAD) / SYN),
    Shape("destination options", ETHER / ip6() / IPv6ExtHdrDestOpt(options=PAD) / ASK),
    Shape("routing header at its end", ETHER / ip6() / IPv6ExtHdrRouting(type=EXPERIMENT, segleft=0) / SYN),
    Shape("atomic fragment (RFC 6946)", ETHER / ip6() / IPv6ExtHdrFragment(offset=0, m=0) / ASK),
    Shape(
        "every kind once",
        ETHER
        / ip6()
        / IPv6ExtHdrHopByHop(options=PAD)
        / IPv6ExtHdrDestOpt(options=PAD)
        / IPv6ExtHdrRouting(type=EXPERIMENT, segleft=0)
        / IPv6ExtHdrFragment(offset=0, m=0)
        / IPv6ExtHdrDestOpt(options=PAD)
        / SYN,
    ),
    Shape(
        "an extension header of 2048 bytes",
        ETHER
        / ip6()
        / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(255))] * 7 + [PadN(optdata=bytes(245))])
        / ASK,
    ),
    Shape("MAC address like IPv4", Ether(dst="46:00:00:00:00:01") / ip4() / SYN),
    Shape("MAC address like IPv6", Ether(dst="62:00:00:00:00:01") / ip6() / SYN),
    Shape("MAC address like IPv4, tagged", Ether(dst="46:00:00:00:00:01") / Dot1Q(vlan=7) / ip4() / SYN),
]


@pytest.fixture
def serving(node: Node) -> Node:
    """A node with port 80 of the VIPs, TCP and UDP."""
    for family in (V4, V6):
        for proto in ("TCP", "UDP"):
            node.service(family.vip, 80, [family.backends[0]], proto=proto)
    return node


@pytest.mark.parametrize("shape", READ, ids=str)
def test_read(serving: Node, shape: Shape) -> None:
    packet = finished(shape.packet)
    family = V4 if IP in packet else V6
    verdict, arrived = serving.ingress(packet)
    assert verdict == "NEW"
    assert raw(arrived) == translated(packet, dst=family.backends[0], dport=8080)


SIX = [IPv6ExtHdrDestOpt(options=PAD)] * 7


def chain(headers: list[Packet]) -> Packet:
    packet = headers[0]
    for each in headers[1:]:
        packet = packet / each
    return packet


@dataclass(frozen=True)
class Alone:
    """A packet that must come out as it went in."""

    name: str
    packet: Packet
    verdict: str
    cut: int = 0  # bytes to take off the end

    def __str__(self) -> str:
        return self.name


LEFT_ALONE = [
    Alone("ARP", ETHER / ARP(pdst=V4.vip), "NOT_OURS"),
    Alone("a frame of another kind", ETHER / Raw(bytes(60)), "NOT_OURS"),
    Alone("another destination", ETHER / IP(src=V4.client, dst="203.0.113.99") / SYN, "NOT_OURS"),
    Alone("another destination, IPv6", ETHER / IPv6(src=V6.client, dst="2001:db8::99") / SYN, "NOT_OURS"),
    Alone("fragment to another destination", ETHER / IP(dst="203.0.113.99", frag=9) / Raw(b"x"), "NOT_OURS"),
    Alone("three VLAN tags", ETHER / Dot1Q() / Dot1Q() / Dot1Q() / ip4() / SYN, "NOT_OURS"),
    Alone("ICMP", ETHER / ip4() / ICMP(type="timestamp-request"), "UNKNOWN_L4"),
    Alone("ICMPv6", ETHER / ip6() / ICMPv6EchoReply(), "UNKNOWN_L4"),
    Alone("UDP-Lite", ETHER / ip4(proto=136) / Raw(raw(ASK)), "UNKNOWN_L4"),
    Alone("AH signs addresses", ETHER / ip4(proto=51) / AH(nh=6) / SYN, "UNKNOWN_L4"),
    Alone("AH, IPv6", ETHER / ip6(nh=51) / AH(nh=6) / SYN, "UNKNOWN_L4"),
    Alone(
        "waypoint of a route",
        ETHER / ip6() / IPv6ExtHdrRouting(type=EXPERIMENT, segleft=1) / SYN,
        "UNKNOWN_L4",
    ),
    Alone("no next header", ETHER / ip6(nh=59), "UNKNOWN_L4"),
    Alone("more extension headers than six", ETHER / ip6() / chain(SIX) / SYN, "UNKNOWN_L4"),
    Alone("first fragment without its ports", ETHER / ip4(flags="MF", proto=17) / Raw(bytes(7)), "TRUNCATED"),
    Alone("fragment header cut", ETHER / ip6(nh=44) / Raw(bytes([17, 0, 0, 1])), "TRUNCATED"),
    Alone("IPv4 header cut", ETHER / Dot1Q(vlan=7) / ip4() / SYN, "TRUNCATED", cut=21),
    Alone("IPv6 header cut", ETHER / Dot1Q(vlan=7) / ip6() / SYN, "TRUNCATED", cut=21),
    Alone("IPv4 header says 4 words", ETHER / ip4(ihl=4) / SYN, "TRUNCATED"),
    Alone("IPv4 options cut", ETHER / ip4(ihl=15, len=20, proto=6), "TRUNCATED"),
    Alone("IPv4 shorter than its TCP header", ETHER / ip4(len=39) / SYN, "TRUNCATED"),
    Alone("IPv4 shorter than its own header", ETHER / ip4(len=19) / SYN, "TRUNCATED"),
    Alone("later fragment shorter than its own header", ETHER / ip4(len=19, frag=3) / SYN, "TRUNCATED"),
    Alone("TCP header cut", ETHER / ip4() / SYN, "TRUNCATED", cut=1),
    Alone("TCP header cut, IPv6", ETHER / ip6() / SYN, "TRUNCATED", cut=1),
    Alone("UDP header cut", ETHER / ip4() / ASK, "TRUNCATED", cut=1),
    Alone("UDP header cut, IPv6", ETHER / ip6() / ASK, "TRUNCATED", cut=1),
    Alone("SCTP without a chunk", ETHER / ip4(proto=132) / Raw(bytes(12)), "TRUNCATED"),
    Alone("IPv6 says less than its UDP header", ETHER / ip6(plen=7) / ASK, "TRUNCATED"),
    Alone(
        "IPv6 says less than its option", ETHER / ip6(plen=7) / IPv6ExtHdrDestOpt(options=PAD), "TRUNCATED"
    ),
    Alone("extension header past the end", ETHER / ip6(nh=60) / Raw(bytes([17, 9, 0, 0])), "TRUNCATED"),
    Alone("wrong version", ETHER / ip4(version=5) / SYN, "TRUNCATED"),
    Alone("tag without a packet", Ether(type=0x8100) / Raw(b"\0\1"), "TRUNCATED"),
]


@pytest.mark.parametrize("alone", LEFT_ALONE, ids=str)
def test_left_alone(serving: Node, alone: Alone) -> None:
    data = raw(alone.packet)
    data = data[: len(data) - alone.cut]
    verdict, arrived = serving.ingress(data)
    assert verdict == alone.verdict
    assert raw(arrived) == data
    assert not serving.flows()


@pytest.mark.parametrize("run", [Node.ingress, Node.egress], ids=["ingress", "egress"])
def test_every_truncation(serving: Node, family: Family, run: Callable[[Node, bytes], Outcome]) -> None:
    """However short a frame is: no error, and what comes out went in.

    Tagged, as the kernel's test run refuses untagged frames without a whole IP header.
    """
    tagged = ETHER / Dot1Q(vlan=7) / family.layer(src=family.client, dst=family.vip) / SYN
    whole = raw(finished(tagged))
    for size in range(15, len(whole)):
        outcome = run(serving, whole[:size])
        assert raw(outcome.packet) == whole[:size]
    assert not serving.flows()
