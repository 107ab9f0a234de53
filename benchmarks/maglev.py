"""What a Maglev table costs to make, and what the end of a backend moves."""

from __future__ import annotations

import time
from ipaddress import IPv4Address
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.figures import spread
from ebpfproxy.dataplane.bpf.schedulers import slot_table
from ebpfproxy.model.services import MAGLEV_SIZES, Backend, Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNT = 100
#: Of the tables that are timed. Nothing may be remembered from one to the next: each has other addresses.
ROUNDS = 100


def backends(random: Random, weight_max: int) -> list[Backend]:
    """Return backends with addresses and weights at random."""
    return [
        Backend(str(IPv4Address(address)), 8080, weight=random.randint(1, weight_max))
        for address in random.sample(range(2**24, 2**31), COUNT)
    ]


def took_ms(members: Sequence[Backend], size: int) -> float:
    """Return the milliseconds that a table takes."""
    start = time.perf_counter()
    slot_table(Scheduler.MAGLEV, members, size)
    return (time.perf_counter() - start) * 1000


def moved_percent(members: Sequence[Backend], size: int) -> list[float]:
    """Return, for each backend, how much of the others' slots changes hands when it goes."""
    before = [members[index] for index in slot_table(Scheduler.MAGLEV, members, size)]
    shares = []
    for gone in members:
        rest = [each for each in members if each is not gone]
        after = [rest[index] for index in slot_table(Scheduler.MAGLEV, rest, size)]
        moves = [old is not new for old, new in zip(before, after, strict=True) if old is not gone]
        shares.append(100 * sum(moves) / len(moves))
    return shares


def measure() -> dict[str, Any]:
    """Return the figures."""
    random = Random(1)
    figures: dict[str, Any] = {}
    for weights, weight_max in (("equal", 1), ("1 to 10", 10)):
        for size in MAGLEV_SIZES:
            name = f"{size} slots, weights {weights}"
            tables = [backends(random, weight_max) for _ in range(ROUNDS)]
            figures[f"{name}, ms"] = spread([took_ms(members, size) for members in tables])
    shares = moved_percent(backends(random, 1), 16381)
    figures["one of 100 goes, % moved"] = spread(shares)
    figures["one of 100 goes, % moved at most"] = max(shares)
    return figures
