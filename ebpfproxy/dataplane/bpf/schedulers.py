"""A scheduler is a table: which backend stands in which slot. Pure.

The programs only pick an index: at random (random), by a counter (rr, wrr), by a hash modulo the number of
slots (sh, dh, maglev) or by the least loaded slot (lc, wlc, sed, nq).

Source: IPVS, ``net/netfilter/ipvs/ip_vs_*.c`` and ipvsadm(8) for the names; Eisenbud et al., "Maglev",
NSDI 2016, for maglev.
"""

from __future__ import annotations

import functools
import hashlib
import math
from array import array
from typing import TYPE_CHECKING

from ebpfproxy.libbpf import ffi, lib
from ebpfproxy.model.services import MAGLEV_SIZE, Backend, Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Slots of a weighted table (random, wrr) at most. Larger weights are scaled down, each backend keeps one
#: slot at least: a share is then wrong by less than one slot.
WEIGHTED_MAX = 4096
#: Slots of an sh or dh table: IPVS's default (CONFIG_IP_VS_SH_TAB_BITS and CONFIG_IP_VS_DH_TAB_BITS 8).
HASH_MIN = 256
#: The same at most, where more backends or weights need it: no backend shall be left out.
HASH_MAX = 1 << 16

CODE = {
    Scheduler.RANDOM: lib.SCHED_RANDOM,
    Scheduler.RR: lib.SCHED_RR,
    Scheduler.WRR: lib.SCHED_WRR,
    Scheduler.SH: lib.SCHED_SH,
    Scheduler.DH: lib.SCHED_DH,
    Scheduler.MAGLEV: lib.SCHED_MAGLEV,
    Scheduler.LC: lib.SCHED_LC,
    Scheduler.WLC: lib.SCHED_WLC,
    Scheduler.SED: lib.SCHED_SED,
    Scheduler.NQ: lib.SCHED_NQ,
}


def slot_table(
    scheduler: Scheduler, backends: Sequence[Backend], maglev_size: int = MAGLEV_SIZE
) -> Sequence[int]:
    """Return which backend stands in each slot.

    Args:
        scheduler: how a backend is picked.
        backends: distinct, of positive weight.
        maglev_size: slots of a maglev table, a prime; more where there are more backends.

    Returns:
        Indexes into ``backends``; empty when there are none.
    """
    if not backends:
        return ()
    if scheduler is Scheduler.MAGLEV:
        return _maglev(tuple([(f"{b.address}|{b.port}", b.weight) for b in backends]), maglev_size)
    return _by_weight(scheduler, tuple([b.weight for b in backends]))


@functools.lru_cache(maxsize=1024)
def _by_weight(scheduler: Scheduler, weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return the table of a scheduler that looks at order and weights only."""
    match scheduler:
        case Scheduler.RANDOM:
            return _repeated(_scaled(weights, WEIGHTED_MAX))
        case Scheduler.WRR:
            return _interleaved(_scaled(weights, WEIGHTED_MAX))
        case Scheduler.SH:
            return _buckets(weights)
        case Scheduler.DH:
            return _buckets((1,) * len(weights))
        case _:
            return tuple(range(len(weights)))


def _scaled(weights: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Return the smallest weights of the same ratio, with a sum of about ``limit`` at most."""
    divisor = math.gcd(*weights)
    total = sum(weights)
    if total // divisor <= max(limit, len(weights)):
        return tuple(weight // divisor for weight in weights)
    return tuple(max(1, weight * limit // total) for weight in weights)


def _repeated(weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return each index as often as its weight says."""
    return tuple(index for index, weight in enumerate(weights) for _ in range(weight))


def _interleaved(weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return one round of IPVS's weighted round robin: 4, 3, 2 gives AABABCABC.

    Source: ``ip_vs_wrr_schedule`` and the LVS documentation of weighted round-robin scheduling.
    """
    step = math.gcd(*weights)
    return tuple(
        index
        for current in range(max(weights), 0, -step)
        for index, weight in enumerate(weights)
        if weight >= current
    )


def _buckets(weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return a hash table: each index fills as many buckets in a row as its weight, round and round.

    Source: ``ip_vs_sh_reassign`` and ``ip_vs_dh_reassign`` (which ignores weights).
    """
    if sum(weights) > HASH_MAX:
        weights = _scaled(weights, HASH_MAX)
    once = _repeated(weights)
    size = HASH_MIN
    while size < len(once):
        size *= 2
    return (once * (size // len(once) + 1))[:size]


@functools.lru_cache(maxsize=64)
def _maglev(members: tuple[tuple[str, int], ...], size: int) -> array[int]:
    """Return the Maglev lookup table; neither the order of ``members`` nor the node matters.

    Args:
        members: (text that identifies the backend, weight).
        size: slots; a prime.

    Source: Eisenbud et al., "Maglev", NSDI 2016, section 3.4; ``glue.c`` says where it differs.
    """
    size = max(size, _next_prime(len(members)))
    order = sorted(range(len(members)), key=members.__getitem__)
    digests = [hashlib.blake2b(members[index][0].encode(), digest_size=16).digest() for index in order]
    offsets = [int.from_bytes(digest[:8], "big") % size for digest in digests]
    skips = [int.from_bytes(digest[8:], "big") % (size - 1) + 1 for digest in digests]
    weights = [members[index][1] for index in order]
    table = array("I", bytes(4 * size))
    if lib.maglev_fill(
        ffi.from_buffer("uint32_t[]", table), size, order, offsets, skips, weights, len(order)
    ):
        raise MemoryError
    return table


def _next_prime(number: int) -> int:
    """Return the smallest prime that is not below ``number``."""
    number = max(number, 2)
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number
