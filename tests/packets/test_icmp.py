"""ICMP: errors about translated packets in every direction, errors made here, echo.

A packet is translated first; the error then quotes what left, as a host or router behind would have seen it,
and must arrive about what its receiver knows. Expected packets are scapy's, all checksums included.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit, SCTPChunkInitAck
from scapy.packet import Packet, Raw, raw

from ebpfproxy.libbpf import ffi, lib
from packets.node import (
    BACKEND_PORT,
    CLIENT_PORT,
    PORT,
    V4,
    V6,
    Backend,
    Family,
    Node,
    finished,
    frame,
    struct_of,
    to_bytes,
    translated,
)
from packets.path import (
    HERE_MAC,
    ROUTER,
    THERE_MAC,
    Driver,
    Result,
    arriving,
    backend_node,
    entry_node,
    request_to,
    way,
)

pytestmark = pytest.mark.root

MTU = 1300
ETHER = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
BACK = Ether(dst=ETHER.src, src=ETHER.dst)
SENT = Ether(dst=THERE_MAC, src=HERE_MAC)
#: RFC 792, RFC 1191; RFC 4443 3.
ERRORS = {
    4: {
        "too big": ICMP(type=3, code=4, nexthopmtu=MTU),
        "time exceeded": ICMP(type=11),
        "port unreachable": ICMP(type=3, code=3),
        "host unreachable": ICMP(type=3, code=1),
        "parameter problem": ICMP(type=12, ptr=1),
    },
    6: {
        "too big": ICMPv6PacketTooBig(mtu=MTU),
        "time exceeded": ICMPv6TimeExceeded(),
        "port unreachable": ICMPv6DestUnreach(code=4),
        "host unreachable": ICMPv6DestUnreach(code=3),
        "parameter problem": ICMPv6ParamProblem(ptr=1),
    },
}


def ip_of(packet: Packet) -> Packet:
    return packet[IP] if IP in packet else packet[IPv6]


def hops(ip: Packet) -> int:
    return int(ip.ttl if isinstance(ip, IP) else ip.hlim)


def error(family: Family, kind: str, src: str, dst: str, quote: bytes, ttl: int = 60) -> Packet:
    """Return an error as an IP packet."""
    head = IP(src=src, dst=dst, ttl=ttl) if family is V4 else IPv6(src=src, dst=dst, hlim=ttl)
    return head / ERRORS[family.version][kind].copy() / Raw(quote)


def l4(proto: str, sport: int, dport: int, *, is_reply: bool = False) -> Packet:
    match proto:
        case "TCP":
            return TCP(sport=sport, dport=dport, flags="SA" if is_reply else "S", seq=99) / Raw(b"data")
        case "UDP":
            return UDP(sport=sport, dport=dport) / Raw(bytes(range(200)))
        case _:
            chunk = SCTPChunkInitAck(init_tag=1) if is_reply else SCTPChunkInit(init_tag=1)
            return SCTP(sport=sport, dport=dport) / chunk


def quotes(seen: Packet, known: bytes, proto: str) -> list[tuple[bytes, bytes]]:
    """Return what an error may quote and what its receiver must find: all of a packet, 8 bytes of its L4."""
    before, after = raw(ip_of(seen)), bytearray(raw(ip_of(Ether(known))))
    head = len(before) - len(raw(ip_of(seen).payload))
    if proto == "SCTP":
        # Its checksum can't be checked from a quote, and stays.
        after[head + 8 : head + 12] = before[head + 8 : head + 12]
    return [(before, bytes(after)), (before[: head + 8], bytes(after[: head + 8]))]


class Flow(NamedTuple):
    """A flow that has begun."""

    node: Node
    seen: Packet  # the request as it goes to the backend
    port: int  # from which the backend sees it come


def begin(node: Node, family: Family, proto: str, *, is_snat: bool) -> Flow:
    """Let a client open a flow."""
    made = node.service(
        family.vip,
        PORT,
        [Backend(family.backends[0], flags=0 if is_snat else lib.BACKEND_LOCAL)],
        proto=proto,
        kind=lib.VIP_LOAD_BALANCER,
        flags=lib.SERVICE_SNAT,
    )
    node.vip(family.node, lib.VIP_LOCAL | lib.VIP_NODE | lib.VIP_SNAT)
    way(node, made.backends[0], family)
    request = finished(frame(family, l4(proto, CLIENT_PORT, PORT), family.client, family.vip))
    result = Driver(node, "tc_ingress")(request)
    assert (result.verdict, result.does) == ("NEW", "send" if is_snat else "pass")
    for key, value in node.flows().items():
        hop = value.hop
        hop.device, hop.mtu, hop.kind, hop.until = 1, 1500, lib.HOP_FORWARD, 2**31 - 1
        for name, mac in (("to_mac", THERE_MAC), ("from_mac", HERE_MAC)):
            ffi.memmove(getattr(hop, name), bytes.fromhex(mac.replace(":", "")), 6)
        node.map("new_flows").update(key, to_bytes(value))
    return Flow(node, result.frame, result.frame[proto].sport)


protocols = pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
kinds = pytest.mark.parametrize("kind", list(ERRORS[4]))
reporters = pytest.mark.parametrize("reporter", ["backend", "router"])


@kinds
@reporters
@protocols
def test_behind_a_translated_source(node: Node, family: Family, proto: str, reporter: str, kind: str) -> None:
    """The way to the backend reports to this node; the client must read about its own packet."""
    flow = begin(node, family, proto, is_snat=True)
    src = family.backends[0] if reporter == "backend" else ROUTER[family.version]
    known = translated(flow.seen, src=family.client, sport=CLIENT_PORT, dst=family.vip, dport=PORT)
    for quote, wanted in quotes(flow.seen, known, proto):
        sent = ETHER / error(family, kind, src, family.node, quote)
        shown = family.vip if reporter == "backend" else family.node
        expected = SENT / error(family, kind, shown, family.client, wanted, 59)
        result = Driver(node, "tc_ingress")(sent)
        assert (result.verdict, result.does) == ("RELATED", "send")
        assert raw(result.frame) == raw(expected)


@kinds
@reporters
@protocols
def test_on_the_way_out(node: Node, family: Family, proto: str, reporter: str, kind: str) -> None:
    """A local backend, or this node's own stack, reports about a packet whose source was kept."""
    flow = begin(node, family, proto, is_snat=False)
    src = family.backends[0] if reporter == "backend" else family.node
    known = translated(flow.seen, dst=family.vip, dport=PORT)
    for quote, wanted in quotes(flow.seen, known, proto):
        sent = ETHER / error(family, kind, src, family.client, quote)
        shown = family.vip if reporter == "backend" else src
        expected = ETHER / error(family, kind, shown, family.client, wanted)
        result = Driver(node, "tc_egress")(sent)
        assert (result.verdict, result.does) == ("RELATED", "pass")
        assert raw(result.frame) == raw(expected)


