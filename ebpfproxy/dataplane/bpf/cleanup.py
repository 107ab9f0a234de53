"""Removes everything that we ever put into the kernel below one BPF file system, and nothing else."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ebpfproxy.dataplane.bpf.attach import QDISC_MARKS, remove_filters
from ebpfproxy.errors import KernelError

if TYPE_CHECKING:
    from pathlib import Path


def cleanup(bpffs: Path) -> list[str]:
    """Remove pinned links and maps below ``bpffs``, and our filters on this network namespace's devices.

    Links go first: with its last pin a link detaches its program, so nothing reads the maps any more. The
    programs go with their links and pins, the memory of the maps with their pins.

    Args:
        bpffs: as given to ``ebpfproxy run``.

    Returns:
        What was removed, one line each; empty: there was nothing.

    Raises:
        KernelError: something could not be removed; call again.
    """
    removed = []
    root = bpffs / "ebpfproxy"
    removed += _remove_tree(root / "links")
    removed += remove_filters(root / QDISC_MARKS)
    for name in (QDISC_MARKS, "programs", "maps", "maps-new", "maps-old"):
        removed += _remove_tree(root / name)
    _remove_directory(root)
    return removed


def _remove_tree(directory: Path) -> list[str]:
    """Remove a directory of pins and the pins in it."""
    if not directory.is_dir():
        return []
    removed = []
    try:
        for path in sorted(directory.iterdir()):
            if path.is_dir():
                removed += _remove_tree(path)
            else:
                path.unlink(missing_ok=True)
                removed.append(f"pin {path}")
    except OSError as error:
        raise KernelError(f"remove {directory}: {error.strerror}", error.errno or 0) from error
    _remove_directory(directory)
    return removed


def _remove_directory(directory: Path) -> None:
    """Remove a directory unless it is missing or holds what is not ours."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise KernelError(f"remove {directory}: {error.strerror}", error.errno or 0) from error
