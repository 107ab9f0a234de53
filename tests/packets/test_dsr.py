"""Direct server return: what the node that was asked sends, what the backend's node makes of it, the reply.

Oracles: RFC 2003 and RFC 2473 for the outer header, RFC 6040 for its traffic class, scapy for every checksum.
"""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    fragment6,
    in6_chksum,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw, raw
from scapy.utils import checksum

from ebpfproxy.libbpf import lib
from packets.node import (
    BACKEND_PORT,
    CLIENT_PORT,
    PORT,
    V4,
    V6,
    Family,
    Node,
    finished,
    frame,
    packed,
    struct_of,
    to_bytes,
    translated,
)
from packets.path import (
    HERE_MAC,
    MTU,
    OTHER_NODE,
    THERE_MAC,
    Driver,
    Result,
    arriving,
    backend_node,
    encapsulated,
    entry_node,
    hops,
    l4,
    request_to,
    way,
)

pytestmark = pytest.mark.root

NODE_PORT = 30080
#: Bytes of the outer header.
SIZE = {4: 20, 6: 40}


class TestEntry:
    """The node that the client's packet comes to."""

    @pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
    def test_the_packet_leaves_as_it_is_in_another_one(
        self, driver: Driver, family: Family, proto: str
    ) -> None:
        entry_node(driver.node, family, proto)
        packet = request_to(family, proto)
        result = driver(packet)
        if proto == "SCTP" and driver.is_xdp:
            assert result == Result("", "pass", packet)  # left to tc
            return
        assert (result.verdict, result.does) == ("NEW", "send")
        label = result.frame.fl if family.version == 6 else 0
        inner = hops(packet[family.layer], -1)
        expected = Ether(src=HERE_MAC, dst=THERE_MAC) / encapsulated(family, inner, label=label)
        assert raw(result.frame) == raw(expected)

    def test_the_whole_connection_takes_this_way_with_one_entry(self, driver: Driver, family: Family) -> None:
        service = entry_node(driver.node, family)
        for flags, verdict, is_open in [
            ("S", "NEW", 1),
            ("S", "ESTABLISHED", 1),
            ("A", "ESTABLISHED", 1),
            ("PA", "ESTABLISHED", 1),
            ("FA", "ESTABLISHED", 0),
            ("A", "ESTABLISHED", 0),
        ]:
            result = driver(request_to(family, flags=flags))
            assert (result.verdict, result.does) == (verdict, "send")
            assert result.frame[family.layer].dst == family.backends[0]
            (flow,) = driver.node.flows().values()
            assert flow.flags == lib.FLOW_DSR
            assert driver.node.backend_stats(service.backends[0])[1] == is_open

    def test_an_answered_flow_is_safe_from_a_flood(self, driver: Driver, family: Family) -> None:
        entry_node(driver.node, family)
        driver(request_to(family))
        assert len(list(driver.node.map("conntrack").items())) == 0
        driver(request_to(family, flags="A"))
        assert len(list(driver.node.map("conntrack").items())) == 1
        assert len(list(driver.node.map("new_flows").items())) == 0

    def test_the_traffic_class_is_seen_outside(self, driver: Driver, family: Family) -> None:
        entry_node(driver.node, family)
        field = "tos" if family.version == 4 else "tc"
        packet = request_to(family)
        setattr(packet[family.layer], field, 0xB9)  # EF, ECT(1)
        result = driver(finished(packet))
        assert getattr(result.frame[family.layer], field) == 0xB9

    def test_a_local_backend_is_not_encapsulated(self, driver: Driver, family: Family) -> None:
        backend_node(driver.node, family)
        packet = request_to(family)
        result = driver(packet)
        assert (result.verdict, result.does) == ("NEW", "pass")
        assert raw(result.frame) == translated(packet, dst=family.backends[0], dport=BACKEND_PORT)

    @pytest.mark.parametrize("size", [1500, 1501])
    def test_mtu_counts_the_outer_header(self, driver: Driver, family: Family, size: int) -> None:
        entry_node(driver.node, family)
        own_source(driver.node, family)
        packet = filled(family, size - SIZE[family.version])
        result = driver(packet)
        if size <= MTU:
            assert (result.verdict, result.does) == ("NEW", "send")
            assert len(result.frame[family.layer]) == size
        elif driver.is_xdp:
            assert result == Result("", "pass", packet)  # tc answers
        else:
            assert (result.verdict, result.does) == ("TOO_BIG", "send")
            assert told(result.frame) == (family.node, family.client, MTU - SIZE[family.version])
            assert quoted(result.frame).startswith(raw(packet[family.layer])[:500])

    def test_a_smaller_link_on_the_way_is_told_to_the_client(self, driver: Driver, family: Family) -> None:
        node = driver.node
        entry_node(node, family)
        own_source(node, family)
        packet = filled(family, MTU - SIZE[family.version])
        sent = driver(packet).frame[family.layer]
        error = ICMP(type=3, code=4, nexthopmtu=1400) if family is V4 else ICMPv6PacketTooBig(mtu=1400)
        router = family.other_client
        body = error / Raw(raw(sent)[:500])
        came = Ether(
            raw(Ether(src=THERE_MAC, dst=HERE_MAC) / family.layer(src=router, dst=family.node) / body)
        )
        result = Driver(node, "tc_ingress")(came)
        assert (result.verdict, result.does) == ("TOO_BIG", "send")
        assert told(result.frame) == (family.node, family.client, 1400 - SIZE[family.version])
        assert (result.frame.src, result.frame.dst) == (HERE_MAC, THERE_MAC)
        seen = raw(hops(packet[family.layer], -1))  # as this node sent it
        assert quoted(result.frame) == seen[: 500 - SIZE[family.version]]

    @pytest.mark.parametrize("what", ["another flow", "another backend", "unreachable"])
    def test_an_error_about_another_tunnel_is_left_alone(self, node: Node, family: Family, what: str) -> None:
        entry_node(node, family)
        own_source(node, family)
        driver = Driver(node, "tc_ingress")
        sent = driver(request_to(family)).frame[family.layer]
        error = ICMP(type=3, code=4, nexthopmtu=1400) if family is V4 else ICMPv6PacketTooBig(mtu=1400)
        if what == "unreachable":
            error = ICMP(type=3, code=2) if family is V4 else ICMPv6DestUnreach(code=1)
        elif what == "another backend":
            sent.dst = family.backends[1]
        else:
            node.forget_flows()
        came = Ether(
            raw(Ether() / family.layer(src=family.other_client, dst=family.node) / error / Raw(raw(sent)))
        )
        result = driver(came)
        assert (result.verdict, result.does) == ("UNKNOWN_L4", "pass")
        assert raw(result.frame) == raw(came)

    def test_an_error_about_a_reply_goes_to_the_backends_node(self, node: Node, family: Family) -> None:
        entry_node(node, family)
        driver = Driver(node, "tc_ingress")
        driver(request_to(family))
        packet = error_about_reply(family)
        result = driver(packet)
        assert (result.verdict, result.does) == ("RELATED", "send")
        label = result.frame.fl if family is V6 else 0
        expected = encapsulated(family, hops(packet[family.layer], -1), label=label)
        assert raw(result.frame[family.layer]) == raw(expected)

    def test_fragments_go_together(self, node: Node, family: Family) -> None:
        entry_node(node, family, "UDP")
        driver = Driver(node, "tc_ingress")
        parts = fragments_of(family)
        for part in parts:
            result = driver(part)
            assert result.does == "send"
            label = result.frame.fl if family is V6 else 0
            expected = encapsulated(family, hops(part[family.layer], -1), label=label)
            assert raw(result.frame[family.layer]) == raw(expected)

    def test_a_backend_that_calls_itself_needs_its_source_translated(
        self, node: Node, family: Family
    ) -> None:
        entry_node(node, family)
        packet = finished(frame(family, l4("TCP"), family.backends[0], family.vip))
        result = Driver(node, "tc_ingress")(packet)
        assert result.does == "send"
        assert result.frame[family.layer].src == family.node
        assert TCP in result.frame

    def test_no_way_to_the_backend(self, node: Node, family: Family) -> None:
        service = entry_node(node, family)
        Driver(node, "tc_ingress")(request_to(family))
        way(node, service.backends[0], family, kind=lib.HOP_HERE)
        ((key, flow),) = node.flows().items()
        flow.hop.kind = lib.HOP_UNKNOWN
        node.map("new_flows").update(key, to_bytes(flow))
        assert Driver(node, "tc_ingress")(request_to(family)).verdict == "NO_ROUTE"


