"""All objects -> all Services of this node; the cost follows what changed."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from ebpfproxy.model.objects import (
    LABEL_SERVICE_NAME,
    Endpoints,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Objects,
    Pod,
    Problem,
    Service,
)
from ebpfproxy.resolve.build import (
    Claim,
    NodeContext,
    ResolveOptions,
    build,
    claims_of,
    is_handled,
    vips_of,
)
from ebpfproxy.resolve.endpoints import groups_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ebpfproxy.model.services import Service as ModelService

__all__ = ["NodeContext", "Resolution", "ResolveOptions", "Resolver", "node_context"]

_K = TypeVar("_K")
_V = TypeVar("_V")


class Resolution(msgspec.Struct, frozen=True):
    """What a node must serve, in the order of namespace and name, and what a user should mend."""

    services: tuple[ModelService, ...]
    problems: tuple[Problem, ...]


def node_context(objects: Objects, name: str) -> NodeContext:
    """Return this node as its Node object describes it; without one it has no zone."""
    node = objects.get(ObjectKey("Node", "", name))
    return NodeContext(name, node.zone if isinstance(node, Node) else "")


class _Name(NamedTuple):
    """Names a Kubernetes Service."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Entry(NamedTuple):
    """What was resolved for one Service."""

    services: tuple[ModelService, ...]
    problems: tuple[Problem, ...]
    addresses: frozenset[str]  # of its endpoints, refused ones too
    uses_zones: bool  # of Node objects


_Pair = tuple[str, str, str]  # namespace, label, value


class _Touched(NamedTuple):
    """What changed objects concern."""

    services: set[_Name]
    vips: set[str]  # addresses that became or ceased to be a VIP
    node_ips: set[str]  # or a node's


