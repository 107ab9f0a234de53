"""Reads what the maps hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ebpfproxy.dataplane.bpf.layouts import BACKEND, SERVICE, SLOT_SIZE, U32

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ebpfproxy.dataplane.bpf.tables import Table


class Readable(Protocol):
    """What reading needs of a map."""

    def items(self) -> list[tuple[bytes, bytes]]:
        """Return all entries of a hash or trie."""

    def mmap(self) -> memoryview:
        """Return the content of an array."""


def read_tables(maps: Mapping[str, Readable]) -> dict[str, Table]:
    """Return what the maps hold, as ``Tables`` wants it."""
    have: dict[str, Table] = {
        name: dict(maps[name].items()) for name in ("services", "vips", "source_ranges", "local_sources")
    }
    have["service_names"] = {U32.unpack(key)[0]: value for key, value in maps["service_names"].items()}
    have["backends"] = dict(used_backends(maps["backends"].mmap()))
    have["slots"] = {}
    slots = maps["slots"].mmap()
    for value in have["services"].values():
        service = SERVICE.read(value)
        if service.slot_count:
            start = service.slot_base * SLOT_SIZE
            have["slots"][service.slot_base] = bytes(slots[start : start + service.slot_count * SLOT_SIZE])
    return have


def used_backends(memory: memoryview) -> Iterator[tuple[int, bytes]]:
    """Yield (id, value) of the backends that are not free, fast where nothing is used."""
    size, state = BACKEND.size, BACKEND.offsets["state"]
    per_block = 128
    empty = bytes(size * per_block)
    for start in range(0, len(memory), len(empty)):
        block = bytes(memory[start : start + len(empty)])
        if block == empty[: len(block)]:
            continue
        first = start // size
        for at in range(0, len(block), size):
            if block[at + state]:
                yield first + at // size, block[at : at + size]
