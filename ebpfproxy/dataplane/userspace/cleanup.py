"""Removes what the userspace dataplane made, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy.dataplane.userspace import client, rules

if TYPE_CHECKING:
    from pathlib import Path


def cleanup(state_dir: Path) -> list[str]:
    """Remove the rules of this network namespace, then end the proxy, and its connections with it.

    Returns:
        What was removed, one line each; empty: there was nothing.

    Raises:
        DataplaneError: something could not be removed; call again.
    """
    removed = rules.remove()
    pid = client.stop(state_dir)
    return [*removed, *([f"userspace proxy, process {pid}"] if pid else ())]
