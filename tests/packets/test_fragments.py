"""Fragments: each is translated as its first one was, and what the receiver puts together is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import IP, TCP, UDP, defragment, fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    PadN,
    defragment6,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw, raw

from ebpfproxy.libbpf import ffi, lib
from packets.node import (
    BACKEND_PORT,
    CLIENT_PORT,
    PORT,
    SECOND_NS,
    V4,
    V6,
    Backend,
    Family,
    Node,
    finished,
    frame,
    to_bytes,
    translated,
)
from packets.path import Driver, arriving, backend_node, way

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.root

SIZE = 1280


def cut(packet: Packet, number: int = 77) -> list[Packet]:
    """Return the fragments that scapy makes of a finished frame."""
    whole = finished(packet)
    if IP in whole:
        whole[IP].id = number
        return [Ether(raw(finished(each))) for each in fragment(whole, fragsize=1200)]
    ether = whole.copy()
    ether.remove_payload()
    ip = whole[IPv6]
    body, upper = ip.payload, ip.nh
    head = ip.copy()
    head.remove_payload()
    head.nh = 44
    parts = fragment6(head / IPv6ExtHdrFragment(nh=upper, id=number) / body, SIZE)
    return [Ether(raw(ether / each)) for each in parts]


def joined(fragments: list[Packet]) -> bytes:
    """Return the IP packet that scapy puts together, as bytes; identification and its like made equal."""
    layers = [each[IP] if IP in each else each[IPv6] for each in fragments]
    if isinstance(layers[0], IP):
        layers.sort(key=lambda ip: ip.frag)
    whole = defragment(layers)[0] if isinstance(layers[0], IP) else defragment6(layers)
    if IP in whole:
        for name in ("chksum", "len"):
            whole[IP].delfieldval(name)
        whole[IP].flags, whole[IP].id = "", 0
    else:
        whole[IPv6].delfieldval("plen")
    data: bytes = raw(whole)
    return data


def expected(packet: Packet, **fields: object) -> bytes:
    """Return the IP packet of a whole frame as it must arrive, checksums by scapy."""
    whole = Ether(translated(packet, **fields))
    if IP in whole:
        whole[IP].delfieldval("chksum")
        whole[IP].flags, whole[IP].id = "", 0
    data: bytes = raw(whole[IP] if IP in whole else whole[IPv6])
    return data


def l4(proto: str, sport: int, dport: int) -> Packet:
    return TCP(sport=sport, dport=dport, flags="S") if proto == "TCP" else UDP(sport=sport, dport=dport)


def run(program: Callable[[Packet], tuple[str, Packet | None]], fragments: list[Packet]) -> list[str]:
    """Run fragments through a program, in place; return the verdicts."""
    verdicts = []
    for index, each in enumerate(fragments):
        verdict, arrived = program(each)
        verdicts.append(verdict)
        assert arrived is not None
        fragments[index] = arrived
    return verdicts


@pytest.mark.parametrize("length", [1300, 4000, 9001])
@pytest.mark.parametrize("proto", ["TCP", "UDP"])
def test_there_and_back(node: Node, family: Family, proto: str, length: int) -> None:
    backend, payload = family.backends[0], bytes(n * 7 & 0xFF for n in range(length))
    node.service(family.vip, PORT, [backend], proto=proto)
    request = finished(frame(family, l4(proto, CLIENT_PORT, PORT), family.client, family.vip, payload))
    parts = cut(request)
    assert len(parts) > 1
    assert run(node.ingress, parts) == ["NEW"] + ["ESTABLISHED"] * (len(parts) - 1)
    assert joined(parts) == expected(request, dst=backend, dport=BACKEND_PORT)
    reply = finished(frame(family, l4(proto, BACKEND_PORT, CLIENT_PORT), backend, family.client, payload))
    parts = cut(reply)
    assert run(node.egress, parts) == ["REPLY"] * len(parts)
    assert joined(parts) == expected(reply, src=family.vip, sport=PORT)


def test_order_behind_the_first_does_not_matter(node: Node, family: Family) -> None:
    node.service(family.vip, PORT, [family.backends[0]], proto="UDP")
    request = finished(frame(family, l4("UDP", CLIENT_PORT, PORT), family.client, family.vip, bytes(5000)))
    first, *others = cut(request)
    parts = [first, *reversed(others)]
    assert set(run(node.ingress, parts)) == {"NEW", "ESTABLISHED"}
    assert joined(parts) == expected(request, dst=family.backends[0], dport=BACKEND_PORT)


def test_datagrams_between_each_other(node: Node, family: Family) -> None:
    """The identification tells which fragment belongs to whom."""
    node.service(family.vip, PORT, [family.backends[0]], proto="UDP")
    node.service(family.vip, PORT + 1, [family.backends[1]], proto="UDP")
    requests = [
        finished(frame(family, l4("UDP", CLIENT_PORT, PORT + n), family.client, family.vip, bytes(2000)))
        for n in (0, 1)
    ]
    parts = [cut(request, 100 + n) for n, request in enumerate(requests)]
    mixed = [each for pair in zip(*parts, strict=True) for each in pair]
    run(node.ingress, mixed)
    for n, request in enumerate(requests):
        assert joined(mixed[n::2]) == expected(request, dst=family.backends[n], dport=BACKEND_PORT)


def test_udp_without_checksum(node: Node) -> None:
    node.service(V4.vip, PORT, [V4.backends[0]], proto="UDP")
    whole = frame(V4, UDP(sport=CLIENT_PORT, dport=PORT, chksum=0), V4.client, V4.vip, bytes(2000))
    whole[IP].id = 5
    parts = [Ether(raw(each)) for each in fragment(whole, fragsize=1200)]
    run(node.ingress, parts)
    assert parts[0][UDP].chksum == 0
    assert {each[IP].dst for each in parts} == {V4.backends[0]}


def test_fragment_behind_options(node: Node) -> None:
    """RFC 8200 4.5: later fragments name the header that the first one begins with, not UDP."""
    node.service(V6.vip, PORT, [V6.backends[0]], proto="UDP")
    ask = UDP(sport=CLIENT_PORT, dport=PORT) / Raw(bytes(2000))
    whole = finished(
        Ether() / IPv6(src=V6.client, dst=V6.vip) / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))]) / ask
    )
    parts = cut(whole)
    assert [each[IPv6ExtHdrFragment].nh for each in parts] == [60, 60]
    assert run(node.ingress, parts) == ["NEW", "ESTABLISHED"]
    assert joined(parts) == expected(whole, dst=V6.backends[0], dport=BACKEND_PORT)


def test_later_before_first(node: Node, family: Family) -> None:
    """To a VIP it is dropped; to the node itself it is the stack's; it never takes another's ports."""
    node.service(family.vip, PORT, [family.backends[0]], proto="UDP")
    node.vip(family.node, lib.VIP_NODE | lib.VIP_LOCAL | lib.VIP_SNAT)
    ask = l4("UDP", CLIENT_PORT, PORT)
    for number, (dst, passes) in enumerate([(family.vip, False), (family.node, True)]):
        first, later = cut(finished(frame(family, ask, family.client, dst, bytes(1500))), number)
        assert node.ingress(later) == ("FRAGMENT_EARLY", later if passes else None)
        node.ingress(first)
        assert node.ingress(later).verdict == ("NOT_OURS" if passes else "ESTABLISHED")
    other = cut(finished(frame(family, ask, family.other_client, family.vip, bytes(1500))), 0)[1]
    assert node.ingress(other).verdict == "FRAGMENT_EARLY"
    foreign = cut(finished(frame(family, ask, family.backends[0], family.client, bytes(1500))))[1]
    assert node.egress(foreign) == ("FRAGMENT", foreign)


def test_first_is_forgotten(node: Node, family: Family) -> None:
    """After the 30 s of net.ipv4.ipfrag_time: the identification may be another packet's."""
    node.service(family.vip, PORT, [family.backends[0]], proto="UDP")
    first, later = cut(
        finished(frame(family, l4("UDP", CLIENT_PORT, PORT), family.client, family.vip, bytes(1500)))
    )
    node.ingress(first)
    entries = node.map("fragments")
    ((key, value),) = list(entries.items())
    made = ffi.new("struct fragment *")
    ffi.memmove(made, value, len(value))
    made.seen_ns = (made.seen_ns - 29 * SECOND_NS) % 2**64
    entries.update(key, to_bytes(made))
    assert node.ingress(later).verdict == "ESTABLISHED"
    made.seen_ns = (made.seen_ns - SECOND_NS) % 2**64
    entries.update(key, to_bytes(made))
    assert node.ingress(later).verdict == "FRAGMENT_EARLY"