@kinds
@pytest.mark.parametrize("reporter", ["client", "router"])
@pytest.mark.parametrize("is_snat", [True, False], ids=["translated source", "kept source"])
@protocols
def test_about_a_reply(
    node: Node, family: Family, proto: str, is_snat: bool, reporter: str, kind: str
) -> None:
    """The way to the client reports to the VIP; the backend must read about its own packet."""
    flow = begin(node, family, proto, is_snat=is_snat)
    backend, client = family.backends[0], family.node if is_snat else family.client
    reply = finished(frame(family, l4(proto, BACKEND_PORT, flow.port, is_reply=True), backend, client))
    seen = Ether(translated(reply, src=family.vip, sport=PORT, dst=family.client, dport=CLIENT_PORT))
    src = family.client if reporter == "client" else ROUTER[family.version]
    shown = client if reporter == "client" or is_snat else src
    for quote, wanted in quotes(seen, raw(reply), proto):
        sent = ETHER / error(family, kind, src, family.vip, quote)
        expected = (SENT if is_snat else ETHER) / error(family, kind, shown, backend, wanted, 60 - is_snat)
        result = Driver(node, "tc_ingress")(sent)
        assert (result.verdict, result.does) == ("RELATED", "send" if is_snat else "pass")
        assert raw(result.frame) == raw(expected)


