"""Cluster IPs, node ports and load-balancer addresses for Services that have none yet.

With an API server this is done there; here it is done for Services from files. What was given out is kept in
a ledger, a plain mapping that the caller stores and hands in again at the next start.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from ebpfproxy.errors import ConfigError
from ebpfproxy.model import addresses
from ebpfproxy.model.objects import (
    LoadBalancerIngress,
    LoadBalancerStatus,
    Object,
    ObjectKey,
    Objects,
    Problem,
    Service,
    ServicePort,
    ServiceStatus,
)
from ebpfproxy.resolve.ranges import Range, Space, cluster_ip_range, node_port_range, pool_range

# Of each Service, by namespace/name: {"clusterIPs": [...], "nodePorts": {"80/TCP": 30080},
# "healthCheckNodePort": 30100, "loadBalancerIPs": [...]}; what it has none of is left out.
Ledger: TypeAlias = Mapping[str, Mapping[str, Any]]


class AllocationOptions(msgspec.Struct, frozen=True):
    """Where values come from."""

    cluster_ip_ranges: tuple[str, ...] = ("10.96.0.0/16",)  # at most one of each family, the default first
    node_port_range: tuple[int, int] = (30000, 32767)
    load_balancer_pools: tuple[str, ...] = ()  # prefixes, or first-last


class Allocation(msgspec.Struct, frozen=True):
    """The outcome of one pass."""

    objects: Objects  # all objects, Services filled in and refused ones left out; valid until the next pass
    changed: frozenset[ObjectKey]  # at least the keys of ``objects`` that changed
    ledger: Ledger  # to be stored; another value than before only if something changed
    problems: tuple[Problem, ...]
    repairs: tuple[str, ...]  # what was mended in the ledger, said once


class GivenByServer:
    """Stands in for an ``Allocator`` where an API server has given everything out: it changes nothing.

    Args:
        ledger: of a time without a server; it stays as it is.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def allocate(self, objects: Objects, changed: Iterable[ObjectKey] | None = None) -> Allocation:
        """Return the objects."""
        return Allocation(objects, frozenset(changed or ()), self._ledger, (), ())


class _Slot(NamedTuple):
    """What a value is for."""

    kind: str  # key of the ledger
    of: str = ""  # family, or port/protocol

    def protocol(self) -> str:
        """Return what the value is used for, "" for an address; health checks are HTTP."""
        return self.of.partition("/")[2] if self.kind == "nodePorts" else "TCP" if not self.of else ""


@dataclass(slots=True)
class _Need:
    """One value that a Service needs."""

    slot: _Slot
    space: Space[Any]
    ranges: tuple[Range, ...]
    path: str
    wanted: Any = None  # asked for in the object
    is_fatal: bool = True  # without it the Service is refused
    may_share: bool = False  # given by others, who know what they do


@dataclass(slots=True)
class _Draft:
    """A Service on its way to its values."""

    key: ObjectKey
    service: Service
    needs: list[_Need]
    held: dict[_Slot, Any]
    values: dict[_Slot, Any] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    is_refused: bool = False


