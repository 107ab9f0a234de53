"""What a Service is in nftables: chains, sets and map elements. Pure.

The name of a chain or set of a Service has a digest of what is in it, so nothing of that name ever changes: a
changed Service gets new chains, the elements that lead to them are switched, and the old chains go, all in
one transaction. It also means that names are all that has to be read back after a restart.

There are no maps inside a Service's chains where a few rules do as well: the kernel takes time with the
square of the number of maps in a table (19 s for 10,000 on Linux 6.18: it looks for a free name among all).
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import math
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.model.addresses import endpoint
from ebpfproxy.model.services import (
    MAGLEV_SIZES,
    Backend,
    Empty,
    FrontendKind,
    Policy,
    Pool,
    Scheduler,
    Service,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ebpfproxy.model.services import DesiredState

#: With more backends than this a map picks one, else a rule for each; a rule costs some 20 ns a connection.
RULES_MAX = 16
#: Of the hash by which sh, dh and maglev pick: the same on every node, and after a restart.
SEED = "0x5eed"
#: Clients that one backend of a Service with affinity remembers.
AFFINITY_MAX = 65536

# Verdicts of elements that lead to no backend.
REFUSE, DROP = "goto refuse", "drop"

#: Maps and sets that are always there, and the types of their keys; {addr} is the family's address type.
MAPS = {
    "cluster-ips": "{addr} . inet_proto . inet_service",
    "internal-ips": "{addr} . inet_proto . inet_service",
    "external-ips": "{addr} . inet_proto . inet_service",
    "internal-node-ports": "inet_proto . inet_service",
    "external-node-ports": "inet_proto . inet_service",
}
SETS = {
    "vips": "{addr}",
    "cluster-vips": "{addr}",
    "node-ports": "inet_proto . inet_service",
    "node-addresses": "{addr}",
    "local-sources": "{addr}; flags interval",
    "local-backends": "{addr}",
    "hairpins": "{addr} . {addr}",
}


class Object(NamedTuple):
    """One thing in one of our tables."""

    family: int  # 4 | 6: which table
    kind: str  # "set" | "chain" | "element"
    name: str  # of the set, map or chain
    key: str = ""  # of the element


class Fragment(NamedTuple):
    """What one Service needs, or the node as a whole."""

    objects: dict[Object, str]  # the value of a map's element, else ""
    bodies: dict[Object, str]  # of sets and chains: what is in them


class Node(NamedTuple):
    """What fragments depend on besides their Service."""

    local: frozenset[str]  # this node's own addresses
    mark: int  # bit of the packet mark that asks for masquerade


class _Builder:
    """Collects a fragment."""

    def __init__(self, service: Service) -> None:
        name = service.name
        self.family = name.family
        self.label = "/".join(part for part in (name.namespace, name.name, name.port) if part)
        self.objects: dict[Object, str] = {}
        self.bodies: dict[Object, str] = {}

    def add(self, kind: str, prefix: str, body: str) -> str:
        """Add a chain or set; return its name."""
        name = f"{prefix}-{digest(body)}-{self.label}"
        made = Object(self.family, kind, name)
        self.objects[made], self.bodies[made] = "", body
        return name

    def element(self, name: str, key: str, value: str = "") -> None:
        self.objects[Object(self.family, "element", name, key)] = value


def digest(text: str) -> str:
    """Return what tells one content from another."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def render(service: Service, node: Node) -> Fragment:
    """Return everything that one Service needs."""
    builder = _Builder(service)
    protocol = service.protocol.lower()
    for frontend in service.frontends:
        inside = _verdict(builder, service, frontend.kind, node, is_external=False)
        key = f"{frontend.address} . {protocol} . {frontend.port}"
        if frontend.address and frontend.address not in node.local:
            builder.element("vips", frontend.address)  # else all other ports of this node were refused
        if frontend.kind is FrontendKind.CLUSTER_IP:
            builder.element("cluster-vips", frontend.address)
            builder.element("cluster-ips", key, inside)
            continue
        outside = _verdict(builder, service, frontend.kind, node, is_external=True)
        if frontend.kind is FrontendKind.NODE_PORT:
            key = f"{protocol} . {frontend.port}"
            builder.element("node-ports", key)
            builder.element("internal-node-ports", key, inside)
            builder.element("external-node-ports", key, outside)
        else:
            builder.element("internal-ips", key, inside)
            builder.element("external-ips", key, outside)
    for backend in service.backends:
        if backend.is_local:
            builder.element("local-backends", backend.address)
            builder.element("hairpins", f"{backend.address} . {backend.address}")
    return Fragment(builder.objects, builder.bodies)


