"""From the desired state to chains and rules, of one IP family. Pure.

The layout is kube-proxy's, rule by rule: chains of the kernel's own lead to a few that all Services share,
those to chains of one Service, those to one chain for each of its endpoints. What a Service adds depends on
it and on the context alone, so it is worked out once for each value.

Source: kube-proxy, pkg/proxy/iptables, syncProxyRules, of Kubernetes 1.35.
"""

from __future__ import annotations

import ipaddress
from itertools import chain as flatten
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ebpfproxy.dataplane.memo import Memo
from ebpfproxy.model.addresses import family
from ebpfproxy.model.services import (
    Empty,
    FrontendKind,
    Policy,
    Pool,
    Protocol,
    Scheduler,
    Service,
)
from ebpfproxy.xtables import names
from ebpfproxy.xtables.chains import Chain, Jump, Rules

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ebpfproxy.model.services import Backend, DesiredState, NodePortAddresses

NAT_SERVICES = Chain("nat", names.SERVICES)
NAT_NODE_PORTS = Chain("nat", names.NODE_PORTS)
FILTER_SERVICES = Chain("filter", names.SERVICES)
FILTER_EXTERNAL = Chain("filter", names.EXTERNAL_SERVICES)
FILTER_NODE_PORTS = Chain("filter", names.NODE_PORTS)
FILTER_FIREWALL = Chain("filter", names.PROXY_FIREWALL)
SHARED = (
    *(FILTER_SERVICES, FILTER_EXTERNAL, FILTER_NODE_PORTS, FILTER_FIREWALL),
    *(NAT_SERVICES, NAT_NODE_PORTS),
)
#: With more endpoints than this, endpoints' rules carry no comments: that is 40 % of the size (kube-proxy's
#: number and words).
LARGE_ENDPOINTS = 1000

_NEW = "-m conntrack --ctstate NEW"
_ESTABLISHED = "-m conntrack --ctstate RELATED,ESTABLISHED"
_FROM_OUTSIDE = "-d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT"
_EXTERNAL = "kubernetes externally-visible service portals"
_PORTALS = "kubernetes service portals"
_BALANCER = "kubernetes load balancer firewall"
JUMPS = (
    Jump("filter", "INPUT", names.EXTERNAL_SERVICES, _EXTERNAL, _NEW),
    Jump("filter", "FORWARD", names.EXTERNAL_SERVICES, _EXTERNAL, _NEW),
    Jump("filter", "INPUT", names.NODE_PORTS, "kubernetes health check service ports"),
    Jump("filter", "FORWARD", names.SERVICES, _PORTALS, _NEW),
    Jump("filter", "OUTPUT", names.SERVICES, _PORTALS, _NEW),
    Jump("filter", "FORWARD", names.FORWARD, "kubernetes forwarding rules"),
    Jump("filter", "INPUT", names.PROXY_FIREWALL, _BALANCER, _NEW),
    Jump("filter", "OUTPUT", names.PROXY_FIREWALL, _BALANCER, _NEW),
    Jump("filter", "FORWARD", names.PROXY_FIREWALL, _BALANCER, _NEW),
    Jump("nat", "OUTPUT", names.SERVICES, _PORTALS),
    Jump("nat", "PREROUTING", names.SERVICES, _PORTALS),
    Jump("nat", "POSTROUTING", names.POSTROUTING, "kubernetes postrouting rules"),
)
#: With NodePorts on 127.0.0.1: keeps others out of this host's loopback, see ``fixed``.
LOCALHOST_JUMPS = (
    Jump("filter", "INPUT", names.FIREWALL),
    Jump("filter", "OUTPUT", names.FIREWALL),
)


class Context(msgspec.Struct, frozen=True):
    """What a Service's rules depend on beside the Service."""

    family: int = 4  # 4 | 6
    mark: str = "0x4000"
    masquerades_all: bool = False
    masquerades_outside: bool = False
    local_sources: tuple[str, ...] = ()  # of this family
    node_addresses: tuple[str, ...] = ()  # of this family, without loopback
    is_large: bool = False
    has_recent: bool = True  # the kernel has the match that affinity needs


class Part(NamedTuple):
    """What one Service adds."""

    shared: dict[Chain, Rules]  # rules in chains that all Services share
    own: dict[Chain, Rules]  # its chains


class Host(NamedTuple):
    """What the fixed rules depend on."""

    serving: tuple[str, ...]  # the addresses of NodePorts, of this family; () with ``serves_everywhere``
    serves_everywhere: bool  # NodePorts are served on every address that is the node's
    has_localhost: bool  # on 127.0.0.1 too
    has_random_fully: bool
    drops_invalid: bool = True


