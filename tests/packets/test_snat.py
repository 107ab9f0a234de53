"""Source translation, step by step: request in, what leaves, reply in, what leaves; by XDP and by tc.

The backend is on another node and the client outside: the source becomes this node's, and both directions
leave by their next hop with one hop less. Oracles: scapy for every checksum, RFC 1812 5.3.1 for the TTL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit, SCTPChunkInitAck
from scapy.packet import raw

from ebpfproxy.libbpf import ffi, lib
from packets.node import (
    BACKEND_PORT,
    CLIENT_PORT,
    PORT,
    SNAT_PORTS,
    Backend,
    Family,
    finished,
    frame,
    struct_of,
    to_bytes,
    translated,
)
from packets.path import HERE_MAC, THERE_MAC, Driver, hops, know_reply_hops, remote, way

if TYPE_CHECKING:
    from scapy.packet import Packet


pytestmark = pytest.mark.root

L4 = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
#: What each side says in turn: client, backend, client, backend.
SAID: dict[str, tuple[Any, ...]] = {
    "TCP": ({"flags": "S"}, {"flags": "SA"}, {"flags": "A"}, {"flags": "PA"}),
    "UDP": ({}, {}, {}, {}),
    "SCTP": (SCTPChunkInit(init_tag=1), SCTPChunkInitAck(init_tag=2), SCTPChunkData(data=b"1234"), None),
}


def header(proto: str, step: int, sport: int, dport: int) -> Packet:
    """Return what is said at a step, with these ports."""
    said = SAID[proto][step]
    if proto == "SCTP":
        return SCTP(sport=sport, dport=dport, tag=1) / (said or SCTPChunkData(data=b"5678"))
    return L4[proto](sport=sport, dport=dport, **said)


def sent_on(packet: Packet, family: Family, **fields: object) -> bytes:
    """Return the frame that leaves: other addresses and ports, one hop less, the next hop's MAC addresses."""
    moved = packet.copy()
    moved.src, moved.dst = HERE_MAC, THERE_MAC
    moved[family.layer] = hops(moved[family.layer], -1)
    return translated(moved, **fields)


@pytest.mark.parametrize("proto", ["TCP", "UDP", "SCTP"])
def test_a_whole_flow(driver: Driver, family: Family, proto: str) -> None:
    node, backend = driver.node, family.backends[0]
    service = remote(node, family, proto)
    taken = 0
    for step in range(4):
        is_request = step % 2 == 0
        if is_request:
            packet = finished(
                frame(family, header(proto, step, CLIENT_PORT, PORT), family.client, family.vip)
            )
        else:
            packet = finished(frame(family, header(proto, step, BACKEND_PORT, taken), backend, family.node))
            know_reply_hops(node)
        result = driver(packet)
        if proto == "SCTP" and driver.is_xdp:
            assert (result.verdict, result.does, raw(result.frame)) == ("", "pass", raw(packet))
            return
        assert (result.verdict, result.does) == (("NEW", "REPLY", "ESTABLISHED", "REPLY")[step], "send")
        if is_request:
            taken = taken or result.frame[L4[proto]].sport
            expected = sent_on(packet, family, src=family.node, dst=backend, sport=taken, dport=BACKEND_PORT)
        else:
            expected = sent_on(
                packet, family, src=family.vip, dst=family.client, sport=PORT, dport=CLIENT_PORT
            )
        assert raw(result.frame) == expected
    # SCTP keeps the client's port where it can: another one costs its checksum.
    wanted = (
        range(CLIENT_PORT, CLIENT_PORT + 1) if proto == "SCTP" else range(SNAT_PORTS[0], SNAT_PORTS[1] + 1)
    )
    assert taken in wanted
    # Confirmed by the client, it is among the established ones; each flow counted once.
    assert (node.map("conntrack").count(), node.map("new_flows").count()) == (2, 0)
    assert node.service_stats(service) == (1, 0)


def many(family: Family, count: int, flags: str = "S") -> list[bytes]:
    """Return one packet each of so many flows."""
    return [
        raw(finished(frame(family, TCP(sport=10000 + n, dport=PORT, flags=flags), family.client, family.vip)))
        for n in range(count)
    ]


def test_when_ports_run_out(driver: Driver, family: Family) -> None:
    """Most of 1,500 flows fit into 1,000 ports, each its own; others are refused and counted."""
    node = driver.node
    service = remote(node, family)
    run = node.loaded.programs[driver.program].run
    before = node.verdicts()
    for packet in many(family, 1500):
        run(packet)
    counted = {name: count - before[name] for name, count in node.verdicts().items()}
    served, refused = counted["NEW"], counted["SNAT_FULL"]
    size = SNAT_PORTS[1] - SNAT_PORTS[0] + 1
    assert served + refused == 1500
    assert size * 0.95 < served <= size
    assert node.service_stats(service) == (served, refused)
    ports = [flow.sport for key, flow in node.flows().items() if is_forward(key)]
    assert len(set(ports)) == len(ports) == served
    again = frame(family, TCP(sport=10000, dport=PORT, flags="A"), family.client, family.vip)
    assert driver(finished(again)).verdict == "ESTABLISHED"


