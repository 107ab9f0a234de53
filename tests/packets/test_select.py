"""Who gets a new connection: the ten schedulers and session affinity, against expectations of their own.

Sources: ipvsadm(8) and the LVS documentation for the schedulers of IPVS; Eisenbud et al., "Maglev", NSDI
2016; Kubernetes' description of sessionAffinity.
"""

from __future__ import annotations

import collections
import hashlib
import math
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from ebpfproxy.libbpf import lib
from packets.node import V4, Backend, Family, Node, finished, frame, packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.root

PORT = 80


def connect(node: Node, family: Family, sport: int, src: str | None = None, vip: str | None = None) -> str:
    """Open a connection; return the backend's address."""
    flags = TCP(sport=sport, dport=PORT, flags="S")
    outcome = node.ingress(finished(frame(family, flags, src or family.client, vip or family.vip)))
    assert outcome.verdict == "NEW"
    assert outcome.packet is not None
    return str(outcome.packet[IP if family.version == 4 else IPv6].dst)


def letters(family: Family, found: Sequence[str]) -> str:
    """Return backends as letters in their order."""
    return "".join("ABC"[family.backends.index(each)] for each in found)


def test_rr(node: Node, family: Family) -> None:
    node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_RR)
    assert letters(family, [connect(node, family, n) for n in range(1, 9)]) == "ABCABCAB"


def test_rr_goes_on_over_frontends(node: Node, family: Family) -> None:
    """One service has one position, whichever of its VIPs is used."""
    service = node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_RR)
    node.service(family.other_vip, PORT, [], table=[0, 1, 2], pool=service, scheduler=lib.SCHED_RR)
    found = [connect(node, family, n, vip=vip) for n, vip in enumerate([family.vip, family.other_vip] * 3)]
    assert letters(family, found) == "ABCABC"


def test_rr_after_a_change(node: Node, family: Family) -> None:
    """The position is a count, the table may shrink under it."""
    service = node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_RR)
    assert letters(family, [connect(node, family, n) for n in range(5)]) == "ABCAB"
    node.set_service(service, slot_count=2)
    assert letters(family, [connect(node, family, n) for n in range(5, 9)]) == "BABA"


def test_wrr(node: Node, family: Family) -> None:
    """LVS documentation: weights 4, 3 and 2 give AABABCABC."""
    node.service(
        family.vip,
        PORT,
        family.backends,
        scheduler=lib.SCHED_WRR,
        table=["ABC".index(letter) for letter in "AABABCABC"],
    )
    assert letters(family, [connect(node, family, n) for n in range(18)]) == "AABABCABC" * 2


def test_random(node: Node, family: Family) -> None:
    """Chi-square with two degrees of freedom: P(x > limit) = exp(-limit / 2), here one in a billion."""
    table = [0, 0, 1, 2]  # weights 2, 1, 1
    node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_RANDOM, table=table)
    draws = 2000
    found = collections.Counter(connect(node, family, n) for n in range(draws))
    statistic = 0.0
    for index, address in enumerate(family.backends):
        wanted = draws * table.count(index) / len(table)
        statistic += (found[address] - wanted) ** 2 / wanted
    assert statistic < -2 * math.log(1e-9), found


# ---- hashes ----


