"""Translation: a packet to a VIP, the reply, and every checksum, computed again by scapy."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, raw

from packets.node import L4, V4, Backend, Family, Node, finished, frame, translated

pytestmark = pytest.mark.root

CLIENT_PORT = 40000

#: 0 to 70 covers every alignment of every checksum, and the padding of short Ethernet frames.
LENGTHS = [*range(71), 255, 256, 1000, 1399, 1400, 1401, 3000]


def opening(proto: str, sport: int, dport: int) -> Packet:
    """Return the header that opens a connection."""
    match proto:
        case "TCP":
            return TCP(sport=sport, dport=dport, flags="S", seq=1000)
        case "UDP":
            return UDP(sport=sport, dport=dport)
        case _:
            return SCTP(sport=sport, dport=dport) / SCTPChunkInit(init_tag=7)


def data(proto: str, sport: int, dport: int, length: int) -> Packet:
    """Return header and payload of a packet in the middle of a connection."""
    payload = bytes(n * 7 + length & 0xFF for n in range(length))
    match proto:
        case "TCP":
            return TCP(sport=sport, dport=dport, flags="A", seq=1001, ack=1) / payload
        case "UDP":
            return UDP(sport=sport, dport=dport) / payload
        case _:
            return SCTP(sport=sport, dport=dport, tag=9) / SCTPChunkData(data=payload)


@pytest.mark.parametrize("backend_port", [8080, 80], ids=["other port", "same port"])
@pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
def test_every_length(node: Node, family: Family, proto: str, backend_port: int) -> None:
    backend = family.backends[0]
    node.service(family.vip, 80, [Backend(backend, backend_port)], proto=proto)
    for length in LENGTHS:
        port = CLIENT_PORT + length
        steps = [
            (node.ingress, opening(proto, port, 80), "NEW"),
            (node.ingress, data(proto, port, 80, length), "ESTABLISHED"),
            (node.egress, data(proto, backend_port, port, length), "REPLY"),
        ]
        for run, header, wanted in steps:
            if wanted == "REPLY":
                packet = finished(frame(family, header, backend, family.client))
                expected = translated(packet, src=family.vip, sport=80)
            else:
                packet = finished(frame(family, header, family.client, family.vip))
                expected = translated(packet, dst=backend, dport=backend_port)
            verdict, arrived = run(packet)
            assert verdict == wanted
            assert raw(arrived) == expected, f"{wanted}, {length} bytes"


def test_udp_without_checksum(node: Node) -> None:
    """RFC 768: 0 means that the sender made no checksum; it stays so."""
    node.service(V4.vip, 53, [V4.backends[0]], proto="UDP")
    request = frame(V4, UDP(sport=5, dport=53, chksum=0), V4.client, V4.vip, b"query")
    _, arrived = node.ingress(request)
    assert arrived is not None
    assert arrived[UDP].chksum == 0
    assert (arrived[IP].dst, arrived[UDP].dport) == (V4.backends[0], 8080)


def test_udp_checksum_that_becomes_zero(node: Node, family: Family) -> None:
    """RFC 768: a computed 0 is sent as 0xffff."""
    node.service(family.vip, 53, [family.backends[0]], proto="UDP")
    wanted = frame(family, UDP(sport=5, dport=8080), family.client, family.backends[0], b"\0\0")
    # The last two bytes that bring the sum of the translated packet to 0xffff, whose complement is 0.
    rest = finished(wanted)[UDP].chksum
    payload = rest.to_bytes(2, "big")
    request = finished(frame(family, UDP(sport=5, dport=53), family.client, family.vip, payload))
    _, arrived = node.ingress(request)
    assert arrived is not None
    assert arrived[UDP].chksum == 0xFFFF
    assert raw(arrived) == translated(request, dst=family.backends[0], dport=8080)


def test_sctp_without_checksum(node: Node, family: Family) -> None:
    """0 before the device computes it (checksum offload); it stays so."""
    node.service(family.vip, 36412, [family.backends[0]], proto="SCTP")
    header = SCTP(sport=5, dport=36412, chksum=0) / SCTPChunkInit()
    _, arrived = node.ingress(frame(family, header, family.client, family.vip))
    assert arrived is not None
    assert (arrived[SCTP].chksum, arrived[SCTP].dport) == (0, 8080)


def test_wrong_checksums_stay_wrong(node: Node, family: Family) -> None:
    """A damaged packet must not be healed: the backend has to see that it is damaged."""
    for proto in ("TCP", "UDP", "SCTP"):
        node.service(family.vip, 80, [family.backends[0]], proto=proto)
        good = finished(frame(family, opening(proto, 77, 80), family.client, family.vip))
        bad = good.copy()
        bad[L4[proto]].chksum ^= 1
        _, arrived = node.ingress(Packet(raw(bad)))
        assert arrived is not None
        assert arrived[L4[proto]].chksum != finished(arrived)[L4[proto]].chksum


def test_l2_padding_is_not_summed(node: Node) -> None:
    """Ethernet pads short frames: an SCTP checksum covers what IP says, not what the frame has."""
    node.service(V4.vip, 80, [V4.backends[0]], proto="SCTP")
    request = finished(
        frame(V4, SCTP(sport=5, dport=80, tag=1) / SCTPChunkData(data=b"x"), V4.client, V4.vip)
    )
    start = finished(frame(V4, opening("SCTP", 5, 80), V4.client, V4.vip))
    assert node.ingress(start).verdict == "NEW"
    padding = bytes(range(20))
    verdict, arrived = node.ingress(raw(request) + padding)
    assert verdict == "ESTABLISHED"
    assert raw(arrived) == translated(request, dst=V4.backends[0], dport=8080) + padding
