"""How long the iptables dataplane takes to program Services: ``python -m benchmarks.iptables``, as root.

Works in a network namespace of its own, with both variants of the tools. A change is timed from the new
desired state to the end of the tools; "cpu" is what this process and the tools used: the better number on a
busy machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from benchmarks import state
from benchmarks.figures import percentile, timed_sync
from ebpfproxy.dataplane.iptables.dataplane import IptablesDataplane
from ebpfproxy.dataplane.xtables import XtablesOptions
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKind,
    NodePortAddresses,
    Service,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIANTS = ("nft", "legacy")
ADDRESSES = NodePortAddresses(frozenset({"192.0.2.1"}), frozenset({"192.0.2.1", "127.0.0.1"}))
ROUNDS = 9
MOST = 16  # endpoints of a Service


def service(number: int, backends: int) -> Service:
    """Return a Service with a cluster IP and so many endpoints."""
    frontend = Frontend(FrontendKind.CLUSTER_IP, state.vip(number + 1), 80)
    listed = tuple(Backend(each, 8080) for each in state.endpoints(number, MOST)[:backends])
    return state.resolved(f"service-{number}", frontend, listed, port_name="http")


def measure(count: int, backends: int, variant: str) -> dict[str, float]:
    """Return milliseconds; runs in a namespace of its own."""
    with tempfile.TemporaryDirectory() as directory:
        dataplane = IptablesDataplane(XtablesOptions(Path(directory) / "sysctls", variant))
        dataplane.start()
        services = [service(number, backends) for number in range(count)]
        figures = dict(zip(("first", "first cpu"), timed_sync(dataplane, wanted(services)), strict=True))
        samples: dict[str, list[tuple[float, float]]] = {"endpoint": [], "added": [], "removed": []}
        for number in range(ROUNDS):
            at = number * count // ROUNDS
            services[at] = service(at, backends - 1 + 2 * (number % 2))
            samples["endpoint"].append(timed_sync(dataplane, wanted(services)))
            samples["added"].append(timed_sync(dataplane, wanted([*services, service(count, backends)])))
            samples["removed"].append(timed_sync(dataplane, wanted(services)))
        for name, found in samples.items():
            figures[name] = percentile([wall for wall, _ in found], 50)
            figures[f"{name} cpu"] = percentile([cpu for _, cpu in found], 50)
        dataplane.close()
    return figures


def wanted(services: Sequence[Service]) -> DesiredState:
    """Return what a node with these Services wants."""
    return DesiredState(tuple(services), ADDRESSES)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.iptables", description=__doc__)
    parser.add_argument("--services", type=int, nargs="*", default=[1, 1000, 5000, 10000])
    parser.add_argument("--endpoints", type=int, default=2, choices=range(1, MOST), metavar="N")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # in the namespace
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.services[0], options.endpoints, options.variant)))
        return
    rows = []
    for variant in VARIANTS:
        for count in options.services:
            command = [sys.executable, "-m", "benchmarks.iptables", "--variant", variant]
            flags = ["--services", str(count), "--endpoints", str(options.endpoints)]
            done = subprocess.run(
                ["unshare", "--net", "--", *command, *flags], check=True, capture_output=True, text=True
            )
            rows.append({"variant": variant, "services": count, **json.loads(done.stdout)})
    print("milliseconds of one sync")
    print(tabulate(rows, headers="keys", floatfmt=".0f"))


if __name__ == "__main__":
    main()