def test_udp_without_checksum(node: Node) -> None:
    """RFC 768: 0 is none, in a quote too."""
    flow = begin(node, V4, "UDP", is_snat=False)
    seen = flow.seen.copy()
    seen[UDP].chksum = 0
    result = Driver(node, "tc_egress")(ETHER / error(V4, "too big", V4.node, V4.client, raw(seen[IP])))
    assert result.verdict == "RELATED"
    inner = IP(raw(result.frame[ICMP].payload))
    assert (inner[UDP].chksum, inner.dst, inner[UDP].dport) == (0, V4.vip, PORT)


def test_quote_with_options_or_of_a_fragment(node: Node, family: Family) -> None:
    """The first fragment shows the ports; a later one can't be told."""
    flow = begin(node, family, "UDP", is_snat=False)
    long = finished(
        frame(
            family, UDP(sport=CLIENT_PORT, dport=BACKEND_PORT), family.client, family.backends[0], bytes(1400)
        )
    )
    if family is V4:
        optional = long.copy()
        optional[IP].options = [IPOption_NOP()] * 4
        del optional[IP].ihl, optional[IP].len
        first, later = fragment(long, fragsize=1200)
        seen = [finished(optional), finished(first)]
    else:
        ip, upper = IPv6(src=V6.client, dst=V6.backends[0]), raw(long[IPv6].payload)
        first = ETHER / ip / IPv6ExtHdrFragment(nh=17, m=1, id=1) / Raw(upper[:1200])
        later = ETHER / ip / IPv6ExtHdrFragment(nh=17, offset=150, id=1) / Raw(upper[1200:])
        seen = [first]
    for each in seen:
        quote = raw(ip_of(each))[:300]
        result = Driver(node, "tc_egress")(
            ETHER / error(family, "too big", family.node, family.client, quote)
        )
        assert result.verdict == "RELATED"
        inner = raw(result.frame[ICMP if family is V4 else ICMPv6PacketTooBig].payload)
        known = family.layer(inner)
        assert known.dst == family.vip
        assert PORT.to_bytes(2, "big") in inner[40:60] if family is V6 else known[UDP].dport == PORT
        assert raw(result.frame) == raw(finished_error(result.frame))
    alone = ETHER / error(family, "too big", family.node, family.client, raw(ip_of(later))[:300])
    assert Driver(flow.node, "tc_egress")(alone)[:2] == ("UNKNOWN_L4", "pass")


def finished_error(packet: Packet) -> Packet:
    """Return an error with the outer checksums computed by scapy."""
    copy = Ether(raw(packet))
    if IP in copy:
        del copy[IP].chksum, copy[ICMP].chksum
    else:
        del copy[ICMPv6PacketTooBig].cksum
    return copy


def test_tagged(node: Node, family: Family) -> None:
    flow = begin(node, family, "UDP", is_snat=False)
    quote = raw(ip_of(flow.seen))
    known = raw(ip_of(Ether(translated(flow.seen, dst=family.vip, dport=PORT))))
    tag = ETHER / Dot1Q(vlan=7)
    sent = tag / error(family, "time exceeded", family.node, family.client, quote)
    expected = tag / error(family, "time exceeded", family.node, family.client, known)
    assert raw(Driver(node, "tc_egress")(sent).frame) == raw(expected)


def left_alone(family: Family, flow: Flow) -> dict[str, Packet]:
    """Return errors to the client or the node that are not about the flow."""
    quote, backend, other = raw(ip_of(flow.seen)), family.backends[0], family.other_client
    foreign = finished(frame(family, l4("UDP", 1, 2), family.node, other))
    packets = {
        "about nothing known": error(family, "too big", backend, family.node, raw(ip_of(foreign))),
        "to another than the sender": error(family, "too big", backend, family.vip, quote),
        "quote without ports": error(family, "too big", backend, family.node, quote[:-200][:23]),
        "nothing quoted": error(family, "too big", backend, family.node, b""),
        "ICMP in ICMP": error(
            family,
            "too big",
            backend,
            family.node,
            raw(error(family, "too big", family.node, backend, quote)),
        ),
    }
    return {name: ETHER / each for name, each in packets.items()}


def test_left_alone(node: Node, family: Family) -> None:
    flow = begin(node, family, "UDP", is_snat=True)
    for name, packet in left_alone(family, flow).items():
        result = Driver(node, "tc_ingress")(packet)
        assert result == Result("UNKNOWN_L4", "pass", Ether(raw(packet))), name


