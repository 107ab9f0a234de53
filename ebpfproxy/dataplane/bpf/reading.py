"""What the maps count, for metrics: cheap enough to be read at every scrape, however full they are.

Opens the pinned maps by itself, so that it can run beside the agent's own thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.bpf import view
from ebpfproxy.dataplane.bpf.layouts import SERVICE_STATS, protocol_name
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
        verdicts = view.verdicts(maps)
        return Reading(
            verdicts={row.verdict: row.count for row in verdicts},
            verdict_bytes={row.verdict: row.bytes for row in verdicts},
            maps=_usage(maps),
            services=services,
        )


def _services(maps: view.Maps) -> Iterator[ServiceCount]:
    memory, size = maps["service_stats"].mmap(), SERVICE_STATS.size
    for number, (text, proto, family) in maps.service_names().items():
        name, _, port = text.partition(":")
        namespace, _, service = name.partition("/")
        stats = SERVICE_STATS.read(memory[number * size : (number + 1) * size])
        yield ServiceCount(
            *(namespace, service, port, protocol_name(proto), family),
            connections=stats.connections,
            refused=stats.refused,
            retried=stats.retried,
            ejected=max(0, stats.ejected),
            packets=stats.packets,
            octets=stats.octets,
            reply_packets=stats.reply_packets,
            reply_octets=stats.reply_octets,
        )


def _usage(maps: view.Maps) -> dict[str, tuple[int, int]]:
    """Return entries in use and limit of each map; of the arrays, how much of them is in use."""
    used = view.usage_of_arrays(maps)
    return {
        name: (used[name] if name in used else maps[name].estimate(), maps[name].max_entries)
        for name in maps.names()
        if name not in {"verdicts", "rejects"}  # counters, and the programs' own memory: never full
    }
