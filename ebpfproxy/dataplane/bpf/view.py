"""The read side: what the pinned maps say, as rows for people and programs; needs no agent.

Everything is read from the live maps at the moment of the call. Only the binding is imported, so that a
command answers at once.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from ebpfproxy.dataplane.bpf.layouts import (
    AFFINITY,
    AFFINITY_KEY,
    BACKEND,
    BACKEND_HEALTH,
    BACKEND_STATS,
    FLOW,
    FLOW_KEY,
    SERVICE,
    SERVICE_KEY,
    SERVICE_NAME,
    SERVICE_STATS,
    SLOT_SIZE,
    SOCKET_FLOW,
    SOCKET_KEY,
    U32,
    BackendValue,
    ServiceKey,
    ServiceValue,
    any_address,
    protocol_name,
    unpack_address,
    unpack_port,
    unpack_slots,
)
from ebpfproxy.dataplane.bpf.read import backend_columns, used_backends
from ebpfproxy.dataplane.rows import AffinityRow, BackendRow, ServiceRow
from ebpfproxy.errors import DataplaneError
from ebpfproxy.libbpf import Map, ffi, lib
from ebpfproxy.model import addresses
from ebpfproxy.model.services import FrontendKind, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from typing import TypeAlias

    Chosen: TypeAlias = Callable[[str], bool]  # whether a service's name is asked for

KINDS = {
    lib.VIP_CLUSTER_IP: FrontendKind.CLUSTER_IP.value,
    lib.VIP_EXTERNAL_IP: FrontendKind.EXTERNAL_IP.value,
    lib.VIP_LOAD_BALANCER: FrontendKind.LOAD_BALANCER.value,
    lib.VIP_NODE: FrontendKind.NODE_PORT.value,
}
SCHEDULERS = {getattr(lib, f"SCHED_{each.name}"): each.value for each in Scheduler}
STATES = {
    lib.BACKEND_READY: "ready",
    lib.BACKEND_TERMINATING: "terminating",
    lib.BACKEND_NOT_READY: "not-ready",
    lib.BACKEND_GONE: "gone",
}
_FIN_BOTH = lib.FLOW_FIN_FORWARD | lib.FLOW_FIN_REPLY
_NS = 1_000_000_000
_ANY = (any_address(4), any_address(6))  # what a NodePort's VIP is in map services


class ConnectionRow(msgspec.Struct, frozen=True):
    """One translated flow or socket."""

    kind: str  # forwarded | dsr (encapsulated to another node) | dsr-in (came so from one) | socket
    protocol: str
    client: str  # ADDRESS:PORT, or the socket's cookie
    source: str  # ADDRESS:PORT of this node that the backend sees; "" = the client's own
    vip: str
    backend: str
    service: str
    state: str  # new | established | closing | closed; of a socket connected | unconnected
    idle_s: float  # since the last packet; of a connected socket since it was connected


class MapRow(msgspec.Struct, frozen=True):
    """How full a map is."""

    name: str
    entries: int
    limit: int
    percent: float
    bytes: int  # kernel memory


class VerdictRow(msgspec.Struct, frozen=True):
    """How often the programs decided so."""

    verdict: str
    count: int  # packets, or calls
    bytes: int  # 0 for calls


class Maps:
    """The pinned maps of an agent, each opened when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, Map] = {}

    def __getitem__(self, name: str) -> Map:
        if name not in self._open:
            self._open[name] = Map.open(self._directory / name)
        return self._open[name]

    def names(self) -> list[str]:
        """Return the names of all pinned maps."""
        return sorted(path.name for path in self._directory.iterdir())

    def close(self) -> None:
        """Close the maps."""
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keys(self, name: str) -> list[bytes]:
        """Return the keys of a map."""
        return [item[0] for item in self[name].items()]

    # -- joins -----------------------------------------------------------------------------------

    def service_names(self) -> dict[int, tuple[str, int, int]]:
        """Return service id -> (name, protocol number, family)."""
        return {U32.unpack(key)[0]: service_name(value) for key, value in self["service_names"].items()}

    def frontends(self, ids: Container[int] | None = None) -> list[tuple[ServiceKey, ServiceValue]]:
        """Return the entries of map services: all, or those of the services with these ids."""
        return [
            (SERVICE_KEY.read(key), SERVICE.read(value))
            for key, value in self["services"].items()
            if ids is None or SERVICE.unpack(value)[0] in ids
        ]

    def backends(self, ids: Container[int] | None = None) -> dict[int, BackendValue]:
        """Return the backends by id: all, or those of the services with these ids."""
        memory = self["backends"].mmap()
        return {number: BACKEND.read(value) for number, value in used_backends(memory, ids)}

    def usable(self, services: Iterable[ServiceValue]) -> set[int]:
        """Return the ids of the backends that new connections to these may go to."""
        ranges = {(value.slot_base, value.slot_count): value for value in services}
        return {backend for value in ranges.values() for backend in self.slots(value)}

    def slots(self, service: ServiceValue) -> list[int]:
        """Return the backend ids in a service's slots."""
        start = service.slot_base * SLOT_SIZE
        return unpack_slots(self["slots"].mmap()[start : start + service.slot_count * SLOT_SIZE])


