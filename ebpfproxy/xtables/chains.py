"""Chains as values, and the one transaction that turns some into others. Pure.

A rule is the text after ``-A CHAIN``; a chain is its rules in order.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ebpfproxy.diff import Delta

T = TypeVar("T")
Rules = tuple[str, ...]

TABLES = ("mangle", "filter", "nat")  # filter before nat, as kube-proxy writes them
#: Of ``transaction``: iptables-nft-restore takes a time that grows with the square of the chains in one
#: COMMIT (seen in 1.8.9).
BLOCK = 250
#: The kernel's own chains.
BUILT_IN = frozenset(("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"))


class Chain(NamedTuple):
    """Names a chain."""

    table: str
    name: str


class Jump(NamedTuple):
    """A rule in a chain of the kernel's own that leads to one of ours."""

    table: str
    source: str  # PREROUTING, INPUT, ...
    target: str
    comment: str = ""
    match: str = ""  # before the comment

    @property
    def rule(self) -> str:
        """The rule as it is written."""
        comment = f' -m comment --comment "{self.comment}"' if self.comment else ""
        return f"{self.match}{comment} -j {self.target}".strip()


class Saved(NamedTuple):
    """A table as the kernel has it."""

    chains: frozenset[str]
    rules: tuple[str, ...]  # "-A CHAIN ...", in the tool's own words


def parse(text: str) -> Saved:
    """Return the table in ``text``, what iptables-save says of one table."""
    chains, rules = set(), []
    for line in text.splitlines():
        if line.startswith(":"):
            chains.add(line[1:].partition(" ")[0])
        elif line.startswith("-A "):
            rules.append(line)
    return Saved(frozenset(chains), tuple(rules))


def target(rule: str) -> str:
    """Return where a rule leads to; "" = nowhere."""
    match = re.search(r" -[jg] (\S+)", _without_comments(rule))
    return match[1] if match else ""


def source(rule: str) -> str:
    """Return the chain that a saved rule is in."""
    return rule.split(" ", 2)[1]


def _without_comments(rule: str) -> str:
    return re.sub(r'--comment (?:"(?:[^"\\]|\\.)*"|\S+)', "", rule)


def comment(rule: str) -> str:
    """Return a rule's comment; "" = it has none."""
    match = re.search(r'--comment (?:"((?:[^"\\]|\\.)*)"|(\S+))', rule)
    return (match[1] or match[2] or "") if match else ""


def has_jump(saved: Saved, jump: Jump) -> bool:
    """Return whether a table has a jump already, in whatever order the tool prints its parts."""
    return any(
        source(rule) == jump.source and target(rule) == jump.target and comment(rule) == jump.comment
        for rule in saved.rules
        if jump.target in rule
    )


class Edit(NamedTuple):
    """A small change of a chain whose order does not matter."""

    insert: list[str]
    delete: list[str]


#: In the comment of a rule that has to stay behind all others.
LAST = "this must be the last rule in this chain"
# More changes than this, and writing the chain anew costs less than looking for what goes.
_EDITS = 64


def edit(have: Rules, want: Rules) -> Edit | None:
    """Return what turns one order of rules into the other, order left aside; None: write it anew."""
    old, new = Counter(have), Counter(want)
    insert, delete = list((new - old).elements()), list((old - new).elements())
    if len(insert) + len(delete) > _EDITS or any(LAST in rule for rule in (*insert, *delete)):
        return None
    return Edit(insert, delete)