def _verdict(
    builder: _Builder, service: Service, kind: FrontendKind, node: Node, *, is_external: bool
) -> str:
    """Return what happens to a new connection to a frontend of ``kind``, by where it comes from."""
    pool = service.pool(kind, is_external=is_external)
    if pool.backends:
        verdict = f"goto {_pool_chain(builder, service, pool)}"
        policy = service.policy(kind, is_external=is_external)
        if is_external and kind is not FrontendKind.CLUSTER_IP and policy is Policy.CLUSTER:
            # The reply must come back through this node; postrouting leaves out what does anyway.
            body = f"meta mark set meta mark | {node.mark:#x}\n{verdict}"
            verdict = f"goto {builder.add('chain', 'ext', body)}"
    else:
        verdict = DROP if pool.on_empty is Empty.DROP else REFUSE
    if kind is FrontendKind.LOAD_BALANCER and service.has_source_ranges:
        verdict = f"goto {_firewall(builder, service.source_ranges, verdict)}"
    return verdict


def _firewall(builder: _Builder, ranges: Sequence[str], verdict: str) -> str:
    """Return the chain that lets only some sources go on to ``verdict``."""
    body = "drop"
    if ranges:
        address_type, ip = _words(builder.family)
        elements = ", ".join(collapse(ranges))
        allowed = builder.add(
            "set", "ranges", f"type {address_type}; flags interval; elements = {{ {elements} }};"
        )
        body = f"{ip} saddr @{allowed} {verdict}\ndrop"
    return builder.add("chain", "fw", body)


def _pool_chain(builder: _Builder, service: Service, pool: Pool) -> str:
    """Return the chain that picks a backend of a pool."""
    address_type, ip = _words(builder.family)
    l4 = f"meta l4proto {service.protocol.lower()}"
    ways, remembered, by_map = [], [], f"{l4} dnat {ip} to {{number}} map {{{{ {{entries}} }}}}"
    for backend in pool.backends:
        translate = f"{l4} dnat {ip} to {_endpoint(backend)}"
        if not service.affinity_s:
            ways.append(_Way(backend, translate, f"{backend.address} . {backend.port}"))
            continue
        # Named by what it is for, so that it outlives every change of the Service but that of its timeout.
        clients = builder.add(
            "set",
            f"clients-{digest(_endpoint(backend))}",
            f"type {address_type}; size {AFFINITY_MAX}; flags dynamic,timeout; "
            f"timeout {service.affinity_s}s;",
        )
        chain = builder.add("chain", "ep", f"update @{clients} {{ {ip} saddr }}\n{translate}")
        ways.append(_Way(backend, f"goto {chain}", f"goto {chain}"))
        remembered.append(f"{ip} saddr @{clients} goto {chain}")
        by_map = "{number} vmap {{ {entries} }}"
    return builder.add("chain", "svc", "\n".join([*remembered, *_pick(service.scheduler, ways, ip, by_map)]))


# --- schedulers ---------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    """One backend of a pool, and how a rule and a map lead to it."""

    backend: Backend
    rule: str
    entry: str


