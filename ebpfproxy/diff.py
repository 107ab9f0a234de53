"""The one diff: what turns one mapping into another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

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