def service_name(value: bytes) -> tuple[str, int, int]:
    """Return (name, protocol number, family) of an entry of map service_names."""
    name = SERVICE_NAME.read(value)
    return name.text.rstrip(b"\0").decode(), name.proto, name.family


def open_maps(bpffs: Path) -> Maps:
    """Return the maps below ``bpffs``, as given to ``ebpfproxy run``.

    Raises:
        DataplaneError: there are none; nothing was ever programmed there.
    """
    directory = bpffs / "ebpfproxy" / "maps"
    try:
        is_there = any(directory.iterdir())
    except PermissionError as error:
        raise DataplaneError(f"read {directory}: permission denied; run it as root") from error
    except OSError:
        is_there = False
    if not is_there:
        raise DataplaneError(
            f"nothing is programmed here: there are no maps in {directory}; "
            "start `ebpfproxy run`, or name its BPF file system with --bpffs"
        )
    return Maps(directory)


def endpoint(address: bytes, port: bytes) -> str:
    """Return ADDRESS:PORT, an IPv6 address in brackets."""
    return addresses.endpoint(unpack_address(address), unpack_port(port))


def frontend(key: ServiceKey) -> str:
    """Return ADDRESS:PORT of an entry of map services; a NodePort's address is "*"."""
    if key.vip in _ANY:
        return f"*:{unpack_port(key.port)}"
    return endpoint(key.vip, key.port)


def _idle_s(stamp_ns: int) -> float:
    return round(max(0, time.monotonic_ns() - stamp_ns) / _NS, 1)


# -- nouns ---------------------------------------------------------------------------------------


def services(maps: Maps, chosen: Chosen | None = None) -> list[ServiceRow]:
    """Return every Service port that has a frontend, or the ``chosen`` of them, by name."""
    names, ids = _names(maps, chosen)
    frontends: dict[int, list[tuple[ServiceKey, ServiceValue]]] = defaultdict(list)
    for key, value in maps.frontends(ids):
        frontends[value.id].append((key, value))
    total, is_open = _tally(maps)
    counters = maps["service_stats"].mmap()
    rows = []
    for number, entries in frontends.items():
        name, proto, family = names.get(number, (f"#{number}", entries[0][0].proto, 0))
        count = SERVICE_STATS.read(counters[number * SERVICE_STATS.size :][: SERVICE_STATS.size])
        first = entries[0][1]
        rows.append(
            ServiceRow(
                name=name,
                protocol=protocol_name(proto),
                family=family,
                kinds=tuple(KINDS[bit] for bit in sorted({value.kind for _, value in entries})),
                frontends=_frontends(key for key, _ in entries),
                scheduler=SCHEDULERS.get(first.scheduler, str(first.scheduler)),
                backends_usable=len(maps.usable(value for _, value in entries)),
                backends_total=total[number],
                open=is_open[number],
                connections=count.connections,
                refused=count.refused,
                affinity_s=first.affinity_s,
            )
        )
    return sorted(rows, key=lambda row: (row.name, row.protocol, row.family))


def _names(
    maps: Maps, chosen: Chosen | None
) -> tuple[dict[int, tuple[str, int, int]], Container[int] | None]:
    """Return the names of the chosen services by id, and the ids to look for: None = all."""
    names = maps.service_names()
    if chosen is None:
        return names, None
    names = {number: name for number, name in names.items() if chosen(name[0])}
    return names, names


