"""What this machine must have for the iptables dataplane, and what it may lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.xtables import probe
from ebpfproxy.xtables.probe import Match

if TYPE_CHECKING:
    from ebpfproxy.xtables.tool import Tool

REQUIRED = (
    *probe.COMMON,
    Match("statistic", "nat", "-m statistic --mode random --probability 0.5000000000"),
    Match("tcp", "nat", "-m tcp -p tcp --dport 80"),
    Match("udp", "nat", "-m udp -p udp --dport 80"),
    Match("DNAT", "nat", "-m tcp -p tcp -j DNAT --to-destination :80"),
)
OPTIONAL = (
    Match("recent", "nat", "-m recent --name a --set", "sessionAffinity: ClientIP"),
    Match("sctp", "nat", "-m sctp -p sctp --dport 80", "SCTP"),
)


def usable(variant: str = "auto") -> str | None:
    """Return why this machine can't run the dataplane, None if it can."""
    return probe.why_not(variant, REQUIRED)


def lacking(tool: Tool) -> list[Match]:
    """Return what the dataplane can do without, and this machine has not."""
    return probe.missing(tool, OPTIONAL)


def problems(tool: Tool, missing: list[Match]) -> list[str]:
    """Return one sentence for each thing that is missing."""
    return [
        f"no {match.needed_for}: the kernel, or {tool.name}, lacks the match {match.name}"
        for match in missing
    ]
