"""Takes away the chains that a mode of ours made, under kube-proxy's names; and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.diff import Delta
from ebpfproxy.errors import DataplaneError
from ebpfproxy.xtables import names
from ebpfproxy.xtables.chains import BLOCK, TABLES, Chain, removal, transaction
from ebpfproxy.xtables.programmer import owner
from ebpfproxy.xtables.tool import VARIANTS, Tool, can_read

if TYPE_CHECKING:
    from ebpfproxy.xtables.chains import Removal, Saved


def remove(mode: str) -> list[str]:
    """Remove the chains of a mode of ours, both families and variants, unless another has taken them over.

    Rules of others stay, also where they lead to one of these chains: that one is only emptied.

    Returns:
        What was removed, one line each.

    Raises:
        DataplaneError: something could not be removed; call again.
    """
    removed = []
    for variant in VARIANTS:
        for family in (4, 6):
            tool = Tool(family, variant)
            # Asking for a legacy table makes one: only those that are there are looked at.
            if not tool.is_installed() or not tool.is_in_use() or not can_read(tool):
                continue
            if owner(tool.rules("nat", names.CANARY)) != mode:
                continue
            saved = {table: tool.save(table) for table in TABLES}
            plan = plan_for(saved)
            text = transaction(
                Delta(dict.fromkeys(plan.kept, ()), plan.chains), removals=plan.rules, block=BLOCK
            )
            if not text:
                continue
            try:
                tool.restore(text)
            except DataplaneError as error:
                raise DataplaneError(f"remove the chains of mode {mode}: {error}") from error
            removed += [f"{tool.name} rules: {line}" for line in _told(plan)]
    return removed


def plan_for(saved: dict[str, Saved]) -> Removal:
    """Return what of these tables to take away. Pure.

    Chains that kubelet makes too stay where there is a kubelet.
    """
    has_kubelet = any(names.KUBELET_CANARY in found.chains for found in saved.values())
    doomed = [
        Chain(table, name)
        for table, found in saved.items()
        for name in found.chains
        if names.is_of_proxy(name) or (not has_kubelet and name in names.OF_KUBELET)
    ]
    return removal(saved, doomed)


def _told(plan: Removal) -> list[str]:
    lines = []
    for table in TABLES:
        count = sum(chain.table == table for chain in plan.chains)
        if count:
            lines.append(f"{count} chain{'' if count == 1 else 's'} of table {table}")
    lines += [
        f"the rules in chain {chain.name} of table {chain.table}; others lead to it, so it stays"
        for chain in plan.kept
    ]
    return lines
