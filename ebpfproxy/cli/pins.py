"""Opens the pinned maps for the commands that read, or says what shows the same in other modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import host, status
from ebpfproxy.cli.exit_codes import NothingError
from ebpfproxy.dataplane import modes
from ebpfproxy.dataplane.bpf import view
from ebpfproxy.errors import DataplaneError

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def other_mode(arguments: argparse.Namespace) -> modes.Mode | None:
    """Return the mode that serves here where it is not bpf; None: it is, or its maps are named by --bpffs."""
    said = status.read(arguments.state_dir)
    if arguments.bpffs is not None or said is None or said.mode == "bpf":
        return None
    return modes.find(said.mode)


def maps_for(arguments: argparse.Namespace) -> view.Maps:
    """Return the maps that a command reads.

    Raises:
        NothingError: there are none; if another mode serves here, the message says what to use.
        DataplaneError: they can't be read.
    """
    if mode := other_mode(arguments):
        raise NothingError(
            f"mode {mode.name} serves here, and {arguments.command} reads the maps of mode bpf: use "
            "`ebpfproxy services`, `backends` and `explain` for what is wanted, "
            f"`{mode.services_by}` for what the kernel has, `{mode.connections_by}` for connections"
        )
    return open_maps(arguments.bpffs)


def open_maps(bpffs: Path | None) -> view.Maps:
    """Return the maps below ``bpffs`` (None: where a BPF file system is mounted).

    Raises:
        NothingError: there are none.
        DataplaneError: they can't be read.
    """
    found = bpffs or host.find_bpffs()
    if found is None:
        raise NothingError("nothing is programmed: no BPF file system is mounted here; name one with --bpffs")
    try:
        return view.open_maps(found)
    except DataplaneError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        raise NothingError(f"{error}; these commands read the maps of mode bpf alone") from error
