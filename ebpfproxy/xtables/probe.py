"""Which matches and targets of iptables this machine has, found by trying rules apart from all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.xtables.tool import Tool, can_read, choose_variant

if TYPE_CHECKING:
    from collections.abc import Sequence

# The first version of both variants, and the one whose legacy tools take the lock by themselves.
MIN_VERSION = (1, 8)


class Match(NamedTuple):
    """A match or target of xtables, in a rule that uses it."""

    name: str
    table: str
    rule: str
    needed_for: str = ""  # "" = the mode can't do without
    setup: str = ""  # a shell command that comes first


#: Rules of every dataplane that is made of iptables.
COMMON = (
    Match("addrtype", "nat", "-m addrtype --dst-type LOCAL"),
    Match("comment", "nat", '-m comment --comment "a comment"'),
    Match("conntrack", "filter", "-m conntrack --ctstate NEW"),
    Match("mark", "nat", "-m mark ! --mark 0x4000/0x4000"),
    Match("MARK", "nat", "-j MARK --or-mark 0x4000"),
    Match("MASQUERADE", "nat", "-j MASQUERADE"),
    Match("REJECT", "filter", "-j REJECT"),
)


def why_not(variant: str, required: Sequence[Match]) -> str | None:
    """Return in one sentence why rules with these matches can't be used here, None if they can."""
    try:
        chosen = choose_variant(variant)
        tool = Tool(4, chosen)
        if tool.version() < MIN_VERSION:
            return f"{tool.name} is version {'.'.join(map(str, tool.version()))}, 1.8 is needed"
        if not can_read(tool):
            return (
                f"{tool.name} can't read the kernel's tables: it needs CAP_NET_ADMIN, and a kernel with them"
            )
        lacking = missing(tool, required)
    except EbpfproxyError as error:
        return str(error)
    if lacking:
        return f"the kernel, or {tool.name}, lacks {', '.join(match.name for match in lacking)}"
    return None


def missing(tool: Tool, matches: Sequence[Match]) -> list[Match]:
    """Return which of ``matches`` the kernel or the tool refuses; none when it can't be tried."""
    if not _reason(tool, matches):
        return []
    return [match for match in matches if _reason(tool, (match,))]


def _reason(tool: Tool, matches: Sequence[Match]) -> str:
    """Return why rules are refused; "" = they are not, or it can't be tried (that needs CAP_SYS_ADMIN)."""
    text = ""
    for table in ("filter", "nat"):
        # MASQUERADE is allowed in chains that POSTROUTING leads to, or that nothing leads to.
        rules = "".join(f"-A KUBE-PROBE {match.rule}\n" for match in matches if match.table == table)
        text += f"*{table}\n:KUBE-PROBE - [0:0]\n{rules}COMMIT\n"
    setup = "; ".join(match.setup for match in matches if match.setup)
    reason = tool.try_apart(text, setup)
    return "" if reason.startswith("unshare") else reason
