"""One agent of a large cluster: the agent's own code, from the API server's bytes to the maps, and a clock.

Run by ``python -m benchmarks cluster`` in a namespace that it made; prints one JSON object.

A change's lag is the time from before the server writes it to the socket until the sync that programs it has
returned. A change that a later one of the same EndpointSlice overtakes is not timed by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cluster_server import SENT
from benchmarks.figures import percentile
from ebpfproxy import agent, config, metrics
from ebpfproxy.dataplane.chosen import ChosenDataplane
from ebpfproxy.dataplane.modes import Site
from ebpfproxy.kubeapi.access import Flags
from ebpfproxy.source.choice import choose

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ebpfproxy.model.objects import Object, ObjectKey

_SETTLE_S = 2.0


class Clock(metrics.Counts):
    """Counts as the agent does, and keeps the lag of each change."""

    def __init__(self) -> None:
        super().__init__(time.time())
        self.lags_ms: list[float] = []
        self.syncs_ms: list[float] = []
        self._taken: list[int] = []

    def changed(self, keys: Iterable[ObjectKey], objects: Mapping[ObjectKey, Object]) -> None:
        """Note when what the next sync is about was sent."""
        known = list(keys)
        super().changed(known, objects)
        for key in known:
            found = objects.get(key)
            if found is not None and (stamp := found.metadata.annotations.get(SENT)):
                self._taken.append(int(stamp))

    def sync(self, took_s: float, now: float, *, is_done: bool, is_full: bool = True) -> None:
        """Note how long ago that was."""
        super().sync(took_s, now, is_done=is_done, is_full=is_full)
        done = time.monotonic_ns()
        self.lags_ms += [(done - each) / 1e6 for each in self._taken]
        self.syncs_ms.append(took_s * 1000)
        self._taken.clear()


def memory() -> dict[str, float]:
    """Return resident memory now and at its peak, in MiB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


def cpu_s() -> float:
    """Return the seconds of CPU that this process used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def step(url: str, clock: Clock, rate: float, seconds: float) -> dict[str, Any]:
    """Let the cluster roll, and return what it cost here."""
    clock.lags_ms.clear()
    clock.syncs_ms.clear()
    cpu = cpu_s()
    with urllib.request.urlopen(f"{url}/roll?rate={rate}&seconds={seconds}", timeout=600) as answer:  # noqa: S310
        rolled = json.load(answer)
    time.sleep(_SETTLE_S)  # whatever is under way; idle time is nearly free
    lags = sorted(clock.lags_ms)
    return {
        "events_per_s": rolled["events"] / rolled["seconds"],
        "bytes_per_event": rolled["bytes"] / rolled["events"],
        "cpu_percent": 100 * (cpu_s() - cpu) / rolled["seconds"],
        "cpu_ms_per_event": 1000 * (cpu_s() - cpu) / rolled["events"],
        "syncs": len(clock.syncs_ms),
        "lag_p50_ms": percentile(lags, 50),
        "lag_p99_ms": percentile(lags, 99),
        "lag_max_ms": max(lags),
        "rss_mib": memory()["VmRSS"],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the agent, wait until it serves, and measure."""
    gc.set_threshold(*agent._GC_THRESHOLD)  # noqa: SLF001 - as ebpfproxy run does
    settings = config.Config(hostname_override="node-0", map_sizes=dict(options.map_size))
    origin = choose(None, Flags(None, options.url, ()), "node-0", options.state_dir)
    options.state_dir.mkdir(parents=True, exist_ok=True)
    dataplane = ChosenDataplane(settings, Site(options.state_dir, options.cgroup, options.bpffs))
    before = memory()["VmRSS"]
    begun, cpu = time.monotonic(), cpu_s()
    here = agent.Agent(
        settings,
        agent.Place("", options.state_dir, origin.server),
        origin.make,
        agent.HostNetwork(),
        dataplane,
    )
    here._counts = clock = Clock()  # noqa: SLF001 - the one thing that is not the agent's own
    dataplane.start()
    found: dict[str, Any] = {}

    def measure() -> None:
        while not clock.synced:
            time.sleep(0.01)
        found["start"] = {
            "seconds": time.monotonic() - begun,
            "cpu_s": cpu_s() - cpu,
            "rss_before_mib": before,
            **dict(zip(("rss_mib", "peak_mib"), memory().values(), strict=True)),
        }
        time.sleep(_SETTLE_S)
        idle = cpu_s()
        time.sleep(options.seconds)
        found["idle"] = {"cpu_percent": 100 * (cpu_s() - idle) / options.seconds}
        found["rolling"] = [step(options.url, clock, rate, options.seconds) for rate in options.rates]
        found["services"] = len(here._state.services) if here._state else 0  # noqa: SLF001
        here.stop()

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    status = here.run()
    thread.join()
    dataplane.close()
    assert status == 0
    return found


def _map_size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, int(number)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--bpffs", type=Path, required=True)
    parser.add_argument("--cgroup", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--map-size", type=_map_size, action="append", default=[])
    parser.add_argument("rates", type=float, nargs="+")
    options = parser.parse_args()
    os.environ.pop("KUBERNETES_SERVICE_HOST", None)
    print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
