"""What Services cost in each mode: ``python -m benchmarks.modes``, as root.

For each number of Services a node of its own: the first sync, changes of one endpoint, the size of what is
programmed, and connections to a Service in the middle, in turns with connections past it. "cpu" is what this
process and the tools that it ran used: the better number on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from benchmarks import state
from benchmarks.compiled import compiled
from benchmarks.figures import percentile, timed_sync
from ebpfproxy.config import Config
from ebpfproxy.dataplane.chosen import ChosenDataplane
from ebpfproxy.dataplane.modes import Site
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKind,
    NodePortAddresses,
    Service,
)
from rig.topology import NODE_IPS, Topology

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES = ("bpf", "nftables", "iptables")
PORT = 8080
ADDRESSES = NodePortAddresses(frozenset({NODE_IPS[0]}), frozenset({NODE_IPS[0], "127.0.0.1"}))
#: How the size of a ruleset is asked for; the maps of mode bpf are of fixed size.
LISTINGS = {"nftables": "nft list ruleset", "iptables": "iptables-save"}


def service(number: int, addresses: Sequence[str]) -> Service:
    """Return Service ``number`` with these endpoints."""
    backends = tuple(Backend(address, PORT) for address in addresses)
    frontend = Frontend(FrontendKind.CLUSTER_IP, state.vip(number), state.PORT)
    return state.resolved(f"service-{number}", frontend, backends)


def wanted(services: Sequence[Service]) -> DesiredState:
    """Return what a node with these Services wants."""
    return DesiredState(tuple(services), ADDRESSES)


def middle(count: int) -> int:
    """Return the Service that connections go to."""
    return (count + 1) // 2


def program(options: argparse.Namespace) -> dict[str, float]:
    """Program one mode in this namespace; what is programmed stays."""
    site = Site(options.state_dir, options.cgroup, options.bpffs)
    dataplane = ChosenDataplane(Config(mode=options.mode), site)
    dataplane.start()
    count = options.services[0]
    services = [
        service(
            n,
            options.first if n == middle(count) else state.endpoints(n, options.endpoints),
        )
        for n in range(1, count + 1)
    ]
    figures = dict(
        zip(("first sync", "first sync cpu"), timed_sync(dataplane, wanted(services)), strict=True)
    )
    samples = []
    for turn in range(options.changes):
        at = turn * 7919 % count
        if at + 1 != middle(count) or count == 1:
            addresses = options.first if count == 1 else state.endpoints(at + 1, options.endpoints)
            services[at] = service(at + 1, addresses[: len(addresses) - 1 + turn % 2])
            samples.append(timed_sync(dataplane, wanted(services)))
            dataplane.tick()
    services[middle(count) - 1] = service(middle(count), options.first)
    dataplane.sync(wanted(services))
    for name, column in (("one change", 0), ("one change cpu", 1)):
        figures[name] = percentile([each[column] for each in samples], 50)
    figures["MiB of the agent"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    dataplane.close()
    return figures


def measure(mode: str, count: int, options: argparse.Namespace, connect: Path) -> dict[str, Any]:
    """Return the figures of one mode and one number of Services."""
    with Topology(pod_count=1) as net:
        pod = net.pods[0]
        first = [f"10.245.0.{number}" for number in range(1, options.endpoints + 1)]
        pod.netns.shell("".join(f"ip addr add {each}/32 dev lo\n" for each in first))
        net.node.shell(f"ip route add 10.245.0.0/24 via {pod.v4}")
        net.add_default_route()
        command = [sys.executable, "-m", "benchmarks.modes", "--mode", mode, "--services", str(count)]
        command += ["--endpoints", str(options.endpoints), "--changes", str(options.changes)]
        command += ["--bpffs", str(net.bpffs), "--cgroup", str(net.cgroup)]
        command += ["--state-dir", str(net.directory / "state"), "--first", *first]
        done = net.on_node_bare.run(*command, timeout_s=1200)
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if mode in LISTINGS:
            figures["KiB of rules"] = len(net.node.shell(LISTINGS[mode])) / 1024
        with pod.place.start(connect, "serve", str(PORT), pipes=True) as server:
            assert server.stdout.readline(), server.output()
            rates: dict[str, list[float]] = {"VIP": [], "direct": []}
            for number in range(options.rounds + 1):
                for name, place, target in (
                    ("VIP", net.on_node, [str(state.PORT), state.vip(middle(count))]),
                    ("direct", net.on_node_bare, [str(PORT), *first]),
                ):
                    load = place.run(connect, "load", "100", *target).stdout
                    connections, took_ns = map(int, load.split())
                    if number:
                        rates[name].append(connections * 1e9 / took_ns)
        figures["connections/s"] = percentile(rates["VIP"], 90)
        figures["of direct"] = percentile(rates["VIP"], 90) / percentile(rates["direct"], 90)
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modes", description=__doc__)
    parser.add_argument("--services", type=int, nargs="*", default=[1, 1000, 5000, 10000])
    parser.add_argument("--endpoints", type=int, default=3)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    for flag in ("--mode", "--first", "--bpffs", "--cgroup", "--state-dir"):  # in the namespace
        kind: Any = Path if flag in ("--bpffs", "--cgroup", "--state-dir") else str
        parser.add_argument(flag, type=kind, nargs="*" if flag == "--first" else None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(program(options)))
        return
    rows = []
    with compiled("connect") as connect:
        for count in options.services:
            rows += [
                {"services": count, "mode": mode, **measure(mode, count, options, connect)}
                for mode in options.modes
            ]
            print(tabulate(rows, headers="keys", floatfmt=".3g"), flush=True)
    print(f"milliseconds; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
