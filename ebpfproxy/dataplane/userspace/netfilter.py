"""The rules that lead VIPs to the proxy, as nftables and as iptables have them. Pure: from redirects to text.

nftables: one table of our own; frontends are elements of its maps, so that a change costs what changed.
iptables, where there is no nft: chains of our own, written anew as a whole.

Connection tracking keeps what was begun: a rule that goes, or a listener that has another port, touches no
established connection. What is refused is what somebody asks for, never an answer: a client on this node may
have any port, one of the proxy's in the other family too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ebpfproxy.dataplane.userspace.render import Door, Redirects
    from ebpfproxy.diff import Delta

TABLE = "ebpfproxy-userspace"
CHAIN = "EBPFPROXY-USER"  # and with a suffix; iptables allows 28 characters

#: An element of a set or map of the table: its name and the element's key; to the data, "" in a set.
Elements = dict[tuple[str, str], str]

_BATCH = 2000  # elements in one command: a line of some 100 KB

_DECLARATIONS = """\
add table inet {table}
delete table inet {table}
table inet {table} {{
	map doors4 {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
	map doors6 {{ type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }}
	map node_doors4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
	map node_doors6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
	set node4 {{ type ipv4_addr; }}
	set node6 {{ type ipv6_addr; }}
	set vips4 {{ type ipv4_addr; }}
	set vips6 {{ type ipv6_addr; }}
	set alive4 {{ type ipv4_addr; }}
	set alive6 {{ type ipv6_addr; }}
	set refused4 {{ type ipv4_addr . inet_proto . inet_service; }}
	set refused6 {{ type ipv6_addr . inet_proto . inet_service; }}
	set refused_node {{ type nf_proto . inet_proto . inet_service; }}
	set proxy {{ type nf_proto . inet_proto . inet_service; }}

	chain lead {{
		dnat ip to ip daddr . meta l4proto . th dport map @doors4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @doors6
		ip daddr @node4 dnat ip to meta l4proto . th dport map @node_doors4
		ip6 daddr @node6 dnat ip6 to meta l4proto . th dport map @node_doors6
		icmp type echo-request ip daddr @alive4 redirect
		icmpv6 type echo-request ip6 daddr @alive6 redirect
	}}
	chain nat-prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		jump lead
	}}
	chain nat-output {{
		type nat hook output priority -100; policy accept;
		jump lead
	}}
	chain refuse {{
		meta l4proto tcp reject with tcp reset
		reject with icmpx port-unreachable
	}}
	chain unserved {{
		ip daddr . meta l4proto . th dport @refused4 jump refuse
		ip6 daddr . meta l4proto . th dport @refused6 jump refuse
		ip daddr @node4 meta nfproto . meta l4proto . th dport @refused_node jump refuse
		ip6 daddr @node6 meta nfproto . meta l4proto . th dport @refused_node jump refuse
		ip daddr @vips4 jump refuse
		ip6 daddr @vips6 jump refuse
	}}
	chain prerouting {{
		type filter hook prerouting priority -90; policy accept;
		ct direction original jump unserved
	}}
	chain output {{
		type filter hook output priority -90; policy accept;
		ct direction original jump unserved
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		ct direction original meta nfproto . meta l4proto . th dport @proxy ct status & dnat == 0 jump refuse
	}}
}}
"""


def elements(redirects: Redirects, ports: Mapping[str, int]) -> Elements:
    """Return what is in the sets and maps.

    Args:
        redirects: what must lead where.
        ports: listener -> the port it has.
    """
    found: Elements = {}
    for door, listener in redirects.to.items():
        if listener not in ports:  # could not be opened: told elsewhere
            continue
        number, protocol = door.family, door.protocol.lower()
        data = f"{redirects.target[number]} . {ports[listener]}"
        if door.address:
            found[f"doors{number}", f"{door.address} . {protocol} . {door.port}"] = data
        else:
            found[f"node_doors{number}", f"{protocol} . {door.port}"] = data
        found["proxy", f"ipv{number} . {protocol} . {ports[listener]}"] = ""
    for door in redirects.refused:
        number, protocol = door.family, door.protocol.lower()
        if door.address:
            found[f"refused{number}", f"{door.address} . {protocol} . {door.port}"] = ""
        else:
            found["refused_node", f"ipv{number} . {protocol} . {door.port}"] = ""
    for name, by_family in (("vips", redirects.vips), ("alive", redirects.alive), ("node", redirects.node)):
        for number, addresses in by_family.items():
            found |= {(f"{name}{number}", address): "" for address in addresses}
    return found


def nft_whole(wanted: Elements) -> str:
    """Return a transaction that makes the table anew, whatever there was."""
    return _DECLARATIONS.format(table=TABLE) + "".join(_commands("add", wanted))


def nft_change(have: Elements, delta: Delta[tuple[str, str], str]) -> str:
    """Return a transaction that changes elements. An element's data can't be: it is deleted and added."""
    stale = [*delta.delete, *(key for key in delta.upsert if key in have)]
    return "".join([*_commands("delete", dict.fromkeys(stale, "")), *_commands("add", delta.upsert)])


def _commands(verb: str, listed: Elements) -> Iterable[str]:
    by_name: dict[str, list[str]] = {}
    for (name, key), data in listed.items():
        by_name.setdefault(name, []).append(f"{key} : {data}" if data else key)
    for name, texts in by_name.items():
        for start in range(0, len(texts), _BATCH):
            yield f"{verb} element inet {TABLE} {name} {{ {', '.join(texts[start : start + _BATCH])} }}\n"


# --- iptables -----------------------------------------------------------------------------------------------


def iptables_whole(family: int, redirects: Redirects, ports: Mapping[str, int]) -> str:
    """Return what ``iptables-restore --noflush`` (4) or ``ip6tables-restore --noflush`` (6) gets."""
    nat = [f":{CHAIN} - [0:0]", f"-F {CHAIN}"]
    refused = [f":{CHAIN}-REFUSE - [0:0]", f":{CHAIN} - [0:0]", f"-F {CHAIN}", f"-F {CHAIN}-REFUSE"]
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    refuse = f"{CHAIN}-REFUSE"
    refused += [
        f"-A {refuse} -p tcp -j REJECT --reject-with tcp-reset",
        f"-A {refuse} -j REJECT --reject-with {unreachable}",
        f"-A {CHAIN} -m conntrack --ctdir REPLY -j RETURN",
    ]
    target = redirects.target[family]
    target = f"[{target}]" if family == 6 else target
    proxy = set()
    for door, listener in sorted(redirects.to.items()):
        if door.family == family and listener in ports:
            lead = f"-j DNAT --to-destination {target}:{ports[listener]}"
            nat += [f"-A {CHAIN} {match} {lead}" for match in _matches(door, redirects)]
            proxy.add((door.protocol.lower(), ports[listener]))
    echo = "-p icmp --icmp-type echo-request" if family == 4 else "-p ipv6-icmp --icmpv6-type echo-request"
    nat += [
        f"-A {CHAIN} -d {vip} {echo} -j REDIRECT" for vip in sorted(redirects.alive.get(family, frozenset()))
    ]
    for door in sorted(redirects.refused):
        if door.family == family:
            refused += [f"-A {CHAIN} {match} -j {refuse}" for match in _matches(door, redirects)]
    refused += [f"-A {CHAIN} -d {vip} -j {refuse}" for vip in sorted(redirects.vips.get(family, frozenset()))]
    refused += [
        f"-A {CHAIN} -m addrtype --dst-type LOCAL -p {protocol} --dport {port} "
        f"-m conntrack ! --ctstate DNAT -j {refuse}"
        for protocol, port in sorted(proxy)
    ]
    return "\n".join(["*nat", *nat, "COMMIT", "*filter", *refused, "COMMIT", ""])


def _matches(door: Door, redirects: Redirects) -> list[str]:
    addresses = [door.address] if door.address else sorted(redirects.node.get(door.family, frozenset()))
    return [f"-d {each} -p {door.protocol.lower()} --dport {door.port}" for each in addresses]


#: Where our chains are entered: table and chain. Rules that go first.
JUMPS = (
    ("nat", "PREROUTING"),
    ("nat", "OUTPUT"),
    ("filter", "INPUT"),
    ("filter", "FORWARD"),
    ("filter", "OUTPUT"),
)