class TestBackendsNode:
    """The node that has the backend."""

    @pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
    def test_the_backend_gets_the_clients_packet(self, driver: Driver, family: Family, proto: str) -> None:
        backend_node(driver.node, family, proto)
        packet = request_to(family, proto)
        frame_in = arriving(family, packet[family.layer])
        result = driver(frame_in)
        if proto == "SCTP" and driver.is_xdp:
            assert result == Result("", "pass", frame_in)
            return
        assert (result.verdict, result.does) == ("NEW", "pass")
        expected = packet.copy()
        expected.src, expected.dst = THERE_MAC, HERE_MAC
        assert raw(result.frame) == translated(expected, dst=family.backends[0], dport=BACKEND_PORT)

    @pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
    def test_the_reply_comes_from_the_vip(self, node: Node, family: Family, proto: str) -> None:
        backend_node(node, family, proto)
        assert node.ingress(arriving(family, request_to(family, proto)[family.layer])).verdict == "NEW"
        answer = l4(proto, "SA")
        answer.sport, answer.dport = BACKEND_PORT, CLIENT_PORT
        packet = finished(frame(family, answer, family.backends[0], family.client))
        outcome = node.egress(packet)
        assert outcome.verdict == "REPLY"
        assert raw(outcome.packet) == translated(packet, src=family.vip, sport=PORT)

    def test_a_node_port_of_the_other_node(self, driver: Driver, family: Family) -> None:
        backend_node(driver.node, family, vip=family.any, port=NODE_PORT, kind=lib.VIP_NODE)
        other = OTHER_NODE[family.version]
        packet = request_to(family, dst=other)
        packet[TCP].dport = NODE_PORT
        packet = finished(packet)
        result = driver(arriving(family, packet[family.layer]))
        assert (result.verdict, result.does) == ("NEW", "pass")
        assert result.frame[family.layer].dst == family.backends[0]
        answer = TCP(sport=BACKEND_PORT, dport=CLIENT_PORT, flags="SA")
        reply = driver.node.egress(finished(frame(family, answer, family.backends[0], family.client)))
        assert reply.packet is not None
        assert (reply.packet[family.layer].src, reply.packet[TCP].sport) == (other, NODE_PORT)

    def test_what_was_there_before_goes_on(self, driver: Driver, family: Family) -> None:
        service = backend_node(driver.node, family)
        inner = request_to(family)[family.layer]
        assert driver(arriving(family, inner)).verdict == "NEW"
        assert driver(arriving(family, request_to(family, flags="A")[family.layer])).verdict == "ESTABLISHED"
        # The client's way changes to this node itself, and back.
        assert driver(request_to(family, flags="PA")).verdict == "ESTABLISHED"
        assert driver(arriving(family, request_to(family, flags="PA")[family.layer])).verdict == "ESTABLISHED"
        assert driver.node.backend_stats(service.backends[0]) == (1, 1)

    def test_a_connection_in_its_middle_goes_on(self, driver: Driver, family: Family) -> None:
        backend_node(driver.node, family)
        result = driver(arriving(family, request_to(family, flags="PA")[family.layer]))
        assert (result.verdict, result.does) == ("NEW", "pass")

    def test_source_ranges_hold_here_too(self, driver: Driver, family: Family) -> None:
        backend_node(driver.node, family, flags=lib.SERVICE_SOURCE_RANGES)
        result = driver(arriving(family, request_to(family)[family.layer]))
        assert (result.verdict, result.does) == ("DROP_SOURCE", "drop")

    def test_an_error_about_a_reply_reaches_the_backend(self, node: Node, family: Family) -> None:
        backend_node(node, family)
        driver = Driver(node, "tc_ingress")
        driver(arriving(family, request_to(family)[family.layer]))
        result = driver(arriving(family, error_about_reply(family)[family.layer]))
        assert (result.verdict, result.does) == ("RELATED", "pass")
        expected = error_about_reply(family, seen_by_backend=True)
        expected.src, expected.dst = THERE_MAC, HERE_MAC
        assert raw(result.frame) == raw(expected)

    def test_fragments_go_to_one_backend(self, node: Node, family: Family) -> None:
        backend_node(node, family, "UDP")
        driver = Driver(node, "tc_ingress")
        whole = b""
        for part in fragments_of(family):
            result = driver(arriving(family, part[family.layer]))
            assert result.does == "pass"
            assert result.frame[family.layer].dst == family.backends[0]
            header = 20 if family is V4 else 48
            whole += raw(result.frame[family.layer])[header:]
        # Put together it is a datagram with a right checksum.
        layer = (
            IP(src=family.client, dst=family.backends[0], proto=17)
            if family is V4
            else IPv6(src=family.client, dst=family.backends[0], nh=17)
        )
        datagram = layer.__class__(raw(layer / Raw(whole)))
        assert datagram[UDP].dport == BACKEND_PORT
        assert raw(datagram[UDP]) == raw(finished(Ether() / datagram)[UDP])


