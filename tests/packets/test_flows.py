"""Connections step by step: what each packet of a flow meets, and what is counted.

A walk is a table. The service has three backends A, B and C in round-robin order, so a new choice shows as
the next letter. Columns:

    client SYN -> NEW A             a packet from the client to the VIP, its verdict and where it went
    A SYN+ACK -> REPLY              a packet from backend A; a REPLY must show the VIP as its source
    wait 130 s                      time passes
    A is gone                       the agent writes another state of a backend (ready, terminating, ...)
    evict forward                   the full map forgets entries of one direction
    open A=1 B=0                    connections that the schedulers count as open
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkAbort,
    SCTPChunkCookieEcho,
    SCTPChunkData,
    SCTPChunkInit,
    SCTPChunkInitAck,
    SCTPChunkShutdown,
    SCTPChunkShutdownAck,
    SCTPChunkShutdownComplete,
)
from scapy.packet import raw

from ebpfproxy.libbpf import lib
from packets.node import (
    BACKEND_PORT,
    CLIENT_PORT,
    L4,
    PORT,
    Backend,
    Family,
    Node,
    finished,
    frame,
    translated,
)

if TYPE_CHECKING:
    from scapy.packet import Packet

    from packets.node import Service

pytestmark = pytest.mark.root

CHUNKS = {
    "INIT": SCTPChunkInit,
    "INIT-ACK": SCTPChunkInitAck,
    "COOKIE": SCTPChunkCookieEcho,
    "DATA": SCTPChunkData,
    "SHUTDOWN": SCTPChunkShutdown,
    "SHUTDOWN-ACK": SCTPChunkShutdownAck,
    "COMPLETE": SCTPChunkShutdownComplete,
    "ABORT": SCTPChunkAbort,
}
DIRECTIONS = {"forward": lib.FLOW_FORWARD, "reply": lib.FLOW_REPLY, "all": None}

TCP_WALKS = {
    "a whole connection, client closes first": """
        client SYN -> NEW A
        open A=1
        A SYN+ACK -> REPLY
        client ACK -> ESTABLISHED A
        client PSH+ACK -> ESTABLISHED A
        A PSH+ACK -> REPLY
        client FIN+ACK -> ESTABLISHED A
        open A=1
        A FIN+ACK -> REPLY
        open A=0
        client ACK -> ESTABLISHED A
        open A=0
    """,
    "server closes first": """
        client SYN -> NEW A
        A SYN+ACK -> REPLY
        client ACK -> ESTABLISHED A
        A FIN+ACK -> REPLY
        client FIN+ACK -> ESTABLISHED A
        open A=0
        A ACK -> REPLY
        open A=0
    """,
    "client resets": """
        client SYN -> NEW A
        client RST -> ESTABLISHED A
        open A=0
        client RST -> ESTABLISHED A
        open A=0
    """,
    "server resets": """
        client SYN -> NEW A
        A RST+ACK -> REPLY
        open A=0
        A RST -> REPLY
        open A=0
    """,
    "reset after both closed counts once": """
        client SYN -> NEW A
        client FIN+ACK -> ESTABLISHED A
        A FIN+ACK -> REPLY
        client RST -> ESTABLISHED A
        open A=0
    """,
    "SYN again is the same connection": """
        client SYN -> NEW A
        wait 64 s
        client SYN -> ESTABLISHED A
        wait 120 s
        client SYN -> ESTABLISHED A
        open A=1 B=0
    """,
    "SYN after more silence than a retransmission takes": """
        client SYN -> NEW A
        wait 130 s
        client SYN -> NEW B
        open A=0 B=1
    """,
    "a long silence does not end a connection": """
        client SYN -> NEW A
        A SYN+ACK -> REPLY
        wait 7200 s
        client PSH+ACK -> ESTABLISHED A
        A ACK -> REPLY
        open A=1
    """,
    "SYN on a closed entry": """
        client SYN -> NEW A
        client FIN+ACK -> ESTABLISHED A
        A FIN+ACK -> REPLY
        client SYN -> NEW B
        B SYN+ACK -> REPLY
        client ACK -> ESTABLISHED B
        open A=0 B=1
    """,
    "SYN on an entry that was reset": """
        client SYN -> NEW A
        A RST+ACK -> REPLY
        client SYN -> NEW B
        open A=0 B=1
    """,
    "SYN on a half-closed entry": """
        client SYN -> NEW A
        client FIN+ACK -> ESTABLISHED A
        client SYN -> NEW B
        open A=0 B=1
    """,
    "a connection survives its backend's removal from the service": """
        client SYN -> NEW A
        A SYN+ACK -> REPLY
        A is gone
        client PSH+ACK -> ESTABLISHED A
        A ACK -> REPLY
    """,
    "a SYN does not go to a backend that is gone": """
        client SYN -> NEW A
        A is gone
        client SYN -> NEW B
        open A=0 B=1
    """,
    "a SYN does not go to a backend that is not ready": """
        client SYN -> NEW A
        A is not ready
        client SYN -> NEW B
    """,
    "a SYN again may go to a backend that terminates": """
        client SYN -> NEW A
        A is terminating
        client SYN -> ESTABLISHED A
    """,
    "the middle of an unknown connection": """
        client ACK -> NOT_OURS
        client PSH+ACK -> NOT_OURS
        client FIN+ACK -> NOT_OURS
        client RST -> NOT_OURS
        client SYN+ACK -> NOT_OURS
        A ACK -> NOT_OURS
        open A=0
    """,
    "the reply entry comes back": """
        client SYN -> NEW A
        evict reply
        A SYN+ACK -> NOT_OURS
        wait 2 s
        client ACK -> ESTABLISHED A
        A ACK -> REPLY
        open A=1
    """,
    "the forward entry comes back": """
        client SYN -> NEW A
        A SYN+ACK -> REPLY
        evict forward
        client ACK -> NOT_OURS
        wait 2 s
        A SYN+ACK -> REPLY
        client ACK -> ESTABLISHED A
        open A=1
    """,
    "a closed flow stays closed when its twin comes back": """
        client SYN -> NEW A
        evict reply
        client RST -> ESTABLISHED A
        open A=0
        A RST -> REPLY
        open A=0
    """,
    "both entries evicted": """
        client SYN -> NEW A
        evict all
        client ACK -> NOT_OURS
        A ACK -> NOT_OURS
        client SYN -> NEW B
    """,
    "directly to the backend from a port that went through the VIP": """
        client SYN -> NEW A
        client FIN+ACK -> ESTABLISHED A
        A FIN+ACK -> REPLY
        A SYN+ACK -> NOT_OURS
        A ACK -> NOT_OURS
        open A=0
    """,
}

UDP_WALKS = {
    "question, answer, question": """
        client UDP -> NEW A
        A UDP -> REPLY
        client UDP -> ESTABLISHED A
        A UDP -> REPLY
        open A=1 B=0
    """,
    "silence shorter than the timeout": """
        client UDP -> NEW A
        wait 50 s
        client UDP -> ESTABLISHED A
        wait 50 s
        client UDP -> ESTABLISHED A
    """,
    "silence longer than the timeout": """
        client UDP -> NEW A
        wait 61 s
        client UDP -> NEW B
        open A=0 B=1
    """,
    "answers keep a flow alive": """
        client UDP -> NEW A
        wait 50 s
        A UDP -> REPLY
        wait 50 s
        client UDP -> ESTABLISHED A
    """,
    "a backend that is gone is left at once": """
        client UDP -> NEW A
        A is gone
        client UDP -> NEW B
        B UDP -> REPLY
        open A=0 B=1
    """,
    "a backend that no longer serves is left at once": """
        client UDP -> NEW A
        A is not ready
        client UDP -> NEW B
    """,
    "a backend that terminates and serves keeps its flows": """
        client UDP -> NEW A
        A is terminating
        client UDP -> ESTABLISHED A
    """,
    "an answer without a question": """
        A UDP -> NOT_OURS
    """,
    "both entries evicted": """
        client UDP -> NEW A
        evict all
        A UDP -> NOT_OURS
        client UDP -> NEW B
    """,
}

SCTP_WALKS = {
    "a whole association": """
        client INIT -> NEW A
        A INIT-ACK -> REPLY
        client COOKIE -> ESTABLISHED A
        A DATA -> REPLY
        client DATA -> ESTABLISHED A
        client SHUTDOWN -> ESTABLISHED A
        open A=1
        A SHUTDOWN-ACK -> REPLY
        client COMPLETE -> ESTABLISHED A
        open A=0
    """,
    "aborted by the server": """
        client INIT -> NEW A
        A ABORT -> REPLY
        open A=0
        client INIT -> NEW B
        open A=0 B=1
    """,
    "INIT again": """
        client INIT -> NEW A
        client INIT -> ESTABLISHED A
    """,
    "the middle of an unknown association": """
        client DATA -> NOT_OURS
        client ABORT -> NOT_OURS
        A DATA -> NOT_OURS
    """,
    "an association survives its backend's removal": """
        client INIT -> NEW A
        A is gone
        client DATA -> ESTABLISHED A
        client INIT -> NEW B
    """,
}

WALKS = [
    pytest.param(proto, walk, id=f"{proto} {name}")
    for proto, walks in (("TCP", TCP_WALKS), ("UDP", UDP_WALKS), ("SCTP", SCTP_WALKS))
    for name, walk in walks.items()
]
TCP_FLAGS = {"SYN": "S", "ACK": "A", "PSH": "P", "FIN": "F", "RST": "R"}


def header(proto: str, what: str, sport: int, dport: int) -> Packet:
    """Return an L4 header with the named flags or chunk."""
    match proto:
        case "TCP":
            flags = "".join(TCP_FLAGS[flag] for flag in what.split("+"))
            return TCP(sport=sport, dport=dport, flags=flags)
        case "UDP":
            return UDP(sport=sport, dport=dport)
        case _:
            return SCTP(sport=sport, dport=dport, tag=1) / CHUNKS[what]()


class Walk:
    """Runs the lines of a table."""

    def __init__(self, node: Node, family: Family, proto: str) -> None:
        self.node, self.family, self.proto = node, family, proto
        self.service: Service = node.service(family.vip, PORT, family.backends, proto=proto)

    def run(self, table: str) -> None:
        for line in filter(None, map(str.strip, table.splitlines())):
            if match := re.fullmatch(r"client (\S+) -> (\S+)(?: ([ABC]))?", line):
                self.request(line, *match.groups())
            elif match := re.fullmatch(r"([ABC]) (\S+) -> (\S+)", line):
                self.reply(line, *match.groups())
            elif match := re.fullmatch(r"wait (\d+) s", line):
                self.node.wait(int(match[1]))
            elif match := re.fullmatch(r"([ABC]) is (.+)", line):
                state = "BACKEND_" + match[2].upper().replace(" ", "_")
                self.node.set_backend(self.backend(match[1]), state=getattr(lib, state))
            elif match := re.fullmatch(r"evict (\S+)", line):
                assert self.node.forget_flows(DIRECTIONS[match[1]]), line
            elif line.startswith("open "):
                wanted = {name: int(count) for name, count in re.findall(r"([ABC])=(\d+)", line)}
                found = {name: self.node.backend_stats(self.backend(name))[1] for name in wanted}
                assert found == wanted, line
            else:
                raise AssertionError(f"what does this line mean? {line}")

    def backend(self, letter: str) -> int:
        return self.service.backends["ABC".index(letter)]

    def request(self, line: str, what: str, verdict: str, letter: str | None) -> None:
        l4 = header(self.proto, what, CLIENT_PORT, PORT)
        packet = finished(frame(self.family, l4, self.family.client, self.family.vip))
        outcome = self.node.ingress(packet)
        assert outcome.verdict == verdict, line
        wanted = raw(packet)
        if letter:
            address = self.family.backends["ABC".index(letter)]
            wanted = translated(packet, dst=address, dport=BACKEND_PORT)
        assert raw(outcome.packet) == wanted, line

    def reply(self, line: str, letter: str, what: str, verdict: str) -> None:
        l4 = header(self.proto, what, BACKEND_PORT, CLIENT_PORT)
        address = self.family.backends["ABC".index(letter)]
        packet = finished(frame(self.family, l4, address, self.family.client))
        outcome = self.node.egress(packet)
        assert outcome.verdict == verdict, line
        wanted = raw(packet)
        if verdict == "REPLY":
            wanted = translated(packet, src=self.family.vip, sport=PORT)
        assert raw(outcome.packet) == wanted, line


@pytest.mark.parametrize(("proto", "walk"), WALKS)
def test_walk(node: Node, family: Family, proto: str, walk: str) -> None:
    Walk(node, family, proto).run(walk)


def test_flows_are_apart(node: Node, family: Family) -> None:
    """The same ports of another client, protocol or VIP make another flow."""
    node.service(family.vip, 80, family.backends, proto="TCP")
    node.service(family.vip, 80, family.backends, proto="UDP")
    node.service(family.other_vip, 80, family.backends, proto="TCP")
    flows = [
        ("TCP", family.client, family.vip),
        ("TCP", family.other_client, family.vip),
        ("UDP", family.client, family.vip),
        ("TCP", family.client, family.other_vip),
    ]
    for proto, client, vip in flows:
        l4 = L4[proto](sport=CLIENT_PORT, dport=80)
        if proto == "TCP":
            l4.flags = "S"
        assert node.ingress(finished(frame(family, l4, client, vip))).verdict == "NEW"
    assert len(node.flows()) == 2 * len(flows) - 1  # A answers the first and the last one's client port


def test_one_client_port_two_vips_one_backend(node: Node, family: Family) -> None:
    """Without SNAT the backend can't tell these two apart; the newer one gets the replies."""
    service = node.service(family.vip, 80, [family.backends[0]])
    node.service(family.other_vip, 80, [family.backends[0]], pool=service)
    syn = TCP(sport=CLIENT_PORT, dport=80, flags="S")
    for vip in (family.vip, family.other_vip):
        assert node.ingress(finished(frame(family, syn, family.client, vip))).verdict == "NEW"
        reply = finished(
            frame(family, TCP(sport=8080, dport=CLIENT_PORT, flags="SA"), family.backends[0], family.client)
        )
        assert raw(node.egress(reply).packet) == translated(reply, src=vip, sport=80)