def is_forward(key: bytes) -> bool:
    return bool(ffi.from_buffer("struct flow_key *", key).dir == lib.FLOW_FORWARD)


def test_the_port_of_a_closed_flow_is_used_again(driver: Driver, family: Family) -> None:
    """RFC 6191: a new SYN may end what waits for its last packets."""
    remote(driver.node, family)
    run = driver.node.loaded.programs[driver.program].run
    before = driver.node.verdicts()
    for opening, reset in zip(many(family, 1500), many(family, 1500, "R"), strict=True):
        run(opening)
        run(reset)
    counted = {name: count - before[name] for name, count in driver.node.verdicts().items()}
    assert (counted["NEW"], counted["ESTABLISHED"], counted["SNAT_FULL"]) == (1500, 1500, 0)


@pytest.mark.parametrize(
    ("label", "flags", "backend", "source", "is_translated"),
    [
        ("outside, backend elsewhere", lib.SERVICE_SNAT, 0, "client", True),
        ("outside, backend here", lib.SERVICE_SNAT, lib.BACKEND_LOCAL, "client", False),
        ("a pod of this node, backend elsewhere", lib.SERVICE_SNAT, 0, "pod", False),
        ("masquerade all, backend here", lib.SERVICE_SNAT_ALL, lib.BACKEND_LOCAL, "pod", True),
        ("nothing asks for it", 0, 0, "client", False),
        ("a backend that calls itself", 0, lib.BACKEND_LOCAL, "backend", True),
    ],
)
def test_whose_source_is_translated(
    driver: Driver, family: Family, label: str, flags: int, backend: int, source: str, is_translated: bool
) -> None:
    """SERVICES.md 5: kept whenever the reply is certain to come back here."""
    node = driver.node
    made = node.service(
        family.vip,
        PORT,
        [Backend(family.backends[0], flags=backend)],
        kind=lib.VIP_LOAD_BALANCER,
        flags=flags,
    )
    node.vip(family.node, lib.VIP_LOCAL | lib.VIP_SNAT)
    node.local_source(family.pods)
    way(node, made.backends[0], family)
    address = {"client": family.client, "pod": family.pod, "backend": family.backends[0]}[source]
    packet = finished(frame(family, TCP(sport=CLIENT_PORT, dport=PORT, flags="S"), address, family.vip))
    result = driver(packet)
    assert result.verdict == "NEW", label
    assert result.does == ("send" if is_translated else "pass"), label
    assert result.frame[family.layer].src == (family.node if is_translated else address), label


@pytest.mark.parametrize("twin", ["forward", "reply"])
def test_an_entry_that_was_forgotten_is_made_again(driver: Driver, family: Family, twin: str) -> None:
    node = driver.node
    remote(node, family)

    def request(flags: str) -> Packet:
        return finished(
            frame(family, TCP(sport=CLIENT_PORT, dport=PORT, flags=flags), family.client, family.vip)
        )

    taken = driver(request("S")).frame[TCP].sport
    reply = finished(
        frame(family, TCP(sport=BACKEND_PORT, dport=taken, flags="SA"), family.backends[0], family.node)
    )
    know_reply_hops(node)
    assert driver(reply).verdict == "REPLY"
    assert driver(request("A")).verdict == "ESTABLISHED"
    know_reply_hops(node)
    direction = lib.FLOW_FORWARD if twin == "forward" else lib.FLOW_REPLY
    assert node.forget_flows(direction) == 1
    node.wait(2)  # a flow is touched once a second
    assert driver(reply if twin == "forward" else request("A")).verdict in ("REPLY", "ESTABLISHED")
    know_reply_hops(node)
    assert driver(request("A")).verdict == "ESTABLISHED"
    assert driver(reply).verdict == "REPLY"


def test_without_an_address_of_its_own_the_node_refuses(driver: Driver, family: Family) -> None:
    made = remote(driver.node, family)
    value = struct_of("backend_hop")
    value.hop.kind, value.hop.device, value.hop.until = lib.HOP_FORWARD, 1, 2**31 - 1
    driver.node.map("backend_hops").update(made.backends[0].to_bytes(4, "little"), to_bytes(value))
    packet = finished(frame(family, TCP(sport=1, dport=PORT, flags="S"), family.client, family.vip))
    result = driver(packet)
    assert (result.verdict, result.does) == ("SNAT_FULL", "drop")