def own_source(node: Node, family: Family) -> None:
    """Give the node an address for its own packets."""
    node.vip(family.node, lib.VIP_SNAT | lib.VIP_LOCAL)
    key = struct_of("node_source_key", device=0, family=family.version)
    node.map("node_sources").update(to_bytes(key), packed(family.node))


def filled(family: Family, size: int) -> Packet:
    """Return a request whose IP packet has ``size`` bytes."""
    payload = b"x" * (size - SIZE[family.version] - 20)
    return finished(frame(family, l4("TCP"), family.client, family.vip, payload))


def told(error: Packet) -> tuple[str, str, int]:
    """Return source, destination and MTU of a packet-too-big that is right."""
    assert has_right_sums(error)
    if IP in error:
        assert (error[ICMP].type, error[ICMP].code) == (3, 4)
        return error[IP].src, error[IP].dst, error[ICMP].nexthopmtu
    return error[IPv6].src, error[IPv6].dst, error[ICMPv6PacketTooBig].mtu


def quoted(error: Packet) -> bytes:
    """Return what an ICMP error quotes."""
    whole: bytes = raw(error[IP if IP in error else IPv6])
    return whole[(20 if IP in error else 40) + 8 :]


def has_right_sums(error: Packet) -> bool:
    """Say whether an ICMP error's checksums are right, by scapy."""
    if IP in error:
        header = raw(error[IP])
        return not checksum(header[:20]) and not checksum(header[20 : error[IP].len])
    return not in6_chksum(58, error[IPv6], raw(error[IPv6])[40:])