class Renderer:
    """Turns desired states into chains; Services that stayed the same cost nothing."""

    def __init__(self) -> None:
        self._memo = Memo(render_service)

    def chains(self, services: Iterable[Service], context: Context, host: Host) -> dict[Chain, Rules]:
        """Return all chains of ours in one family, and their rules."""
        parts = self._memo.parts((each for each in services if each.name.family == context.family), context)
        found: dict[Chain, Rules] = fixed(context, host)
        for chain in SHARED:
            found[chain] = (
                *flatten.from_iterable(part.shared.get(chain, ()) for _, part in parts),
                *found.get(chain, ()),
            )
        for _, part in parts:
            found.update(part.own)
        return found


def context_of(state: DesiredState, number: int, *, mark: int, is_large: bool, has_recent: bool) -> Context:
    """Return the context of a state's Services in one family."""
    return Context(
        family=number,
        mark=f"{mark:#x}",
        masquerades_all=state.masquerades_all,
        masquerades_outside=state.masquerades_outside,
        local_sources=tuple(sorted(each for each in state.local_sources if family(each) == number)),
        node_addresses=tuple(
            sorted(
                each for each in state.addresses.local if family(each) == number and not _is_loopback(each)
            )
        ),
        is_large=is_large,
        has_recent=has_recent,
    )


def host_of(
    addresses: NodePortAddresses,
    number: int,
    *,
    has_random_fully: bool,
    allows_localhost: bool,
    drops_invalid: bool = True,
) -> Host:
    """Return what the fixed rules of one family depend on."""
    serving = sorted(each for each in addresses.serving if family(each) == number)
    mine = [each for each in addresses.local if family(each) == number and not _is_link_local(each)]
    has_loopback = any(_is_loopback(each) for each in serving)
    everywhere = bool(serving) and set(mine) == set(serving)
    return Host(
        serving=() if everywhere else tuple(each for each in serving if not _is_loopback(each)),
        serves_everywhere=everywhere,
        has_localhost=number == 4 and allows_localhost and has_loopback,
        has_random_fully=has_random_fully,
        drops_invalid=drops_invalid,
    )


# --- what is there with no Service ----------------------------------------------------------------------


def fixed(context: Context, host: Host) -> dict[Chain, Rules]:
    """Return the chains that do not depend on Services, and the end of those that do."""
    mark = f"{context.mark}/{context.mark}"
    fully = " --random-fully" if host.has_random_fully else ""
    found = {
        Chain("nat", names.POSTROUTING): (
            f"-m mark ! --mark {mark} -j RETURN",
            # Else a packet that comes through here again is masqueraded again.
            f"-j MARK --xor-mark {context.mark}",
            f'-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE{fully}',
        ),
        Chain("nat", names.MARK_MASQ): (f"-j MARK --or-mark {context.mark}",),
        Chain("filter", names.FORWARD): (
            # A packet out of window would reach a client untranslated, which answers with RST
            # (kubernetes issue 74839).
            *(("-m conntrack --ctstate INVALID -j DROP",) if host.drops_invalid else ()),
            f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {mark} -j ACCEPT',
            f"{_comment('kubernetes forwarding conntrack rule')} {_ESTABLISHED} -j ACCEPT",
        ),
        NAT_SERVICES: _to_node_ports(context, host),
    }
    if context.masquerades_outside and len(context.local_sources) > 1:
        # "None of these" is more than one rule can say.
        found[Chain("nat", names.MARK_OUTSIDE)] = (
            *(f"-s {prefix} -j RETURN" for prefix in context.local_sources),
            f"-j {names.MARK_MASQ}",
        )
    if host.has_localhost:
        # route_localnet, which NodePorts on 127.0.0.1 need, would let neighbours reach what listens there
        # (CVE-2020-8558).
        found[Chain("filter", names.FIREWALL)] = (
            f"{_comment('block incoming localnet connections')} {_FROM_OUTSIDE} -j DROP",
        )
    return found


def _to_node_ports(context: Context, host: Host) -> Rules:
    """Return the last rules of the chain of all Services: what leads to NodePorts."""
    comment = (
        '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
    )
    jump = f"-j {names.NODE_PORTS}"
    if host.serves_everywhere:
        # IPv6 has no route_localnet.
        not_loopback = (
            "" if host.has_localhost else f" ! -d {'::1/128' if context.family == 6 else '127.0.0.0/8'}"
        )
        return (f"{comment} -m addrtype --dst-type LOCAL{not_loopback} {jump}",)
    listed = (*host.serving, *(("127.0.0.1",) if host.has_localhost else ()))
    return tuple(f"{comment} -d {address} {jump}" for address in listed)