def rotate(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & 0xFFFFFFFF


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3 x86_32 for whole words and a tail, by its published description."""
    state = seed
    whole = len(data) // 4 * 4
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little")
        word = rotate(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        state = (rotate(state ^ word, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if data[whole:]:
        word = int.from_bytes(data[whole:], "little")
        state ^= rotate(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16


@pytest.mark.parametrize(
    ("data", "seed", "value"),
    [
        (b"", 0, 0x00000000),
        (b"", 1, 0x514E28B7),
        (b"hello", 0, 0x248BFA47),
        (b"hello, world", 0, 0x149BBB7F),
        (b"The quick brown fox jumps over the lazy dog", 0x9747B28C, 0x2FA826CD),
    ],
)
def test_the_yardstick(data: bytes, seed: int, value: int) -> None:
    """Published test vectors of MurmurHash3 x86_32."""
    assert murmur3(data, seed) == value


CLIENTS = {
    4: [f"198.51.{n // 200}.{n % 200 + 1}" for n in range(60)],
    6: [f"2001:db8:77:{n:x}::{n * 31 + 1:x}" for n in range(60)],
}


def test_sh(node: Node, family: Family) -> None:
    """The client's address alone decides, as IPVS's source hashing does."""
    table = [n * 7 % 3 for n in range(256)]
    node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_SH, table=table)
    for client in CLIENTS[family.version]:
        wanted = family.backends[table[murmur3(packed(client)) % len(table)]]
        assert {connect(node, family, sport, client) for sport in (1, 2, 3)} == {wanted}


def test_dh(node: Node, family: Family) -> None:
    """The VIP alone decides, as IPVS's destination hashing does."""
    table = [n * 7 % 3 for n in range(256)]
    for vip in CLIENTS[family.version]:
        node.service(vip, PORT, family.backends, scheduler=lib.SCHED_DH, table=table)
        wanted = family.backends[table[murmur3(packed(vip)) % len(table)]]
        assert {connect(node, family, sport, vip=vip) for sport in (1, 2, 3)} == {wanted}


def maglev(names: Sequence[str], size: int) -> list[int]:
    """Fill a Maglev table as the paper's pseudocode does (section 3.4)."""

    def number(name: str, salt: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{salt}{name}".encode()).digest()[:8], "big")

    permutations = []
    for name in names:
        offset, skip = number(name, "offset") % size, number(name, "skip") % (size - 1) + 1
        permutations.append([(offset + j * skip) % size for j in range(size)])
    following = [0] * len(names)
    entry = [-1] * size
    filled = 0
    while True:
        for i in range(len(names)):
            c = permutations[i][following[i]]
            while entry[c] >= 0:
                following[i] += 1
                c = permutations[i][following[i]]
            entry[c] = i
            following[i] += 1
            filled += 1
            if filled == size:
                return entry


def test_maglev(node: Node, family: Family) -> None:
    """Hash of the flow into the table: 16 + 16 + 2 + 2 bytes as on the wire, protocol, three zeros."""
    table = maglev(family.backends, 307)
    node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_MAGLEV, table=table)
    used = set()
    for sport in range(1000, 1100):
        flow = packed(family.client) + packed(family.vip) + sport.to_bytes(2, "big") + PORT.to_bytes(2, "big")
        wanted = family.backends[table[murmur3(flow + bytes([6, 0, 0, 0])) % len(table)]]
        assert connect(node, family, sport) == wanted
        used.add(wanted)
    assert used == set(family.backends)


def test_maglev_finds_a_connection_that_another_node_began(node: Node, family: Family) -> None:
    table = maglev(family.backends, 307)
    node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_MAGLEV, table=table)
    layer = IP if family.version == 4 else IPv6
    for sport in range(1000, 1020):
        began = connect(node, family, sport)
        node.forget_flows()
        ack = finished(frame(family, TCP(sport=sport, dport=PORT, flags="A"), family.client, family.vip))
        verdict, arrived = node.ingress(ack)
        assert arrived is not None
        assert (verdict, arrived[layer].dst) == ("NEW", began)


# ---- least connections and its kin ----

WEIGHTS = (4, 2, 1)
COSTS: dict[int, Callable[[int, int], Fraction]] = {
    lib.SCHED_LC: lambda open_, weight: Fraction(open_),
    lib.SCHED_WLC: Fraction,
    lib.SCHED_SED: lambda open_, weight: Fraction(open_ + 1, weight),
    # "assigns jobs to an idle server if there is, instead of waiting for a fast one; ... if all servers are
    # busy, it adopts the Shortest Expected Delay policy" (ipvsadm(8))
    lib.SCHED_NQ: lambda open_, weight: Fraction(open_ + 1, weight) if open_ else Fraction(0),
}