def _pick(scheduler: Scheduler, ways: Sequence[_Way], ip: str, by_map: str) -> list[str]:
    """Return the rules that lead to one of ``ways``.

    Schedulers that look at open connections become the nearest one that does not: nftables counts none.

    Args:
        scheduler: how.
        ways: one or more, of positive weight.
        ip: "ip" or "ip6".
        by_map: a rule that looks ``entries`` up by ``number``.
    """
    if len(ways) == 1:
        return [ways[0].rule]
    if scheduler is Scheduler.MAGLEV:
        slots = _maglev([each.backend for each in ways])
        number = f"jhash {ip} saddr . {ip} daddr . th sport . th dport mod {len(slots)} seed {SEED}"
        return [by_map.format(number=number, entries=_entries(ways, _runs(slots)))]
    has_weights = scheduler not in (Scheduler.RR, Scheduler.LC, Scheduler.DH)
    weights = _reduced([each.backend.weight if has_weights else 1 for each in ways])
    total = sum(weights)
    field = {Scheduler.SH: "saddr", Scheduler.DH: "daddr"}.get(scheduler)
    counter = "numgen random" if scheduler is Scheduler.RANDOM else "numgen inc"
    if len(ways) > RULES_MAX:
        number = f"jhash {ip} {field} mod {total} seed {SEED}" if field else f"{counter} mod {total}"
        starts = [sum(weights[:index]) for index in range(len(ways))]
        runs = [
            (start, start + weight - 1, n)
            for n, (start, weight) in enumerate(zip(starts, weights, strict=True))
        ]
        return [by_map.format(number=number, entries=_entries(ways, runs))]
    rules, below = [], 0
    for way, weight in zip(ways[:-1], weights[:-1], strict=True):
        if field:  # the same number in every rule
            below += weight
            rules.append(f"jhash {ip} {field} mod {total} seed {SEED} < {below} {way.rule}")
        else:  # a new number in every rule, among those that are left
            rules.append(f"{counter} mod {total - below} < {weight} {way.rule}")
            below += weight
    return [*rules, ways[-1].rule]


def _reduced(weights: Sequence[int]) -> list[int]:
    """Return the smallest weights of the same ratio."""
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]