class Allocator:
    """Fills in what Services leave open, and remembers.

    A Service keeps what it has; then come values that objects ask for, the oldest first; then free ones.
    Values of an object that came from an API server (it has a ``uid``) are kept even outside of our ranges.

    Args:
        options: where values come from.
        ledger: ``Allocation.ledger`` of the last run.

    Raises:
        ConfigError: a range is no range.
    """

    def __init__(self, options: AllocationOptions, ledger: Ledger | None = None) -> None:
        self._ips: Space[str] = Space(_to_text, _to_number)
        self._ports: Space[int] = Space(int, int)
        self._balancer_ips: Space[str] = Space(_to_text, _to_number)
        self._ip_ranges = {
            addresses.family(each): cluster_ip_range(each) for each in options.cluster_ip_ranges
        }
        if not self._ip_ranges or len(self._ip_ranges) < len(options.cluster_ip_ranges):
            raise ConfigError("cluster IP ranges: one of each family at most, and at least one")
        self._port_range = node_port_range(*options.node_port_range)
        self._pools = tuple(
            (addresses.family(each), pool_range(each)) for each in options.load_balancer_pools
        )
        self._repairs: list[str] = []
        self._is_copied = False  # whether the ledger was copied in this pass
        self._ledger = self._read(ledger or {})
        self._may_leak = True  # until the first pass
        self._seen: dict[ObjectKey, Object] = {}
        self._objects: dict[ObjectKey, Object] = {}
        self._drafts: dict[ObjectKey, _Draft] = {}  # of Services that have something or were refused
        self._unhappy: dict[ObjectKey, tuple[Problem, ...]] = {}

    def allocate(self, objects: Objects, changed: Iterable[ObjectKey] | None = None) -> Allocation:
        """Return the objects with every Service complete.

        Args:
            objects: all objects.
            changed: at least the keys that changed since the last call; None = find out.
        """
        if changed is None:
            changed = [key for key, value in objects.items() if self._seen.get(key) is not value]
            changed += [key for key in self._seen if key not in objects]
        touched = {key for key in changed if self._seen.get(key) is not objects.get(key)}
        drafts = []
        for key in touched | self._unhappy.keys():
            obj = objects.get(key)
            if obj is None:
                self._seen.pop(key, None)
                self._objects.pop(key, None)
            else:
                self._seen[key] = obj
            if key.kind == "Service":
                self._release(key)
            if isinstance(obj, Service):
                drafts.append(self._draft(key, obj))
            elif obj is not None:
                self._objects[key] = obj
        drafts.sort(key=_age)
        self._grant(drafts)
        touched.update(draft.key for draft in drafts if self._settle(draft))
        self._forget(touched)
        return Allocation(
            self._objects,
            frozenset(touched),
            self._ledger,
            tuple(problem for _, each in sorted(self._unhappy.items()) for problem in each),
            self._told(),
        )

    # --- the three rounds ------------------------------------------------------------------------

    def _grant(self, drafts: list[_Draft]) -> None:
        """Give every draft its values, or errors; ``drafts`` is sorted by age."""
        for draft in drafts:
            for need in draft.needs:
                self._keep(draft, need)
        for draft in drafts:
            for need in draft.needs:
                if need.wanted is not None and need.slot not in draft.values:
                    self._request(draft, need)
            if draft.is_refused:
                self._release_values(draft)
        for draft in drafts:
            for need in draft.needs:
                if need.slot not in draft.values and need.wanted is None and not draft.is_refused:
                    self._pick(draft, need)
            if draft.is_refused:
                self._release_values(draft)

    def _keep(self, draft: _Draft, need: _Need) -> None:
        """Give back what the ledger says, unless the object asks for something else."""
        value = draft.held.get(need.slot)
        if value is None or need.wanted not in (None, value):
            return
        if need.wanted is None and any(each.wanted == value for each in draft.needs):
            return  # the object asks for it for another of its ports
        if need.wanted is None and not any(need.space.holds(each, value) for each in need.ranges):
            self._repairs.append(f"{_name(draft.key)}: {value} lies outside of {_texts(need)}; replaced")
        elif self._take(draft, need, value):
            draft.values[need.slot] = value
        elif need.wanted is None:
            owner = _name(need.space.owners[value])
            self._repairs.append(f"{_name(draft.key)}: {value} was allocated to {owner} too; replaced")

    def _request(self, draft: _Draft, need: _Need) -> None:
        """Give what the object asks for."""
        is_trusted = bool(draft.service.metadata.uid) or not need.is_fatal
        in_range = any(need.space.holds(each, need.wanted) for each in need.ranges)
        if not in_range and not is_trusted:
            what = _what(need)
            why = f"provided {what} is not in the valid range. The range of valid {what}s is {_texts(need)}"
            self._fail(draft, need, why)
        elif self._take(draft, need, need.wanted) or need.may_share:
            draft.values[need.slot] = need.wanted
        else:
            owner = _name(need.space.owners[need.wanted])
            self._fail(draft, need, f"provided {_what(need)} is already allocated to {owner}")

    def _pick(self, draft: _Draft, need: _Need) -> None:
        """Give a free value; ports of one number share a node port, as TCP and UDP of a DNS server."""
        number = need.slot.of.partition("/")[0]
        for slot, value in draft.values.items():
            is_sibling = need.slot.kind == slot.kind == "nodePorts" and slot.of.partition("/")[0] == number
            if is_sibling and self._take(draft, need, value):
                draft.values[need.slot] = value
                return
        seed = "/".join((draft.key.namespace, draft.key.name, need.slot.kind, number))
        for each in need.ranges:
            if (value := need.space.pick(each, draft.key, seed)) is not None:
                draft.values[need.slot] = value
                return
        draft.is_refused |= need.is_fatal
        draft.errors.append((need.path, f"no free value is left in {_texts(need)}"))

    def _fail(self, draft: _Draft, need: _Need, why: str) -> None:
        value = f'"{need.wanted}"' if isinstance(need.wanted, str) else need.wanted
        draft.errors.append((need.path, f"Invalid value: {value}: {why}"))
        draft.is_refused |= need.is_fatal

    # --- what a Service needs --------------------------------------------------------------------

    def _draft(self, key: ObjectKey, service: Service) -> _Draft:
        draft = _Draft(key, service, [], _held(self._ledger.get(_name(key), {})))
        if service.spec.type == "ExternalName" or service.is_headless:
            return draft
        families = self._families(draft)
        by_family = {addresses.family(each): each for each in service.cluster_ips}
        for i, family in enumerate(families):
            path = f"spec.clusterIPs[{i}]" if service.spec.cluster_ips or i else "spec.clusterIP"
            ranges = tuple(each for at, each in self._ip_ranges.items() if at == family)
            slot = _Slot("clusterIPs", str(family))
            draft.needs.append(_Need(slot, self._ips, ranges, path, by_family.get(family)))
        draft.needs += self._port_needs(service)
        draft.needs += self._balancer_needs(service, families)
        return draft

    def _families(self, draft: _Draft) -> list[int]:
        """Return the families that a Service has, the first one first."""
        spec = draft.service.spec
        requested = [addresses.family(each) for each in draft.service.cluster_ips]
        families = list(requested)
        families += [int(each[-1]) for each in spec.ip_families if int(each[-1]) not in families]
        families = families or [next(iter(self._ip_ranges))]
        if spec.ip_family_policy in ("PreferDualStack", "RequireDualStack"):
            families += [each for each in self._ip_ranges if each not in families]
        known = set(self._ip_ranges)
        if draft.service.metadata.uid:
            known |= {addresses.family(each) for each in draft.service.cluster_ips}
        for i, family in enumerate(families):
            is_optional = spec.ip_family_policy == "PreferDualStack" and i > 0 and family not in requested
            if family not in known and not is_optional:
                path, value = f"spec.ipFamilies[{i}]", f"IPv{family}"
                draft.errors.append((path, f'Invalid value: "{value}": not configured on this cluster'))
                draft.is_refused = True
        families = [each for each in families if each in known]
        if spec.ip_family_policy == "RequireDualStack" and len(families) < 2 and not draft.is_refused:
            why = "this cluster is not configured for dual-stack services"
            draft.errors.append(("spec.ipFamilyPolicy", f'Invalid value: "RequireDualStack": {why}'))
            draft.is_refused = True
        return families

    def _port_needs(self, service: Service) -> list[_Need]:
        spec = service.spec
        if spec.type not in ("NodePort", "LoadBalancer"):
            return []
        is_automatic = spec.type == "NodePort" or spec.allocate_load_balancer_node_ports is not False
        needs = [
            _Need(
                _Slot("nodePorts", f"{port.port}/{port.protocol}"),
                self._ports,
                (self._port_range,),
                f"spec.ports[{i}].nodePort",
                port.node_port or None,
            )
            for i, port in enumerate(spec.ports)
            if port.node_port or is_automatic
        ]
        if spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local":
            slot, path = _Slot("healthCheckNodePort"), "spec.healthCheckNodePort"
            wanted = spec.health_check_node_port or None
            needs.append(_Need(slot, self._ports, (self._port_range,), path, wanted))
        return needs

    def _balancer_needs(self, service: Service, families: list[int]) -> list[_Need]:
        """Return the load-balancer addresses that a Service needs; not those of another class."""
        spec = service.spec
        if spec.type != "LoadBalancer":
            return []
        needs = []
        kind, space = "loadBalancerIPs", self._balancer_ips
        ingress = service.status.load_balancer.ingress
        for i, each in enumerate(ingress):
            path, slot = f"status.loadBalancer.ingress[{i}].ip", _Slot(kind, each.ip)
            if each.ip:
                needs.append(_Need(slot, space, (), path, each.ip, is_fatal=False, may_share=True))
        if ingress or spec.load_balancer_class is not None:
            return needs
        for family in families:
            pools = tuple(pool for at, pool in self._pools if at == family)
            is_named = bool(spec.load_balancer_ip) and addresses.family(spec.load_balancer_ip) == family
            wanted = spec.load_balancer_ip if is_named else None
            if wanted or (pools and not spec.load_balancer_ip):
                path, slot = "spec.loadBalancerIP", _Slot(kind, str(family))
                needs.append(_Need(slot, space, pools, path, wanted, is_fatal=False))
        return needs

    # --- book-keeping ----------------------------------------------------------------------------

    def _take(self, draft: _Draft, need: _Need, value: Any) -> bool:
        """Give a value; a Service itself can use a node port twice, for different protocols."""
        for slot, other in draft.values.items():
            if other == value and slot.protocol() == need.slot.protocol():
                return False
        return need.space.take(value, draft.key, self._range_of(need, value))

    def _range_of(self, need: _Need, value: Any) -> Range | None:
        return next((each for each in need.ranges if need.space.holds(each, value)), None)

    def _release(self, key: ObjectKey) -> None:
        if (draft := self._drafts.pop(key, None)) is not None:
            self._release_values(draft)

    def _release_values(self, draft: _Draft) -> None:
        for need in draft.needs:
            if (value := draft.values.get(need.slot)) is not None:
                need.space.release(value, draft.key, self._range_of(need, value))
        draft.values.clear()

    def _settle(self, draft: _Draft) -> bool:
        """Write down the outcome for one Service; return whether its object changed."""
        key = draft.key
        before = self._objects.pop(key, None)
        if draft.errors:
            self._unhappy[key] = tuple(Problem(*key, *error) for error in draft.errors)
        else:
            self._unhappy.pop(key, None)
        self._drafts[key] = draft
        draft.values = {
            each.slot: draft.values[each.slot] for each in draft.needs if each.slot in draft.values
        }
        if draft.is_refused:
            self._note(key, {})
            return before is not None
        filled = _filled(draft.service, draft.values)
        self._objects[key] = before if isinstance(before, Service) and before == filled else filled
        self._note(key, _entry(draft.values))
        return self._objects[key] is not before

    def _note(self, key: ObjectKey, entry: Mapping[str, Any]) -> None:
        """Change the ledger's entry, on a copy: whoever has the old ledger keeps it."""
        if self._ledger.get(_name(key), {}) == entry:
            return
        if not self._is_copied:
            self._ledger, self._is_copied = dict(self._ledger), True
        if entry:
            self._ledger[_name(key)] = entry
        else:
            self._ledger.pop(_name(key), None)

    def _forget(self, touched: set[ObjectKey]) -> None:
        """Drop what belongs to Services that are gone."""
        gone = [key for key in touched if key.kind == "Service" and key not in self._seen]
        for key in gone:
            self._unhappy.pop(key, None)
            self._note(key, {})
        if self._may_leak:
            self._may_leak = False
            for name in sorted(set(self._ledger) - {_name(key) for key in self._drafts}):
                self._note(ObjectKey("Service", *name.split("/", 1)), {})
                self._repairs.append(f"{name}: no such Service any more; what it had is free again")
        self._is_copied = False

    def _told(self) -> tuple[str, ...]:
        repairs, self._repairs = tuple(self._repairs), []
        return repairs

    def _read(self, ledger: Ledger) -> dict[str, Mapping[str, Any]]:
        """Return a ledger without entries that can't be read."""
        entries: dict[str, Mapping[str, Any]] = {}
        for name, entry in ledger.items():
            if not entry:
                continue
            try:
                read = msgspec.convert(entry, _Entry)
                valid = all(addresses.pack(each) for each in (*read.cluster_ips, *read.load_balancer_ips))
            except msgspec.ValidationError:
                valid = False
            if valid and name.count("/") == 1:
                entries[name] = entry
            else:
                self._repairs.append(f"{name}: its entry can't be read; dropped")
        return entries


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of a ledger's entry."""

    cluster_ips: list[str] = msgspec.field(name="clusterIPs", default_factory=list)
    node_ports: dict[str, int] = msgspec.field(name="nodePorts", default_factory=dict)
    health_check_node_port: int = msgspec.field(name="healthCheckNodePort", default=0)
    load_balancer_ips: list[str] = msgspec.field(name="loadBalancerIPs", default_factory=list)