# --- one Service ----------------------------------------------------------------------------------------


def render_service(service: Service, context: Context) -> Part:
    """Return what a Service adds."""
    shared: dict[Chain, list[str]] = {chain: [] for chain in SHARED}
    own: dict[Chain, Rules] = {}
    has_endpoints = bool(service.cluster.backends)
    is_local = service.external_policy is Policy.LOCAL
    internal = service.local if service.internal_policy is Policy.LOCAL else service.cluster
    external = service.local if is_local else service.cluster
    is_external = any(each.kind is not FrontendKind.CLUSTER_IP for each in service.frontends)
    svc, svl = names.of_service("SVC", service), names.of_service("SVL", service)
    ext, firewall = names.of_service("EXT", service), names.of_service("FW", service)
    to_internal = svl if service.internal_policy is Policy.LOCAL else svc
    to_external = svl if is_local else svc
    vips = [each.address for each in service.frontends if each.kind is FrontendKind.LOAD_BALANCER]
    is_guarded = has_endpoints and bool(vips) and service.has_source_ranges

    for frontend in service.frontends:
        words = _FRONTENDS[frontend.kind]
        is_cluster_ip = frontend.kind is FrontendKind.CLUSTER_IP
        pool = internal if is_cluster_ip else external
        match = _match(service, frontend.address, frontend.port)
        # Local clients of an external VIP are served by any endpoint, whatever the policy.
        if pool.backends or (has_endpoints and not is_cluster_ip):
            entry = NAT_NODE_PORTS if frontend.kind is FrontendKind.NODE_PORT else NAT_SERVICES
            is_behind = is_guarded and frontend.kind is FrontendKind.LOAD_BALANCER
            goal = to_internal if is_cluster_ip else firewall if is_behind else ext
            shared[entry].append(f"{_comment(f'{service.name}{words}')} {match} -j {goal}")
            if is_behind:
                why = _comment(f"{service.name} traffic not accepted by {firewall}")
                shared[FILTER_FIREWALL].append(f"{why} {match} -j DROP")
        if not pool.backends:
            none = "has no local endpoints" if has_endpoints else "has no endpoints"
            at = FILTER_SERVICES if is_cluster_ip else FILTER_EXTERNAL
            local = "-m addrtype --dst-type LOCAL " if frontend.kind is FrontendKind.NODE_PORT else ""
            what = _comment(f"{service.name} {none}")
            shared[at].append(f"{what} {local}{match} -j {_refusal(service, pool)}")
        if is_cluster_ip and pool.backends:
            chain = Chain("nat", to_internal)
            own[chain] = own.get(chain, ()) + tuple(
                f"{_comment(f'{service.name} cluster IP')} {match} {each}"
                for each in _masquerade_internal(context)
            )
    if service.health_check_node_port:
        shared[FILTER_NODE_PORTS].append(
            f"{_comment(f'{service.name} health check node port')} "
            f"-m tcp -p tcp --dport {service.health_check_node_port} -j ACCEPT"
        )
    if is_external and has_endpoints:
        own[Chain("nat", ext)] = _external(
            service, context, svc, to_external, has_pool=bool(external.backends)
        )
    if is_guarded:
        own[Chain("nat", firewall)] = _source_ranges(service, context, ext, vips)
    used: dict[Backend, None] = {}
    for name, pool, is_used in (
        (svc, service.cluster, is_external or to_internal == svc),
        (svl, service.local, to_internal == svl or (is_external and is_local)),
    ):
        if is_used and pool.backends:
            chain = Chain("nat", name)
            own[chain] = own.get(chain, ()) + balance(service, pool, context)
            used.update(dict.fromkeys(pool.backends))
    for backend in used:
        own[Chain("nat", names.of_backend(service, backend))] = _endpoint(service, backend, context)
    return Part({chain: tuple(rules) for chain, rules in shared.items() if rules}, own)


_FRONTENDS = {
    FrontendKind.CLUSTER_IP: " cluster IP",
    FrontendKind.EXTERNAL_IP: " external IP",
    FrontendKind.LOAD_BALANCER: " loadbalancer IP",
    FrontendKind.NODE_PORT: "",
}


def _refusal(service: Service, pool: Pool) -> str:
    """Return what happens to packets for an empty pool.

    kube-proxy answers TCP with an ICMP error as well. The kernel sends one of those a second to a client
    (icmp_ratelimit), so the next connection would wait for its second SYN; a reset is not limited.
    """
    if pool.on_empty is Empty.REJECT and service.protocol is Protocol.TCP:
        return "REJECT --reject-with tcp-reset"
    return pool.on_empty.upper()