def error_about_reply(family: Family, *, seen_by_backend: bool = False) -> Packet:
    """Return the error of a router near the client about a reply, as it comes, or as the backend sees it."""
    source, port = (family.backends[0], BACKEND_PORT) if seen_by_backend else (family.vip, PORT)
    reply = TCP(sport=port, dport=CLIENT_PORT, flags="A", seq=1)
    quote = raw(finished(frame(family, reply, source, family.client, b"x" * 100))[family.layer])
    error = ICMP(type=3, code=4, nexthopmtu=1300) if family is V4 else ICMPv6PacketTooBig(mtu=1300)
    return Ether(raw(Ether() / family.layer(src=family.other_client, dst=source) / error / Raw(quote)))


def fragments_of(family: Family) -> list[Packet]:
    """Return the fragments of a datagram."""
    payload = bytes(range(256)) * 8
    whole = finished(frame(family, l4("UDP"), family.client, family.vip, payload))[family.layer]
    if family is V4:
        parts = fragment(whole, 1000)
    else:
        body = IPv6(src=whole.src, dst=whole.dst) / IPv6ExtHdrFragment(id=7) / whole[UDP]
        parts = fragment6(body, 1048)
    return [Ether(raw(Ether(dst=HERE_MAC, src=THERE_MAC) / each)) for each in parts]