def _held(entry: Mapping[str, Any]) -> dict[_Slot, Any]:
    """Return a ledger's entry by slot."""
    held: dict[_Slot, Any] = {
        _Slot(kind, str(addresses.family(each))): each
        for kind in ("clusterIPs", "loadBalancerIPs")
        for each in entry.get(kind, ())
    }
    held |= {_Slot("nodePorts", of): port for of, port in entry.get("nodePorts", {}).items()}
    if number := entry.get("healthCheckNodePort", 0):
        held[_Slot("healthCheckNodePort")] = number
    return held


def _entry(values: Mapping[_Slot, Any]) -> dict[str, Any]:
    """Return the ledger's entry of what a Service has."""
    entry: dict[str, Any] = {}
    for slot, value in values.items():
        if slot.kind == "nodePorts":
            entry.setdefault(slot.kind, {})[slot.of] = value
        elif slot.kind == "healthCheckNodePort":
            entry[slot.kind] = value
        else:
            entry.setdefault(slot.kind, []).append(value)
    return entry


def _filled(service: Service, values: Mapping[_Slot, Any]) -> Service:
    """Return a Service with its values in it, the same one if it has them."""
    if not values:
        return service
    spec, status = service.spec, service.status
    ips = tuple(value for slot, value in values.items() if slot.kind == "clusterIPs")
    if ips != spec.cluster_ips or ips[0] != spec.cluster_ip:
        families = tuple(f"IPv{addresses.family(each)}" for each in ips)
        spec = replace(spec, cluster_ip=ips[0], cluster_ips=ips, ip_families=families)
    ports = tuple(_filled_port(each, values) for each in spec.ports)
    health_check = values.get(_Slot("healthCheckNodePort"), 0)
    if ports != spec.ports or health_check != spec.health_check_node_port:
        spec = replace(spec, ports=ports, health_check_node_port=health_check)
    balancer_ips = [value for slot, value in values.items() if slot.kind == "loadBalancerIPs"]
    if balancer_ips and not status.load_balancer.ingress:
        ingress = tuple(LoadBalancerIngress(each) for each in balancer_ips)
        status = ServiceStatus(LoadBalancerStatus(ingress))
    if spec is service.spec and status is service.status:
        return service
    return replace(service, spec=spec, status=status)


def _filled_port(port: ServicePort, values: Mapping[_Slot, Any]) -> ServicePort:
    number = values.get(_Slot("nodePorts", f"{port.port}/{port.protocol}"), 0)
    return port if number == port.node_port else replace(port, node_port=number)


def _age(draft: _Draft) -> tuple[bool, float, ObjectKey]:
    """Sort the oldest first, and what an API server never made last."""
    created = draft.service.metadata.creation_timestamp
    return created is None, created.timestamp() if created else 0.0, draft.key


def _name(key: Any) -> str:
    return f"{key.namespace}/{key.name}"


def _what(need: _Need) -> str:
    return "port" if isinstance(need.wanted, int) else "IP"


def _texts(need: _Need) -> str:
    return ", ".join(each.text for each in need.ranges)


def _to_text(number: int) -> str:
    if number < 1 << 32:
        return socket.inet_ntoa(number.to_bytes(4, "big"))
    return socket.inet_ntop(socket.AF_INET6, number.to_bytes(16, "big"))


def _to_number(address: str) -> int:
    packed = addresses.pack(address)
    return int.from_bytes(packed, "big") if packed else -1
