"""The ipsets, and the iptables rules that look things up in them, as kube-proxy's ipvs mode names them. Pure.

Source: kube-proxy, pkg/proxy/ipvs, of Kubernetes 1.35. The two sets of "no local endpoints" are ours: there
kube-proxy lets clients from outside wait for answers that don't come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.xtables import names
from ebpfproxy.xtables.chains import Chain, Jump
from ebpfproxy.xtables.sets import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ebpfproxy.xtables.chains import Rules

LOOP_BACK = "LOOP-BACK"
CLUSTER_IP = "CLUSTER-IP"
EXTERNAL_IP = "EXTERNAL-IP"
EXTERNAL_IP_LOCAL = "EXTERNAL-IP-LOCAL"
LOAD_BALANCER = "LOAD-BALANCER"
LOAD_BALANCER_LOCAL = "LOAD-BALANCER-LOCAL"
LOAD_BALANCER_FW = "LOAD-BALANCER-FW"
SOURCE_IP = "LOAD-BALANCER-SOURCE-IP"
SOURCE_CIDR = "LOAD-BALANCER-SOURCE-CIDR"
HEALTH_CHECK = "HEALTH-CHECK-NODE-PORT"
IPVS_IPS = "IPVS-IPS"
NO_LOCAL_EXTERNAL = "NO-LOCAL-EXTERNAL"
NO_LOCAL_INTERNAL = "NO-LOCAL-INTERNAL"

_LB = "Kubernetes service load balancer ip + port"
# What "kube-proxy" writes as comments of the rules; set -> type, comment.
_SETS = {
    LOOP_BACK: ("hash:ip,port,ip", "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose"),
    CLUSTER_IP: ("hash:ip,port", "Kubernetes service cluster ip + port for masquerade purpose"),
    EXTERNAL_IP: ("hash:ip,port", "Kubernetes service external ip + port for masquerade and filter purpose"),
    EXTERNAL_IP_LOCAL: (
        "hash:ip,port",
        "Kubernetes service external ip + port with externalTrafficPolicy=local",
    ),
    LOAD_BALANCER: ("hash:ip,port", "Kubernetes service lb portal"),
    LOAD_BALANCER_LOCAL: ("hash:ip,port", f"{_LB} with externalTrafficPolicy=local"),
    LOAD_BALANCER_FW: ("hash:ip,port", f"{_LB} for load balancer with sourceRange"),
    SOURCE_IP: ("hash:ip,port,ip", f"{_LB} + source IP for packet filter purpose"),
    SOURCE_CIDR: ("hash:ip,port,net", f"{_LB} + source cidr for packet filter purpose"),
    HEALTH_CHECK: ("bitmap:port", "Kubernetes health check node port"),
    IPVS_IPS: ("hash:ip", ""),
    NO_LOCAL_EXTERNAL: ("hash:ip,port", "no local endpoints, traffic from outside"),
    NO_LOCAL_INTERNAL: ("hash:ip,port", "no local endpoints"),
}
for _protocol in ("TCP", "UDP"):
    _what = f"Kubernetes nodeport {_protocol} port"
    _SETS[f"NODE-PORT-LOCAL-{_protocol}"] = ("bitmap:port", f"{_what} with externalTrafficPolicy=local")
    _SETS[f"NODE-PORT-{_protocol}"] = ("bitmap:port", f"{_what} for masquerade purpose")
_what = "Kubernetes nodeport SCTP port"
_SETS["NODE-PORT-LOCAL-SCTP-HASH"] = (
    "hash:ip,port",
    f"{_what} with externalTrafficPolicy=local with type 'hash ip:port'",
)
_SETS["NODE-PORT-SCTP-HASH"] = ("hash:ip,port", f"{_what} for masquerade purpose with type 'hash ip:port'")
NAMES = tuple(_SETS)

JUMPS = (
    Jump("nat", "OUTPUT", names.SERVICES, "kubernetes service portals"),
    Jump("nat", "PREROUTING", names.SERVICES, "kubernetes service portals"),
    Jump("nat", "POSTROUTING", names.POSTROUTING, "kubernetes postrouting rules"),
    Jump("filter", "FORWARD", names.FORWARD, "kubernetes forwarding rules"),
    Jump("filter", "INPUT", names.NODE_PORT, "kubernetes health check rules"),
    Jump("filter", "INPUT", names.PROXY_FIREWALL, "kube-proxy firewall rules"),
    Jump("filter", "FORWARD", names.PROXY_FIREWALL, "kube-proxy firewall rules"),
    Jump("filter", "INPUT", names.IPVS_FILTER, "kubernetes ipvs access filter"),
    Jump("filter", "OUTPUT", names.IPVS_OUT_FILTER, "kubernetes ipvs access filter"),
)


def full_name(name: str, family: int) -> str:
    """Return the name of a set in the kernel, which allows 31 characters; kube-proxy cuts it likewise."""
    return (f"KUBE-6-{name}" if family == 6 else f"KUBE-{name}")[:31]


def kinds(family: int) -> dict[str, Kind]:
    """Return all sets of one family, by their names in the kernel."""
    return {full_name(name, family): Kind(kind, family) for name, (kind, _) in _SETS.items()}


def node_port_set(protocol: str, *, is_local: bool) -> str:
    """Return the set of NodePorts of a protocol, "TCP" say."""
    suffix = "-HASH" if protocol == "SCTP" else ""
    return f"NODE-PORT-{'LOCAL-' if is_local else ''}{protocol}{suffix}"


_MASQ = f"-j {names.MARK_MASQ}"
_ESTABLISHED = "-m conntrack --ctstate RELATED,ESTABLISHED"
_FROM_NODE = "-m addrtype --src-type LOCAL"
# As near as rules come to it: neither from a bridge, where containers are, nor from this node.
_FROM_OUTSIDE = "-m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL"


class Firm(NamedTuple):
    """What the rules depend on, beside which sets have entries."""

    family: int
    mark: str
    masquerades_all: bool
    masquerades_outside: bool
    local_sources: Sequence[str]  # of this family
    has_random_fully: bool
    barred: Sequence[str]  # matches of what this node itself may not reach


class _Writer:
    """Writes rules of one family."""

    def __init__(self, firm: Firm, filled: Collection[str]) -> None:
        self.firm, self.filled = firm, filled

    def match(self, name: str, directions: str) -> str:
        """Return the match of a set."""
        return f"-m set --match-set {full_name(name, self.firm.family)} {directions}"

    def found(self, name: str, directions: str, goal: str, before: str = "") -> list[str]:
        """Return the rule for a set; none if it has no entries."""
        text = f'-m comment --comment "{_SETS[name][1]}" {self.match(name, directions)}'
        return [f"{before}{text} {goal}"] if name in self.filled else []


def rules(firm: Firm, filled: Collection[str]) -> dict[Chain, Rules]:
    """Return all chains of one family; ``filled`` are the sets with entries."""
    writer = _Writer(firm, filled)
    mark = f"{firm.mark}/{firm.mark}"
    fully = " --random-fully" if firm.has_random_fully else ""
    made = {
        Chain("nat", names.SERVICES): _services(writer),
        Chain("nat", names.NODE_PORT): _node_ports(writer),
        Chain("nat", names.LOAD_BALANCER): (
            *writer.found(LOAD_BALANCER_LOCAL, "dst,dst", "-j RETURN"),
            _MASQ,
        ),
        Chain("nat", names.MARK_MASQ): (f"-j MARK --or-mark {firm.mark}",),
        Chain("nat", names.POSTROUTING): (
            *writer.found(LOOP_BACK, "dst,dst,src", "-j MASQUERADE"),
            f"-m mark ! --mark {mark} -j RETURN",
            # Else a packet that comes through here again is masqueraded again.
            f"-j MARK --xor-mark {firm.mark}",
            f'-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE{fully}',
        ),
        Chain("filter", names.FORWARD): (
            f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {mark} -j ACCEPT',
            f'-m comment --comment "kubernetes forwarding conntrack rule" {_ESTABLISHED} -j ACCEPT',
        ),
        Chain("filter", names.NODE_PORT): (
            f'-m comment --comment "{_SETS[HEALTH_CHECK][1]}" {writer.match(HEALTH_CHECK, "dst")} -j ACCEPT',
        ),
        Chain("filter", names.PROXY_FIREWALL): tuple(
            writer.found(LOAD_BALANCER_FW, "dst,dst", f"-j {names.SOURCE_RANGES}")
        ),
        Chain("filter", names.SOURCE_RANGES): (
            *writer.found(SOURCE_CIDR, "dst,dst,src", "-j RETURN"),
            *writer.found(SOURCE_IP, "dst,dst,src", "-j RETURN"),
            "-j DROP",
        ),
        Chain("filter", names.NO_LOCAL): (
            *(f"-s {prefix} -j RETURN" for prefix in firm.local_sources),
            f"{_FROM_NODE} -j RETURN",
            "-j DROP",
        ),
        Chain("filter", names.IPVS_FILTER): _filter(writer),
        Chain("filter", names.IPVS_OUT_FILTER): tuple(f"{each} -j DROP" for each in firm.barred),
    }
    if firm.masquerades_outside and len(firm.local_sources) > 1:
        # "None of these" is more than one rule can say.
        made[Chain("nat", names.MARK_OUTSIDE)] = (
            *(f"-s {prefix} -j RETURN" for prefix in firm.local_sources),
            _MASQ,
        )
    return made


def _services(writer: _Writer) -> Rules:
    """Return the chain that decides whose address is translated."""
    firm = writer.firm
    return (
        f"-s {'::1/128' if firm.family == 6 else '127.0.0.0/8'} -j RETURN",
        # The node's own clients have a VIP as source, which is an address of other nodes, too.
        *writer.found(NO_LOCAL_EXTERNAL, "dst,dst", f"{_FROM_NODE} {_MASQ}"),
        *writer.found(LOAD_BALANCER, "dst,dst", f"-j {names.LOAD_BALANCER}"),
        *_cluster_ips(writer),
        *writer.found(EXTERNAL_IP, "dst,dst", _MASQ),
        *(
            rule
            for name in (EXTERNAL_IP, EXTERNAL_IP_LOCAL)
            for end in (f"{_FROM_OUTSIDE} -j ACCEPT", "-m addrtype --dst-type LOCAL -j ACCEPT")
            for rule in writer.found(name, "dst,dst", end)
        ),
        f"-m addrtype --dst-type LOCAL -j {names.NODE_PORT}",
        *(
            f"{writer.match(name, 'dst,dst')} -j ACCEPT"
            for name in (CLUSTER_IP, LOAD_BALANCER)
            if name in writer.filled
        ),
    )


def _cluster_ips(writer: _Writer) -> list[str]:
    """Return the rule that gives a cluster IP's clients this node's address."""
    firm = writer.firm
    if firm.masquerades_all:
        return writer.found(CLUSTER_IP, "dst,dst", _MASQ)
    if firm.masquerades_outside and firm.local_sources:
        one = f"! -s {firm.local_sources[0]} {_MASQ}"
        several = len(firm.local_sources) > 1
        return writer.found(CLUSTER_IP, "dst,dst", f"-j {names.MARK_OUTSIDE}" if several else one)
    # The node's own clients have the VIP as source, which is an address of other nodes, too.
    return writer.found(CLUSTER_IP, "src,dst", _MASQ)


def _node_ports(writer: _Writer) -> Rules:
    found: list[str] = []
    for protocol in ("TCP", "UDP", "SCTP"):
        directions = "dst,dst" if protocol == "SCTP" else "dst"
        before = f"-p {protocol.lower()} "
        for is_local, goal in ((True, "-j RETURN"), (False, _MASQ)):
            found += writer.found(node_port_set(protocol, is_local=is_local), directions, goal, before)
    return tuple(found)


def _filter(writer: _Writer) -> Rules:
    """Return the chain that guards VIPs, which are addresses of this node, against what is no Service."""
    return (
        *writer.found(NO_LOCAL_INTERNAL, "dst,dst", "-j DROP"),
        *writer.found(NO_LOCAL_EXTERNAL, "dst,dst", f"-j {names.NO_LOCAL}"),
        *(
            f"{writer.match(name, 'dst,dst')} -j RETURN"
            for name in (LOAD_BALANCER, CLUSTER_IP, EXTERNAL_IP, EXTERNAL_IP_LOCAL)
        ),
        f"{writer.match(HEALTH_CHECK, 'dst')} -j RETURN",
        f"-m conntrack --ctstate NEW {writer.match(IPVS_IPS, 'dst')} -j REJECT",
    )
