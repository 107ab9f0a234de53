"""The latest objects of every source: what came last, what changed, and whether all of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from ebpfproxy.model.objects import Object, ObjectKey, Objects, Problem, key_of

if TYPE_CHECKING:
    from collections.abc import Iterable


class Set(msgspec.Struct, frozen=True):
    """An object is there now, new or changed."""

    object: Object
    source: str = ""  # where it came from: a file


class Delete(msgspec.Struct, frozen=True):
    """An object is gone from where it was."""

    key: ObjectKey
    source: str = ""


class Synced(msgspec.Struct, frozen=True):
    """A source has told everything that it had at the start."""

    what: str  # one of the names that the store waits for


Event: TypeAlias = Set | Delete | Synced


class Reach(msgspec.Struct, frozen=True):
    """Whether a source still hears of every change at once.

    Attributes:
        lost_at: Unix time since when it does not; None: it does.
    """

    lost_at: float | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What ``Store.take`` hands over.

    Attributes:
        objects: a live view, valid until the next event is applied.
        changed: keys that were set, changed or deleted since the last take.
    """

    objects: Objects
    changed: frozenset[ObjectKey]


class Store:
    """Holds the latest object of each key; last value wins, equal values are no change.

    When several files define one object, the one whose file name sorts last wins, as with
    ``kubectl apply -f DIR``; the others are reported and wait in case that one goes away.
    Not thread-safe: one thread applies and takes.

    Args:
        expected: the names that must each be ``Synced`` before the store is ready.
    """

    def __init__(self, expected: Iterable[str] = ("objects",)) -> None:
        self._waiting = set(expected)
        self._objects: dict[ObjectKey, Object] = {}
        self._sources: dict[ObjectKey, str] = {}
        self._hidden: dict[ObjectKey, dict[str, Object]] = {}  # further definitions, by source
        self._changed: set[ObjectKey] = set()

    def apply(self, event: Event) -> None:
        """Take over one event."""
        match event:
            case Set(obj, source):
                self._set(key_of(obj), obj, source)
            case Delete(key, source):
                self._delete(key, source)
            case Synced(what):
                self._waiting.discard(what)

    def _set(self, key: ObjectKey, obj: Object, source: str) -> None:
        shown = self._sources.get(key, source)
        if source < shown:
            self._hidden.setdefault(key, {})[source] = obj
            return
        if source != shown:
            self._hidden.setdefault(key, {})[shown] = self._objects[key]
        self._sources[key] = source
        if self._objects.get(key) != obj:
            self._objects[key] = obj
            self._changed.add(key)

    def _delete(self, key: ObjectKey, source: str) -> None:
        hidden = self._hidden.get(key, {})
        if self._sources.get(key) != source:
            hidden.pop(source, None)
        elif hidden:
            source = self._sources[key] = max(hidden)
            obj = hidden.pop(source)
            if self._objects[key] != obj:
                self._objects[key] = obj
                self._changed.add(key)
        else:
            del self._objects[key], self._sources[key]
            self._changed.add(key)
        if not hidden:
            self._hidden.pop(key, None)

    def ready(self) -> bool:
        """Say whether everything expected was ``Synced``: before that nothing may be deleted."""
        return not self._waiting

    def has_changes(self) -> bool:
        """Say whether ``take`` would tell anything new."""
        return bool(self._changed)

    def pending(self) -> frozenset[ObjectKey]:
        """Return what ``take`` would say has changed."""
        return frozenset(self._changed)

    def take(self) -> Changes:
        """Return the objects and which of them changed since the last call."""
        changed, self._changed = frozenset(self._changed), set()
        return Changes(self._objects, changed)

    def source(self, key: ObjectKey) -> str:
        """Return where an object came from, "" if that is unknown."""
        return self._sources.get(key, "")

    def locate(self, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """Return the problems with the source of their object filled in."""
        return tuple(
            msgspec.structs.replace(each, source=self.source(ObjectKey(each.kind, each.namespace, each.name)))
            if not each.source
            else each
            for each in problems
        )

    def problems(self) -> tuple[Problem, ...]:
        """Return one problem for each object that another file hides."""
        return tuple(
            Problem(*key, "", f"is defined in {self._sources[key]} too, which is used", source)
            for key, hidden in sorted(self._hidden.items())
            for source in sorted(hidden)
        )
