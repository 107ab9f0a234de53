"""The agent with an API server as its source, measured from within: its start, its memory, its latency.

Run by ``python -m benchmarks`` beside ``benchmarks.api_server``; prints one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import signal
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from benchmarks.figures import percentile
from ebpfproxy import agent
from ebpfproxy.dataplane import chosen
from ebpfproxy.kubeapi import access

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState

SETTLE_S = 3.0


def memory_mib(field: str) -> float:
    """Return a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def watch_syncs() -> queue.SimpleQueue[int]:
    """Return where the end of each sync is told (monotonic, nanoseconds)."""
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()
    sync = chosen.ChosenDataplane.sync

    def timed(self: chosen.ChosenDataplane, state: DesiredState) -> None:
        sync(self, state)
        ends.put(time.monotonic_ns())

    chosen.ChosenDataplane.sync = timed  # type: ignore[method-assign]
    return ends


def measure(options: argparse.Namespace, ends: queue.SimpleQueue[int]) -> dict[str, Any]:
    """Return the figures; the agent runs in the main thread."""
    first = ends.get()
    figures: dict[str, Any] = {
        "from start to the maps, s": (first - options.started) / 1e9,
        "processor time until then, s": time.process_time(),
        "resident, MiB": memory_mib("VmRSS"),
        "resident at most, MiB": memory_mib("VmHWM"),
    }
    time.sleep(SETTLE_S)
    found = access.read_kubeconfig(options.kubeconfig)
    connection = http.client.HTTPSConnection(
        urlsplit(found.servers[0]).netloc, context=ssl.create_default_context(cafile=found.authority.file)
    )
    took = []
    for count in range(options.changes):
        while not ends.empty():
            ends.get()
        connection.request("POST", f"/change/{2 + count // 2 * 7919 % (options.services - 1)}")
        sent = int(connection.getresponse().read())
        took.append((ends.get() - sent) / 1e6)
        time.sleep(0.01)
    figures["changes"] = len(took)
    figures |= {f"p{each}_ms": percentile(took, each) for each in (50, 99)} | {"max_ms": max(took)}
    figures["resident after them, MiB"] = memory_mib("VmRSS")
    return figures


def main() -> None:
    """Run the agent, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--started", type=int, required=True, help="monotonic, nanoseconds")
    parser.add_argument("--bpffs", type=Path, required=True)
    parser.add_argument("--cgroup", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--services", type=int, required=True)
    parser.add_argument("--changes", type=int, required=True)
    options = parser.parse_args()
    ends = watch_syncs()
    figures: dict[str, Any] = {}

    def work() -> None:
        try:
            figures.update(measure(options, ends))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=work, daemon=True).start()
    status = agent.run(
        agent.Options(
            kubeconfig=options.kubeconfig,
            node_name="node-1",
            mode="bpf",
            loader="libbpf",
            cgroup=options.cgroup,
            bpffs=options.bpffs,
            state_dir=options.state_dir,
            healthz_bind_address="",
            metrics_bind_address="",
        )
    )
    print(json.dumps(figures))
    sys.exit(status)


if __name__ == "__main__":
    main()
