"""The main job on real traffic: a node, three pods, a client outside, and ebpfproxy on ``examples/``.

Everything is made in network namespaces of its own, with a BPF file system, a cgroup and a state directory
of its own: the machine's network is not touched, and nothing is left behind. Topology, servers and clients
are those of the tests (``tests/rig``). Exit status 0: everything was as it should be.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.dataplane.bpf import view
from rig import leaks, process
from rig.agent import Agent
from rig.kernel import is_since
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import NODE_IPS, OUTSIDE_IPS, Topology
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REQUESTS = 300
IS_TERMINAL = sys.stdout.isatty()


class DemoError(Exception):
    """Something is not as it should be."""


class Target(NamedTuple):
    """One way to a Service."""

    label: str
    address: str
    port: int
    backends: Collection[str]


WEB_VIP = ("10.96.0.10", 80)
TARGETS = {
    "node": [
        Target("ClusterIP", *WEB_VIP, ("pod1", "pod2", "pod3")),
        Target("ClusterIP, IPv6", "fd00:10:96::20", 80, ("pod1", "pod2")),
        *(
            # In a namespace that is not the machine's own, as this node is.
            [Target("NodePort on localhost", "127.0.0.1", 30080, ("pod1", "pod2", "pod3"))]
            if is_since(5, 14)
            else []
        ),
    ],
    "outside": [
        Target("NodePort", NODE_IPS[0], 30080, ("pod1", "pod2", "pod3")),
    ],
}


def main() -> int:
    """Run the demo and return its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.geteuid() != 0:
        print("demo: network namespaces and BPF need root", file=sys.stderr)
        return 1
    status = 0
    try:
        with ExitStack() as made:
            try:
                demo(made)
            finally:  # nothing interrupts the clean-up
                ignore_signals()
    except KeyboardInterrupt:
        print("\ninterrupted")
        status = 130
    except (DemoError, AssertionError, OSError) as error:
        print(f"\n{bold('FAILED')}: {error}", file=sys.stderr)
        status = 1
    left = leaks.find()
    print(f"left behind: {', '.join(left)}" if left else "everything that was made is removed again")
    return status or int(bool(left))


def demo(made: ExitStack) -> None:
    """Show it, and raise DemoError when it is not as it should be."""
    leaks.sweep()
    net = made.enter_context(Topology(pod_count=3))
    made.callback(end_processes)  # those of a start that was interrupted too
    made.enter_context(name_servers([(pod.name, pod.place) for pod in net.pods], 8080, 8081))
    say("made", f"a node ({NODE_IPS[0]}), a client outside ({OUTSIDE_IPS[0]}), an HTTP server in each of")
    say("", ", ".join(f"{pod.name} ({pod.v4})" for pod in net.pods))

    agent = Agent(net, arguments=["--config", str(EXAMPLES / "config" / "dual-stack.yaml")])
    for file in EXAMPLES.glob("*.yaml"):
        shutil.copy(file, agent.manifests)
    started = time.monotonic()
    made.enter_context(agent)
    say("agent", f"ebpfproxy run --manifests examples/: ready in {time.monotonic() - started:.2f} s")

    probes = {
        "node": made.enter_context(Probe(net.on_node)),
        "outside": made.enter_context(Probe(net.from_outside)),
    }
    heading(f"{REQUESTS} requests each, a new connection for every one: who answered?")
    ask_all(probes, removed=())

    heading("The endpoint of pod3 is taken out of web.yaml, under load")
    left = {pod.v4 for pod in net.pods[:2]}
    with probes["node"].load(*WEB_VIP) as load, view.open_maps(net.bpffs) as maps:
        before = load.more(REQUESTS)
        edited = time.monotonic()
        remove_endpoint(agent, "web.yaml", net.pods[2].v4)
        # Not by the command line: starting it takes ten times as long as what is measured.
        eventually(
            lambda: usable(maps, "default/web:http") == left, "the edit to be in the maps", every_s=0.001
        )
        took_ms = (time.monotonic() - edited) * 1000
        after = load.more(REQUESTS)
        answered, failures = load.counts()
    say("before", ", ".join(f"{name} {before[name]}" for name in sorted(before)))
    say("after", ", ".join(f"{name} {after[name]}" for name in sorted(after)))
    say(
        "in all",
        f"{answered.total()} requests, {len(failures)} failed; in the maps {took_ms:.0f} ms after the edit",
    )
    expect(after.keys() == {"pod1", "pod2"}, f"pod3 should have no traffic any more: {dict(after)}")
    print()
    ask_all(probes, removed=("pod3",))

    heading("ebpfproxy services")
    print(agent.cli("services", "--bpffs", net.bpffs).stdout.rstrip())
    heading("ebpfproxy backends web")
    print(agent.cli("backends", "web", "--bpffs", net.bpffs).stdout.rstrip())
    print()


def ignore_signals() -> None:
    """Let nothing interrupt what follows."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_processes() -> None:
    """End everything that was started."""
    for each in [*process.running]:
        each.stop()


def ask_all(probes: dict[str, Probe], removed: Collection[str]) -> None:
    """Ask every target, print who answered, and check it; ``removed`` backends are those of Service web."""
    rows = [("FROM", "TO", "", "pod1", "pod2", "pod3")]
    wrong: list[str] = []
    for origin, targets in TARGETS.items():
        for target in targets:
            answered = probes[origin].tcp(target.address, target.port, REQUESTS)
            host = f"[{target.address}]" if ":" in target.address else target.address
            cells = [str(answered[name] or "-") for name in ("pod1", "pod2", "pod3")]
            rows.append((origin, f"{host}:{target.port}", target.label, cells[0], cells[1], cells[2]))
            expected = set(target.backends) - set(removed)
            if answered.keys() != expected or answered.total() != REQUESTS:
                wrong.append(
                    f"{host}:{target.port} should be answered by {sorted(expected)} alone: {answered}"
                )
    print_table(rows)
    expect(not wrong, "; ".join(wrong))


def usable(maps: view.Maps, service: str) -> set[str]:
    """Return the addresses of the backends that new connections to a Service may go to."""
    return {row.address for row in view.backends(maps, service.__eq__) if row.is_usable}


def remove_endpoint(agent: Agent, file: str, address: str) -> None:
    """Take one endpoint out of a manifest, as a person with an editor would."""
    lines = (agent.manifests / file).read_text().splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if f"- addresses: [{address}]" in line)
    end = start + 1
    while end < len(lines) and lines[end].startswith("    "):
        end += 1
    agent.write_text(file, "".join(lines[:start] + lines[end:]))


def expect(condition: object, otherwise: str) -> None:
    """Raise DemoError unless the condition holds."""
    if not condition:
        raise DemoError(otherwise)


# --- looks -------------------------------------------------------------------------------------------


def bold(text: str) -> str:
    """Return ``text`` in bold where people read it."""
    return f"\033[1m{text}\033[0m" if IS_TERMINAL else text


def heading(text: str) -> None:
    """Print what comes next."""
    print(f"\n{bold(text)}")


def say(what: str, text: str) -> None:
    """Print one line with a name."""
    print(f"{what:<8}{text}")


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows in columns; the first one is the header, the last three columns are numbers."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number > 2 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
