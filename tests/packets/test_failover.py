"""Failover in the kernel: an unanswered opening goes to another backend; one that fails is passed over.

A walk is a table. Columns:

    SYN -> NEW A|B|C        a client opens; its verdict, and which backends may get it ("!A": any but A)
    again -> ...            the same client sends its SYN once more
    wait 1.1 s              time passes
    answer                  the backend that got the last SYN accepts
    refuse                  it answers with RST
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.libbpf import lib
from packets.node import Family, Node, finished, frame

if TYPE_CHECKING:
    from packets.node import Outcome, Service

pytestmark = pytest.mark.root

WALKS = {
    "a SYN that is not answered goes to every backend in turn, as far as the limit goes": """
        SYN -> NEW A
        wait 1.1 s
        again -> NEW !A
        wait 2.2 s
        again -> NEW any
        wait 4.4 s
        again -> ESTABLISHED last
    """,
    "what the network copied is no second try": """
        SYN -> NEW A
        wait 0.2 s
        again -> ESTABLISHED A
    """,
    "a backend that has answered keeps the flow: its answer was lost": """
        SYN -> NEW A
        answer
        wait 1.1 s
        again -> ESTABLISHED A
    """,
    "a refusal is an answer": """
        SYN -> NEW A
        refuse
        wait 1.1 s
        again -> NEW any
    """,
}

EJECTIONS = {
    "two refusals in a row and A is passed over, until its time is over": """
        SYN -> NEW A
        refuse
        SYN -> NEW B
        answer
        SYN -> NEW C
        answer
        SYN -> NEW A
        refuse
        SYN -> NEW B
        answer
        SYN -> NEW C
        answer
        SYN -> NEW !A
        SYN -> NEW !A
        SYN -> NEW !A
        SYN -> NEW !A
        wait 31 s
        SYN -> NEW any
        SYN -> NEW any
        SYN -> NEW any
        seen A
    """,
    "a success in between counts": """
        SYN -> NEW A
        refuse
        SYN -> NEW B
        SYN -> NEW C
        SYN -> NEW A
        answer
        SYN -> NEW B
        SYN -> NEW C
        SYN -> NEW A
        refuse
        SYN -> NEW B
        SYN -> NEW C
        SYN -> NEW A
    """,
    "one at a time, at most": """
        SYN -> NEW A
        refuse
        SYN -> NEW B
        refuse
        SYN -> NEW C
        answer
        SYN -> NEW A
        refuse
        SYN -> NEW B
        refuse
        SYN -> NEW C
        answer
        SYN -> NEW !A
        SYN -> NEW !A
        SYN -> NEW !A
        SYN -> NEW !A
        SYN -> NEW !A
        SYN -> NEW !A
        seen B
    """,
}

PORT, BACKEND_PORT = 80, 8080


class Walk:
    """One client after the other, each from a port of its own."""

    def __init__(self, node: Node, family: Family, service: Service) -> None:
        self.node, self.family, self.service = node, family, service
        self.port = 40000
        self.last = ""
        self.seen: list[str] = []

    def step(self, line: str) -> None:
        """Do one line."""
        if opened := re.fullmatch(r"(SYN|again) -> (\w+) (\S+)", line):
            self.port += opened[1] == "SYN"
            before = self.last
            outcome = self.open()
            assert outcome.verdict == opened[2], line
            assert outcome.packet is not None
            address = outcome.packet[self.family.layer].dst
            self.last = "ABC"[self.family.backends.index(address)]
            self.seen.append(self.last)
            wanted = {"any": "ABC", "last": before}.get(opened[3], opened[3])
            fits = self.last not in wanted if wanted[0] == "!" else self.last in wanted
            assert fits, f"{line}: got {self.last}"
        elif waited := re.fullmatch(r"wait (\S+) s", line):
            self.node.wait(float(waited[1]))
        elif found := re.fullmatch(r"seen (\w)", line):
            assert found[1] in self.seen[-6:], line
        else:
            flags = {"answer": "SA", "refuse": "RA"}[line]
            header = TCP(sport=BACKEND_PORT, dport=self.port, flags=flags)
            backend = self.family.backends["ABC".index(self.last)]
            reply = finished(frame(self.family, header, backend, self.family.client))
            assert self.node.egress(reply).verdict == "REPLY"

    def open(self) -> Outcome:
        """Send a SYN."""
        header = TCP(sport=self.port, dport=PORT, flags="S")
        return self.node.ingress(finished(frame(self.family, header, self.family.client, self.family.vip)))


@pytest.mark.parametrize("name", WALKS)
def test_an_unanswered_opening(node: Node, family: Family, name: str) -> None:
    service = node.service(family.vip, PORT, family.backends, syn_tries=2)
    walk = Walk(node, family, service)
    for line in filter(None, map(str.strip, WALKS[name].splitlines())):
        walk.step(line)
    # What was begun elsewhere is over: each flow has two entries, forward and reply.
    assert len(node.flows()) == 2


@pytest.mark.parametrize("name", EJECTIONS)
def test_a_backend_that_fails(node: Node, family: Family, name: str) -> None:
    service = node.service(family.vip, PORT, family.backends, flags=lib.SERVICE_EJECTS)
    node.eject(service, failures=2, seconds=30, most=1)
    walk = Walk(node, family, service)
    for line in filter(None, map(str.strip, EJECTIONS[name].splitlines())):
        walk.step(line)


def test_retries_are_off_where_the_service_says_so(node: Node, family: Family) -> None:
    walk = Walk(node, family, node.service(family.vip, PORT, family.backends))
    for line in ("SYN -> NEW A", "wait 1.1 s", "again -> ESTABLISHED A"):
        walk.step(line)
