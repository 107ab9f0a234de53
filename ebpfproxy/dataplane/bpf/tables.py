"""What the maps must hold: bytes begin here.

``render_service`` is pure: one Service in, its frontends, backends and slot tables out. ``Tables`` gives them
ids and slot ranges and keeps two pictures of every map: ``have``, what the kernel holds, and ``wanted``. It
looks only at Services that are not the very objects it saw before, so its cost follows the change.
"""

from __future__ import annotations

from socket import IPPROTO_UDP
from typing import TYPE_CHECKING, Any, NamedTuple

from ebpfproxy.dataplane.bpf import schedulers
from ebpfproxy.dataplane.bpf.ids import IdAllocator, SlotAllocator, full
from ebpfproxy.dataplane.bpf.layouts import (
    BACKEND,
    DSR_BACKEND_KEY,
    LOCAL_SOURCE_KEY,
    NODE_SOURCE_KEY,
    OUTLIER,
    PROTOCOL_NUMBER,
    SERVICE,
    SERVICE_KEY,
    SERVICE_NAME,
    SLOT_SIZE,
    SOURCE_RANGE_KEY,
    U32,
    VIP,
    any_address,
    pack_address,
    pack_port,
    pack_prefix,
    pack_slots,
)
from ebpfproxy.diff import Delta, diff, turnover
from ebpfproxy.errors import MapFullError
from ebpfproxy.libbpf import lib
from ebpfproxy.model.services import (
    DesiredState,
    Empty,
    Frontend,
    FrontendKind,
    Policy,
    Readiness,
    Service,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

#: The maps that the control plane fills. ``backends`` is keyed by id, ``slots`` by the base of a range.
NAMES = (
    "service_names",
    "backends",
    "slots",
    "dsr_backends",
    "source_ranges",
    "local_sources",
    "node_sources",
    "outliers",
    "services",
    "vips",
)

#: Seconds until an unused slot range is handed out again; a program holds one for microseconds.
SLOT_GRACE_S = 1.0

Table = dict[Any, bytes]

_KIND = {
    FrontendKind.CLUSTER_IP: lib.VIP_CLUSTER_IP,
    FrontendKind.EXTERNAL_IP: lib.VIP_EXTERNAL_IP,
    FrontendKind.LOAD_BALANCER: lib.VIP_LOAD_BALANCER,
    FrontendKind.NODE_PORT: lib.VIP_NODE,
}
_STATE = {
    Readiness.READY: lib.BACKEND_READY,
    Readiness.TERMINATING: lib.BACKEND_TERMINATING,
    Readiness.NOT_READY: lib.BACKEND_NOT_READY,
}
_FLAGS = {
    (is_local, is_hinted): is_local * lib.BACKEND_LOCAL | is_hinted * lib.BACKEND_HINT_ELSEWHERE
    for is_local in (False, True)
    for is_hinted in (False, True)
}
_PROTO = SERVICE_NAME.offsets["proto"]
_SCOPES = ((lib.SCOPE_INTERNAL, False), (lib.SCOPE_EXTERNAL, True))
_RETIRED_VIP = VIP.pack(0)
_USED = U32.pack(1)  # the value of map source_ranges
_LOCAL, _OWN = U32.pack(lib.SOURCE_LOCAL), U32.pack(lib.SOURCE_LOCAL | lib.SOURCE_OWN)

#: The owner of the node's own addresses among the owners of VIPs, who are packed service names.
_NODE = b""


class FrontendEntry(NamedTuple):
    """One entry of map services, before ids and slots are known."""

    key: bytes
    kind: int
    flags: int
    table: int  # index into RenderedService.tables


class RenderedService(NamedTuple):
    """Everything the maps must know of one Service, before it has ids."""

    name: bytes  # value of service_names
    proto: int
    backends: dict[bytes, tuple[int, int, int]]  # address + port -> (state, weight, flags); tables index it
    tables: tuple[Sequence[int], ...]  # slot tables
    frontends: tuple[FrontendEntry, ...]
    vips: frozenset[tuple[bytes, int]]  # (address, kinds)
    source_ranges: tuple[tuple[int, bytes], ...]  # (bits, address)
    affinity_s: int
    scheduler: int
    is_dsr: bool
    syn_tries: int
    outlier: bytes | None  # value of map outliers


def name_bytes(service: Service) -> bytes:
    """Return the value of map service_names for a Service: it identifies it across restarts."""
    return SERVICE_NAME.pack(
        str(service.name).encode(), PROTOCOL_NUMBER[service.protocol], service.name.family
    )


class Masquerade(NamedTuple):
    """Whose traffic to a cluster IP gets this node's address as source (see ``DesiredState``)."""

    all: bool = False
    outside: bool = False


def _flags(
    service: Service, kind: FrontendKind, masquerade: Masquerade, *, is_external: bool, is_drop: bool
) -> int:
    """Return the bits of ``enum service_flag`` for a frontend."""
    flags = lib.SERVICE_DROP_EMPTY if is_drop else 0
    if kind is FrontendKind.CLUSTER_IP:
        if masquerade.all or (masquerade.outside and is_external):
            flags |= lib.SERVICE_SNAT_ALL
    elif service.policy(kind, is_external=is_external) is Policy.CLUSTER:
        flags |= lib.SERVICE_DSR if service.is_dsr else lib.SERVICE_SNAT
    if service.outliers:
        flags |= lib.SERVICE_EJECTS
    if service.policy(kind, is_external=is_external) is Policy.LOCAL:
        flags |= lib.SERVICE_LOCAL
    if kind is FrontendKind.LOAD_BALANCER and service.has_source_ranges:
        flags |= lib.SERVICE_SOURCE_RANGES
    return int(flags)


def _of_node(state: DesiredState) -> tuple[object, ...]:
    """Return the part of ``state`` that belongs to the node itself."""
    return state.addresses, state.local_sources, state.own_sources


def render_service(service: Service, masquerade: Masquerade = Masquerade()) -> RenderedService:  # noqa: B008
    """Return what the maps must know of ``service``. Pure."""
    proto = PROTOCOL_NUMBER[service.protocol]
    family = service.name.family
    backends = {
        pack_address(backend.address) + backend.port.to_bytes(2, "big"): (
            _STATE[backend.readiness],
            backend.weight,
            _FLAGS[backend.is_local, backend.is_hinted_elsewhere],
        )
        for backend in service.backends
    }
    tables: list[Sequence[int]] = []
    numbers: dict[bool, int] = {}  # is it the pool of policy Local? -> index into tables

    def table_of(policy: Policy) -> int:
        is_local = policy is Policy.LOCAL
        if is_local not in numbers:
            chosen = (service.local if is_local else service.cluster).backends
            slots = schedulers.slot_table(service.scheduler, chosen, service.maglev_size)
            if len(chosen) != len(service.backends):
                position = {(b.address, b.port): n for n, b in enumerate(service.backends)}
                places = [position[b.address, b.port] for b in chosen]
                slots = tuple([places[index] for index in slots])
            numbers[is_local] = len(tables)
            tables.append(slots)
        return numbers[is_local]

    frontends = []
    vips = set()
    for frontend in service.frontends:
        address = _frontend_address(frontend, family)
        port = pack_port(frontend.port)
        kind = _KIND[frontend.kind]
        pingable = False
        for scope, is_external in _SCOPES:
            policy = service.policy(frontend.kind, is_external=is_external)
            pool = service.pool(frontend.kind, is_external=is_external)
            is_drop = pool.on_empty is Empty.DROP
            flags = _flags(service, frontend.kind, masquerade, is_external=is_external, is_drop=is_drop)
            key = SERVICE_KEY.pack(address, port, proto, scope)
            table = table_of(policy)
            frontends.append(FrontendEntry(key, kind, flags, table))
            pingable = pingable or len(tables[table]) > 0
        if frontend.address:
            vips.add((address, kind | (lib.VIP_PINGABLE if pingable else 0)))
    return RenderedService(
        name=name_bytes(service),
        proto=proto,
        backends=backends,
        tables=tuple(tables),
        frontends=tuple(frontends),
        vips=frozenset(vips),
        source_ranges=tuple([pack_prefix(cidr) for cidr in service.source_ranges]),
        affinity_s=service.affinity_s,
        scheduler=schedulers.CODE[service.scheduler],
        is_dsr=service.is_dsr,
        syn_tries=service.syn_retries if len(service.cluster.backends) > 1 else 0,
        outlier=_outlier(service),
    )


def _outlier(service: Service) -> bytes | None:
    """Return the value of map outliers; at least one backend is always left."""
    if service.outliers is None:
        return None
    count = len(service.cluster.backends)
    most = min(count * service.outliers.max_percent // 100, count - 1)
    return OUTLIER.pack(service.outliers.failures, service.outliers.seconds, max(most, 0))


def _frontend_address(frontend: Frontend, family: int) -> bytes:
    return pack_address(frontend.address) if frontend.address else any_address(family)


class _Entry:
    """What one Service occupies: ids, slot ranges and the keys it claims."""

    __slots__ = (
        "backends",
        "dsr_backends",
        "frontends",
        "id",
        "name",
        "ranges",
        "service",
        "source_ranges",
        "vips",
    )

    def __init__(self, name: bytes, number: int) -> None:
        self.name = name
        self.id = number
        self.service: Service | None = None  # None: only known from the kernel, or removed
        self.backends: dict[bytes, int] = {}  # address + port -> id, GONE ones too
        self.ranges: dict[bytes, int] = {}  # content of a slot range -> base
        self.frontends: set[bytes] = set()
        self.vips: frozenset[tuple[bytes, int]] = frozenset()
        self.source_ranges: set[bytes] = set()
        self.dsr_backends: set[bytes] = set()


class _Claims:
    """Entries of one map that several owners may want; ``merge`` turns their claims into what is written."""

    def __init__(
        self, tables: Tables, name: str, merge: Callable[[bytes, dict[bytes, Any]], bytes | None]
    ) -> None:
        self._tables = tables
        self._name = name
        self._merge = merge
        self._claims: dict[bytes, dict[bytes, Any]] = {}

    def put(self, key: bytes, owner: bytes, value: Any) -> None:
        """Let ``owner`` want ``value``."""
        claims = self._claims.get(key)
        if claims is None:
            claims = self._claims[key] = {}
        claims[owner] = value
        self._tables.want(self._name, key, self._merge(key, claims))

    def drop(self, key: bytes, owner: bytes) -> None:
        """Let ``owner`` want nothing any more."""
        claims = self._claims.get(key)
        if claims is None or claims.pop(owner, None) is None:
            return
        if not claims:
            del self._claims[key]
        self.settle(key)

    def settle(self, key: bytes) -> None:
        """Want what the claims on ``key`` amount to."""
        self._tables.want(self._name, key, self._merge(key, self._claims.get(key, {})))


def _first_owner(key: bytes, claims: dict[bytes, bytes]) -> bytes | None:
    """Return the value of the first owner by name: the same winner on every node."""
    return claims[min(claims)] if claims else None


class Tables:
    """Wanted and present content of the maps, kept up to date by change. Touches no kernel.

    Args:
        have: what the maps hold: table per name in ``NAMES``, ``slots`` as base -> content for every range
            that ``services`` refers to.
        limits: max_entries of every map.

    Ids, slot ranges and claims are taken over from ``have``, so that nothing moves at a restart.
    """

    def __init__(self, have: Mapping[str, Table], limits: Mapping[str, int]) -> None:
        self.have = {name: dict(have.get(name, {})) for name in NAMES}
        self.wanted: dict[str, Table] = {name: {} for name in NAMES}
        self._touched: dict[str, set[Any]] = {name: set() for name in NAMES}
        self._new: dict[str, set[Any]] = {name: set() for name in NAMES}  # wanted, not in ``have``
        self._limits = limits
        smaller = min("service_names", "service_stats", key=limits.__getitem__)
        self._service_ids = IdAllocator(smaller, limits[smaller])
        smaller = min("backends", "backend_stats", key=limits.__getitem__)
        self._backend_ids = IdAllocator(smaller, limits[smaller])
        self._slots = SlotAllocator(limits["slots"], SLOT_GRACE_S)
        self._entries: dict[bytes, _Entry] = {}
        self._by_id: dict[int, _Entry] = {}
        self._services: tuple[Service, ...] = ()  # as ``update`` was last told
        self._unfit: list[Service] = []  # those of them that did not fit
        self._adopted: set[bytes] = set()  # names found in the kernel, no Service of that name fitted yet
        self._gone: dict[int, tuple[_Entry, bytes]] = {}
        self._freed_backends: list[int] = []
        self._freed_services: list[int] = []
        self._retired: list[int] = []  # bases of slot ranges that the next commit frees
        self._frontends = _Claims(self, "services", _first_owner)
        self._vips = _Claims(self, "vips", self._vip_value)
        self._retired_vips: set[bytes] = set()
        self._node_vips: frozenset[tuple[bytes, int]] = frozenset()
        self._state: DesiredState | None = None
        self._masquerade = Masquerade()
        self._take_over()

    # -- the two pictures ------------------------------------------------------------------------

    def want(self, name: str, key: Any, value: bytes | None) -> None:
        """Want ``value`` (None: no entry) at ``key`` of map ``name``."""
        if value is None:
            self.wanted[name].pop(key, None)
            self._new[name].discard(key)
        else:
            self.wanted[name][key] = value
            if key not in self.have[name]:
                self._new[name].add(key)
        self._touched[name].add(key)

    def want_all(self, name: str, entries: Table) -> None:
        """Want all of ``entries`` in map ``name``."""
        self.wanted[name].update(entries)
        have = self.have[name]
        self._new[name].update([key for key in entries if key not in have])
        self._touched[name].update(entries)

    def _vip_value(self, key: bytes, claims: dict[bytes, int]) -> bytes | None:
        """Return the union of the kinds that an address is claimed for.

        An address that is only the node's own needs no entry. One that served before keeps an entry
        without any kind, so that its established flows go on, until ``release_vips``.
        """
        kinds = 0
        for kind in claims.values():
            kinds |= kind
        is_retired = kinds in (0, lib.VIP_LOCAL)
        if not is_retired:
            self._retired_vips.discard(key)
            return VIP.pack(kinds)
        if key not in self.have["vips"]:
            return None
        self._retired_vips.add(key)
        return _RETIRED_VIP

    def delta(self) -> dict[str, Delta[Any, bytes]]:
        """Return what turns ``have`` into ``wanted``."""
        deltas = {}
        for name in NAMES:
            have, wanted, touched = self.have[name], self.wanted[name], self._touched[name]
            deltas[name] = diff(
                {key: have[key] for key in touched if key in have},
                {key: wanted[key] for key in touched if key in wanted},
            )
        return deltas

    def commit(self, deltas: Mapping[str, Delta[Any, bytes]], now_s: float) -> None:
        """Note that the kernel now holds what ``deltas`` say."""
        for name, delta in deltas.items():
            have = self.have[name]
            have.update(delta.upsert)
            for key in delta.delete:
                del have[key]
            self._touched[name].clear()
            self._new[name].clear()
        for base in self._retired:
            self._slots.release(base, now_s)
        self._backend_ids.release(*self._freed_backends)
        self._service_ids.release(*self._freed_services)
        self._retired, self._freed_backends, self._freed_services = [], [], []

    def collect(self, now_s: float) -> None:
        """Make slot ranges available whose grace period is over."""
        self._slots.collect(now_s)

    @property
    def gone(self) -> set[int]:
        """Ids of backends that are no longer wanted but may still be referred to."""
        return set(self._gone)

    @property
    def retired_vips(self) -> set[bytes]:
        """Addresses (16 bytes) that serve no more but may still have established flows."""
        return set(self._retired_vips)

    def affinity_s(self) -> dict[int, int]:
        """Return the affinity timeout of each service id that has one."""
        return {
            entry.id: entry.service.affinity_s
            for entry in self._entries.values()
            if entry.service is not None and entry.service.affinity_s
        }

    @property
    def ejects(self) -> bool:
        """Whether backends of some Service may be passed over because they fail."""
        return bool(self.wanted["outliers"])

    def has_lost_udp(self) -> bool:
        """Return whether a UDP backend went since the last commit."""
        return any(
            self._gone[number][0].name[_PROTO] == IPPROTO_UDP
            for number in self._touched["backends"]
            if number in self._gone
        )

    # -- changes ---------------------------------------------------------------------------------

    def update(self, state: DesiredState) -> list[tuple[Service | None, MapFullError]]:
        """Want what ``state`` says.

        Returns:
            The Services that did not fit, with the reason: they keep what they had. Services are tried
            again at every call until they fit. None in place of a Service: the node's addresses.
        """
        masquerade = Masquerade(state.masquerades_all, state.masquerades_outside)
        must_render = masquerade != self._masquerade
        self._masquerade = masquerade
        gone, came = turnover(self._services, state.services)
        left = set(map(id, gone))
        unfit = [service for service in self._unfit if id(service) not in left]
        changed = state.services if must_render else [*came, *unfit]
        self._services = state.services
        if gone or self._adopted:
            kept = set(map(name_bytes, state.services if self._adopted else changed))
            names = {name_bytes(service) for service in gone} | self._adopted
            for name in (names & self._entries.keys()) - kept:
                self._remove(self._entries[name])
        failures: list[tuple[Service | None, MapFullError]] = []
        for service in changed:
            try:
                self._admit(service)
            except MapFullError as error:
                failures.append((service, error))
        self._unfit = [service for service, _ in failures if service is not None]
        if self._state is None or _of_node(state) != _of_node(self._state):
            try:
                self._admit_node(state)
                self._state = state
            except MapFullError as error:
                failures.append((None, error))
        return failures

    def release_backends(self, unused: Iterable[int]) -> None:
        """Free the ids of gone backends that no entry of any map refers to any more."""
        for number in unused:
            if number not in self._gone:
                continue
            entry, key = self._gone.pop(number)
            del entry.backends[key]
            self.want("backends", number, None)
            self._freed_backends.append(number)
            self._forget_if_empty(entry)

    def release_vips(self, unused: Iterable[bytes]) -> None:
        """Remove retired addresses that no flow goes to any more."""
        for key in unused:
            if key in self._retired_vips:
                self._retired_vips.discard(key)
                self.want("vips", key, None)

    def _admit(self, service: Service) -> None:
        """Want ``service``, all of it or nothing.

        Raises:
            MapFullError: it does not fit; nothing was changed.
        """
        rendered = render_service(service, self._masquerade)
        entry = self._entries.get(rendered.name)
        known, old_ranges = (entry.backends, entry.ranges) if entry else ({}, {})
        fresh = [key for key in rendered.backends if key not in known]
        new_service: list[int] = []
        new_backends: list[int] = []
        new_bases: list[int] = []
        try:
            if entry is None:
                new_service = self._service_ids.allocate()
            number = entry.id if entry else new_service[0]
            new_backends = self._backend_ids.allocate(len(fresh))
            found = known | dict(zip(fresh, new_backends, strict=True)) if fresh else known
            ids = {key: found[key] for key in rendered.backends}
            in_order = list(ids.values())
            ranges: dict[bytes, int] = {}
            bases = []
            for table in rendered.tables:
                content = pack_slots([in_order[index] for index in table])
                if content and content not in ranges:
                    if content not in old_ranges:
                        new_bases.append(self._slots.allocate(len(table)))
                    ranges[content] = old_ranges[content] if content in old_ranges else new_bases[-1]
                bases.append(ranges.get(content, 0))
            sources = {
                SOURCE_RANGE_KEY.pack(32 + bits, number, address) for bits, address in rendered.source_ranges
            }
            sent_to = {
                DSR_BACKEND_KEY.pack(key[:16], number): U32.pack(ids[key])
                for key, (_, _, flags) in rendered.backends.items()
                if rendered.is_dsr and flags & lib.BACKEND_LOCAL
            }
            self._check_room("services", [frontend.key for frontend in rendered.frontends])
            self._check_room("vips", {address for address, _ in rendered.vips})
            self._check_room("source_ranges", sources)
            self._check_room("dsr_backends", sent_to)
            self._check_room("outliers", [number] if rendered.outlier else [])
        except MapFullError:
            self._service_ids.release(*new_service)
            self._backend_ids.release(*new_backends)
            for base in new_bases:
                self._slots.cancel(base)
            raise
        if entry is None:
            entry = self._entries[rendered.name] = self._by_id[number] = _Entry(rendered.name, number)
            self.want("service_names", number, rendered.name)
        self._set_backends(entry, rendered, ids)
        self._set_ranges(entry, ranges)
        self._set_frontends(entry, rendered, bases)
        self._set_sources(entry, sources)
        self._set_dsr_backends(entry, sent_to)
        if rendered.outlier != self.wanted["outliers"].get(number):
            self.want("outliers", number, rendered.outlier)
        entry.service = service
        self._adopted.discard(entry.name)

    def _set_backends(self, entry: _Entry, rendered: RenderedService, ids: dict[bytes, int]) -> None:
        proto, number, pack = rendered.proto, entry.id, BACKEND.pack
        for key in entry.backends.keys() - ids.keys():
            self._retire_backend(entry, key)
        values = {
            backend: pack(key[:16], key[16:], proto, state, number, weight, flags)
            for (key, (state, weight, flags)), backend in zip(
                rendered.backends.items(), ids.values(), strict=True
            )
        }
        self.want_all("backends", values)
        if self._gone:
            for backend in self._gone.keys() & values.keys():
                del self._gone[backend]
        entry.backends.update(ids)

    def _retire_backend(self, entry: _Entry, key: bytes) -> None:
        """Mark a backend as gone; its id stays until nothing refers to it."""
        number = entry.backends[key]
        if number in self._gone:
            return
        record = BACKEND.read(self.wanted["backends"][number])
        self.want("backends", number, BACKEND.write(record._replace(state=lib.BACKEND_GONE)))
        self._gone[number] = (entry, key)

    def _set_ranges(self, entry: _Entry, ranges: dict[bytes, int]) -> None:
        for content, base in ranges.items():
            if content not in entry.ranges:
                self.want("slots", base, content)
        for content, base in entry.ranges.items():
            if content not in ranges:
                self.want("slots", base, None)
                self._retired.append(base)
        entry.ranges = ranges

    def _set_frontends(self, entry: _Entry, rendered: RenderedService, bases: list[int]) -> None:
        keys = set()
        for key, kind, flags, table in rendered.frontends:
            count = len(rendered.tables[table])
            value = SERVICE.pack(
                entry.id,
                bases[table],
                count,
                rendered.affinity_s,
                rendered.scheduler,
                flags,
                kind,
                rendered.syn_tries,
            )
            self._frontends.put(key, entry.name, value)
            keys.add(key)
        for key in entry.frontends - keys:
            self._frontends.drop(key, entry.name)
        entry.frontends = keys
        if rendered.vips != entry.vips:
            self._set_vips(entry.name, entry.vips, rendered.vips)
            entry.vips = rendered.vips

    def _set_vips(
        self, owner: bytes, old: frozenset[tuple[bytes, int]], new: frozenset[tuple[bytes, int]]
    ) -> None:
        kinds: dict[bytes, int] = {}
        for address, kind in new:
            kinds[address] = kinds.get(address, 0) | kind
        for address, union in kinds.items():
            self._vips.put(address, owner, union)
        for address in {address for address, _ in old} - kinds.keys():
            self._vips.drop(address, owner)

    def _set_sources(self, entry: _Entry, sources: set[bytes]) -> None:
        for key in sources - entry.source_ranges:
            self.want("source_ranges", key, _USED)
        for key in entry.source_ranges - sources:
            self.want("source_ranges", key, None)
        entry.source_ranges = sources

    def _set_dsr_backends(self, entry: _Entry, sent_to: Table) -> None:
        self.want_all("dsr_backends", sent_to)
        for key in entry.dsr_backends - sent_to.keys():
            self.want("dsr_backends", key, None)
        entry.dsr_backends = set(sent_to)

    def _remove(self, entry: _Entry) -> None:
        """Want no frontend of this entry; its ids stay until nothing refers to its backends."""
        for key in entry.frontends:
            self._frontends.drop(key, entry.name)
        entry.frontends = set()
        self._set_vips(entry.name, entry.vips, frozenset())
        entry.vips = frozenset()
        self._set_ranges(entry, {})
        self._set_sources(entry, set())
        self._set_dsr_backends(entry, {})
        self.want("outliers", entry.id, None)
        for key in entry.backends:
            self._retire_backend(entry, key)
        entry.service = None
        self._adopted.discard(entry.name)
        self._forget_if_empty(entry)

    def _forget_if_empty(self, entry: _Entry) -> None:
        if entry.service is None and not entry.backends and not entry.frontends:
            self.want("service_names", entry.id, None)
            self._freed_services.append(entry.id)
            del self._entries[entry.name], self._by_id[entry.id]

    def _admit_node(self, state: DesiredState) -> None:
        """Want the node's own addresses and the prefixes of its pods."""
        addresses = state.addresses
        vips = frozenset(
            [(pack_address(address), lib.VIP_NODE) for address in addresses.serving]
            + [(pack_address(address), lib.VIP_LOCAL) for address in addresses.local | addresses.serving]
            + [(pack_address(source.address), lib.VIP_SNAT) for source in addresses.sources]
        )
        node_sources = {
            NODE_SOURCE_KEY.pack(source.device, source.family): pack_address(source.address)
            for source in addresses.sources
        }
        sources = {
            LOCAL_SOURCE_KEY.pack(*pack_prefix(cidr)): _OWN if cidr in state.own_sources else _LOCAL
            for cidr in state.local_sources | state.own_sources
        }
        self._check_room("vips", {address for address, kind in vips if kind != lib.VIP_LOCAL})
        self._check_room("local_sources", sources)
        self._check_room("node_sources", node_sources)
        self._set_vips(_NODE, self._node_vips, vips)
        self._node_vips = vips
        for key in self.wanted["local_sources"].keys() - sources.keys():
            self.want("local_sources", key, None)
        for key, kinds in sources.items():
            self.want("local_sources", key, kinds)
        for key in self.wanted["node_sources"].keys() - node_sources.keys():
            self.want("node_sources", key, None)
        for key, address in node_sources.items():
            self.want("node_sources", key, address)

    # -- room ------------------------------------------------------------------------------------

    def _check_room(self, name: str, keys: Iterable[Any]) -> None:
        """Refuse keys that would not fit even beside entries that the coming deletes remove."""
        have, new = self.have[name], self._new[name]
        more = sum(1 for key in keys if key not in have and key not in new)
        if more and len(have) + len(new) + more > self._limits[name]:
            raise full(name, self._limits[name])

    # -- restart ---------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Take ids, slot ranges and claims over from ``have``; what nobody owns will be removed."""
        for name in NAMES:
            self._touched[name].update(self.have[name])
        for number, text in self.have["service_names"].items():
            if text in self._entries or not 0 < number < self._service_ids.limit:
                continue
            self._service_ids.take(number)
            self._entries[text] = self._by_id[number] = _Entry(text, number)
            self._adopted.add(text)
            self.want("service_names", number, text)
        for number, value in self.have["backends"].items():
            record = BACKEND.read(value)
            entry = self._by_id.get(record.service)
            key = record.address + record.port
            if entry is None or key in entry.backends or not 0 < number < self._backend_ids.limit:
                continue
            self._backend_ids.take(number)
            entry.backends[key] = number
            self.want("backends", number, value)
            if record.state == lib.BACKEND_GONE:
                self._gone[number] = (entry, key)
        for key, value in self.have["services"].items():
            self._take_over_frontend(key, value)
        for key in self.have["vips"]:
            self._vips.settle(key)
        for key in self.have["source_ranges"]:
            entry = self._by_id.get(SOURCE_RANGE_KEY.read(key).service)
            if entry is not None:
                entry.source_ranges.add(key)
                self.want("source_ranges", key, _USED)
        for key, value in self.have["dsr_backends"].items():
            entry = self._by_id.get(DSR_BACKEND_KEY.read(key).service)
            if entry is not None:
                entry.dsr_backends.add(key)
                self.want("dsr_backends", key, value)

    def _take_over_frontend(self, key: bytes, value: bytes) -> None:
        service = SERVICE.read(value)
        entry = self._by_id.get(service.id)
        if entry is None:
            return
        content = self.have["slots"].get(service.slot_base, b"")
        if service.slot_count and entry.ranges.get(content) != service.slot_base:
            if len(content) != service.slot_count * SLOT_SIZE or content in entry.ranges:
                return
            try:
                self._slots.take(service.slot_base, service.slot_count)
            except ValueError:
                return
            entry.ranges[content] = service.slot_base
            self.want("slots", service.slot_base, content)
        entry.frontends.add(key)
        self._frontends.put(key, entry.name, value)
        address = SERVICE_KEY.read(key).vip
        if address not in (any_address(4), any_address(6)):
            entry.vips |= {(address, service.kind)}
            self._set_vips(entry.name, frozenset(), entry.vips)