def test_a_reused_backend_id_is_another_backend(node: Node, family: Family) -> None:
    """The agent gives the id of a removed backend to a new one: an old UDP flow must not follow it."""
    service = node.service(family.vip, 53, family.backends[:2], proto="UDP")
    ask = finished(frame(family, UDP(sport=5, dport=53), family.client, family.vip))
    assert raw(node.ingress(ask).packet) == translated(ask, dst=family.backends[0], dport=8080)
    node.write_backend(service.backends[0], service, Backend(family.backends[2]), "UDP")
    verdict, arrived = node.ingress(ask)
    assert verdict == "NEW"
    assert raw(arrived) == translated(ask, dst=family.backends[1], dport=8080)


def test_flows_of_a_retired_vip_go_on(node: Node, family: Family) -> None:
    """Vips without a kind: the Service is gone, its established connections are not."""
    node.service(family.vip, 80, [family.backends[0]])
    syn = finished(frame(family, TCP(sport=5, dport=80, flags="S"), family.client, family.vip))
    ack = finished(frame(family, TCP(sport=5, dport=80, flags="A"), family.client, family.vip))
    assert node.ingress(syn).verdict == "NEW"
    node.vip(family.vip, 0)
    assert node.ingress(ack).verdict == "ESTABLISHED"
    other = finished(frame(family, TCP(sport=6, dport=80, flags="S"), family.client, family.vip))
    assert node.ingress(other).verdict == "NOT_OURS"
