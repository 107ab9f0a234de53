"""What kube-proxy left on this machine, in each of its modes: found, and removed without anything of others.

Chains, sets and tables are known by kube-proxy's names. Others have chains that begin with KUBE, too: kubelet
(``KUBE-FIREWALL`` in filter, ``KUBE-KUBELET-CANARY``), network policies (``KUBE-ROUTER-*``). What is not
listed here stays.

Connections that kube-proxy translated are translated by conntrack from then on, rule or no rule, as long as
the kernel's NAT is at work, and that ends with its last user. ``KEEPER`` is one until ``ebpfproxy cleanup``.

Source: the names are those of kube-proxy's iptables, ipvs and nftables modes, Kubernetes 1.2 to 1.35.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy import netlink
from ebpfproxy.diff import Delta
from ebpfproxy.errors import DataplaneError
from ebpfproxy.model.addresses import endpoint
from ebpfproxy.xtables import chains
from ebpfproxy.xtables.chains import BUILT_IN, TABLES, Chain, source, target
from ebpfproxy.xtables.names import is_of_service
from ebpfproxy.xtables.tool import VARIANTS, Tool, can_read

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ebpfproxy.xtables.chains import Saved

DEVICE = "kube-ipvs0"
KEEPER = "ebpfproxy-takeover"  # our nftables table
_NFT_TABLE = "kube-proxy"
_IPVS, _IPVS_CONNECTIONS = Path("/proc/net/ip_vs"), Path("/proc/net/ip_vs_conn")

_CHAINS: Mapping[str, frozenset[str]] = {
    "nat": frozenset(
        (
            *("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY"),
            # mode ipvs
            *("KUBE-NODE-PORT", "KUBE-LOAD-BALANCER", "KUBE-FIREWALL"),
            # mode userspace, until 1.25
            *("KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST"),
            *("KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST"),
        )
    ),
    "filter": frozenset(
        (
            *("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-FORWARD"),
            *("KUBE-PROXY-FIREWALL", "KUBE-PROXY-CANARY"),
            *("KUBE-NODE-PORT", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER"),
            "KUBE-NODEPORT-NON-LOCAL",
        )
    ),
    "mangle": frozenset(("KUBE-PROXY-CANARY",)),
}
_MASQUERADE = frozenset(("KUBE-MARK-MASQ", "KUBE-POSTROUTING"))  # one marks, the other acts on the mark
_SETS = frozenset(
    f"KUBE-{family}{name}"[:31]  # a set's name is no longer; kube-proxy cuts it
    for family in ("", "6-")
    for name in (
        *("LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "IPVS-IPS"),
        "HEALTH-CHECK-NODE-PORT",
        *("LOAD-BALANCER", "LOAD-BALANCER-LOCAL", "LOAD-BALANCER-FW"),
        *("LOAD-BALANCER-SOURCE-CIDR", "LOAD-BALANCER-SOURCE-IP"),
        *("NODE-PORT-TCP", "NODE-PORT-UDP", "NODE-PORT-SCTP", "NODE-PORT-SCTP-HASH"),
        *("NODE-PORT-LOCAL-TCP", "NODE-PORT-LOCAL-UDP", "NODE-PORT-LOCAL-SCTP", "NODE-PORT-LOCAL-SCTP-HASH"),
    )
)
_IPVS_PROTOCOLS = {"-t": "TCP", "-u": "UDP", "--sctp-service": "SCTP"}


# --- pure: what to remove ----------------------------------------------------------------------------


class Removal(NamedTuple):
    """What goes from the rules of one iptables variant and family."""

    text: str  # for iptables-restore --noflush; "" = nothing
    chains: tuple[str, ...]  # "table chain", those that go
    kept: tuple[str, ...]  # "table chain (who uses it)", those of kube-proxy's that others need


def removal(saved: Mapping[str, Saved]) -> Removal:
    """Return how kube-proxy's chains, and the jumps to them, go from tables.

    A chain that a chain of somebody else jumps to stays, with all that it leads to: CNI's portmap may be told
    to use KUBE-MARK-MASQ.
    """
    doomed: list[Chain] = []
    kept = []
    for table, found in saved.items():
        ours = {name for name in found.chains if name in _CHAINS.get(table, ()) or is_of_service(name)}
        users = _users(ours, found.rules)
        doomed += [Chain(table, name) for name in sorted(ours - users.keys())]
        kept += [f"{table} {name} (used by {users[name]})" for name in sorted(users)]
    plan = chains.removal(saved, doomed)
    text = chains.transaction(Delta({}, plan.chains), removals=plan.rules, block=chains.BLOCK)
    return Removal(text, tuple(f"{table} {name}" for table, name in doomed), tuple(kept))


def _users(ours: set[str], rules: Sequence[str]) -> dict[str, str]:
    """Return those of ``ours`` that have to stay -> the chain of somebody else that needs them."""
    leads = [(source(rule), target(rule)) for rule in rules]
    users = {to: chain for chain, to in leads if to in ours and chain not in ours | BUILT_IN}
    if found := _MASQUERADE & users.keys():
        users |= dict.fromkeys(_MASQUERADE & ours, users[min(found)])
    waiting = list(users)
    while waiting:
        chain = waiting.pop()
        for to in {to for by, to in leads if by == chain} & (ours - users.keys()):
            users[to] = users[chain]
            waiting.append(to)
    return users


def nft_script(tables: Iterable[tuple[str, str]]) -> str:
    """Return the transaction that removes kube-proxy's tables; "" if none is there.

    Args:
        tables: family and name of each table there is.
    """
    families = [family for family, name in tables if name == _NFT_TABLE and family in ("ip", "ip6")]
    return "".join(f"delete table {family} {_NFT_TABLE}\n" for family in families)


def keeper_script(families: Iterable[str]) -> str:
    """Return the transaction that keeps the kernel's NAT at work for connections that it has translated.

    The rule does nothing; it is there because an empty chain would not hold connection tracking (tried on
    Linux 6.18: a connection through a deleted DNAT rule stands still without it).
    """
    return "".join(
        f"add table {family} {KEEPER}\n"
        f"add chain {family} {KEEPER} nat {{ type nat hook prerouting priority dstnat; }}\n"
        f"flush chain {family} {KEEPER} nat\n"
        f"add rule {family} {KEEPER} nat ct status dnat continue\n"
        for family in families
    )


class VirtualServer(NamedTuple):
    """One of IPVS."""

    flag: str  # as ipvsadm(8) names its protocol: -t, -u
    address: str  # canonical
    port: int

    @property
    def protocol(self) -> str:
        """Return TCP, UDP or SCTP."""
        return _IPVS_PROTOCOLS[self.flag]

    def __str__(self) -> str:
        return endpoint(self.address, self.port)


def virtual_servers(
    saved: str, vips: frozenset[str], ports: frozenset[tuple[str, int]]
) -> list[VirtualServer]:
    """Return kube-proxy's virtual servers.

    Args:
        saved: what ``ipvsadm --save --numeric`` says.
        vips: addresses of kube-proxy's device.
        ports: protocol and port of NodePorts, which are served at the node's own addresses.
    """
    found = []
    for flag, text, port in re.findall(r"^-A (-t|-u|--sctp-service) (\S+):([0-9]+) ", saved, re.MULTILINE):
        server = VirtualServer(flag, str(ipaddress.ip_address(text.strip("[]"))), int(port))
        if server.address in vips or (server.protocol, server.port) in ports:
            found.append(server)
    return found


def node_ports(saved: str) -> frozenset[tuple[str, int]]:
    """Return protocol and port of the NodePorts in kube-proxy's sets, from what ``ipset save`` says."""
    pattern = r"^add KUBE-(?:6-)?NODE-PORT(?:-LOCAL)?-(TCP|UDP|SCTP)\S* (?:\S+:)?([0-9]+)(?: |$)"
    return frozenset((protocol, int(port)) for protocol, port in re.findall(pattern, saved, re.MULTILINE))


