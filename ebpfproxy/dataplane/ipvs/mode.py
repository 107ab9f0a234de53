"""Mode ``ipvs``: whether this machine can run it, what it is made from, and its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ebpfproxy.dataplane.modes import Made, Site
from ebpfproxy.metrics import Reading

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ebpfproxy.config import Config


def usable() -> str | None:
    """Return why this machine can't run it, None if it can."""
    from ebpfproxy.dataplane.ipvs import features

    return features.usable()


def make(settings: Config, site: Site, stack: ExitStack) -> Made:
    """Make the dataplane."""
    from ebpfproxy.dataplane.ipvs.dataplane import MODE, IpvsDataplane, IpvsOptions, sysctls
    from ebpfproxy.dataplane.xtables import options_of
    from ebpfproxy.netlink.ipvs import Timeouts

    needed = sysctls(has_strict_arp=settings.ipvs_strict_arp, release=os.uname().release)
    options = IpvsOptions(
        scheduler=settings.scheduler,
        further_scheduler=settings.ipvs_scheduler,
        node_ports=settings.service_node_port_range,
        exclude_cidrs=settings.ipvs_exclude_cidrs,
        timeouts=Timeouts(
            round(settings.ipvs_tcp_s), round(settings.ipvs_tcp_fin_s), round(settings.ipvs_udp_s)
        ),
    )
    return Made(IpvsDataplane(options_of(settings, site, MODE, needed), options), Site(site.state_dir))


def reading(site: Site) -> Reading:
    """Return nothing: what IPVS counts, ipvsadm and others show."""
    return Reading()


def cleanup(site: Site) -> list[str]:
    """Remove what this mode made, and put settings of the kernel back."""
    from ebpfproxy.dataplane.ipvs import cleanup as end
    from ebpfproxy.dataplane.xtables import sysctls_file

    return end.cleanup(sysctls_file(site, "ipvs"))
