"""Ends what the ipvs dataplane made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import netlink, sysctl
from ebpfproxy.dataplane.ipvs.sets import kinds
from ebpfproxy.errors import UnsupportedError
from ebpfproxy.netlink.ipvs import Ipvs, remove_server
from ebpfproxy.xtables import cleanup as chains
from ebpfproxy.xtables import sets

if TYPE_CHECKING:
    from pathlib import Path


def cleanup(sysctls: Path, node_ports: tuple[int, int] = (30000, 32767)) -> list[str]:
    """Remove our chains, virtual servers, device and sets, put settings back; return one line for each thing.

    Where this mode never ran they are kube-proxy's, if they are there at all, and stay.
    Virtual servers are ours that are on an address of our device, or on a NodePort of this node's.

    Raises:
        EbpfproxyError: something could not be removed; call again.
    """
    ledger = sysctl.Ledger(sysctls)
    if not ledger.exists:
        return []
    removed = chains.remove("ipvs")
    vips = netlink.addresses_of(netlink.VIP_DEVICE)
    if vips:
        local = {each.address for each in netlink.addresses()}
        removed += _remove_servers(vips, local, node_ports)
    if netlink.remove_device(netlink.VIP_DEVICE):
        removed.append(f"device {netlink.VIP_DEVICE}")
    if sets.is_installed():
        ours = [name for number in (4, 6) for name in kinds(number)]
        removed += [f"ipset {name}" for name in sets.destroy(ours)]
    return removed + ledger.restore()


def _remove_servers(vips: frozenset[str], local: set[str], node_ports: tuple[int, int]) -> list[str]:
    try:
        ipvs = Ipvs()
    except UnsupportedError:
        return []
    with ipvs:
        first, last = node_ports
        ours = [
            server
            for server in ipvs.servers()
            if server.address in vips or (server.address in local and first <= server.port <= last)
        ]
        ipvs.run([remove_server(server) for server in ours])
    return [f"{len(ours)} virtual server{'' if len(ours) == 1 else 's'}"] if ours else []