def established(connections: str, servers: Iterable[VirtualServer]) -> int:
    """Return how many connections go through ``servers``, from the text of /proc/net/ip_vs_conn."""
    wanted = {(each.protocol, each.address, each.port) for each in servers}
    count = 0
    for line in connections.splitlines()[1:]:
        protocol, _, _, address, port, *rest = line.split()
        if "ESTABLISHED" in rest:
            count += (protocol, _proc_address(address), int(port, 16)) in wanted
    return count


def _proc_address(text: str) -> str:
    """Return an address as IPVS writes it under /proc: eight hexadecimal digits, or IPv6 in brackets."""
    return str(ipaddress.ip_address(text.strip("[]") if "[" in text else int(text, 16)))


# --- the machine -------------------------------------------------------------------------------------


def cleanup(*, now: bool = False) -> list[str]:
    """Remove what kube-proxy left in this network namespace; may be repeated.

    Args:
        now: also cut the connections that go through kube-proxy's IPVS.

    Returns:
        One line for each thing that was removed, or kept because others use it.

    Raises:
        DataplaneError: connections still go through IPVS, or something could not be removed; call again.
    """
    done: list[str] = []
    nft = _Nft()
    removals = [(tool, removal({table: tool.save(table) for table in TABLES})) for tool in _tools()]
    script = nft_script(nft.tables())
    servers = _virtual_servers()
    is_there = bool(script or servers or any(each.text for _, each in removals))
    if servers and not now and (count := established(_IPVS_CONNECTIONS.read_text("ascii"), servers)):
        raise DataplaneError(
            f"remove kube-proxy's IPVS: {count} connections go through it and would end; wait for them "
            "(ipvsadm -Lnc), or say --now"
        )
    if is_there and nft.path:
        nft.run(keeper_script(("ip", "ip6")))
        done.append(f"added nftables table {KEEPER}: it keeps connections that kube-proxy translated")
    for tool, each in removals:
        if each.text:
            tool.restore(each.text)
        done += [f"removed {tool.name} chain {name}" for name in each.chains]
        done += [f"kept {tool.name} chain {name}" for name in each.kept]
    if script:
        nft.run(script)
        done += [f"removed nftables {line.removeprefix('delete ')}" for line in script.splitlines()]
    for server in servers:
        _run(["ipvsadm", "--delete-service", server.flag, str(server)])
        done.append(f"removed IPVS virtual server {server}/{server.protocol.lower()}")
    if netlink.remove_device(DEVICE):
        done.append(f"removed device {DEVICE}")
    return done + _remove_sets()