@pytest.mark.parametrize("scheduler", COSTS, ids=["lc", "wlc", "sed", "nq"])
def test_lowest_cost(node: Node, family: Family, scheduler: int) -> None:
    """Each connection goes to the backend of the lowest cost, the first of several equals."""
    backends = [Backend(each, weight=weight) for each, weight in zip(family.backends, WEIGHTS, strict=True)]
    node.service(family.vip, PORT, backends, scheduler=scheduler)
    open_ = [0, 0, 0]
    for sport in range(1, 40):
        wanted = min(range(3), key=lambda n: COSTS[scheduler](open_[n], WEIGHTS[n]))
        assert connect(node, family, sport) == family.backends[wanted], f"{sport} open: {open_}"
        open_[wanted] += 1


#: First choices for weights 4, 2 and 1, worked out by hand.
BY_HAND = {
    lib.SCHED_LC: "ABCABC",
    lib.SCHED_WLC: "ABCAAB",  # 0/4 0/2 0/1 | 1/4 | 2/4 1/2: equal, A first | 3/4 1/2
    lib.SCHED_SED: "AABAABC",  # 1/4 | 2/4 1/2: A first | 3/4 1/2 | 3/4 | 4/4 2/2 1/1: A | 5/4 2/2 | 5/4 3/2 1
    lib.SCHED_NQ: "ABCAA",  # each idle one | (1+1)/4 | (2+1)/4
}


@pytest.mark.parametrize("scheduler", BY_HAND, ids=["lc", "wlc", "sed", "nq"])
def test_lowest_cost_by_hand(node: Node, family: Family, scheduler: int) -> None:
    backends = [Backend(each, weight=weight) for each, weight in zip(family.backends, WEIGHTS, strict=True)]
    node.service(family.vip, PORT, backends, scheduler=scheduler)
    wanted = BY_HAND[scheduler]
    assert letters(family, [connect(node, family, n + 1) for n in range(len(wanted))]) == wanted


@pytest.mark.parametrize("scheduler", COSTS, ids=["lc", "wlc", "sed", "nq"])
def test_a_closed_connection_counts_no_more(node: Node, family: Family, scheduler: int) -> None:
    node.service(family.vip, PORT, family.backends, scheduler=scheduler)
    for sport in range(1, 7):
        connect(node, family, sport)
    reset = TCP(sport=2, dport=PORT, flags="R")
    assert node.ingress(finished(frame(family, reset, family.client, family.vip))).verdict == "ESTABLISHED"
    assert connect(node, family, 7) == family.backends[1]


@pytest.mark.parametrize("scheduler", COSTS, ids=["lc", "wlc", "sed", "nq"])
def test_more_backends_than_are_compared(node: Node, scheduler: int) -> None:
    """Of 600, a window of 256 is compared: with every third one idle, each window has idle ones."""
    backends = [Backend(f"10.9.{n // 200}.{n % 200 + 1}") for n in range(600)]
    service = node.service(V4.vip, PORT, backends, scheduler=scheduler)
    for n, each in enumerate(service.backends):
        if n % 3:
            node.set_open(each, 1000)
    found = {connect(node, V4, sport) for sport in range(1, 60)}
    idle = {each.address for each in backends[::3]}
    assert found <= idle
    assert len(found) > 20  # not always the same window


def test_a_counter_below_zero(node: Node, family: Family) -> None:
    """The recount may meet a program half-way; a negative count is no invitation."""
    service = node.service(family.vip, PORT, family.backends, scheduler=lib.SCHED_LC)
    node.set_open(service.backends[2], -5)
    assert letters(family, [connect(node, family, n) for n in (1, 2)]) == "AB"


# ---- session affinity ----


@pytest.fixture
def sticky(node: Node, family: Family) -> Node:
    """A node with a round-robin service with affinity of 100 s on two VIPs."""
    service = node.service(family.vip, PORT, family.backends, affinity_s=100)
    node.service(family.other_vip, PORT, [], table=[0, 1, 2], affinity_s=100, pool=service)
    node.sticky_service = service  # type: ignore[attr-defined]
    return node


