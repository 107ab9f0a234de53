"""Reads what the maps hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ebpfproxy.dataplane.bpf.layouts import BACKEND, SERVICE, SLOT_SIZE, U32

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

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
        name: dict(maps[name].items())
        for name in ("services", "vips", "source_ranges", "local_sources", "node_sources", "dsr_backends")
    }
    have["outliers"] = {U32.unpack(key)[0]: value for key, value in maps["outliers"].items()}
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


def used_backends(memory: memoryview, services: Container[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (id, value) of the backends that are not free: of all services, or of those with these ids."""
    size = BACKEND.size
    for number, (state, service) in enumerate(zip(*backend_columns(memory), strict=True)):
        if state and (services is None or service in services):
            yield number, bytes(memory[number * size : (number + 1) * size])


def backend_columns(memory: memoryview) -> tuple[bytes, list[int]]:
    """Return the states and the service ids of the backends, up to the last one that is not free."""
    size = BACKEND.size
    states = bytes(memory[BACKEND.offsets["state"] :: size]).rstrip(b"\0")  # BACKEND_FREE
    services = memory.cast("I")[BACKEND.offsets["service"] // 4 :: size // 4]
    return states, services[: len(states)].tolist()
