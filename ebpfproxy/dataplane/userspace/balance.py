"""Which backend a connection goes to: scheduler and affinity of one Service port. No sockets here.

The names are IPVS's. ``maglev`` is weighted rendezvous hashing here: like Maglev's table it moves only the
clients of a backend that goes, and every node chooses alike, but it needs no table.

Source: ``net/netfilter/ipvs/ip_vs_*.c``; Thaler and Ravishankar, "Using name-based mappings to increase hit
rates", 1998; weights after Schindelhauer and Schomaker, 2005.
"""

from __future__ import annotations

import collections
import hashlib
import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from ebpfproxy.dataplane.userspace.protocol import Target

#: Clients remembered for one Service port; the one that was away longest goes first.
AFFINITY_MAX = 65536

Backend = tuple[str, int]


class Balancer:
    """Picks among the backends of one Service port, whichever pool they are given from."""

    def __init__(self) -> None:
        self._open: collections.Counter[Backend] = collections.Counter()
        self.affinity: collections.OrderedDict[str, tuple[Backend, float]] = collections.OrderedDict()
        self._turn = -1
        self._level = 0  # of wrr
        self._pickers: dict[str, Callable[[Sequence[Target], str, Hashable], int]] = {
            "random": lambda targets, *_: random.choices(range(len(targets)), [t.weight for t in targets])[0],
            "rr": lambda targets, *_: self._next(len(targets)),
            "wrr": lambda targets, *_: self._weighted(targets),
            "sh": lambda targets, client, _: _bucket([t.weight for t in targets], client),
            "dh": lambda targets, _, entrance: _bucket([1] * len(targets), entrance),
            "maglev": _rendezvous,
            "lc": lambda targets, *_: self._least(targets, lambda open_, _: open_),
            "wlc": lambda targets, *_: self._least(targets, lambda open_, weight: open_ / weight),
            "sed": lambda targets, *_: self._least(targets, lambda open_, weight: (open_ + 1) / weight),
            "nq": lambda targets, *_: self._least(
                targets, lambda open_, weight: (open_ > 0, (open_ + 1) / weight)
            ),
        }

    def order(
        self,
        targets: Sequence[Target],
        scheduler: str,
        affinity_s: int,
        client: tuple[str, int],
        entrance: str,
        now: float,
    ) -> list[Target]:
        """Return ``targets`` in the order in which a new connection tries them.

        Args:
            targets: not empty.
            scheduler: chooses the first; the others follow in their own order.
            affinity_s: a client's backend comes first so long after its last connection; 0 = never.
            client: address and port.
            entrance: the listener, for ``dh``.
            now: of any clock that only goes forward.
        """
        known = self.affinity.get(client[0]) if affinity_s else None
        first = -1
        if known is not None and now - known[1] < affinity_s:
            first = next((n for n, target in enumerate(targets) if target[:2] == known[0]), -1)
        if first < 0:
            flow = f"{client[0]}|{client[1]}" if scheduler == "maglev" else client[0]
            first = self._pickers[scheduler](targets, flow, entrance)
        return [*targets[first:], *targets[:first]]

    def bind(self, client: str, backend: Backend, now: float) -> None:
        """Remember that ``client`` was given ``backend``."""
        self.affinity[client] = (backend, now)
        self.affinity.move_to_end(client)
        if len(self.affinity) > AFFINITY_MAX:
            self.affinity.popitem(last=False)

    def opened(self, backend: Target) -> None:
        """Count one more connection to ``backend``."""
        self._open[backend[:2]] += 1

    def closed(self, backend: Target) -> None:
        """Count one less."""
        self._open[backend[:2]] -= 1
        if not self._open[backend[:2]]:
            del self._open[backend[:2]]

    def expire(self, affinity_s: int, now: float) -> None:
        """Forget clients that were away for ``affinity_s``."""
        while self.affinity:
            client, (_, last) = next(iter(self.affinity.items()))
            if now - last < affinity_s:
                break
            del self.affinity[client]

    def _next(self, count: int) -> int:
        self._turn = (self._turn + 1) % count
        return self._turn

    def _weighted(self, targets: Sequence[Target]) -> int:
        """Return the next of IPVS's weighted round robin: 4, 3, 2 gives AABABCABC."""
        weights = [target.weight for target in targets]
        if self._turn >= len(weights):  # there were more
            self._turn = -1
        while True:
            turn = self._next(len(weights))
            if turn == 0:
                self._level -= math.gcd(*weights)
                if self._level <= 0:
                    self._level = max(weights)
            if weights[turn] >= self._level:
                return turn

    def _least(
        self, targets: Sequence[Target], cost: Callable[[int, int], float | tuple[bool, float]]
    ) -> int:
        """Return the cheapest; among equals the next in turn, so that idle backends share evenly."""
        start, count = self._next(len(targets)), len(targets)
        places = [(start + n) % count for n in range(count)]
        return min(places, key=lambda n: cost(self._open[targets[n][:2]], targets[n].weight))


def _hash(*parts: Hashable) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def _bucket(weights: Sequence[int], key: Hashable) -> int:
    """Return the index in whose share of the hash's range ``key`` falls."""
    place = _hash(key) % sum(weights)
    for index, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return index
    raise AssertionError(weights)


def _rendezvous(targets: Sequence[Target], flow: str, _: Hashable) -> int:
    def score(target: Target) -> float:
        share = (_hash(flow, target[:2]) + 1) / (2**64 + 1)  # in (0, 1)
        return -target.weight / math.log(share)

    return max(range(len(targets)), key=lambda n: score(targets[n]))