def remove_keeper() -> list[str]:
    """Remove the table that ``cleanup`` added; return what was removed."""
    nft = _Nft()
    try:
        found = [family for family, name in nft.tables() if name == KEEPER]
    except DataplaneError:  # who may not look did not make it
        return []
    if found:
        nft.run("".join(f"delete table {family} {KEEPER}\n" for family in found))
    return [f"nftables table {family} {KEEPER}" for family in found]


class _Nft:
    """nftables' own tool, if it is here."""

    def __init__(self) -> None:
        self.path = shutil.which("nft")

    def tables(self) -> list[tuple[str, str]]:
        """Return family and name of each table; none where the kernel has no nf_tables.

        Raises:
            DataplaneError: we may not look.
        """
        if not self.path:
            return []
        try:
            said = _run([self.path, "--json", "list", "tables"])
        except DataplaneError as error:
            if "not permitted" in str(error):
                raise
            self.path = None
            return []
        listed = json.loads(said or "{}").get("nftables", [])
        return [(each["table"]["family"], each["table"]["name"]) for each in listed if "table" in each]

    def run(self, script: str) -> None:
        """Apply one transaction."""
        assert self.path
        _run([self.path, "-f", "-"], script)


def _tools() -> list[Tool]:
    """Return the iptables tools to look with; legacy and nft keep rules of their own."""
    every = [Tool(family, variant) for family in (4, 6) for variant in VARIANTS]
    here = [tool for tool in every if tool.is_installed() and tool.is_in_use()]
    readable = [tool for tool in here if can_read(tool)]
    for tool in here:
        # A kernel may have no nf_tables; but where legacy tables are, there may be rules in them.
        if tool not in readable and tool.variant == "legacy":
            raise DataplaneError(
                f"look for kube-proxy's rules: {tool.name} can't read the tables that are there; it needs "
                "CAP_NET_RAW beside CAP_NET_ADMIN"
            )
    return readable


def _remove_sets() -> list[str]:
    if not shutil.which("ipset"):
        return []
    found = sorted(_SETS & set(_run(["ipset", "list", "-n"]).split()))
    for name in found:
        _run(["ipset", "destroy", name])
    return [f"removed ipset {name}" for name in found]


def _virtual_servers() -> list[VirtualServer]:
    """Return kube-proxy's virtual servers."""
    if not _IPVS.exists():
        return []
    vips = netlink.addresses_of(DEVICE)
    sets = _run(["ipset", "save"]) if shutil.which("ipset") else ""
    if not vips and not node_ports(sets):
        return []
    if not shutil.which("ipvsadm"):
        raise DataplaneError("remove kube-proxy's IPVS: install ipvsadm, then call again")
    return virtual_servers(_run(["ipvsadm", "--save", "--numeric"]), vips, node_ports(sets))


def _run(command: list[str], text: str = "") -> str:
    """Run a tool; return its output.

    Raises:
        DataplaneError: it failed; the message says what it said.
    """
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        said = result.stderr.strip() or f"exit status {result.returncode}"
        raise DataplaneError(f"{' '.join(command)}: {said}")
    return result.stdout
