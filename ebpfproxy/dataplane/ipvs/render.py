"""From the desired state to virtual servers, addresses and set entries. Pure.

What a Service adds depends on it and on the context alone, so it is worked out once for each value.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ebpfproxy.dataplane.ipvs import sets
from ebpfproxy.dataplane.memo import Memo
from ebpfproxy.model.addresses import family
from ebpfproxy.model.services import FrontendKind, Policy, Pool, Protocol, Scheduler, Service
from ebpfproxy.netlink.ipvs import MH_PORT, PERSISTENT, Destination, Server, Settings
from ebpfproxy.xtables.sets import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ebpfproxy.model.services import Backend, DesiredState, Frontend

PROTOCOLS = {
    Protocol.TCP: socket.IPPROTO_TCP,
    Protocol.UDP: socket.IPPROTO_UDP,
    Protocol.SCTP: socket.IPPROTO_SCTP,
}
#: How IPVS names schedulers; it has no random one, and kube-proxy's default is rr.
SCHEDULERS = {Scheduler.RANDOM: "rr", Scheduler.MAGLEV: "mh"}
#: Schedulers of IPVS that only the configuration file can ask for, for all Services.
FURTHER_SCHEDULERS = ("lblc", "lblcr", "fo", "ovf")


class Context(msgspec.Struct, frozen=True):
    """What a Service's part depends on beside the Service."""

    node_addresses: frozenset[str] = frozenset()  # all of this node, VIPs on our device left out
    node_port_addresses: tuple[str, ...] = ()  # where NodePorts are served; no loopback
    default_scheduler: Scheduler = Scheduler.RANDOM  # of Services that name none
    further_scheduler: str = ""  # one of FURTHER_SCHEDULERS, for those


class Part(NamedTuple):
    """What one Service adds."""

    servers: dict[Server, Settings]
    destinations: dict[Destination, int]  # weights
    addresses: frozenset[str]  # for our device
    entries: tuple[Entry, ...]
    barred: tuple[str, ...]  # matches of iptables: what this node itself may not reach


class Rendered(NamedTuple):
    """All that is to be in the kernel, but rules."""

    servers: dict[Server, Settings]
    destinations: dict[Destination, int]
    addresses: dict[str, None]
    entries: dict[Entry, None]
    barred: dict[int, tuple[str, ...]]  # by family


class Renderer:
    """Turns desired states into IPVS' terms; Services that stayed the same cost nothing."""

    def __init__(self) -> None:
        self._memo = Memo(render_service)

    def render(self, services: Iterable[Service], context: Context) -> Rendered:
        """Return what is to be in the kernel."""
        found = Rendered({}, {}, {}, {}, {4: (), 6: ()})
        for service, part in self._memo.parts(services, context):
            found.servers.update(part.servers)
            found.destinations.update(part.destinations)
            found.addresses.update(dict.fromkeys(part.addresses))
            found.entries.update(dict.fromkeys(part.entries))
            if part.barred:
                found.barred[service.name.family] += part.barred
        for address in found.addresses:
            found.entries[Entry(sets.full_name(sets.IPVS_IPS, family(address)), address)] = None
        return found


def context_of(
    state: DesiredState, *, default_scheduler: Scheduler = Scheduler.RANDOM, further_scheduler: str = ""
) -> Context:
    """Return the context of a state's Services."""
    serving = (each for each in state.addresses.serving if not ipaddress.ip_address(each).is_loopback)
    return Context(state.addresses.local, tuple(sorted(serving)), default_scheduler, further_scheduler)


def scheduler_of(service: Service, context: Context) -> str:
    """Return IPVS' name of a Service's scheduler."""
    if context.further_scheduler and service.scheduler is context.default_scheduler:
        return context.further_scheduler
    return SCHEDULERS.get(service.scheduler, service.scheduler.value)


def render_service(service: Service, context: Context) -> Part:
    """Return what a Service adds."""
    scheduler = scheduler_of(service, context)
    settings = Settings(
        scheduler,
        # kube-proxy's, too: with the client's port in the hash, one client's connections are spread.
        (MH_PORT if scheduler == "mh" else 0) | (PERSISTENT if service.affinity_s else 0),
        service.affinity_s,
    )
    protocol = PROTOCOLS[service.protocol]
    servers: dict[Server, Settings] = {}
    destinations: dict[Destination, int] = {}
    addresses: set[str] = set()
    entries = list(_loop_back(service))
    barred: list[str] = []
    for frontend in service.frontends:
        is_node_port = frontend.kind is FrontendKind.NODE_PORT
        vips = (
            [each for each in context.node_port_addresses if family(each) == service.name.family]
            if is_node_port
            else [frontend.address]
        )
        pool, no_local = _pool(service, frontend.kind)
        for vip in vips:
            server = Server(protocol, vip, frontend.port)
            servers[server] = settings
            destinations.update(_destinations(server, pool.backends))
            if not is_node_port and vip not in context.node_addresses:
                addresses.add(vip)
            if no_local:
                entries.append(_entry(service, no_local, f"{_port(service, vip, frontend.port)}"))
        entries += _entries(service, frontend, vips)
    for frontend in service.frontends:
        if frontend.kind is FrontendKind.LOAD_BALANCER and service.has_source_ranges:
            ranges, bars = _source_ranges(service, frontend, context)
            entries += ranges
            barred += bars
    if service.health_check_node_port:
        entries.append(_entry(service, sets.HEALTH_CHECK, str(service.health_check_node_port)))
    return Part(servers, destinations, frozenset(addresses), tuple(entries), tuple(barred))


