"""Opens the pinned maps for the commands that read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import host
from ebpfproxy.cli.exit_codes import NothingError
from ebpfproxy.dataplane.bpf import view
from ebpfproxy.errors import DataplaneError

if TYPE_CHECKING:
    from pathlib import Path


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
