"""What the tests make in the kernel: bpffs mounts, cgroups and network namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from rig.names import PREFIX, temporary_directory, unique
from rig.process import HERE, Place
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

NETNS_DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000


def is_since(*version: int) -> bool:
    """Return whether this kernel is of ``version`` or later."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= version


#: How a call fails that a cgroup program refused with ECONNREFUSED; before Linux 5.18 there is only EPERM.
REFUSED = ConnectionRefusedError if is_since(5, 18) else PermissionError


def mounts() -> list[tuple[str, Path]]:
    """Return (file system type, mount point) of every mount we see."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        found.append((fields[fields.index("-") + 1], Path(fields[4])))
    return found


def cgroup_root() -> Path:
    """Return where cgroup2 is mounted (systemd's hybrid layout: below /sys/fs/cgroup/unified)."""
    return next(path for kind, path in mounts() if kind == "cgroup2")


@contextlib.contextmanager
def new_bpffs() -> Iterator[Path]:
    """Mount a bpffs of its own; pins end with it."""
    path = temporary_directory("bpffs")
    HERE.run("mount", "-t", "bpf", "bpf", path)
    try:
        yield path
    finally:
        HERE.run("umount", path)
        path.rmdir()


@contextlib.contextmanager
def new_cgroup() -> Iterator[Path]:
    """Make a cgroup below the cgroup2 root; at the end its processes are killed and it is removed."""
    path = cgroup_root() / f"{PREFIX}{uuid.uuid4().hex}"
    path.mkdir()
    try:
        yield path
    finally:
        remove_cgroup(path)


def remove_cgroup(path: Path) -> None:
    """Kill every process in the cgroup and below, then remove it."""
    if is_since(5, 14):
        (path / "cgroup.kill").write_text("1")
    else:
        for file in path.rglob("cgroup.procs"):
            for pid in file.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    eventually(
        lambda: "populated 0" in (path / "cgroup.events").read_text(), f"the processes of {path} to end"
    )
    for directory, _, _ in os.walk(path, topdown=False):
        Path(directory).rmdir()


class Netns:
    """A network namespace with a name."""

    def __init__(self, label: str = "") -> None:
        self.name = unique(label)
        self.path = NETNS_DIRECTORY / self.name

    def place(self, cgroup: Path | None = None) -> Place:
        """Return this namespace, and ``cgroup``, as a place for processes."""
        return Place(self.path, cgroup)

    def shell(self, script: str) -> str:
        """Run a shell script inside, ending at the first error; return its output."""
        return self.place().run("sh", "-e", "-c", script).stdout

    def __repr__(self) -> str:
        return f"Netns({self.name})"


class OwnNetns(Netns):
    """The network namespace of the tests themselves."""

    def __init__(self) -> None:
        self.name, self.path = "", Path("/proc/self/ns/net")


# IPv6 addresses are usable at once: no duplicate address detection. Autoconfiguration stays out of it.
_PREPARE = """
for kind in all default; do
    echo 0 > /proc/sys/net/ipv6/conf/$kind/accept_dad
    echo 0 > /proc/sys/net/ipv6/conf/$kind/accept_ra
    echo 0 > /proc/sys/net/ipv6/conf/$kind/router_solicitations
done
ip link set lo up
"""


@contextlib.contextmanager
def new_netns(label: str = "") -> Iterator[Netns]:
    """Make a network namespace with loopback up."""
    netns = Netns(label)
    HERE.run("ip", "netns", "add", netns.name)
    try:
        netns.shell(_PREPARE)
        yield netns
    finally:
        HERE.run("ip", "netns", "delete", netns.name)


def enter(netns: Path) -> None:
    """Move this thread into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(netns, os.O_RDONLY)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"enter {netns}")
    finally:
        os.close(fd)
