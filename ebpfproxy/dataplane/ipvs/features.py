"""What this machine must have for the ipvs dataplane."""

from __future__ import annotations

from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.netlink.ipvs import Ipvs
from ebpfproxy.xtables import probe, sets
from ebpfproxy.xtables.probe import Match

REQUIRED = (
    *probe.COMMON,
    Match("ipvs", "filter", "-m ipvs --vaddr 192.0.2.1 --vproto tcp --vport 80"),
    Match("physdev", "nat", "-m physdev ! --physdev-is-in"),
    Match(
        "set", "nat", "-m set --match-set KUBE-PROBE dst,dst", setup="ipset create KUBE-PROBE hash:ip,port"
    ),
)


def usable(variant: str = "auto") -> str | None:
    """Return why this machine can't run the dataplane, None if it can."""
    try:
        Ipvs().close()
    except EbpfproxyError as error:
        return str(error)
    if not sets.is_installed():
        return "ipset is not installed (Debian package ipset)"
    return probe.why_not(variant, REQUIRED)