def _maglev(backends: Sequence[Backend]) -> Sequence[int]:
    """Return a Maglev table: the smallest one that is good for so many backends."""
    from ebpfproxy.dataplane.bpf.schedulers import slot_table

    size = next((each for each in MAGLEV_SIZES if each >= 100 * len(backends)), MAGLEV_SIZES[-1])
    return slot_table(Scheduler.MAGLEV, backends, size)


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first, last, index) of slots in a row that hold the same."""
    found, first = [], 0
    for number, index in enumerate(slots):
        if number + 1 == len(slots) or slots[number + 1] != index:
            found.append((first, number, index))
            first = number + 1
    return found


def _entries(ways: Sequence[_Way], runs: Iterable[tuple[int, int, int]]) -> str:
    """Return the entries of a map from numbers to ways."""
    return ", ".join(
        f"{first if first == last else f'{first}-{last}'} : {ways[index].entry}"
        for first, last, index in runs
    )


# --- the node -----------------------------------------------------------------------------------------------


def node_fragment(state: DesiredState, families: Iterable[int], *, serves_loopback: bool = True) -> Fragment:
    """Return the elements that belong to no Service."""
    objects: dict[Object, str] = {}
    for address in state.addresses.serving:
        if not serves_loopback and (address.startswith("127.") or address == "::1"):
            continue
        objects[Object(_family(address), "element", "node-addresses", address)] = ""
    for family in families:
        ours = [each for each in state.local_sources if _family(each) == family]
        for prefix in collapse(ours):
            objects[Object(family, "element", "local-sources", prefix)] = ""
    return Fragment(objects, {})


def base(family: int, mark: int, *, masquerades_all: bool, masquerades_outside: bool) -> str:
    """Return the part that is always there: maps, sets, and the chains that packets enter; complete commands.

    Run again it changes nothing, however much is in the maps.
    """
    address_type, ip = _words(family)
    table = f"{ip} {TABLE}"
    error = "icmp" if family == 4 else "icmpv6"
    here = f"{ip} daddr . meta l4proto . th dport"
    to_masquerade = f"meta mark set meta mark | {mark:#x}"
    # From outside to a backend here: the reply comes back here without our address.
    returns_here = f"{ip} daddr @local-backends ct original {ip} daddr != @cluster-vips"
    asked = []
    if masquerades_all:
        asked = [f"{ip} daddr @cluster-vips {to_masquerade}"]
    elif masquerades_outside:
        asked = [f"{ip} daddr @cluster-vips {ip} saddr != @local-sources {to_masquerade}"]
    chains = {
        "refuse": ("", ["meta l4proto tcp reject with tcp reset", f"reject with {error} port-unreachable"]),
        "unused": ("", ["meta l4proto { tcp, udp, sctp } goto refuse"]),
        "internal": (
            "",
            [
                f"{here} vmap @internal-ips",
                f"{ip} daddr @node-addresses meta l4proto . th dport vmap @internal-node-ports",
                f"{ip} daddr @vips goto unused",
            ],
        ),
        # Before kube-proxy's chains: where both are, new connections go through ours.
        "prerouting": (
            f"type nat hook prerouting priority {DSTNAT - 10};",
            [
                *asked,
                f"{here} vmap @cluster-ips",
                f"{ip} saddr @local-sources goto internal",
                f"{here} vmap @external-ips",
                f"{ip} daddr @node-addresses meta l4proto . th dport vmap @external-node-ports",
                f"{ip} daddr @vips goto unused",
            ],
        ),
        # What this node sends itself got its source address from the way to the VIP, not to the backend.
        "output": (
            f"type nat hook output priority {DSTNAT - 10};",
            [
                f"{ip} daddr @vips {to_masquerade}",
                f"{ip} daddr @node-addresses meta l4proto . th dport @node-ports {to_masquerade}",
                f"{here} vmap @cluster-ips",
                "goto internal",
            ],
        ),
        "postrouting": (
            f"type nat hook postrouting priority {SRCNAT - 10};",
            [
                f"{ip} saddr . {ip} daddr @hairpins masquerade fully-random",
                f"meta mark & {mark:#x} == 0 return",
                f"meta mark set meta mark ^ {mark:#x}",
                f"fib saddr type != local {returns_here} return",
                "masquerade fully-random",
            ],
        ),
    }
    if family == 4:
        # NodePorts on 127.0.0.1 need route_localnet; it must not open loopback to others (CVE-2020-8558).
        chains["guard"] = (
            "type filter hook input priority 0;",
            ["ip saddr != 127.0.0.0/8 ip daddr 127.0.0.0/8 ct state new ct status & dnat == 0 drop"],
        )
    lines = [f"add table {table}"]
    lines += [
        f"add map {table} {name} {{ type {key.format(addr=address_type)} : verdict; }}"
        for name, key in MAPS.items()
    ]
    lines += [
        f"add set {table} {name} {{ type {key.format(addr=address_type)}; }}" for name, key in SETS.items()
    ]
    lines += [
        f"add chain {table} {name}{f' {{ {hook} }}' if hook else ''}" for name, (hook, _) in chains.items()
    ]
    for name, (_, rules) in chains.items():
        lines.append(f"flush chain {table} {name}")
        lines += [f"add rule {table} {name} {rule}" for rule in rules]
    return "\n".join(lines) + "\n"


#: Chains that are always there; "guard" is in the table of IPv4 alone.
BASE_CHAINS = frozenset(("refuse", "unused", "internal", "prerouting", "output", "postrouting", "guard"))


# --- words --------------------------------------------------------------------------------------------------

TABLE = "ebpfproxy"
# Priorities of the kernel's NAT, uapi/linux/netfilter_ipv4.h.
DSTNAT, SRCNAT = -100, 100


def _words(family: int) -> tuple[str, str]:
    """Return nft's words for a family: the type of addresses, and the header."""
    return ("ipv4_addr", "ip") if family == 4 else ("ipv6_addr", "ip6")


def header(family: int) -> str:
    """Return nft's word for a family of tables."""
    return _words(family)[1]


def _endpoint(backend: Backend) -> str:
    return endpoint(backend.address, backend.port)


def _family(address: str) -> int:
    return 6 if ":" in address else 4


@functools.lru_cache(maxsize=256)
def _collapse(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    networks = [ipaddress.ip_network(each) for each in prefixes]
    found = ipaddress.collapse_addresses(networks)  # type: ignore[type-var]
    return tuple(str(each.network_address if each.num_addresses == 1 else each) for each in found)


def collapse(prefixes: Iterable[str]) -> tuple[str, ...]:
    """Return prefixes of one family without overlap, as nft writes them."""
    return _collapse(tuple(sorted(prefixes)))
