"""What a run left behind, found by its names; and what dead runs left, swept away."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

from rig import process
from rig.kernel import NETNS_DIRECTORY, cgroup_root, mounts, remove_cgroup
from rig.names import PREFIX
from rig.process import HERE


def find(prefix: str = PREFIX) -> list[str]:
    """Return one line for each thing that carries ``prefix`` and still exists."""
    found = [f"process {child.pid}: {child.name}" for child in process.running if child.poll() is None]
    found += [f"userspace proxy {pid}" for pid in proxies(prefix)]
    found += [f"network namespace {path}" for path in _entries(NETNS_DIRECTORY, prefix)]
    found += [f"cgroup {path}" for path in _entries(cgroup_root(), prefix)]
    found += [f"mount {path}" for _, path in mounts() if _carries(path, prefix)]
    found += [f"directory {path}" for path in _entries(Path(tempfile.gettempdir()), prefix)]
    return found


def pins() -> set[Path]:
    """Return our pins on the machine's own bpffs: tests must never make any there."""
    return set(Path("/sys/fs/bpf").glob("ebpfproxy/*/*"))


def sweep() -> None:
    """Remove what test runs left whose process is gone (killed, or the machine was stopped)."""
    everywhere = [NETNS_DIRECTORY, cgroup_root(), Path(tempfile.gettempdir())]
    names = [path.name for place in everywhere for path in _entries(place, "ebp-")]
    # A proxy may be all that is left: it outlives its agent, and its directory too.
    names += [part for path in _proxy_sockets().values() for part in path.parts]
    for pid in {match[1] for name in names if (match := re.match(r"ebp-(\d+)-", name))}:
        if not Path(f"/proc/{pid}").exists():
            _remove(f"ebp-{pid}-")


def _remove(prefix: str) -> None:
    for pid in proxies(prefix):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Another run may sweep the same things at the same time.
    with contextlib.suppress(OSError):
        for path in _entries(cgroup_root(), prefix):
            remove_cgroup(path)
    for path in _entries(NETNS_DIRECTORY, prefix):
        HERE.run("ip", "netns", "delete", path.name, check=False)
    for _, path in mounts():
        if _carries(path, prefix) and path.parent != NETNS_DIRECTORY:
            HERE.run("umount", path, check=False)
    for path in _entries(Path(tempfile.gettempdir()), prefix):
        shutil.rmtree(path, ignore_errors=True)


def _entries(directory: Path, prefix: str) -> list[Path]:
    if not directory.exists():
        return []
    return sorted(path for path in directory.iterdir() if path.name.startswith(prefix))


def proxies(prefix: str) -> list[int]:
    """Return the proxies of mode userspace with ``prefix`` in their socket's path."""
    return [pid for pid, path in _proxy_sockets().items() if prefix in str(path)]


def _proxy_sockets() -> dict[int, Path]:
    """Return the socket of each proxy of mode userspace, by process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "ebpfproxy.dataplane.userspace.proxy" in words and "--socket" in words[:-1]:
                found[int(entry.name)] = Path(words[words.index("--socket") + 1])
    return found


def _carries(path: Path, prefix: str) -> bool:
    return any(part.startswith(prefix) for part in path.parts)
