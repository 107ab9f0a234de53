"""Ends what the iptables dataplane made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import sysctl
from ebpfproxy.xtables import cleanup as chains

if TYPE_CHECKING:
    from pathlib import Path


def cleanup(sysctls: Path) -> list[str]:
    """Remove our chains, put settings back; return one line for each thing.

    Raises:
        EbpfproxyError: something could not be removed; call again.
    """
    removed = chains.remove("iptables")
    return removed + sysctl.Ledger(sysctls).restore()
