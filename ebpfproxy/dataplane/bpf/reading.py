"""What the maps count, for metrics: cheap enough to be read at every scrape, however full they are.

Opens the pinned maps by itself, so that it can run beside the agent's own thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.bpf import view
from ebpfproxy.dataplane.bpf.layouts import BACKEND, PROTOCOL_NAME, SERVICE, SERVICE_STATS
from ebpfproxy.libbpf import lib
from ebpfproxy.metrics import Reading, ServiceCount

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read(bpffs: Path) -> Reading:
    """Return what is counted in the maps below ``bpffs``.

    Raises:
        DataplaneError: they can't be read.
    """
    with view.open_maps(bpffs) as maps:
        services = list(_services(maps))
        return Reading(
            verdicts={row.verdict: row.count for row in view.verdicts(maps)},
            maps=_usage(maps, len(services)),
            services=services,
        )


def _services(maps: view.Maps) -> Iterator[ServiceCount]:
    memory, size = maps["service_stats"].mmap(), SERVICE_STATS.size
    for number, (text, proto, family) in maps.service_names().items():
        name, _, port = text.partition(":")
        namespace, _, service = name.partition("/")
        stats = SERVICE_STATS.read(memory[number * size : (number + 1) * size])
        protocol = PROTOCOL_NAME[proto].value if proto in PROTOCOL_NAME else str(proto)
        yield ServiceCount(namespace, service, port, protocol, family, stats.connections, stats.refused)


def _usage(maps: view.Maps, services: int) -> dict[str, tuple[int, int]]:
    """Return entries in use and limit of each map; of the arrays, how much of them is in use."""
    backends = maps["backends"]
    used = {"service_names": services, "service_stats": services, "slots": _slots(maps)}
    used["backends"] = used["backend_stats"] = _backends(backends.mmap())
    return {
        name: (used[name] if name in used else maps[name].estimate(), maps[name].max_entries)
        for name in maps.names()
        if name != "verdicts"  # an array of counters: never full
    }


def _slots(maps: view.Maps) -> int:
    """Return how many slots services point to; frontends share ranges."""
    return sum(count for _, count in {SERVICE.unpack(value)[1:3] for _, value in maps["services"].items()})


def _backends(memory: memoryview) -> int:
    """Return how many backends are not free."""
    states = bytes(memory[BACKEND.offsets["state"] :: BACKEND.size])
    return len(states) - states.count(lib.BACKEND_FREE)
