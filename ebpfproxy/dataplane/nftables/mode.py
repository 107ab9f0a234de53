"""Mode ``nftables``: whether this machine can run it, what it is made from, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import conntrack
from ebpfproxy.dataplane.modes import Made, Site

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ebpfproxy.config import Config
    from ebpfproxy.metrics import Reading

SETTINGS = "nftables-settings.json"  # in the state directory: what was changed of the kernel


def usable() -> str | None:
    """Return why this machine can't run it, None if it can."""
    from ebpfproxy.dataplane.nftables import kernel

    return kernel.why_not()


def make(settings: Config, site: Site, stack: ExitStack) -> Made:
    """Make the dataplane, and hold the lock of our tables in this network namespace."""
    from ebpfproxy.dataplane.nftables.dataplane import NftablesDataplane, NftablesOptions
    from ebpfproxy.host import NetworkLock
    from ebpfproxy.sysctl import Ledger

    stack.callback(NetworkLock("nftables").close)
    options = NftablesOptions(
        mark=1 << settings.masquerade_bit,
        settings=conntrack.settings_of(settings),
        serves_loopback=settings.localhost_node_ports,
        check_s=settings.max_sync_s / 2,  # so that each full sync does it
    )
    dataplane = NftablesDataplane(options, Ledger(site.state_dir / SETTINGS))
    return Made(dataplane, site._replace(cgroup=None, bpffs=None))


def reading(site: Site) -> Reading:
    """Return what is counted: nothing, a counter costs time on every packet."""
    from ebpfproxy.metrics import Reading

    return Reading()


def cleanup(site: Site) -> list[str]:
    """Remove our tables, and put the kernel's settings back."""
    from ebpfproxy.dataplane.nftables import kernel
    from ebpfproxy.dataplane.nftables.dataplane import remove
    from ebpfproxy.dataplane.nftables.render import TABLE, header
    from ebpfproxy.host import NetworkLock
    from ebpfproxy.sysctl import Ledger

    restored = Ledger(site.state_dir / SETTINGS).restore()
    if kernel.is_missing():
        return restored
    lock = NetworkLock("nftables")
    try:
        found = tuple(family for family in kernel.families() if kernel.has_tables([family]))
        if found:
            kernel.run(remove(found))
    finally:
        lock.close()
    return [*(f"table {header(family)} {TABLE}" for family in found), *restored]
