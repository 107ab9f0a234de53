"""From the desired state to what the proxy listens on, and to the rules that lead VIPs there. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ebpfproxy.dataplane.userspace.protocol import Fate, Listener, ServicePort, Settings, Target
from ebpfproxy.model.addresses import family as family_of
from ebpfproxy.model.services import Empty, FrontendKind, Policy, Protocol, Readiness

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ebpfproxy.model.services import DesiredState, Frontend, Service

_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_LOOPBACK_PREFIXES = ("127.", "::1")


class Door(NamedTuple):
    """A frontend's VIP, port and protocol; address "" = the node's, for NodePorts."""

    family: int
    address: str
    protocol: str
    port: int


class Redirects(msgspec.Struct, frozen=True):
    """What netfilter has to do so that VIPs lead to the proxy.

    Attributes:
        to: doors, each to its listener.
        refused: doors that are no VIP's, and nobody is behind them.
        vips: by family: addresses that are nobody's but ours; what no door takes there is refused.
        alive: those of them that have a backend: they answer echo requests.
        node: by family: the addresses at which NodePorts are.
        target: by family: this node's address that packets are sent on to.
    """

    to: dict[Door, str] = {}
    refused: frozenset[Door] = frozenset()
    vips: dict[int, frozenset[str]] = {}
    alive: dict[int, frozenset[str]] = {}
    node: dict[int, frozenset[str]] = {}
    target: dict[int, str] = {}


class Want(msgspec.Struct, frozen=True):
    """Everything that the mode makes true."""

    settings: Settings
    services: dict[str, ServicePort]
    listeners: dict[str, Listener]
    redirects: Redirects
    problems: tuple[str, ...]


def render(state: DesiredState, settings: Settings, listen: Sequence[str]) -> Want:
    """Return what to make of ``state``.

    Args:
        state: as resolved; SCTP is passed over, there are no sockets for it.
        settings: the timeouts.
        listen: addresses to serve on, without rules; () = rules lead VIPs to the proxy.
    """
    served = [each for each in state.services if each.protocol is not Protocol.SCTP]
    services = {_key(each): _service_port(each) for each in served}
    addresses = state.addresses
    settings = msgspec.structs.replace(
        settings, inside=tuple(sorted((*state.local_sources, *map(_host_prefix, addresses.local))))
    )
    if listen:
        listeners, problems = _listen(served, listen)
        return Want(settings, services, listeners, Redirects(), problems)
    listeners, redirects = _redirect(served, state)
    return Want(settings, services, listeners, redirects, ())


def _host_prefix(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def _key(service: Service) -> str:
    return f"{service.name}/{service.protocol}/{service.name.family}"


def _service_port(service: Service) -> ServicePort:
    return ServicePort(
        protocol=service.protocol.value,
        family=service.name.family,
        scheduler=service.scheduler.value,
        affinity_s=service.affinity_s,
        cluster=tuple(Target(each.address, each.port, each.weight) for each in service.cluster.backends),
        local=tuple(Target(each.address, each.port, each.weight) for each in service.local.backends),
        known=frozenset(
            (each.address, each.port)
            for each in service.backends
            if each.readiness is not Readiness.NOT_READY
        ),
    )


def _fate(service: Service, kind: FrontendKind, *, is_external: bool) -> Fate:
    pool = service.pool(kind, is_external=is_external)
    if not pool.backends:
        return Fate.DROP if pool.on_empty is Empty.DROP else Fate.REJECT
    is_local = service.policy(kind, is_external=is_external) is Policy.LOCAL
    return Fate.LOCAL if is_local else Fate.CLUSTER


def _listener(service: Service, kind: FrontendKind, address: str = "", port: int = 0) -> Listener | None:
    """Return the listener of a kind of frontend; None: everybody is refused, which takes none."""
    inside = _fate(service, kind, is_external=False)
    outside = _fate(service, kind, is_external=True)
    if inside is outside is Fate.REJECT:
        return None
    has_ranges = kind is FrontendKind.LOAD_BALANCER and service.has_source_ranges
    ranges = service.source_ranges if has_ranges else None
    return Listener(_key(service), address, port, inside, outside, ranges)


def _entrance(service: Service, kind: FrontendKind) -> str:
    """Return which listener a kind of frontend has: those that never differ share one."""
    if kind is FrontendKind.LOAD_BALANCER and service.has_source_ranges:
        return "guarded"
    return "internal" if kind is FrontendKind.CLUSTER_IP else "external"


# --- rules lead VIPs to the proxy ---------------------------------------------------------------------------


def _redirect(services: Iterable[Service], state: DesiredState) -> tuple[dict[str, Listener], Redirects]:
    listeners: dict[str, Listener] = {}
    to: dict[Door, str] = {}
    refused: set[Door] = set()
    vips: dict[int, set[str]] = {4: set(), 6: set()}
    alive: dict[int, set[str]] = {4: set(), 6: set()}
    own = state.addresses.local
    for service in state.services:  # a VIP of SCTP alone is a VIP too
        family = service.name.family
        vips[family] |= {each.address for each in service.frontends if each.address} - own
    for service in services:
        family = service.name.family
        for frontend in service.frontends:
            door = Door(family, frontend.address, service.protocol.value, frontend.port)
            key = f"{_key(service)}/{_entrance(service, frontend.kind)}"
            listener = listeners.get(key) or _listener(service, frontend.kind)
            if listener is None:
                refused.add(door)
                continue
            listeners[key], to[door] = listener, key
            alive[family] |= {frontend.address} & vips[family]
    return listeners, Redirects(
        to=to,
        refused=frozenset(door for door in refused if not door.address or door.address in own),
        vips={family: frozenset(found) for family, found in vips.items()},
        alive={family: frozenset(found) for family, found in alive.items()},
        node={
            family: frozenset(each for each in state.addresses.serving if family_of(each) == family)
            for family in (4, 6)
        },
        target={family: _target(state, family) for family in (4, 6)},
    )


def _target(state: DesiredState, family: int) -> str:
    """Return the address of this node that redirected packets get.

    Not REDIRECT's choice, the first address of the device that a packet came in by: a pod's device often has
    none, and then the packet is lost.
    """
    for pool in (state.addresses.serving, state.addresses.local):
        found = sorted(
            each
            for each in pool
            if family_of(each) == family
            and not each.startswith(_LOOPBACK_PREFIXES)
            and not each.startswith(("fe80:", "169.254."))
        )
        if found:
            return found[0]
    return _LOOPBACK[family]  # then only this node's own processes come


# --- the proxy serves on addresses that it was given --------------------------------------------------------


def _listen(
    services: Sequence[Service], addresses: Sequence[str]
) -> tuple[dict[str, Listener], tuple[str, ...]]:
    """Return a listener for each address and port; the first Service that wants a port has it.

    An address that is a VIP serves that VIP's ports and NodePorts; every other one all cluster IPs' ports and
    NodePorts.
    """
    listeners: dict[str, Listener] = {}
    owners: dict[tuple[str, str, int], Service] = {}
    problems = []
    vips = {frontend.address for service in services for frontend in service.frontends}
    for address in addresses:
        for service in services:
            if family_of(address) != service.name.family:
                continue
            for frontend in service.frontends:
                if not _stands_for(address, frontend, is_vip=address in vips):
                    continue
                place = (address, service.protocol.value, frontend.port)
                owner = owners.setdefault(place, service)
                if owner.name != service.name:
                    problems.append(
                        f"{service.name}: port {frontend.port} of {address} is {owner.name}'s already; "
                        "give the Service a NodePort, or list its VIP as an address to listen on"
                    )
                    continue
                listener = _listener(service, frontend.kind, address, frontend.port)
                if listener is not None:
                    key = f"{_key(service)}/{_entrance(service, frontend.kind)}@{address}:{frontend.port}"
                    listeners[key] = listener
    return listeners, tuple(dict.fromkeys(problems))


def _stands_for(address: str, frontend: Frontend, *, is_vip: bool) -> bool:
    if frontend.kind is FrontendKind.NODE_PORT:
        return True
    if is_vip:
        return frontend.address == address
    return frontend.kind is FrontendKind.CLUSTER_IP