def _tally(maps: Maps) -> tuple[Counter[int], Counter[int]]:
    """Return how many backends each service has, and how many connections are open to them."""
    total: Counter[int] = Counter()
    is_open: Counter[int] = Counter()
    states, owners = backend_columns(maps["backends"].mmap())
    width = BACKEND_STATS.size // 8
    counts = maps["backend_stats"].mmap().cast("q")[BACKEND_STATS.offsets["open"] // 8 :: width]
    for state, owner, count in zip(states, owners, counts[: len(states)].tolist(), strict=True):
        if state != lib.BACKEND_FREE:
            total[owner] += state != lib.BACKEND_GONE
            if count > 0:
                is_open[owner] += count
    return total, is_open


def _frontends(keys: Iterable[ServiceKey]) -> tuple[str, ...]:
    """Return the frontends of a service port, those at addresses first."""
    found = {(key.vip in _ANY, key.port, key.vip): key for key in keys}
    return tuple(frontend(found[order]) for order in sorted(found))


def _backend_stats(memory: memoryview, number: int) -> tuple[int, int]:
    """Return (connections ever, open now) of a backend."""
    stats = BACKEND_STATS.read(memory[number * BACKEND_STATS.size :][: BACKEND_STATS.size])
    return stats.connections, stats.open


def backends(maps: Maps, chosen: Chosen | None = None) -> list[BackendRow]:
    """Return every backend, or those of the ``chosen`` services, by service, address and port."""
    names, ids = _names(maps, chosen)
    usable = maps.usable(value for _, value in maps.frontends(ids))
    stats = maps["backend_stats"].mmap()
    ejected = ejections(maps)
    rows = []
    found = sorted(maps.backends(ids).items(), key=lambda item: (item[1].address, item[1].port))
    for number, backend in found:
        connections, is_open = _backend_stats(stats, number)
        rows.append(
            BackendRow(
                service=names[backend.service][0] if backend.service in names else f"#{backend.service}",
                protocol=protocol_name(backend.proto),
                address=unpack_address(backend.address),
                port=unpack_port(backend.port),
                state=STATES.get(backend.state, str(backend.state)),
                weight=backend.weight,
                is_local=bool(backend.flags & lib.BACKEND_LOCAL),
                is_hinted_elsewhere=bool(backend.flags & lib.BACKEND_HINT_ELSEWHERE),
                is_usable=number in usable and number not in ejected,
                ejected_s=ejected.get(number, 0.0),
                open=max(0, is_open),
                connections=connections,
                id=number,
            )
        )
    return sorted(rows, key=lambda row: (row.service, row.protocol))


def ejections(maps: Maps) -> dict[int, float]:
    """Return the backends that are passed over for failing, and for how many seconds more."""
    now_ns = time.monotonic_ns()
    untils = maps["backend_health"].mmap().cast("Q")[:: BACKEND_HEALTH.size // 8].tolist()
    return {number: round((until - now_ns) / _NS, 1) for number, until in enumerate(untils) if until > now_ns}


def connections(maps: Maps, chosen: Chosen | None = None) -> list[ConnectionRow]:
    """Return the flows that pass through this node and the sockets on it, by service and client."""
    names = maps.service_names()
    rows = [*_flows(maps, names), *_sockets(maps, names)]
    if chosen is not None:
        rows = [row for row in rows if chosen(row.service)]
    return sorted(rows, key=lambda row: (row.service, row.kind, row.client))


def _flows(maps: Maps, names: dict[int, tuple[str, int, int]]) -> Iterator[ConnectionRow]:
    for key_bytes, value in itertools.chain(maps["conntrack"].items(), maps["new_flows"].items()):
        key, flow = FLOW_KEY.read(key_bytes), FLOW.read(value)
        if key.dir == lib.FLOW_FORWARD:
            yield ConnectionRow(
                kind=_flow_kind(flow.flags),
                protocol=protocol_name(key.proto),
                client=endpoint(key.src, key.sport),
                source=endpoint(flow.src, flow.sport) if flow.flags & lib.FLOW_SNAT else "",
                vip=endpoint(key.dst, key.dport),
                backend=endpoint(flow.dst, flow.dport),
                service=names[flow.service][0] if flow.service in names else "",
                state=_flow_state(flow.state),
                idle_s=_idle_s(flow.last_seen_ns),
            )


def _flow_kind(flags: int) -> str:
    if flags & lib.FLOW_DSR:
        return "dsr"
    return "dsr-in" if flags & lib.FLOW_DSR_IN else "forwarded"


def _flow_state(state: int) -> str:
    if state & lib.FLOW_RESET or state & _FIN_BOTH == _FIN_BOTH:
        return "closed"
    if state & _FIN_BOTH:
        return "closing"
    return "established" if state & lib.FLOW_REPLIED else "new"


def _sockets(maps: Maps, names: dict[int, tuple[str, int, int]]) -> Iterator[ConnectionRow]:
    for key_bytes, value in maps["sockets"].items():
        key, flow = SOCKET_KEY.read(key_bytes), SOCKET_FLOW.read(value)
        if key.kind != lib.SOCKET_FROM_BACKEND:
            yield ConnectionRow(
                kind="socket",
                protocol=protocol_name(key.proto),
                client=f"socket {key.cookie}",
                source="",
                vip=endpoint(flow.vip, flow.vip_port),
                backend=endpoint(flow.backend_addr, flow.backend_port),
                service=names[flow.service][0] if flow.service in names else "",
                state="connected" if key.kind == lib.SOCKET_CONNECTED else "unconnected",
                idle_s=_idle_s(flow.last_used_ns),
            )


def affinity(maps: Maps, chosen: Chosen | None = None) -> list[AffinityRow]:
    """Return the affinity entries that have not expired, by service and client."""
    entries = maps["affinity"].items()
    ids = {AFFINITY_KEY.read(key).service for key, _ in entries}
    if not ids:
        return []
    names, _ = _names(maps, chosen)
    found = maps.backends(ids)
    timeouts = {value.id: value.affinity_s for _, value in maps.frontends(ids)}
    rows = (affinity_row(key, value, names, found, timeouts) for key, value in entries)
    return sorted((row for row in rows if row), key=lambda row: (row.service, row.client))


def affinity_row(
    key_bytes: bytes,
    value: bytes,
    names: dict[int, tuple[str, int, int]],
    found: dict[int, BackendValue],
    timeouts: dict[int, int],
) -> AffinityRow | None:
    """Return an entry of map affinity; None: it expired, or its backend or service is gone."""
    key, entry = AFFINITY_KEY.read(key_bytes), AFFINITY.read(value)
    backend = found.get(entry.backend)
    left_s = timeouts.get(key.service, 0) - (time.monotonic_ns() - entry.last_used_ns) / _NS
    if left_s <= 0 or backend is None or backend.service != key.service or key.service not in names:
        return None
    is_address = key.kind == lib.CLIENT_ADDR
    return AffinityRow(
        service=names[key.service][0],
        client=unpack_address(key.client) if is_address else f"netns {_cookie(key.client)}",
        backend=endpoint(backend.address, backend.port),
        idle_s=_idle_s(entry.last_used_ns),
        expires_s=round(left_s, 1),
    )


def _cookie(client: bytes) -> int:
    """Return the network namespace cookie in words 2 and 3 of a client address."""
    cookie: int = ffi.from_buffer("uint64_t[]", client[8:])[0]
    return cookie


def map_usage(maps: Maps) -> list[MapRow]:
    """Return how full each map is; of the arrays, how much of them is in use."""
    arrays = usage_of_arrays(maps)
    rows = []
    for name in maps.names():
        opened = maps[name]
        entries = arrays[name] if name in arrays else opened.count()
        percent = round(100 * entries / opened.max_entries, 1)
        rows.append(MapRow(name, entries, opened.max_entries, percent, _memory(opened)))
    return rows


def usage_of_arrays(maps: Maps) -> dict[str, int]:
    """Return how much of each array is in use."""
    # Frontends share ranges of slots.
    ranges = {SERVICE.unpack(value)[1:3] for _, value in maps["services"].items()}
    states, _ = backend_columns(maps["backends"].mmap())
    in_use = len(states) - states.count(lib.BACKEND_FREE)
    return {
        "slots": sum(count for _, count in ranges),
        "backends": in_use,
        "backend_stats": in_use,
        "service_stats": maps["service_names"].count(),
        "verdicts": maps["verdicts"].max_entries,
    }


def _memory(opened: Map) -> int:
    """Return the kernel memory of a map in bytes."""
    for line in Path(f"/proc/self/fdinfo/{opened.fd}").read_text().splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    return 0


def verdicts(maps: Maps) -> list[VerdictRow]:
    """Return the verdict counters, in the order of abi.h."""
    rows = []
    for number, name in sorted(ffi.typeof("enum verdict").elements.items()):
        if number not in (lib.VERDICT_CONTINUE, lib.VERDICT_MAX):
            text = name.removeprefix("VERDICT_").lower().replace("_", "-")
            total = maps["verdicts"].get_percpu_sums(U32.pack(number))
            rows.append(VerdictRow(text, *total))
    return rows


__all__ = [
    "KINDS",
    "SCHEDULERS",
    "STATES",
    "ConnectionRow",
    "MapRow",
    "Maps",
    "VerdictRow",
    "affinity",
    "affinity_row",
    "backends",
    "connections",
    "ejections",
    "endpoint",
    "frontend",
    "map_usage",
    "open_maps",
    "service_name",
    "services",
    "verdicts",
]