def test_every_truncation(node: Node, family: Family) -> None:
    """However short an error is: it comes out as it went in, or is translated whole."""
    flow = begin(node, family, "TCP", is_snat=True)
    whole = raw(
        ETHER
        / Dot1Q(vlan=7)
        / error(family, "too big", family.backends[0], family.node, raw(ip_of(flow.seen)))
    )
    for size in range(60, len(whole)):
        result = Driver(node, "tc_ingress")(Packet(whole[:size]))
        if result.verdict != "RELATED":
            assert raw(result.frame) == whole[:size]


# --- direct server return


def test_about_a_reply_that_went_past_this_node(node: Node, family: Family) -> None:
    """It goes to the backend's node as the packets do; the node there tells the backend."""
    request = request_to(family, "UDP")
    entry_node(node, family, "UDP")
    assert Driver(node, "tc_ingress")(request).verdict == "NEW"
    reply = frame(family, l4("UDP", PORT, CLIENT_PORT), family.vip, family.client)
    quote = raw(ip_of(finished(reply)))
    for src in (family.client, ROUTER[family.version]):
        result = Driver(node, "tc_ingress")(ETHER / error(family, "too big", src, family.vip, quote))
        assert (result.verdict, result.does) == ("RELATED", "send")
        outer = ip_of(result.frame)
        assert (outer.src, outer.dst) == (family.node, family.backends[0])
        assert raw(outer.payload) == raw(error(family, "too big", src, family.vip, quote, 59))


def test_about_a_reply_from_the_node_that_was_asked(node: Node, family: Family) -> None:
    backend_node(node, family, "UDP")
    assert (
        Driver(node, "tc_ingress")(arriving(family, request_to(family, "UDP")[family.layer])).verdict == "NEW"
    )
    sent = finished(frame(family, l4("UDP", BACKEND_PORT, CLIENT_PORT), family.backends[0], family.client))
    seen = Ether(translated(sent, src=family.vip, sport=PORT))
    about = error(family, "too big", ROUTER[family.version], family.vip, raw(ip_of(seen)))
    result = Driver(node, "tc_ingress")(arriving(family, family.layer(raw(about))))
    assert (result.verdict, result.does) == ("RELATED", "pass")
    expected = error(family, "too big", ROUTER[family.version], family.backends[0], raw(ip_of(sent)))
    assert raw(ip_of(result.frame)) == raw(expected)


def test_of_another_backend_or_unknown_stays_in_its_tunnel(node: Node, family: Family) -> None:
    backend_node(node, family, "UDP")
    seen = finished(frame(family, l4("UDP", PORT, CLIENT_PORT), family.vip, family.client))
    about = family.layer(raw(error(family, "too big", family.client, family.vip, raw(ip_of(seen)))))
    packet = arriving(family, about)
    assert Driver(node, "tc_ingress")(packet) == Result("NOT_OURS", "pass", packet)
    Driver(node, "tc_ingress")(arriving(family, request_to(family, "UDP")[family.layer]))
    packet = arriving(family, about, dst=family.backends[1])
    assert Driver(node, "tc_ingress")(packet) == Result("NOT_OURS", "pass", packet)


# --- errors made here


def source(node: Node, family: Family) -> None:
    key = struct_of("node_source_key", device=0, family=family.version)
    value = struct_of("backend_hop", source=family.node)
    node.map("node_sources").update(to_bytes(key), to_bytes(value)[:16])


def made_here(family: Family, kind: str, src: str, request: Packet) -> Packet:
    """Return the error that a router sends (RFC 1812 4.3.2, RFC 4443 2.4)."""
    if family is V4:
        head = IP(src=src, dst=V4.client, ttl=64, id=0, flags="DF", tos=0xC0)
    else:
        head = IPv6(src=src, dst=V6.client, hlim=64)
    head = head / ERRORS[family.version][kind].copy()
    return BACK / head / Raw(raw(ip_of(request))[: {4: 576, 6: 1280}[family.version] - len(head)])