def _comment(text: str) -> str:
    return f'-m comment --comment "{text}"'


def _match(service: Service, address: str, port: int) -> str:
    protocol = service.protocol.lower()
    to = f" -d {address}" if address else ""
    return f"-m {protocol} -p {protocol}{to} --dport {port}"


def _masquerade_internal(context: Context) -> Rules:
    """Return the ends of the rules that give a cluster IP's clients this node's address."""
    if context.masquerades_all:
        return (f"-j {names.MARK_MASQ}",)
    if not context.masquerades_outside or not context.local_sources:
        return ()
    if len(context.local_sources) > 1:
        return (f"-j {names.MARK_OUTSIDE}",)
    return (f"! -s {context.local_sources[0]} -j {names.MARK_MASQ}",)


def _external(service: Service, context: Context, svc: str, policy: str, *, has_pool: bool) -> Rules:
    """Return the chain for the VIPs that are reached from outside."""
    what = f"{service.name} external destinations"
    if service.external_policy is not Policy.LOCAL:
        return (
            f"{_comment(f'masquerade traffic for {what}')} -j {names.MARK_MASQ}",
            f"-j {policy}",
        )
    local = "-m addrtype --src-type LOCAL"
    return (
        *(f"{_comment(f'pod traffic for {what}')} -s {prefix} -j {svc}" for prefix in context.local_sources),
        # The VIP may be an address of this node, and then it is the source.
        f"{_comment(f'masquerade LOCAL traffic for {what}')} {local} -j {names.MARK_MASQ}",
        f"{_comment(f'route LOCAL traffic for {what}')} {local} -j {svc}",
        *((f"-j {policy}",) if has_pool else ()),
    )


def _source_ranges(service: Service, context: Context, ext: str, vips: Sequence[str]) -> Rules:
    """Return the chain that lets only the source ranges in; what passes it is dropped in the filter table."""
    start = _comment(f"{service.name} loadbalancer IP")
    networks = [ipaddress.ip_network(each) for each in service.source_ranges]
    mine = [ipaddress.ip_address(each) for each in context.node_addresses]
    # A VIP that is an address of this node is the source of what the node sends to it.
    loops = vips if any(address in network for network in networks for address in mine) else ()
    return (
        *(f"{start} -s {each} -j {ext}" for each in (*service.source_ranges, *loops)),
        _comment(f"other traffic to {service.name} will be dropped by KUBE-PROXY-FIREWALL"),
    )


def balance(service: Service, pool: Pool, context: Context) -> Rules:
    """Return the rules that pick one of the backends."""
    chains = [names.of_backend(service, backend) for backend in pool.backends]
    comments = [
        "" if context.is_large else _comment(f"{service.name} -> {names.endpoint(backend)}") + " "
        for backend in pool.backends
    ]
    rules = []
    if service.affinity_s and context.has_recent:
        rules = [
            f"{text}-m recent --name {chain} --rcheck --seconds {service.affinity_s} --reap -j {chain}"
            for text, chain in zip(comments, chains, strict=True)
        ]
    rules += [
        f"{text}{share}-j {chain}"
        for text, share, chain in zip(comments, _shares(service, pool), chains, strict=True)
    ]
    return tuple(rules)


def _shares(service: Service, pool: Pool) -> list[str]:
    """Return the match of each backend: which part of what comes to its rule it takes."""
    is_even = service.scheduler is Scheduler.RR
    weights = [1 if is_even else each.weight for each in pool.backends]
    left, shares = sum(weights), []
    for weight in weights[:-1]:
        if is_even:
            share = f"--mode nth --every {left} --packet 0"
        else:
            share = f"--mode random --probability {weight / left:.10f}"
        shares.append(f"-m statistic {share} ")
        left -= weight
    return [*shares, ""]


def _endpoint(service: Service, backend: Backend, context: Context) -> Rules:
    """Return the chain that translates to one backend."""
    text = "" if context.is_large else _comment(str(service.name)) + " "
    protocol = service.protocol.lower()
    name = names.of_backend(service, backend)
    remember = f"-m recent --name {name} --set " if service.affinity_s and context.has_recent else ""
    return (
        # A pod that reaches itself must not see its own address as the client's.
        f"{text}-s {backend.address} -j {names.MARK_MASQ}",
        f"{text}{remember}-m {protocol} -p {protocol} -j DNAT --to-destination {names.endpoint(backend)}",
    )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_link_local