def transaction(
    delta: Delta[Chain, Rules],
    jumps: Iterable[Jump] = (),
    removals: Mapping[str, Iterable[str]] | None = None,
    edits: Mapping[Chain, Edit] | None = None,
    block: int = 0,
) -> str:
    """Return the input of ``iptables-restore --noflush --counters`` that makes a change; "" = there is none.

    A chain that is only named is emptied first, so a chain to delete is named too. Every table is changed at
    once or not at all, unless there are more chains than ``block``: then those come first that lead to no
    other, and those last that lead to them, so that whatever is reached is complete at every moment. What
    goes is emptied, all of it, before any of it is deleted: no chain goes that another leads to.

    Args:
        delta: chains to write, and chains to delete.
        jumps: rules to put first in the kernel's own chains.
        removals: table -> saved rules to take out of chains that are not ours.
        edits: chains to change and not to write anew.
        block: at most so many chains at once; 0 = all.
    """
    parts: list[str] = []
    for table in TABLES:
        written = sorted((each for each in delta.upsert if each.table == table), key=_depth)
        deleted = [each for each in delta.delete if each.table == table]
        first = [f"-I {jump.source} {jump.rule}\n" for jump in jumps if jump.table == table]
        for chain, change in (edits or {}).items():
            if chain.table == table:
                first += [f"-I {chain.name} {rule}\n" for rule in change.insert]
                first += [f"-D {chain.name} {rule}\n" for rule in change.delete]
        first += [f"-D {rule.removeprefix('-A ')}\n" for rule in (removals or {}).get(table, ())]
        if not block or len(written) + len(deleted) <= block:
            parts += _block(table, written, delta.upsert, first, deleted)
            continue
        leaves = [each for each in written if _depth(each) < _TOP]
        parts += [
            text for some in _split(leaves, block) for text in _block(table, some, delta.upsert, (), ())
        ]
        parts += _block(table, [each for each in written if _depth(each) == _TOP], delta.upsert, first, ())
        for some in _split(deleted, block):
            parts += _block(table, some, dict.fromkeys(some, ()), (), ())
        for lines in _split([f"-X {name}\n" for _, name in deleted], block):
            parts += _block(table, (), {}, lines, ())
    return "".join(parts)


def _block(
    table: str,
    written: Sequence[Chain],
    rules: Mapping[Chain, Rules],
    lines: Sequence[str],
    deleted: Sequence[Chain],
) -> list[str]:
    if not (written or lines or deleted):
        return []
    return [
        f"*{table}\n",
        *[f":{name} - [0:0]\n" for _, name in (*written, *deleted)],
        *[f"-A {chain.name} {rule}\n" for chain in written for rule in rules[chain]],
        *lines,
        *[f"-X {name}\n" for _, name in deleted],
        "COMMIT\n",
    ]


def _split(many: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (many[at : at + size] for at in range(0, len(many), size))


# A chain leads to those before it here only; all others are at the top.
_DEPTHS = ("KUBE-MARK-", "KUBE-SEP-", "KUBE-SV", "KUBE-EXT-", "KUBE-FW-")
_TOP = len(_DEPTHS)


def _depth(chain: Chain) -> int:
    return next((n for n, prefix in enumerate(_DEPTHS) if chain.name.startswith(prefix)), _TOP)


class Removal(NamedTuple):
    """How chains are taken away without touching what is others'."""

    chains: list[Chain]  # to delete
    kept: list[Chain]  # rules of others lead to them: to be emptied only
    rules: dict[str, list[str]]  # table -> saved rules of the kernel's own chains that lead to what goes


def removal(saved: Mapping[str, Saved], doomed: Iterable[Chain], rewritten: Iterable[Chain] = ()) -> Removal:
    """Return how to take the chains ``doomed`` away, while ours that stay are ``rewritten``."""
    wanted = set(doomed)
    own = wanted | set(rewritten)
    kept: set[Chain] = set()
    rules: dict[str, list[str]] = {}
    for table, found in saved.items():
        for rule in found.rules:
            goal = Chain(table, target(rule))
            if goal not in wanted or Chain(table, source(rule)) in own:
                continue
            if source(rule) in BUILT_IN:
                rules.setdefault(table, []).append(rule)
            else:
                kept.add(goal)
    return Removal(sorted(wanted - kept), sorted(kept), rules)
