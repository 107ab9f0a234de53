"""Answers to connections that nobody serves: the packet in, the exact packet back.

Expected answers are scapy's, checksums included. Numbers come from RFC 9293 3.10.7.1 (TCP), RFC 1812 4.3.2
(ICMP) and RFC 4443 2.4 and 3.1 (ICMPv6).
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkAbort,
    SCTPChunkCookieEcho,
    SCTPChunkInit,
    SCTPChunkShutdownComplete,
)
from scapy.packet import Packet, Raw, raw

from ebpfproxy.libbpf import ffi, lib
from packets.node import (
    SECOND_NS,
    TC_ACT_REDIRECT,
    TC_ACT_SHOT,
    V4,
    V6,
    Family,
    Node,
    finished,
    frame,
    number,
)

if TYPE_CHECKING:
    from rig.kernel import Netns

pytestmark = pytest.mark.root

TUN_CHILD = Path(__file__).with_name("tun_child.py")
ROOT = Path(__file__).resolve().parents[2]
PORT, UNUSED, CLIENT_PORT = 80, 81, 40000
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
BACK = Ether(dst=ETHER.src, src=ETHER.dst)
#: RFC 1812 4.3.2.3 and RFC 4443 2.4 (c): the longest error, IP header included.
ERROR_MAX = {4: 576, 6: 1280}


def ip_back(family: Family, **fields: int) -> Packet:
    """Return the IP header of an answer to the client."""
    if family is V4:
        return IP(src=V4.vip, dst=V4.client, ttl=64, id=0, flags="DF", **fields)
    return IPv6(src=V6.vip, dst=V6.client, hlim=64)


def unreachable(family: Family, request: Packet) -> Packet:
    """Return the ICMP error about a request to the VIP, without Ethernet."""
    quoted = raw(request[family.layer])
    if family is V4:
        # RFC 1812 4.3.2.5: precedence "internetwork control".
        head = ip_back(family, tos=0xC0) / ICMP(type="dest-unreach", code="port-unreachable")
    else:
        head = ip_back(family) / ICMPv6DestUnreach(code="Port unreachable")
    return head / Raw(quoted[: ERROR_MAX[family.version] - len(head)])


@pytest.fixture(autouse=True)
def service(node: Node, family: Family) -> None:
    """Port 80 of the VIP has no backend in any protocol, no other port has a service."""
    for proto in ("TCP", "UDP", "SCTP"):
        node.service(family.vip, PORT, [], proto=proto)


class Segment(NamedTuple):
    """A TCP segment, and the flags, sequence and acknowledgment number of the answer."""

    flags: str
    seq: int
    ack: int
    payload: int
    answer: tuple[str, int, int]


SEGMENTS = [
    Segment("S", 1000, 0, 0, ("RA", 0, 1001)),
    Segment("SEC", 1000, 0, 0, ("RA", 0, 1001)),
    Segment("S", 1000, 0, 10, ("RA", 0, 1011)),  # TCP Fast Open
    Segment("S", 0xFFFFFFFF, 0, 0, ("RA", 0, 0)),
    Segment("S", 0xFFFFFFF0, 0, 100, ("RA", 0, 85)),
    Segment("", 1000, 0, 5, ("RA", 0, 1005)),
    Segment("F", 1000, 0, 5, ("RA", 0, 1006)),
    Segment("SF", 1000, 0, 0, ("RA", 0, 1002)),
    Segment("SA", 1000, 777, 0, ("R", 777, 0)),
    Segment("A", 1000, 777, 0, ("R", 777, 0)),
    Segment("PA", 1000, 0xFFFFFFFF, 1400, ("R", 0xFFFFFFFF, 0)),
    Segment("FA", 1000, 0, 3, ("R", 0, 0)),
]


@pytest.mark.parametrize(
    "options", [[], [("MSS", 1460), ("WScale", 7), ("SAckOK", b"")]], ids=["", "options"]
)
@pytest.mark.parametrize("segment", SEGMENTS, ids=lambda row: f"{row.flags}+{row.payload}")
def test_tcp(node: Node, family: Family, segment: Segment, options: list[tuple[str, object]]) -> None:
    header = TCP(
        sport=CLIENT_PORT,
        dport=UNUSED,
        flags=segment.flags,
        seq=segment.seq,
        ack=segment.ack,
        options=options,
    )
    request = finished(frame(family, header, family.client, family.vip, b"x" * segment.payload))
    flags, seq, ack = segment.answer
    reset = TCP(sport=UNUSED, dport=CLIENT_PORT, flags=flags, seq=seq, ack=ack, window=0)
    verdict, answer = node.ingress(request)
    assert verdict == "REJECT_UNUSED"
    assert raw(answer) == raw(BACK / ip_back(family) / reset)


LENGTHS = [0, 1, 2, 3, 4, 5, 63, 483, 484, 485, 519, 520, 521, 547, 548, 1183, 1184, 1185, 1232, 1452, 3000]


@pytest.mark.parametrize("port", [PORT, UNUSED])
def test_udp_of_every_length(node: Node, family: Family, port: int) -> None:
    """All of it is quoted, or what fits."""
    for length in LENGTHS:
        header = UDP(sport=CLIENT_PORT, dport=port)
        request = finished(frame(family, header, family.client, family.vip, os.urandom(length)))
        verdict, answer = node.ingress(request)
        assert verdict == ("REJECT_EMPTY" if port == PORT else "REJECT_UNUSED")
        assert raw(answer) == raw(BACK / unreachable(family, request)), f"{length} bytes"


@pytest.mark.parametrize(
    "chunk", [SCTPChunkInit(), SCTPChunkCookieEcho(cookie=b"old")], ids=["INIT", "COOKIE"]
)
def test_sctp(node: Node, family: Family, chunk: Packet) -> None:
    request = finished(
        frame(family, SCTP(sport=CLIENT_PORT, dport=UNUSED) / chunk, family.client, family.vip)
    )
    verdict, answer = node.ingress(request)
    assert verdict == "REJECT_UNUSED"
    assert raw(answer) == raw(BACK / unreachable(family, request))


def test_the_answer_leaves_through_egress_as_it_is(node: Node, family: Family) -> None:
    """Tc_egress of the same device sees the answer."""
    for header, verdict in [(TCP(dport=PORT, flags="S"), "NOT_OURS"), (UDP(dport=PORT), "UNKNOWN_L4")]:
        answer = node.ingress(finished(frame(family, header, family.client, family.vip))).packet
        assert answer is not None
        assert node.egress(answer) == (verdict, answer)


@dataclass(frozen=True)
class Shape:
    """A request with more than the plain headers."""

    name: str
    layers: Packet  # Ethernet and tags
    options: tuple[Packet, ...] = ()  # IPv4 options
    extensions: Packet | None = None  # of IPv6
    trailer: bytes = b""  # behind the IP packet

    def __str__(self) -> str:
        return self.name

    def request(self, family: Family, l4: Packet) -> Packet:
        if family is V4:
            ip = IP(src=V4.client, dst=V4.vip, options=list(self.options))
        else:
            ip = IPv6(src=V6.client, dst=V6.vip)
            ip = ip / self.extensions if self.extensions else ip
        return finished(self.layers / ip / l4)

    def back(self, ip: Packet) -> Packet:
        """Return an answer in the request's L2 headers, MAC addresses exchanged."""
        layers = self.layers.copy()
        layers.src, layers.dst = self.layers.dst, self.layers.src
        return layers / ip


