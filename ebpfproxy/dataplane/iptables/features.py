"""What this machine must have for iptables rules, and what it may lack, found by trying the rules."""

from __future__ import annotations

from typing import NamedTuple

from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.xtables.tool import Tool, can_read, choose_variant

# The first version of both variants, and the one whose legacy tools take the lock by themselves.
MIN_VERSION = (1, 8)


class Match(NamedTuple):
    """A match or target of xtables, in a rule that uses it."""

    name: str
    table: str
    rule: str
    needed_for: str = ""  # "" = the mode can't do without


REQUIRED = (
    Match("addrtype", "nat", "-m addrtype --dst-type LOCAL"),
    Match("comment", "nat", '-m comment --comment "a comment"'),
    Match("conntrack", "filter", "-m conntrack --ctstate NEW"),
    Match("mark", "nat", "-m mark ! --mark 0x4000/0x4000"),
    Match("statistic", "nat", "-m statistic --mode random --probability 0.5000000000"),
    Match("tcp", "nat", "-m tcp -p tcp --dport 80"),
    Match("udp", "nat", "-m udp -p udp --dport 80"),
    Match("MARK", "nat", "-j MARK --or-mark 0x4000"),
    Match("DNAT", "nat", "-m tcp -p tcp -j DNAT --to-destination :80"),
    Match("REJECT", "filter", "-j REJECT"),
)
MASQUERADE = Match("MASQUERADE", "nat", "-j MASQUERADE")
OPTIONAL = (
    Match("recent", "nat", "-m recent --name a --set", "sessionAffinity: ClientIP"),
    Match("sctp", "nat", "-m sctp -p sctp --dport 80", "SCTP"),
)


def missing(tool: Tool, matches: tuple[Match, ...]) -> list[Match]:
    """Return which of ``matches`` the kernel or the tool refuses; none when it can't be tried."""
    if not _reason(tool, matches):
        return []
    return [match for match in matches if _reason(tool, (match,))]


def _reason(tool: Tool, matches: tuple[Match, ...]) -> str:
    """Return why rules are refused; "" = they are not, or it can't be tried (that needs CAP_SYS_ADMIN)."""
    text = ""
    for table in ("filter", "nat"):
        rules = "".join(f"-A KUBE-PROBE {match.rule}\n" for match in matches if match.table == table)
        masquerade = f"-A POSTROUTING {MASQUERADE.rule}\n" if MASQUERADE in matches and table == "nat" else ""
        text += f"*{table}\n:KUBE-PROBE - [0:0]\n{rules}{masquerade}COMMIT\n"
    reason = tool.try_apart(text)
    return "" if reason.startswith("unshare") else reason


def usable(variant: str = "auto") -> str | None:
    """Return why this machine can't run the dataplane, None if it can."""
    try:
        chosen = choose_variant(variant)
        tool = Tool(4, chosen)
        if tool.version() < MIN_VERSION:
            return f"{tool.name} is version {'.'.join(map(str, tool.version()))}, 1.8 is needed"
        if not can_read(tool):
            return (
                f"{tool.name} can't read the kernel's tables: it needs CAP_NET_ADMIN, and a kernel with them"
            )
        lacking = missing(tool, REQUIRED)
    except EbpfproxyError as error:
        return str(error)
    if lacking:
        return f"the kernel, or {tool.name}, lacks {', '.join(match.name for match in lacking)}"
    return None


def problems(tool: Tool, lacking: list[Match]) -> list[str]:
    """Return one sentence for each optional thing that is missing."""
    return [
        f"no {match.needed_for}: the kernel, or {tool.name}, lacks the match {match.name}"
        for match in lacking
    ]
