"""The order of writes, as data: a reader of the maps never meets a dangling id, wherever the writer stops.

Upserts go from what is pointed to, to what points: names, backends, slots, prefixes, services, addresses.
Deletes go the other way round. Backends that lose usability are written after the services that turn away
from them. A plan is a list of steps; ``apply`` runs it on maps, the kernel's or a test's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ebpfproxy.dataplane.bpf.layouts import (
    BACKEND,
    BACKEND_HEALTH,
    BACKEND_STATS,
    SERVICE_STATS,
    SLOT_SIZE,
    U32,
)
from ebpfproxy.libbpf import lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ebpfproxy.diff import Delta

_USABLE = frozenset({lib.BACKEND_READY, lib.BACKEND_TERMINATING})
_FREE = bytes(BACKEND.size)
_STATE = BACKEND.offsets["state"]
_NO_HEALTH = bytes(BACKEND_HEALTH.size)
_NO_BACKEND_STATS = bytes(BACKEND_STATS.size)
_NO_SERVICE_STATS = bytes(SERVICE_STATS.size)


@dataclass(frozen=True, slots=True)
class Put:
    """Insert or overwrite entries of a hash or trie."""

    map: str
    entries: dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete entries of a hash or trie; missing ones are no error."""

    map: str
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Write:
    """Write into a memory-mapped array: (byte offset, content), ascending and apart."""

    map: str
    parts: list[tuple[int, bytes]]


Step = Put | Drop | Write


class Target(Protocol):
    """What a plan needs of a map."""

    def update_batch(self, items: Mapping[bytes, bytes]) -> None:
        """Insert or overwrite entries."""

    def delete_batch(self, keys: Iterable[bytes]) -> object:
        """Delete entries; missing ones are no error."""

    def mmap(self) -> memoryview:
        """Return the content of an array, writable."""


def _write(map_name: str, size: int, values: Iterable[tuple[int, bytes]]) -> Write:
    """Return a write of array elements; neighbours become one part.

    Args:
        map_name: the array.
        size: bytes of one element.
        values: (index of the first element, content of one or more elements).
    """
    parts: list[tuple[int, list[bytes]]] = []
    end = -1
    for index, content in sorted(values):
        if index * size == end:
            parts[-1][1].append(content)
        else:
            parts.append((index * size, [content]))
        end = index * size + len(content)
    return Write(map_name, [(offset, b"".join(contents)) for offset, contents in parts])


def _hash_key(key: Any) -> bytes:
    return U32.pack(key) if isinstance(key, int) else key


def make_plan(deltas: Mapping[str, Delta[Any, bytes]]) -> list[Step]:
    """Return the writes for ``deltas`` (from ``Tables.delta``) in their safe order.

    Counters are zeroed when an id is freed, so that the next one to get it starts from zero.
    """
    steps: list[Step] = []

    def put(name: str) -> None:
        if deltas[name].upsert:
            steps.append(Put(name, {_hash_key(key): value for key, value in deltas[name].upsert.items()}))

    def drop(name: str) -> None:
        if deltas[name].delete:
            steps.append(Drop(name, [_hash_key(key) for key in deltas[name].delete]))

    def write(name: str, size: int, values: Iterable[tuple[int, bytes]]) -> None:
        step = _write(name, size, values)
        if step.parts:
            steps.append(step)

    backends = deltas["backends"]
    usable = {number: value for number, value in backends.upsert.items() if value[_STATE] in _USABLE}
    others = {number: value for number, value in backends.upsert.items() if number not in usable}
    put("service_names")
    write("backends", BACKEND.size, usable.items())
    write("slots", SLOT_SIZE, deltas["slots"].upsert.items())
    for name in ("source_ranges", "local_sources", "node_sources", "outliers", "services", "vips"):
        put(name)
    for name in (
        *("vips", "services", "outliers", "node_sources"),
        *("local_sources", "source_ranges", "dsr_backends"),
    ):
        drop(name)
    write("backends", BACKEND.size, others.items())
    put("dsr_backends")  # leads to backends in any state
    write("backend_stats", BACKEND_STATS.size, ((number, _NO_BACKEND_STATS) for number in backends.delete))
    write("backend_health", BACKEND_HEALTH.size, ((number, _NO_HEALTH) for number in backends.delete))
    write("backends", BACKEND.size, ((number, _FREE) for number in backends.delete))
    names = deltas["service_names"].delete
    write("service_stats", SERVICE_STATS.size, ((number, _NO_SERVICE_STATS) for number in names))
    drop("service_names")
    return steps


def apply(steps: Iterable[Step], maps: Mapping[str, Target]) -> None:
    """Run a plan.

    Raises:
        KernelError, MapFullError: the steps before this one are done, it may be done in part.
    """
    for step in steps:
        target = maps[step.map]
        match step:
            case Put():
                target.update_batch(step.entries)
            case Drop():
                target.delete_batch(step.keys)
            case Write():
                view = target.mmap()
                for offset, content in step.parts:
                    view[offset : offset + len(content)] = content
