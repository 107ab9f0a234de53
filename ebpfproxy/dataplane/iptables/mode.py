"""Mode ``iptables``: whether this machine can run it, what it is made from, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.modes import Made, Site
from ebpfproxy.metrics import Reading

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ebpfproxy.config import Config


def usable() -> str | None:
    """Return why this machine can't run it, None if it can."""
    from ebpfproxy.dataplane.iptables import features

    return features.usable()


def lacking() -> list[str]:
    """Return what it can't do on this machine."""
    from ebpfproxy.dataplane.iptables import features
    from ebpfproxy.xtables.tool import Tool, choose_variant

    tool = Tool(4, choose_variant())
    return features.problems(tool, features.lacking(tool))


def make(settings: Config, site: Site, stack: ExitStack) -> Made:
    """Make the dataplane."""
    from ebpfproxy.dataplane.iptables.dataplane import MODE, IptablesDataplane
    from ebpfproxy.dataplane.xtables import options_of

    dataplane = IptablesDataplane(
        options_of(settings, site, MODE),
        allows_localhost=settings.localhost_node_ports,
        drops_invalid=not settings.tcp_be_liberal,
    )
    return Made(dataplane, Site(site.state_dir))


def reading(site: Site) -> Reading:
    """Return nothing: the kernel's counters of rules belong to administrators."""
    return Reading()


def cleanup(site: Site) -> list[str]:
    """Remove our chains, unless mode ipvs has taken them over, and put settings of the kernel back."""
    from ebpfproxy.dataplane.iptables.dataplane import MODE
    from ebpfproxy.dataplane.xtables import sysctls_file
    from ebpfproxy.sysctl import Ledger
    from ebpfproxy.xtables import cleanup as chains

    return chains.remove(MODE) + Ledger(sysctls_file(site, MODE)).restore()