def _pool(service: Service, kind: FrontendKind) -> tuple[Pool, str]:
    """Return the backends of a kind of frontend, and the set of those that have none on this node.

    There is one virtual server for clients in the cluster and for those outside. Under external policy Local
    the former may go to backends elsewhere, and do when there is none here; the latter are dropped then.
    """
    if kind is FrontendKind.CLUSTER_IP:
        is_local = service.internal_policy is Policy.LOCAL
        pool = service.local if is_local else service.cluster
        return pool, sets.NO_LOCAL_INTERNAL if _lacks_local(service, is_local=is_local) else ""
    is_local = service.external_policy is Policy.LOCAL
    if _lacks_local(service, is_local=is_local):
        return service.cluster, sets.NO_LOCAL_EXTERNAL
    return service.local if is_local else service.cluster, ""


def _lacks_local(service: Service, *, is_local: bool) -> bool:
    return is_local and bool(service.cluster.backends) and not service.local.backends


def _destinations(server: Server, backends: Iterable[Backend]) -> Iterator[tuple[Destination, int]]:
    return ((Destination(server, each.address, each.port), each.weight) for each in backends)


def _entry(service: Service, name: str, text: str) -> Entry:
    return Entry(sets.full_name(name, service.name.family), text)


def _port(service: Service, address: str, port: int) -> str:
    return f"{address},{service.protocol.lower()}:{port}"


def _loop_back(service: Service) -> Iterator[Entry]:
    """Yield the entries for pods of this node that reach themselves."""
    for each in service.backends:
        if each.is_local:
            yield _entry(service, sets.LOOP_BACK, f"{_port(service, each.address, each.port)},{each.address}")


def _entries(service: Service, frontend: Frontend, vips: list[str]) -> Iterator[Entry]:
    """Yield the entries that say what a frontend is."""
    is_local = service.external_policy is Policy.LOCAL
    kind = frontend.kind
    if kind is FrontendKind.NODE_PORT:
        for each in (False, True) if is_local else (False,):
            name = sets.node_port_set(service.protocol, is_local=each)
            texts = (
                [_port(service, vip, frontend.port) for vip in vips]
                if service.protocol is Protocol.SCTP
                else [str(frontend.port)]
            )
            yield from (_entry(service, name, text) for text in texts)
        return
    text = _port(service, frontend.address, frontend.port)
    if kind is FrontendKind.CLUSTER_IP:
        yield _entry(service, sets.CLUSTER_IP, text)
    elif kind is FrontendKind.EXTERNAL_IP:
        yield _entry(service, sets.EXTERNAL_IP_LOCAL if is_local else sets.EXTERNAL_IP, text)
    else:
        yield _entry(service, sets.LOAD_BALANCER, text)
        if is_local:
            yield _entry(service, sets.LOAD_BALANCER_LOCAL, text)


def _source_ranges(service: Service, frontend: Frontend, context: Context) -> tuple[list[Entry], list[str]]:
    """Return the entries that guard a load balancer's VIP, and the match of what this node may not reach."""
    text = _port(service, frontend.address, frontend.port)
    entries = [_entry(service, sets.LOAD_BALANCER_FW, text)]
    networks = [ipaddress.ip_network(each) for each in service.source_ranges]
    entries += [
        _entry(service, sets.SOURCE_CIDR, f"{text},{_net(part)}")
        for network in networks
        for part in _parts(network)
    ]
    mine = [ipaddress.ip_address(each) for each in context.node_addresses]
    if any(address in network for network in networks for address in mine if not address.is_loopback):
        # The source of what this node sends to a VIP of its own is that VIP.
        return [*entries, _entry(service, sets.SOURCE_IP, f"{text},{frontend.address}")], []
    low = service.protocol.lower()
    vip = frontend.address
    return entries, [f"-s {vip} -m ipvs --vaddr {vip} --vproto {low} --vport {frontend.port}"]


def _parts(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return a prefix, or its halves: sets can't hold the empty one."""
    return network.subnets() if network.prefixlen == 0 else (network,)


def _net(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    """Return a prefix as ipset prints it: without the length of a whole address."""
    is_whole = network.prefixlen == network.max_prefixlen
    return str(network.network_address) if is_whole else str(network)