def test_full_map_forgets_the_oldest(node: Node) -> None:
    """The map is LRU: new datagrams are served, however many never end."""
    node.service(V4.vip, PORT, [V4.backends[0]], proto="UDP")
    request = finished(frame(V4, l4("UDP", CLIENT_PORT, PORT), V4.client, V4.vip, bytes(1500)))
    room = node.map("fragments").definition.max_entries
    start, _ = cut(request)
    for number in range(min(room + room // 4, 65535)):
        start[IP].id = number
        node.loaded.programs["tc_ingress"].run(raw(start))
    first, later = cut(request, 65535)
    assert node.ingress(first).verdict == "ESTABLISHED"
    assert node.ingress(later).verdict == "ESTABLISHED"


def test_to_another_node(node: Node, family: Family) -> None:
    """With the source translated, both ways."""
    made = node.service(
        family.vip,
        PORT,
        family.backends[:1],
        proto="UDP",
        kind=lib.VIP_LOAD_BALANCER,
        flags=lib.SERVICE_SNAT,
    )
    node.vip(family.node, lib.VIP_LOCAL | lib.VIP_SNAT)
    way(node, made.backends[0], family)
    program = Driver(node, "tc_ingress")
    ask = l4("UDP", CLIENT_PORT, PORT)
    request = finished(frame(family, ask, family.client, family.vip, bytes(4000)))
    results = [program(each) for each in cut(request)]
    assert {each.does for each in results} == {"send"}
    assert [each.verdict for each in results] == ["NEW"] + ["ESTABLISHED"] * (len(results) - 1)
    parts = [each.frame for each in results]
    port = parts[0][UDP].sport
    for each in parts:
        if IP in each:
            each[IP].ttl += 1
        else:
            each[IPv6].hlim += 1
    fields = {"src": family.node, "sport": port, "dst": family.backends[0], "dport": BACKEND_PORT}
    assert joined(parts) == expected(request, **fields)
    answer = l4("UDP", BACKEND_PORT, port)
    reply = finished(frame(family, answer, family.backends[0], family.node, bytes(4000)))
    results = [program(each) for each in cut(reply)]
    assert {each.verdict for each in results} == {"REPLY"}
    wanted = {(family.vip, family.client)}
    assert {(each.frame[family.layer].src, each.frame[family.layer].dst) for each in results} == wanted


def test_direct_server_return(node: Node, family: Family) -> None:
    """Each fragment comes in a packet of its own."""
    backend_node(node, family, "UDP")
    ask = l4("UDP", CLIENT_PORT, PORT)
    request = finished(frame(family, ask, family.client, family.vip, bytes(4000)))
    results = [Driver(node, "tc_ingress")(arriving(family, each[family.layer])) for each in cut(request)]
    assert [each.verdict for each in results] == ["NEW"] + ["ESTABLISHED"] * (len(results) - 1)
    parts = [each.frame for each in results]
    assert joined(parts) == expected(request, dst=family.backends[0], dport=BACKEND_PORT)


@pytest.mark.parametrize("backend_port", [PORT, BACKEND_PORT])
def test_sctp(node: Node, family: Family, backend_port: int) -> None:
    """CRC32c can't be corrected for another port without the size of the whole packet: then it is dropped."""
    node.service(family.vip, PORT, [Backend(family.backends[0], backend_port)], proto="SCTP")
    start = SCTP(sport=CLIENT_PORT, dport=PORT) / SCTPChunkInit(init_tag=7)
    node.ingress(finished(frame(family, start, family.client, family.vip)))
    data = SCTP(sport=CLIENT_PORT, dport=PORT, tag=9) / SCTPChunkData(data=bytes(2000))
    request = finished(frame(family, data, family.client, family.vip))
    parts = cut(request)
    if backend_port != PORT:
        assert node.ingress(parts[0]) == ("REWRITE_FAILED", None)
        return
    assert run(node.ingress, parts) == ["ESTABLISHED"] * len(parts)
    assert joined(parts) == expected(request, dst=family.backends[0])


def test_later_fragment_of_what_is_refused_gets_no_answer(node: Node, family: Family) -> None:
    """RFC 1122 3.2.2, RFC 1812 4.3.2.7."""
    node.service(family.vip, PORT, [], proto="UDP")
    first, later = cut(
        finished(frame(family, l4("UDP", CLIENT_PORT, PORT), family.client, family.vip, bytes(1500)))
    )
    verdict, answer = node.ingress(first)
    assert verdict == "REJECT_EMPTY"
    assert answer is not None
    assert node.ingress(later) == ("REJECT_EMPTY", None)
