"""What this machine is: its name and where the kernel's file systems are mounted."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.errors import KernelError, UnsupportedError
from ebpfproxy.files import LockedError

if TYPE_CHECKING:
    from collections.abc import Iterator

BPFFS = Path("/sys/fs/bpf")  # where every tool looks for it
_MOUNTINFO = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """One line of mountinfo."""

    path: Path
    root: str  # the part of the file system that is mounted; "/" = all of it
    type: str


def node_name(override: str = "") -> str:
    """Return the name of the Node that this machine is: ``override``, else the host's name in lower case."""
    return override.strip() or socket.gethostname().strip().lower()


def mounts(text: str) -> Iterator[Mount]:
    """Yield the mounts in ``text``, the content of /proc/self/mountinfo; later ones hide earlier ones.

    Source: proc(5), /proc/pid/mountinfo; space, tab, newline and backslash are written in octal there.
    """
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, types = before.split(), after.split()
        if len(fields) >= 5 and types:
            yield Mount(Path(_unescape(fields[4])), _unescape(fields[3]), types[0])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def find_cgroup2() -> Path:
    """Return where the cgroup v2 tree is mounted.

    Raises:
        UnsupportedError: nowhere.
    """
    for mount in _visible("cgroup2"):
        return mount
    raise UnsupportedError(
        "no cgroup v2 file system is mounted: mount one (mount -t cgroup2 none DIR) and name it with --cgroup"
    )


def find_bpffs() -> Path | None:
    """Return where a BPF file system is mounted, /sys/fs/bpf first; None: nowhere."""
    found = list(_visible("bpf"))
    return BPFFS if BPFFS in found else next(iter(found), None)


def is_bpffs(path: Path) -> bool:
    """Return whether ``path`` is in a BPF file system."""
    whole = path.resolve()
    over = [mount for mount in _top_mounts() if whole.is_relative_to(mount.path)]
    return bool(over) and max(over, key=lambda mount: len(mount.path.parts)).type == "bpf"


def mount_bpffs(path: Path = BPFFS) -> None:
    """Mount a BPF file system at ``path``.

    Raises:
        KernelError: the kernel refused.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        errno = ctypes.get_errno()
        raise KernelError(f"mount a bpf file system at {path}: {os.strerror(errno)}", errno)


def _visible(kind: str) -> Iterator[Path]:
    """Yield where file systems of type ``kind`` are mounted and not mounted over, whole ones first."""
    ours = [mount for mount in _top_mounts() if mount.type == kind and mount.path.is_dir()]
    yield from (mount.path for mount in sorted(ours, key=lambda mount: mount.root != "/"))


def _top_mounts() -> list[Mount]:
    """Return the mounts that no later one at the same path hides."""
    found = mounts(_MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape"))
    return list({mount.path: mount for mount in found}.values())


class NetworkLock:
    """Holds a name in this network namespace; the kernel lets go of it when the process ends."""

    def __init__(self, name: str) -> None:
        """Take the name.

        Raises:
            LockedError: another process in this network namespace has it.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            # The abstract names of Unix sockets belong to the network namespace, unix(7).
            self._socket.bind(f"\0ebpfproxy-{name}")
        except OSError:
            self._socket.close()
            raise LockedError(
                f"the {name} rules of this network namespace are in use by another agent: stop it"
            ) from None

    def close(self) -> None:
        """Let go of the name."""
        self._socket.close()
