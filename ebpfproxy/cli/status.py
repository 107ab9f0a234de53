"""``ebpfproxy status``: the agent, what it programmed last, and what the kernel counted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import status
from ebpfproxy.cli import output, pins
from ebpfproxy.cli.exit_codes import ExitCode, NothingError
from ebpfproxy.dataplane.bpf import view

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> ExitCode:
    """Print the status; exit status 3 if no agent runs."""
    said = status.read(arguments.state_dir)
    is_running = said is not None and said.state != "stopped" and _is_agent(said.pid)
    verdicts = _verdicts(arguments.bpffs or (Path(said.bpffs) if said and said.bpffs else None))
    if arguments.output in ("json", "yaml"):
        agent = msgspec.to_builtins(said) if said else {}
        output.encode({"is_running": is_running, **agent, "verdicts": verdicts}, arguments.output)
    else:
        lines = _lines(said, verdicts, is_running=is_running)
        print("\n".join(f"{name:<14}{text}".rstrip() for name, text in lines))
    return ExitCode.OK if is_running else ExitCode.NOTHING


def _is_agent(pid: int) -> bool:
    """Return whether a process is one of ours: numbers are used again."""
    try:
        return b"ebpfproxy" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _verdicts(bpffs: Path | None) -> dict[str, int] | None:
    """Return what the kernel counted; None: nothing is programmed."""
    try:
        with pins.open_maps(bpffs) as maps:
            return {row.verdict: row.count for row in view.verdicts(maps)}
    except NothingError:
        return None


def _lines(
    said: status.Status | None, verdicts: dict[str, int] | None, *, is_running: bool
) -> list[tuple[str, str]]:
    """Return the status for people, as names and texts."""
    if said is None:
        lines = [("agent", "none has run with this state directory")]
    else:
        agent = f"{said.state}, process {said.pid}" if is_running else "not running"
        last = f"{said.last_sync}, took {said.last_sync_s * 1000:.1f} ms" if said.last_sync else "none yet"
        lines = [
            ("agent", f"{agent}, version {said.version}, since {said.started}"),
            ("node", said.node),
            ("dataplane", _mode(said)),
            *_several("passed over", said.passed_over),
            ("manifests", said.manifests) if said.manifests else ("API server", said.server),
            *([("cgroup", said.cgroup)] if said.cgroup else ()),
            *([("bpffs", said.bpffs)] if said.bpffs else ()),
            *([("devices", ", ".join(said.devices) or "none")] if said.mode == "bpf" else ()),
            ("last sync", f"{last} ({said.syncs} in all)"),
            ("programmed", f"{said.services} Service ports, {said.backends} backends"),
        ]
        lines += _several("problems", said.problems)
        lines += _several("not done", said.unsupported)
        lines += _several("no effect", said.unused_settings)
    if verdicts is None and said is not None and said.mode not in ("", "bpf"):
        return lines  # only BPF programs count what they do
    if verdicts is None:
        return [*lines, ("kernel", "nothing is programmed")]
    counted = [f"{count} {name}" for name, count in verdicts.items() if count]
    return [*lines, ("counted", ", ".join(counted) or "nothing yet")]


def _mode(said: status.Status) -> str:
    if said.mode == "bpf":
        return f"bpf, loader {said.loader or 'none yet'}"
    return said.mode or "none yet"


def _several(name: str, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return one line for each text, named once."""
    return [(name if number == 0 else "", text) for number, text in enumerate(texts)]