def test_the_same_client_the_same_backend(sticky: Node, family: Family) -> None:
    assert letters(family, [connect(sticky, family, n) for n in range(1, 6)]) == "AAAAA"
    assert letters(family, [connect(sticky, family, n, family.other_client) for n in range(1, 4)]) == "BBB"
    assert connect(sticky, family, 9) == family.backends[0]


def test_through_any_vip(sticky: Node, family: Family) -> None:
    assert connect(sticky, family, 1) == family.backends[0]
    assert connect(sticky, family, 2, vip=family.other_vip) == family.backends[0]


def test_affinity_of_each_service(node: Node, family: Family) -> None:
    node.service(family.vip, PORT, family.backends, affinity_s=100)
    node.service(family.other_vip, PORT, family.backends[1:], affinity_s=100)
    assert connect(node, family, 1) == family.backends[0]
    assert connect(node, family, 2, vip=family.other_vip) == family.backends[1]


def test_affinity_ends(sticky: Node, family: Family) -> None:
    """It lasts until the timeout passes without a new connection; each new one begins it again."""
    assert connect(sticky, family, 1) == family.backends[0]
    sticky.wait(99)
    assert connect(sticky, family, 2) == family.backends[0]
    sticky.wait(99)
    assert connect(sticky, family, 3) == family.backends[0]
    sticky.wait(100)
    assert connect(sticky, family, 4) == family.backends[1]


def test_the_longest_timeout(node: Node, family: Family) -> None:
    """86400 s (API validation): must not overflow on the way to nanoseconds."""
    node.service(family.vip, PORT, family.backends, affinity_s=86400)
    assert connect(node, family, 1) == family.backends[0]
    node.wait(30)
    assert connect(node, family, 2) == family.backends[0]


#: What becomes of the backend that a client is used to -> whether it keeps it.
CHANGES = [
    ("it terminates, others are ready", {"state": lib.BACKEND_TERMINATING}, {}, False),
    ("it is not ready", {"state": lib.BACKEND_NOT_READY}, {}, False),
    ("it is gone", {"state": lib.BACKEND_GONE}, {}, False),
    ("its id is free", {"state": lib.BACKEND_FREE}, {}, False),
    ("it drains", {"weight": 0}, {}, False),
    ("its id belongs to another service", {"service": 999}, {}, False),
    ("policy Local, it is not local", {}, {"flags": lib.SERVICE_LOCAL}, False),
    ("policy Local, it is local", {"flags": lib.BACKEND_LOCAL}, {"flags": lib.SERVICE_LOCAL}, True),
    ("a hint keeps it for another zone", {"flags": lib.BACKEND_HINT_ELSEWHERE}, {}, False),
    ("another weight", {"weight": 7}, {}, True),
    ("nothing", {}, {}, True),
]


@pytest.mark.parametrize(
    ("backend", "service", "stays"), [each[1:] for each in CHANGES], ids=[each[0] for each in CHANGES]
)
def test_affinity_to_a_changed_backend(
    node: Node, family: Family, backend: dict[str, int], service: dict[str, int], stays: bool
) -> None:
    made = node.service(family.vip, PORT, family.backends, affinity_s=100, table=[1, 0, 2])
    assert connect(node, family, 1) == family.backends[1]
    node.set_backend(made.backends[1], **backend)
    # The agent would have switched the table too: B stands in it no more, A comes next.
    node.set_service(made, slot_base=made.value.slot_base + 1, slot_count=2, **service)
    if "flags" in service:
        node.set_backend(made.backends[2], flags=lib.BACKEND_LOCAL)
    again = connect(node, family, 2)
    assert (again == family.backends[1]) == stays


def test_affinity_when_all_terminate(node: Node, family: Family) -> None:
    """With none ready, the pool is those that terminate and serve: affinity holds among them."""
    made = node.service(family.vip, PORT, family.backends, affinity_s=100)
    assert connect(node, family, 1) == family.backends[0]
    for each in made.backends:
        node.set_backend(each, state=lib.BACKEND_TERMINATING)
    assert connect(node, family, 2) == family.backends[0]