def no_backend_here(node: Node, family: Family) -> None:
    node.map("dsr_backends").delete_batch([key for key, _ in node.map("dsr_backends").items()])


FOREIGN = [
    "no Service",
    "another port",
    "to a backend of another node",
    "from a pod",
    "to itself",
    "a fragment outside",
    "options outside",
    "another version inside",
    "cut short inside",
    "longer inside than outside",
    "nothing inside",
]


def foreign(what: str, node: Node, family: Family) -> Packet:
    """Return a frame with a tunnelled packet that is not ours."""
    packet = request_to(family)
    layer = family.layer
    options: dict[str, Any] = {}
    match what:
        case "no Service":
            packet = request_to(family, dst=family.other_vip)
        case "another port":
            packet[TCP].dport = 81
        case "to a backend of another node":
            options["dst"] = family.backends[1]
        case "from a pod":
            node.local_source(family.pods)
            options["src"] = family.pod
        case "to itself":
            packet[layer].src = family.backends[0]
        case "cut short inside":
            return Ether(raw(arriving(family, packet[layer]))[: -len(packet[TCP]) + 4])
        case "longer inside than outside":
            whole = arriving(family, packet[layer])
            field = "len" if family.version == 4 else "plen"
            setattr(whole[layer], field, getattr(whole[layer], field) - 1)
            return Ether(raw(finished_ip(whole)))
        case "nothing inside":
            return Ether(raw(arriving(family, packet[layer]))[: 14 + SIZE[family.version]])
        case "a fragment outside" if family is V4:
            options["flags"] = "MF"
        case "options outside" if family is V4:
            options["options"] = b"\x01\x01\x01\x01"
        case "a fragment outside" | "options outside":
            inner = Raw(raw(finished(packet)[layer]))
            outer = IPv6(src=OTHER_NODE[6], dst=family.backends[0]) / IPv6ExtHdrDestOpt(nh=41) / inner
            return Ether(raw(Ether(src=THERE_MAC, dst=HERE_MAC) / outer))
        case "another version inside":
            inner = (
                IPv6(src="2001:db8::1", dst="2001:db8::2")
                if family is V4
                else IP(src="192.0.2.1", dst="192.0.2.2")
            )
            whole = arriving(family, packet[layer])
            field = "proto" if family is V4 else "nh"
            setattr(whole[layer], field, 41 if family is V4 else 4)
            whole[layer].remove_payload()
            return Ether(raw(finished_ip(whole / Raw(raw(inner / packet[TCP])))))
    return arriving(family, finished(packet)[layer], **options)


def finished_ip(packet: Packet) -> Packet:
    """Return the packet with the outer header's checksum made anew."""
    if packet.getlayer(1).name == "IP":
        packet[IP].delfieldval("chksum")
    return packet


@pytest.mark.parametrize("what", FOREIGN)
def test_other_tunnels_are_left_alone(driver: Driver, family: Family, what: str) -> None:
    backend_node(driver.node, family)
    packet = foreign(what, driver.node, family)
    result = driver(packet)
    assert result.does == "pass"
    assert result.verdict in {"NOT_OURS", "TRUNCATED", "UNKNOWN_L4", ""}
    assert raw(result.frame) == raw(packet)
    assert driver.node.flows() == {}


def test_a_service_that_is_not_forwarded_so_takes_nothing_out(driver: Driver, family: Family) -> None:
    backend_node(driver.node, family)
    no_backend_here(driver.node, family)
    packet = arriving(family, request_to(family)[family.layer])
    assert raw(driver(packet).frame) == raw(packet)


def test_from_the_client_to_the_backend(driver: Driver, family: Family) -> None:
    entry_node(driver.node, family)
    packet = request_to(family)
    sent = driver(packet).frame
    far = Driver(Node(driver.node.loaded), driver.program)  # with empty maps
    backend_node(far.node, family)
    expected = Ether(raw(Ether(src=HERE_MAC, dst=THERE_MAC) / hops(packet[family.layer], -1)))
    assert raw(far(sent).frame) == translated(expected, dst=family.backends[0], dport=BACKEND_PORT)
