"""Maps in memory, for the tests of the BPF dataplane's pure part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.bpf.layouts import (
    BACKEND,
    BACKEND_HEALTH,
    BACKEND_STATS,
    PROTOCOL_NUMBER,
    SERVICE,
    SERVICE_STATS,
    SLOT_SIZE,
    unpack_address,
    unpack_port,
    unpack_slots,
)
from ebpfproxy.dataplane.bpf.plan import Drop, Put, Step, Write
from ebpfproxy.libbpf import lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ebpfproxy.model.services import Service

LIMITS = {
    "service_names": 32,
    "service_stats": 32,
    "backends": 128,
    "backend_stats": 128,
    "slots": 4096,
    "services": 64,
    "vips": 32,
    "source_ranges": 32,
    "local_sources": 8,
    "node_sources": 8,
    "dsr_backends": 32,
    "outliers": 32,
    "backend_health": 128,
}
ELEMENT = {
    "backends": BACKEND.size,
    "backend_health": BACKEND_HEALTH.size,
    "backend_stats": BACKEND_STATS.size,
    "service_stats": SERVICE_STATS.size,
    "slots": SLOT_SIZE,
}


class FakeMap:
    """A BPF map in memory."""

    def __init__(self, name: str, max_entries: int) -> None:
        self.name = name
        self.max_entries = max_entries
        self.entries: dict[bytes, bytes] = {}
        self.memory = bytearray(ELEMENT.get(name, 0) * max_entries)

    def items(self) -> list[tuple[bytes, bytes]]:
        return list(self.entries.items())

    def chunks(self, size: int) -> Iterator[list[tuple[bytes, bytes]]]:
        every = self.items()
        for start in range(0, len(every), size):
            yield every[start : start + size]

    def blocks(self, size: int) -> Iterator[tuple[memoryview, memoryview]]:
        for chunk in self.chunks(size):
            yield (
                memoryview(b"".join(key for key, _ in chunk)),
                memoryview(b"".join(value for _, value in chunk)),
            )

    def update_batch(self, items: Mapping[bytes, bytes]) -> None:
        self.entries.update(items)
        assert len(self.entries) <= self.max_entries, f"the kernel would refuse: map {self.name} is full"

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def delete(self, key: bytes) -> bool:
        return self.entries.pop(key, None) is not None

    def delete_batch(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.entries.pop(key, None)

    def mmap(self) -> memoryview:
        return memoryview(self.memory)


def fake_maps(limits: Mapping[str, int] = LIMITS) -> dict[str, FakeMap]:
    return {name: FakeMap(name, limit) for name, limit in limits.items()}


def single_writes(steps: Iterable[Step]) -> Iterator[Step]:
    """Yield the same writes one by one, arrays word by word: each may be the last before a kill."""
    for step in steps:
        match step:
            case Put(name, entries):
                yield from (Put(name, {key: value}) for key, value in entries.items())
            case Drop(name, keys):
                yield from (Drop(name, [key]) for key in keys)
            case Write(name, parts):
                for offset, content in parts:
                    for at in range(0, len(content), 8):
                        yield Write(name, [(offset + at, content[at : at + 8])])


def follow(maps: Mapping[str, FakeMap], value: bytes) -> list[tuple[str, int]]:
    """Return the backends that a program reaches from a value of map services, slot by slot.

    Asserts that every step of the way is there: nothing dangles.
    """
    entry = SERVICE.read(value)
    names = {int.from_bytes(key, "little") for key in maps["service_names"].entries}
    assert entry.id in names, "the service id has no name"
    start = entry.slot_base * SLOT_SIZE
    reached = []
    for number in unpack_slots(maps["slots"].mmap()[start : start + entry.slot_count * SLOT_SIZE]):
        backend = BACKEND.read(bytes(maps["backends"].memory[number * BACKEND.size :][: BACKEND.size]))
        assert number, "a slot is empty"
        assert backend.service == entry.id, "a slot leads to a backend of another service"
        assert backend.state in (lib.BACKEND_READY, lib.BACKEND_TERMINATING), (
            "a slot leads to an unusable one"
        )
        reached.append((unpack_address(backend.address), unpack_port(backend.port)))
    return reached


def expected(services: Iterable[Service]) -> dict[tuple[str, int, int, bool], frozenset[tuple[str, int]]]:
    """Return (VIP, port, protocol, is external) -> the backends that must be reached, from the model."""
    result = {}
    for each in sorted(services, key=lambda s: s.name, reverse=True):
        for frontend in each.frontends:
            for is_external in (False, True):
                key = (
                    frontend.address or "0.0.0.0",
                    frontend.port,
                    PROTOCOL_NUMBER[each.protocol],
                    is_external,
                )
                pool = each.pool(frontend.kind, is_external=is_external)
                result[key] = frozenset((b.address, b.port) for b in pool.backends)
    return result
