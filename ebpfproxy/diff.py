"""The one diff: what turns one mapping into another, and one sequence of objects into another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress, count
from operator import is_not
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Delta(Generic[K, V]):
    """What to write and what to remove; falsy when there is nothing to do."""

    upsert: dict[K, V]
    delete: list[K]

    def __bool__(self) -> bool:
        return bool(self.upsert or self.delete)


def diff(have: Mapping[K, V], want: Mapping[K, V]) -> Delta[K, V]:
    """Return the smallest delta that turns ``have`` into ``want``."""
    upsert = {key: value for key, value in want.items() if key not in have or have[key] != value}
    return Delta(upsert, [key for key in have if key not in want])


def turnover(old: Sequence[V], new: Sequence[V]) -> tuple[list[V], list[V]]:
    """Return which objects of ``old`` are not in ``new``, and the other way round.

    The very objects count, not their values. What kept its place costs next to nothing, so that one change
    among 10,000 is found in a fraction of a millisecond.
    """
    places = [*compress(count(), map(is_not, old, new))]
    gone = [old[place] for place in places] + [*old[len(new) :]]
    came = [new[place] for place in places] + [*new[len(old) :]]
    if moved := set(map(id, gone)) & set(map(id, came)):
        gone = [each for each in gone if id(each) not in moved]
        came = [each for each in came if id(each) not in moved]
    return gone, came