@pytest.mark.parametrize("has_address", [True, False], ids=["its own address", "the VIP's"])
@pytest.mark.parametrize("kind", ["too big", "time exceeded"])
@protocols
def test_made_here(node: Node, family: Family, proto: str, kind: str, has_address: bool) -> None:
    """A packet that can't go on to another node: its sender is told, about the packet as it sent it."""
    made = node.service(
        family.vip, PORT, family.backends[:1], proto=proto, kind=lib.VIP_LOAD_BALANCER, flags=lib.SERVICE_SNAT
    )
    way(node, made.backends[0], family, mtu=MTU)
    if has_address:
        source(node, family)
    header = (
        l4(proto, CLIENT_PORT, PORT)
        if proto != "SCTP"
        else SCTP(sport=CLIENT_PORT, dport=PORT) / SCTPChunkInit()
    )
    if kind == "too big":
        header = header / (SCTPChunkData(data=bytes(1400)) if proto == "SCTP" else Raw(bytes(1400)))
    request = frame(family, header, family.client, family.vip)
    ip = ip_of(request)
    setattr(ip, "ttl" if family is V4 else "hlim", 1 if kind == "time exceeded" else 64)
    request = finished(request)
    result = Driver(node, "tc_ingress")(request)
    assert (result.verdict, result.does) == ("TOO_BIG" if kind == "too big" else "HOPS", "send")
    assert raw(result.frame) == raw(
        made_here(family, kind, family.node if has_address else family.vip, request)
    )


def test_no_error_about_an_error(node: Node, family: Family) -> None:
    """RFC 1122 3.2.2: dropped, where its TTL ends here."""
    flow = begin(node, family, "UDP", is_snat=True)
    sent = ETHER / error(family, "too big", family.backends[0], family.node, raw(ip_of(flow.seen)), 1)
    assert Driver(node, "tc_ingress")(sent)[:2] == ("HOPS", "drop")


# --- echo


def echo(
    family: Family, src: str, dst: str, length: int = 56, *, is_reply: bool = False, ttl: int = 50
) -> Packet:
    payload = bytes(n & 0xFF for n in range(length))
    if family is V4:
        kind = "echo-reply" if is_reply else "echo-request"
        return IP(src=src, dst=dst, ttl=ttl) / ICMP(type=kind, id=7, seq=1) / Raw(payload)
    layer = ICMPv6EchoReply if is_reply else ICMPv6EchoRequest
    return IPv6(src=src, dst=dst, hlim=ttl) / layer(id=7, seq=1, data=payload)


@pytest.mark.parametrize("kind", [lib.VIP_CLUSTER_IP, lib.VIP_EXTERNAL_IP, lib.VIP_LOAD_BALANCER])
def test_echo(node: Node, family: Family, kind: int) -> None:
    node.vip(family.vip, kind | lib.VIP_PINGABLE)
    for length in (0, 1, 56, 1400):
        result = Driver(node, "tc_ingress")(ETHER / echo(family, family.client, family.vip, length))
        assert (result.verdict, result.does) == ("ECHO", "send")
        assert raw(result.frame) == raw(
            BACK / echo(family, family.vip, family.client, length, is_reply=True, ttl=64)
        )


def test_echo_that_nobody_answers(node: Node, family: Family) -> None:
    """No backend: dropped. An address of the node: for its own stack."""
    request = ETHER / echo(family, family.client, family.vip)
    for kinds_, does, verdict in [
        (lib.VIP_CLUSTER_IP, "drop", "DROP_EMPTY"),
        (lib.VIP_EXTERNAL_IP | lib.VIP_LOCAL | lib.VIP_PINGABLE, "pass", "UNKNOWN_L4"),
        (lib.VIP_NODE | lib.VIP_LOCAL, "pass", "UNKNOWN_L4"),
        (0, "pass", "UNKNOWN_L4"),
    ]:
        node.vip(family.vip, kinds_)
        assert Driver(node, "tc_ingress")(request) == Result(verdict, does, Ether(raw(request)))


def test_damaged_echo_stays_damaged(node: Node, family: Family) -> None:
    node.vip(family.vip, lib.VIP_CLUSTER_IP | lib.VIP_PINGABLE)
    request = Ether(raw(ETHER / echo(family, family.client, family.vip)))
    layer, name = (request[ICMP], "chksum") if family is V4 else (request[ICMPv6EchoRequest], "cksum")
    setattr(layer, name, getattr(layer, name) ^ 1)
    answer = Driver(node, "tc_ingress")(request).frame
    good = raw(BACK / echo(family, family.vip, family.client, is_reply=True, ttl=64))
    assert raw(answer) != good
    assert len(raw(answer)) == len(good)
