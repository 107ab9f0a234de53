"""Allocation in arrays: ids one by one, slots as contiguous ranges. Pure: no kernel, no clock."""

from __future__ import annotations

import bisect
from collections import deque

from ebpfproxy.errors import MapFullError


def _setting(map_name: str) -> str:
    return f"ebpfproxy.mapSizes.{map_name} in the configuration or start with --map-size {map_name}=N"


def full(map_name: str, limit: int) -> MapFullError:
    """Return the error for a map, or the id range that mirrors it, with no room left."""
    return MapFullError(f"map {map_name} is full: all {limit} entries are in use; raise {_setting(map_name)}")


class IdAllocator:
    """Hands out ids 1 .. limit - 1, each one as late as possible after its release (round robin)."""

    def __init__(self, map_name: str, limit: int) -> None:
        self._map_name = map_name
        self.limit = limit
        self._used: set[int] = set()
        self._next = 1

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, number: int) -> bool:
        return number in self._used

    def take(self, number: int) -> None:
        """Mark an id found in the kernel as used; new ids start after the highest such id."""
        if not 0 < number < self.limit:
            raise ValueError(f"id {number} is outside map {self._map_name} (1 to {self.limit - 1})")
        self._used.add(number)
        self._next = max(self._next, number + 1)

    def allocate(self, count: int = 1) -> list[int]:
        """Return ``count`` unused ids.

        Raises:
            MapFullError: not so many are left; none was handed out.
        """
        if len(self._used) + count > self.limit - 1:
            raise full(self._map_name, self.limit)
        used, number = self._used, self._next
        ids: list[int] = []
        while len(ids) < count:
            if number >= self.limit:
                number = 1
            if number not in used:
                used.add(number)
                ids.append(number)
            number += 1
        self._next = number
        return ids

    def release(self, *numbers: int) -> None:
        """Give ids back."""
        self._used.difference_update(numbers)


class SlotAllocator:
    """Hands out contiguous ranges of slots.

    A freed range comes back after a grace period only, because a program that looked a service up just
    before it was switched may still read the old range.
    """

    def __init__(self, limit: int, grace_s: float, map_name: str = "slots") -> None:
        self._limit = limit
        self._grace_s = grace_s
        self._map_name = map_name
        self._bases = [0]  # of the free ranges, sorted; no two of them touch
        self._ends = [limit]
        self._used: dict[int, int] = {}  # base -> size
        self._waiting: deque[tuple[float, int, int]] = deque()  # (free from, base, size), oldest first

    @property
    def used(self) -> dict[int, int]:
        """The ranges in use, base -> size."""
        return dict(self._used)

    @property
    def free(self) -> int:
        """The number of slots that can be handed out now."""
        return sum(self._ends) - sum(self._bases)

    def take(self, base: int, size: int) -> None:
        """Mark a range found in the kernel as used.

        Raises:
            ValueError: a part of it is outside the map or already in use.
        """
        at = bisect.bisect_right(self._bases, base) - 1
        if size < 1 or at < 0 or base + size > self._ends[at]:
            raise ValueError(f"slots {base} to {base + size - 1} are not free")
        self._carve(at, base, size)

    def allocate(self, size: int) -> int:
        """Return the base of a free range of ``size`` slots (first fit).

        Raises:
            MapFullError: no free range is long enough.
        """
        for at, (base, end) in enumerate(zip(self._bases, self._ends, strict=True)):
            if end - base >= size:
                self._carve(at, base, size)
                return base
        raise MapFullError(
            f"map {self._map_name} is full: no {size} entries in a row are free of {self._limit} in all; "
            f"raise {_setting(self._map_name)}"
        )

    def release(self, base: int, now_s: float) -> None:
        """Give the range at ``base`` back once the grace period is over."""
        self._waiting.append((now_s + self._grace_s, base, self._used.pop(base)))

    def cancel(self, base: int) -> None:
        """Give the range at ``base`` back at once: the kernel never saw it."""
        self._return(base, self._used.pop(base))

    def collect(self, now_s: float) -> None:
        """Make the ranges whose grace period is over available."""
        while self._waiting and self._waiting[0][0] <= now_s:
            _, base, size = self._waiting.popleft()
            self._return(base, size)

    def _carve(self, at: int, base: int, size: int) -> None:
        """Take a range out of the free range number ``at``."""
        start, end = self._bases[at], self._ends[at]
        rest = [(low, high) for low, high in ((start, base), (base + size, end)) if low < high]
        self._bases[at : at + 1] = [low for low, _ in rest]
        self._ends[at : at + 1] = [high for _, high in rest]
        self._used[base] = size

    def _return(self, base: int, size: int) -> None:
        """Put a range among the free ones and join it with its neighbours."""
        at = bisect.bisect_left(self._bases, base)
        low, high = base, base + size
        first, last = at, at
        if at > 0 and self._ends[at - 1] == low:
            first, low = at - 1, self._bases[at - 1]
        if at < len(self._bases) and self._bases[at] == high:
            last, high = at + 1, self._ends[at]
        self._bases[first:last] = [low]
        self._ends[first:last] = [high]