PAD = [PadN(optdata=bytes(4))]
SHAPES = [
    Shape("Ethernet padding", ETHER, trailer=b"\xff" * 18),
    Shape("one tag", ETHER / Dot1Q(vlan=7, prio=3)),
    Shape("two tags", ETHER / Dot1AD(vlan=9) / Dot1Q(vlan=7)),
    Shape("options", ETHER, (IPOption_NOP(),), IPv6ExtHdrHopByHop(options=PAD)),
    Shape(
        "long options",
        ETHER,
        (IPOption_RR(routers=["0.0.0.0"] * 9),),
        IPv6ExtHdrHopByHop(options=PAD) / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(200))]),
    ),
    Shape("tag and options", ETHER / Dot1Q(vlan=7), (IPOption_NOP(),), IPv6ExtHdrDestOpt(options=PAD)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(node: Node, family: Family, shape: Shape) -> None:
    syn = TCP(sport=CLIENT_PORT, dport=PORT, flags="S", seq=5)
    reset = TCP(sport=PORT, dport=CLIENT_PORT, flags="RA", ack=6, window=0)
    verdict, answer = node.ingress(raw(shape.request(family, syn)) + shape.trailer)
    assert verdict == "REJECT_EMPTY"
    assert raw(answer) == raw(shape.back(ip_back(family) / reset))
    for length in (0, 3, 1400):
        ask = UDP(sport=CLIENT_PORT, dport=PORT) / Raw(bytes(length))
        request = shape.request(family, ask)
        verdict, answer = node.ingress(raw(request) + shape.trailer)
        assert verdict == "REJECT_EMPTY"
        assert raw(answer) == raw(shape.back(unreachable(family, request))), f"{length} bytes"


def test_no_ethernet_header(node: Node, family: Family, netns: Netns, bpffs: Path) -> None:
    """Through a tun device, as WireGuard and tunnels are."""
    for name in ("tc_ingress", "tc_egress"):
        node.loaded.programs[name].pin(bpffs / name)
    ip = family.layer(src=family.client, dst=family.vip)
    syn = ip / TCP(sport=CLIENT_PORT, dport=PORT, flags="S", seq=5)
    asks = [ip / UDP(sport=CLIENT_PORT, dport=PORT) / Raw(bytes(length)) for length in (0, 3, 1400)]
    reset = ip_back(family) / TCP(sport=PORT, dport=CLIENT_PORT, flags="RA", ack=6, window=0)
    result = netns.place().run(
        sys.executable,
        TUN_CHILD,
        bpffs / "tc_ingress",
        bpffs / "tc_egress",
        text="".join(f"{raw(sent).hex()}\n" for sent in [syn, *asks]),
        env={"PYTHONPATH": str(ROOT)},
    )
    answers = [bytes.fromhex(line) for line in result.stdout.splitlines()]
    assert answers == [raw(wanted) for wanted in [reset, *(unreachable(family, ask) for ask in asks)]]


def damaged(packet: Packet, **fields: int) -> Packet:
    """Return a finished IPv4 frame with fields changed and no checksum made again."""
    copy = finished(packet)
    for name, value in fields.items():
        setattr(copy[IP], name, value)
    return copy


def test_never_answered(node: Node, family: Family) -> None:
    """Dropped in silence (RFC 1122 3.2.2, RFC 1812 4.3.2.7, RFC 4443 2.4 (e), RFC 9293 3.10.7.1)."""
    syn, ask = TCP(sport=CLIENT_PORT, dport=UNUSED, flags="S"), UDP(sport=CLIENT_PORT, dport=UNUSED)
    sources = {
        4: ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"],
        6: ["::", "::1", "ff02::1", "::ffff:192.0.2.7"],
    }[family.version]
    groups = {4: ["224.0.0.1", "255.255.255.255"], 6: ["ff02::1", "ff0e::7"]}[family.version]
    for group in groups:
        node.vip(group, lib.VIP_EXTERNAL_IP)
    packets = {f"from {source}": finished(frame(family, ask, source, family.vip)) for source in sources}
    packets |= {f"to {group}": finished(frame(family, ask, family.client, group)) for group in groups}
    for name, header in {
        "RST": TCP(dport=UNUSED, flags="R"),
        "RST and ACK": TCP(dport=UNUSED, flags="RA"),
        "ABORT": SCTP(dport=UNUSED) / SCTPChunkAbort(),
        "SHUTDOWN COMPLETE": SCTP(dport=UNUSED) / SCTPChunkShutdownComplete(),
        "TCP header too short for TCP": TCP(dport=UNUSED, flags="S", dataofs=4),
        "TCP header longer than its packet": TCP(dport=UNUSED, flags="S", dataofs=6),
    }.items():
        packets[name] = finished(frame(family, header, family.client, family.vip))
    for name, mac in {"broadcast": "ff:ff:ff:ff:ff:ff", "multicast": "01:00:5e:00:00:01"}.items():
        for header in (syn, ask):
            packet = finished(frame(family, header, family.client, family.vip))
            packet.dst = mac
            packets[f"{type(header).__name__} in an Ethernet {name}"] = packet
    if family is V4:
        good = frame(family, ask / Raw(bytes(20)), family.client, family.vip)
        packets["damaged IPv4 header"] = damaged(good, ttl=17)
        cut = frame(family, ask / Raw(bytes(20)), family.client, family.vip)
        cut[IP].len = 100
    else:
        cut = frame(family, ask / Raw(bytes(20)), family.client, family.vip)
        cut[IPv6].plen = 100
    packets["shorter than it says"] = finished(cut)
    for name, packet in packets.items():
        assert node.ingress(packet) == ("REJECT_UNUSED", None), name


def test_left_alone(node: Node, family: Family) -> None:
    """ICMP is for the stack: neither an error nor an echo to a VIP gets an error back."""
    quoted = finished(frame(family, UDP(sport=UNUSED, dport=CLIENT_PORT), family.vip, family.client))
    error = unreachable(family, quoted)
    error.src, error.dst = family.client, family.vip
    packet = finished(ETHER / error)
    assert node.ingress(packet) == ("UNKNOWN_L4", packet)


def run_many(node: Node, family: Family, count: int) -> tuple[int, float]:
    """Let rejected packets enter on one CPU; return how many were answered and the time it took."""
    request = raw(finished(frame(family, UDP(sport=CLIENT_PORT, dport=PORT), family.client, family.vip)))
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        started = time.monotonic()
        actions = [node.loaded.programs["tc_ingress"].run(request).retval for _ in range(count)]
        took_s = time.monotonic() - started
    finally:
        os.sched_setaffinity(0, cpus)
    assert set(actions) <= {TC_ACT_REDIRECT, TC_ACT_SHOT}
    return actions.count(TC_ACT_REDIRECT), took_s


PER_SECOND = 1000  # net.ipv4.icmp_msgs_per_sec


def test_rate_limit(node: Node, family: Family) -> None:
    """A second's answers may go at once, then a thousand a second on each CPU."""
    before = node.verdicts()
    answered, took_s = run_many(node, family, 3 * PER_SECOND)
    after = node.verdicts()
    assert PER_SECOND <= answered <= PER_SECOND * (1 + took_s) + 1
    assert after["REJECT_EMPTY"] - before["REJECT_EMPTY"] == answered
    assert after["REJECT_LIMITED"] - before["REJECT_LIMITED"] == 3 * PER_SECOND - answered


def test_rate_limit_refills(node: Node, family: Family) -> None:
    request = finished(frame(family, TCP(dport=UNUSED, flags="S"), family.client, family.vip))
    now_ns = time.monotonic_ns()
    node.reject_from(now_ns + 60 * SECOND_NS)
    assert node.ingress(request) == ("REJECT_LIMITED", None)
    node.reject_from(now_ns - SECOND_NS // 10)
    answered, took_s = run_many(node, family, PER_SECOND)
    assert PER_SECOND // 10 <= answered <= PER_SECOND * (0.1 + time.monotonic() - now_ns / SECOND_NS) + 1
    assert took_s > 0


def test_what_is_not_answered_costs_no_budget(node: Node, family: Family) -> None:
    packet = raw(finished(frame(family, TCP(dport=UNUSED, flags="R"), family.client, family.vip)))
    for _ in range(10):
        assert node.loaded.programs["tc_ingress"].run(packet).retval == TC_ACT_SHOT
    entries, size = node.map("rejects"), ffi.sizeof("__u64")
    value = entries.get(number(0))
    assert value is not None
    assert all(value[at : at + size] == bytes(size) for at in range(0, len(value), entries.stride))
