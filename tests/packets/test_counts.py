"""Packets and bytes: each flow counts its own, and adds them to the totals about once a second.

Every size is what scapy makes of the packet behind its Ethernet header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import UDP

from ebpfproxy.libbpf import ffi
from packets.node import finished, frame, number

if TYPE_CHECKING:
    from scapy.packet import Packet

    from packets.node import Family, Node, Service

pytestmark = pytest.mark.root

PORT, BACKEND_PORT, CLIENT_PORT = 53, 8080, 40000
ETHERNET = 14


def totals(node: Node, map_: str, key: int) -> tuple[int, int, int, int]:
    """Return what is added to the totals: packets, bytes, and those of replies."""
    name = f"struct {map_} *"
    stats = ffi.from_buffer(name, node.map(map_).get(number(key)))
    return stats.packets, stats.octets, stats.reply_packets, stats.reply_octets


def request(node: Node, family: Family, size: int) -> int:
    """Let the client send so many bytes; return what the IP packet has."""
    packet = finished(
        frame(family, UDP(sport=CLIENT_PORT, dport=PORT), family.client, family.vip, b"x" * size)
    )
    assert node.ingress(packet).verdict in {"NEW", "ESTABLISHED"}
    return ip_bytes(packet)


def reply(node: Node, family: Family, size: int) -> int:
    """Let the backend send so many bytes."""
    packet = finished(
        frame(
            family,
            UDP(sport=BACKEND_PORT, dport=CLIENT_PORT),
            family.backends[0],
            family.client,
            b"y" * size,
        )
    )
    assert node.egress(packet).verdict == "REPLY"
    return ip_bytes(packet)


def ip_bytes(packet: Packet) -> int:
    return len(bytes(packet)) - ETHERNET


def added(node: Node, service: Service, before: tuple[int, ...]) -> tuple[int, ...]:
    """Return what came to the totals of the service since then; its only backend has the same."""
    of_service = totals(node, "service_stats", service.id)
    return tuple(now - then for now, then in zip(of_service, before, strict=True))


def test_a_flow_adds_its_counts_once_a_second(node: Node, family: Family) -> None:
    service = node.service(family.vip, PORT, family.backends[:1], proto="UDP")
    before = totals(node, "service_stats", service.id)
    of_backend = totals(node, "backend_stats", service.backends[0])
    sent = [request(node, family, size) for size in (10, 400, 1)]
    answered = [reply(node, family, size) for size in (1200, 3)]
    node.wait(1.1)
    sent.append(request(node, family, 20))  # makes the flow add what is there, and is counted next time
    answered.append(reply(node, family, 5))
    node.wait(1.1)
    sent.append(request(node, family, 30))
    answered.append(reply(node, family, 6))
    waiting = [0, 0, 0, 0]
    for key, flow in node.flows().items():
        at = 2 * ffi.from_buffer("struct flow_key *", key).dir
        waiting[at] += flow.packets
        waiting[at + 1] += flow.octets
    assert 0 < waiting[0] < len(sent), "something was added, and something waits"
    expected = (len(sent), sum(sent), len(answered), sum(answered))
    found = added(node, service, before)
    assert tuple(map(sum, zip(found, waiting, strict=True))) == expected
    backend = totals(node, "backend_stats", service.backends[0])
    assert tuple(now - then for now, then in zip(backend, of_backend, strict=True)) == found
    assert found[0] >= 3, "the first three were added in the second second"
    assert found[1] >= sum(sent[:3])
