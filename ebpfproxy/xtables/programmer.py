"""Keeps the chains of one IP family as a dataplane wants them: have, want, diff, one transaction."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ebpfproxy.diff import Delta, diff
from ebpfproxy.errors import DataplaneError
from ebpfproxy.xtables import names
from ebpfproxy.xtables.chains import (
    BLOCK,
    TABLES,
    Chain,
    Edit,
    Jump,
    Rules,
    comment,
    edit,
    has_jump,
    removal,
    transaction,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ebpfproxy.xtables.chains import Saved
    from ebpfproxy.xtables.tool import Tool

log = logging.getLogger(__name__)

CANARIES = tuple(Chain(table, names.CANARY) for table in TABLES)
_BLOCK = {"nft": BLOCK, "legacy": 0}
# What the kernel holds from before is in the tool's words, which are not ours: it differs from all we want.
_UNKNOWN: Rules = ("?",)


def canary_rule(mode: str) -> str:
    """Return the rule that says whose chains these are; a flush that leaves the chains takes it away."""
    return f'-m comment --comment "ebpfproxy, mode {mode}; gone when somebody flushed the rules"'


def owner(rules: Sequence[str] | None) -> str:
    """Return which mode of ours the canary's rules name; "" = none."""
    for rule in rules or ():
        match = re.match(r"ebpfproxy, mode (\w+);", comment(rule))
        if match:
            return match[1]
    return ""


class Programmer:
    """The chains of one IP family in the kernel.

    Args:
        tool: what writes them.
        mode: the dataplane's, for the canary.
        unordered: chains where only the rules count, not their order.

    Attributes:
        written: table -> rules that the last ``apply`` wrote.
        failures: how often one was refused.
    """

    def __init__(self, tool: Tool, mode: str, unordered: Collection[Chain] = ()) -> None:
        self.tool, self._mode, self._unordered = tool, mode, frozenset(unordered)
        self._have: dict[Chain, Rules] | None = None  # None: has to be read
        self._jumps: set[Jump] = set()  # that are there
        self._totals: tuple[object, dict[str, int]] = (None, {})  # of these chains
        self.written: dict[str, int] = {}
        self.failures = 0

    def apply(self, want: Mapping[Chain, Rules], jumps: Sequence[Jump]) -> int:
        """Make exactly these chains be there; the canaries are added to them.

        What kube-proxy, or another mode of ours, left is taken over in the same transaction.

        Returns:
            How many chains were written or deleted.

        Raises:
            DataplaneError: some tables may be as they were; call again.
        """
        full = {**want, **dict.fromkeys(CANARIES, (canary_rule(self._mode),))}
        removals: dict[str, list[str]] = {}
        if self._have is None:
            saved = {table: self.tool.save(table) for table in TABLES}
            have = {Chain(table, name): _UNKNOWN for table in TABLES for name in _ours(saved[table])}
            present = {jump for jump in jumps if has_jump(saved[jump.table], jump)}
            delta = diff(have, full)
            plan = removal(saved, delta.delete, full)
            removals = plan.rules
            delta = Delta({**delta.upsert, **dict.fromkeys(plan.kept, ())}, plan.chains)
        else:
            present = self._jumps
            delta = diff(self._have, full)
            # kubelet and route_localnet count on it for as long as they are there.
            delta.delete[:] = [each for each in delta.delete if each.name not in names.OF_KUBELET]
        edits = self._edits(delta)
        self._have = None  # until it is done
        text = transaction(
            Delta(
                {chain: rules for chain, rules in delta.upsert.items() if chain not in edits}, delta.delete
            ),
            [jump for jump in jumps if jump not in present],
            removals,
            edits,
            _BLOCK[self.tool.variant],
        )
        if text:
            try:
                self.tool.restore(text)
            except DataplaneError:
                self.failures += 1
                raise
        self.written = _count({chain: delta.upsert[chain] for chain in delta.upsert if chain not in edits})
        for chain, change in edits.items():
            self.written[chain.table] += len(change.insert)
        self._have, self._jumps = full, present | set(jumps)
        return len(delta.upsert) + len(delta.delete)

    def totals(self) -> dict[str, int]:
        """Return table -> rules that are ours."""
        if self._totals[0] is not self._have:
            self._totals = self._have, _count(self._have or {})
        return self._totals[1]

    def _edits(self, delta: Delta[Chain, Rules]) -> dict[Chain, Edit]:
        """Return the chains that need not be written anew."""
        found = {}
        for chain in self._unordered & delta.upsert.keys():
            have = (self._have or {}).get(chain)
            change = None if have is None or have == _UNKNOWN else edit(have, delta.upsert[chain])
            if change is not None:
                found[chain] = change
        return found

    def forget(self) -> None:
        """Read what is there at the next ``apply``, and write everything."""
        self._have = None

    def is_intact(self) -> bool:
        """Return whether nobody flushed the rules since the last ``apply``."""
        return all(owner(self.tool.rules(*chain)) == self._mode for chain in CANARIES)


def _count(chains: Mapping[Chain, Rules]) -> dict[str, int]:
    """Return table -> rules."""
    counts = dict.fromkeys(TABLES, 0)
    for chain, rules in chains.items():
        counts[chain.table] += len(rules)
    return counts


def _ours(saved: Saved) -> list[str]:
    return [name for name in saved.chains if names.is_of_proxy(name)]
