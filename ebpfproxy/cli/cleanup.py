"""``ebpfproxy cleanup``: removes everything that we ever made."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ebpfproxy import agent, files, status
from ebpfproxy.cli.exit_codes import ExitCode
from ebpfproxy.dataplane import chosen, kube_proxy, modes
from ebpfproxy.dataplane.modes import Site
from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.source import lastgood

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

# Modes whose chains, sets and device have kube-proxy's names.
_SAME_NAMES = frozenset(("iptables", "ipvs"))


def run(arguments: argparse.Namespace) -> ExitCode:
    """Remove and say what; a second time there is nothing.

    Raises:
        LockedError: an agent is at work.
        EbpfproxyError: something could not be removed; the message says what.
    """
    if arguments.kube_proxy:
        return _kube_proxy(arguments.state_dir, now=arguments.now)
    site = Site(arguments.state_dir, bpffs=arguments.bpffs)
    recorded = chosen.read_record(arguments.state_dir)
    removed = []
    with ExitStack() as stack:
        _lock(stack, arguments.state_dir / agent.LOCK_FILE, "state directory")
        for name in modes.names():
            removed += chosen.cleanup(name, site, "" if arguments.bpffs else recorded.get(name, ""))
        removed += kube_proxy.remove_keeper()
        removed += _remove_state(arguments.state_dir)
    for line in removed:
        print(f"removed {line}")
    if not removed:
        print("there was nothing to remove")
    return ExitCode.OK


def _kube_proxy(state_dir: Path, *, now: bool) -> ExitCode:
    """Remove what kube-proxy left; an agent may be at work, but not in a mode that has the same names."""
    said = status.read(state_dir)
    if said and said.mode in _SAME_NAMES and said.state != "stopped":
        raise EbpfproxyError(
            f"remove what kube-proxy left: the agent runs in mode {said.mode} and has taken over the chains "
            "of those names; ebpfproxy cleanup removes them once it has ended"
        )
    done = kube_proxy.cleanup(now=now)
    for line in done:
        print(line)
    if not done:
        print("there was nothing to remove")
    return ExitCode.OK


def _lock(stack: ExitStack, path: Path, what: str) -> None:
    """Hold the lock that an agent would hold."""
    if path.exists():
        stack.callback(files.Lock(path, what).close)


def _remove_state(directory: Path) -> list[str]:
    """Remove our files, and the directory if nothing of others is in it."""
    removed = []
    copies = lastgood.directory_of(directory)
    if copies.is_dir():
        shutil.rmtree(copies)
        removed.append(f"directory {copies}")
    for name in (agent.LEDGER_FILE, status.FILE, status.SOCKET, chosen.RECORD, agent.LOCK_FILE):
        path = directory / name
        if path.exists():
            path.unlink()
            removed.append(f"file {path}")
    with suppress(OSError):  # missing, or others have something in it
        directory.rmdir()
    return removed