class Resolver:
    """Turns objects into Services and remembers the result of each.

    Only Services are resolved again whose own input changed; all others are the identical values as
    before. The first call, and any call without ``changed``, goes the same way: everything that is not the
    identical object as before has changed.
    """

    def __init__(self) -> None:
        self._seen: dict[ObjectKey, Object] = {}
        self._node = NodeContext()
        self._options = ResolveOptions()
        self._services: dict[_Name, Service] = {}  # handled ones
        self._slices: dict[_Name, dict[str, EndpointSlice]] = {}
        self._pods: dict[_Pair, dict[str, Pod]] = {}
        self._selecting: dict[_Pair, set[_Name]] = {}  # by one pair of their selector
        self._zones: dict[str, str] = {}  # of each node
        self._node_ips: dict[str, int] = {}  # how many nodes have it
        self._vips: dict[str, int] = {}  # how many Services have it
        self._claims: dict[Claim, list[_Name]] = {}
        self._contested: set[Claim] = set()  # those of several Services
        self._entries: dict[_Name, _Entry] = {}
        self._order: list[_Name] = []  # keys of _entries, sorted
        self._flat: list[ModelService] = []  # the result, in that order
        self._starts = [0]  # where the part of each of them begins there; the end of the last one
        self._with_problems: dict[_Name, _Entry] = {}
        self._resolution = Resolution((), ())

    def resolve(
        self,
        objects: Objects,
        node: NodeContext,
        options: ResolveOptions | None = None,
        changed: Iterable[ObjectKey] | None = None,
    ) -> Resolution:
        """Return what ``node`` must serve.

        Args:
            objects: all objects, valid ones as ``decode`` makes them.
            node: this node.
            options: from the configuration.
            changed: at least the keys that changed since the last call; None = find out.
        """
        touched = _Touched(set(), set(), set())
        dirty = touched.services
        for key in self._all_changed(objects) if changed is None else changed:
            old, new = self._seen.get(key), objects.get(key)
            if old is not new:
                self._index(key, old, new, touched)
        options = options or ResolveOptions()
        if (node, options) != (self._node, self._options):
            self._node, self._options = node, options
            dirty.update(self._services)
        if moved := touched.vips | touched.node_ips:
            dirty.update(name for name, e in self._entries.items() if not e.addresses.isdisjoint(moved))
        if not dirty:
            return self._resolution
        for name in dirty:
            if name in self._services:
                self._entries[name] = self._resolve(name)
            else:
                self._entries.pop(name, None)
        self._arrange(dirty)
        problems = [entry.problems for _, entry in sorted(self._with_problems.items())]
        self._resolution = Resolution(tuple(self._flat), tuple(chain.from_iterable(problems)))
        return self._resolution

    def _arrange(self, dirty: set[_Name]) -> None:
        """Bring what was resolved anew into the order of the result."""
        places = {name: bisect_left(self._order, name) for name in dirty}
        parts = {
            name: slice(*self._starts[at : at + 2])
            for name, at in places.items()
            if self._order[at : at + 1] == [name]
        }
        sizes = {name: part.stop - part.start for name, part in parts.items()}
        if sizes == {name: len(self._entries[name].services) for name in dirty if name in self._entries}:
            for name, part in parts.items():
                self._flat[part] = self._entries[name].services
        else:
            kept = [name for name in self._order if name in self._entries]
            self._order = sorted(kept + [name for name in dirty - parts.keys() if name in self._entries])
            found = [self._entries[name].services for name in self._order]
            self._flat = [*chain.from_iterable(found)]
            self._starts = [*accumulate(map(len, found), initial=0)]
        for name in dirty:
            entry = self._entries.get(name)
            if entry is not None and entry.problems:
                self._with_problems[name] = entry
            else:
                self._with_problems.pop(name, None)

    # --- what changed ----------------------------------------------------------------------------

    def _all_changed(self, objects: Objects) -> list[ObjectKey]:
        seen = self._seen
        changed = [key for key, value in objects.items() if seen.get(key) is not value]
        return changed + [key for key in seen if key not in objects]

    def _index(self, key: ObjectKey, old: Object | None, new: Object | None, touched: _Touched) -> None:
        """Take over one object and collect what it touches."""
        if new is None:
            del self._seen[key]
        else:
            self._seen[key] = new
        for each, is_new in ((old, False), (new, True)):
            match each:
                case Service():
                    self._index_service(each, touched, is_new=is_new)
                case EndpointSlice():
                    name = _Name(key.namespace, each.metadata.labels.get(LABEL_SERVICE_NAME, ""))
                    _update(self._slices, name, key.name, each if is_new else None)
                    touched.services.add(name)
                case Endpoints():
                    touched.services.add(_Name(key.namespace, key.name))
                case Pod():
                    for pair in each.metadata.labels.items():
                        at = (key.namespace, *pair)
                        _update(self._pods, at, key.name, each if is_new else None)
                        touched.services.update(self._selecting.get(at, ()))
                case Node():
                    self._index_node(each, touched, is_new=is_new)

    def _index_service(self, service: Service, touched: _Touched, *, is_new: bool) -> None:
        name = _Name(service.metadata.namespace, service.metadata.name)
        touched.services.add(name)
        if not is_handled(service):
            return
        if is_new:
            self._services[name] = service
        else:
            del self._services[name]
        for vip in vips_of(service):
            _count(self._vips, vip, touched.vips, is_new=is_new)
        for claim in claims_of(service):
            claimants = self._claims.setdefault(claim, [])
            if is_new:
                claimants.append(name)
            else:
                claimants.remove(name)
            if len(claimants) > 1:
                self._contested.add(claim)
            else:
                self._contested.discard(claim)
            if claimants:
                touched.services.update(claimants)
            else:
                del self._claims[claim]
        if service.spec.selector:
            at = (name.namespace, *min(service.spec.selector.items()))
            if is_new:
                self._selecting.setdefault(at, set()).add(name)
            else:
                self._selecting[at].remove(name)
                if not self._selecting[at]:
                    del self._selecting[at]

    def _index_node(self, node: Node, touched: _Touched, *, is_new: bool) -> None:
        self._zones[node.metadata.name] = node.zone if is_new else ""
        touched.services.update(name for name, entry in self._entries.items() if entry.uses_zones)
        for address in node.ips:
            _count(self._node_ips, address, touched.node_ips, is_new=is_new)

    # --- one Service -----------------------------------------------------------------------------

    def _resolve(self, name: _Name) -> _Entry:
        service = self._services[name]
        endpoints = self._seen.get(ObjectKey("Endpoints", *name))
        by_name = self._slices.get(name, {})
        slices = [by_name[each] for each in sorted(by_name)] if len(by_name) > 1 else [*by_name.values()]
        pods = self._selected(service) if not slices else []
        groups = groups_of(
            service, slices, endpoints if isinstance(endpoints, Endpoints) else None, pods, self._zones
        )
        found = frozenset([each.addresses[0] for group in groups for each in group.slice.endpoints])
        # A host-network pod has its node's address, which an external IP may be as well.
        refused = {each for each in found if each in self._vips and each not in self._node_ips}
        lost = {
            claim: str(winner)
            for claim in self._contested and claims_of(service)
            if claim in self._contested and (winner := self._winner(claim)) != name
        }
        services, problems = build(service, groups, self._node, self._options, lost, refused)
        old = self._entries.get(name)
        if old is not None:
            known = {each.name: each for each in old.services}
            services = tuple(known[each.name] if known.get(each.name) == each else each for each in services)
        return _Entry(services, tuple(problems), found, bool(pods))

    def _selected(self, service: Service) -> list[Pod]:
        """Return the pods that a selector selects, by name."""
        selector = service.spec.selector.items()
        if not selector:
            return []
        namespace = service.metadata.namespace
        fewest = min((self._pods.get((namespace, *pair), {}) for pair in selector), key=len)
        return [pod for _, pod in sorted(fewest.items()) if selector <= pod.metadata.labels.items()]

    def _winner(self, claim: Claim) -> _Name:
        """Return the oldest Service of those that claim one thing; one never created is the youngest."""

        def age(name: _Name) -> tuple[bool, float, _Name]:
            created = self._services[name].metadata.creation_timestamp
            return created is None, created.timestamp() if created else 0.0, name

        return min(self._claims[claim], key=age)


def _update(index: dict[_K, dict[str, _V]], key: _K, name: str, value: _V | None) -> None:
    """Set or remove one value of an index of indexes."""
    values = index.setdefault(key, {})
    if value is None:
        values.pop(name, None)
    else:
        values[name] = value
    if not values:
        del index[key]


def _count(counts: dict[str, int], key: str, turned: set[str], *, is_new: bool) -> None:
    """Count one up or down; a key that comes to or leaves zero turns, and turning twice is not at all."""
    before = counts.get(key, 0)
    counts[key] = after = before + (1 if is_new else -1)
    if not after:
        del counts[key]
    if not before or not after:
        turned ^= {key}
