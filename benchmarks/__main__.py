"""Runs the benchmarks and prints their figures; as root, on a machine that does nothing else."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

from tabulate import tabulate

import ebpfproxy
from benchmarks import collector, forward, maglev, state, userspace, xdp
from benchmarks.compiled import compiled
from benchmarks.figures import percentile, spread
from rig import leaks
from rig.agent import Agent
from rig.certificates import Authority
from rig.objects import endpoint_slice, service
from rig.process import HERE
from rig.topology import Topology, wait_listening

PORT = 8080
API_PORT = 6443


def scale(net: Topology, options: argparse.Namespace, first: list[str]) -> dict[str, Any]:
    """Load the node and measure the control plane there; what is programmed stays."""
    flags = {
        "--bpffs": net.bpffs,
        "--cgroup": net.cgroup,
        "--port": PORT,
        "--services": options.services,
        "--backends": options.backends,
        "--changes": options.changes,
        "--repeat": options.repeat,
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        *map(str, chain.from_iterable(flags.items())),
        *first,
    ]
    result = net.on_node_bare.run(*command, *first, timeout_s=600)
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def connections(net: Topology, options: argparse.Namespace, first: list[str]) -> dict[str, Any]:
    """Connect to a VIP, to its backends, and to its backends from outside the cgroup, in turns."""
    pod = net.pods[0]
    with compiled("connect") as program, pod.place.start(program, "serve", str(PORT), pipes=True) as server:
        assert server.stdout.readline(), server.output()
        turns = {
            "VIP": (net.on_node, [str(state.PORT), state.vip(1)]),
            "direct": (net.on_node_bare, [str(PORT), *first]),
            "direct, in the cgroup": (net.on_node, [str(PORT), *first]),
        }
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(options.rounds + 1):
            # Another one begins each time; the first round only warms up.
            names = list(turns)[number % 3 :] + list(turns)[: number % 3]
            for name in names:
                place, target = turns[name]
                done, took_ns = map(
                    int, place.run(program, "load", str(options.milliseconds), *target).stdout.split()
                )
                if number:
                    rates[name].append(done * 1e9 / took_ns)
    ratios: dict[str, Any] = {}
    for name in (each for each in turns if each != "VIP"):
        pairs = zip(rates["VIP"], rates[name], strict=True)
        ratios[f"ratio to {name}"] = spread([vip / other for vip, other in pairs])
        fastest = percentile(rates["VIP"], 90) / percentile(rates[name], 90)
        ratios[f"ratio to {name}, fastest tenth"] = fastest
    return {
        **{f"{name}, per second": spread(values) for name, values in rates.items()},
        **ratios,
    }


def starts(options: argparse.Namespace) -> dict[str, Any]:
    """Start the agent on an empty node, and again after it was killed, until its Service is programmed."""
    first: list[float] = []
    again: list[float] = []
    HERE.run(sys.executable, "-m", "compileall", "-q", Path(ebpfproxy.__file__).parent)  # as pip does
    for _ in range(options.starts):
        with Topology(pod_count=1) as net:
            agent = Agent(net)
            agent.write(service("web", 80, ips=["10.96.0.10"]), endpoint_slice("web", [net.pods[0].v4], PORT))
            for samples in (first, again):
                begin = time.perf_counter()
                agent.start()
                samples.append(time.perf_counter() - begin)
                agent.kill()
            agent.stop()
    return {"first start, s": spread(first), "restart, s": spread(again)}


def kubernetes(options: argparse.Namespace) -> dict[str, Any]:
    """Run the agent on an empty node with an API server as its source."""
    with Topology(pod_count=0) as net, Authority() as authority:
        own = authority.issue("api", "IP:127.0.0.1")
        size = ["--services", str(options.services)]
        server: list[str | Path] = [
            *(sys.executable, "-m", "benchmarks.api_server", *size, "--backends", str(options.backends)),
            *("--certificate", own.certificate, "--key", own.key, "--port", str(API_PORT)),
        ]
        kubeconfig = net.directory / "kubeconfig"
        cluster = {
            "server": f"https://127.0.0.1:{API_PORT}",
            "certificate-authority": str(authority.certificate),
        }
        config = {
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it"}}],
            "clusters": [{"name": "it", "cluster": cluster}],
        }
        kubeconfig.write_text(json.dumps(config))
        with net.on_node_bare.start(*server, pipes=True) as running:
            assert running.stdout.readline(), running.output()
            result = net.on_node_bare.run(
                *(sys.executable, "-m", "benchmarks.follow", "--started", str(time.monotonic_ns()), *size),
                *("--bpffs", net.bpffs, "--cgroup", net.cgroup, "--state-dir", net.directory / "state"),
                *("--kubeconfig", kubeconfig, "--changes", str(options.changes)),
                timeout_s=600,
            )
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def reading(net: Topology, options: argparse.Namespace) -> dict[str, Any]:
    """Time reading commands against the maps that are full of Services."""
    figures = {}
    for noun in ("services", "backends", "maps", "status"):
        samples = []
        for _ in range(options.starts):
            begin = time.perf_counter()
            net.on_node_bare.run(sys.executable, "-m", "ebpfproxy", noun, "--bpffs", net.bpffs, check=False)
            samples.append(time.perf_counter() - begin)
        figures[f"{noun}, s"] = spread(samples)
    return figures


def cluster(options: argparse.Namespace) -> dict[str, Any]:
    """Start one agent of a large cluster against a stand-in for its API server, and let Deployments roll."""
    port = 6443
    with Topology(pod_count=0) as net:
        wanted = {
            "--port": port,
            "--nodes": options.nodes,
            "--services": options.cluster_services,
            "--endpoints": options.cluster_endpoints,
        }
        command = [sys.executable, "-m", "benchmarks.cluster_server"]
        with net.on_node_bare.start(*command, *map(str, chain.from_iterable(wanted.items()))):
            wait_listening(net.on_node_bare, port, timeout_s=120)
            flags = {
                "--url": f"http://127.0.0.1:{port}",
                "--bpffs": net.bpffs,
                "--cgroup": net.cgroup,
                "--state-dir": net.directory / "state",
                "--seconds": options.seconds,
                "--map-size": "backends=524288",
            }
            command = [
                sys.executable,
                "-m",
                "benchmarks.cluster",
                *map(str, chain.from_iterable(flags.items())),
            ]
            result = net.on_node_bare.run(*command, *map(str, options.rates), timeout_s=1800)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    figures = {
        "cluster, start": found["start"],
        "cluster, idle": found["idle"] | {"Service ports": found["services"]},
    }
    for step in found["rolling"]:
        figures[f"cluster, {step['events_per_s']:.0f} changes/s"] = step
    return figures


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures for people: a median with its quartiles, or one number."""
    rows = []
    for group, values in figures.items():
        for name, value in values.items():
            rows.append([group, name, *_cells(value)])
    return str(tabulate(rows, ["", "", "median", "quartiles"], "plain", disable_numparse=True))


def _cells(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        middle, low, high = value
        return [_number(middle), f"{_number(low)} .. {_number(high)}"]
    return [_number(value), ""]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "only",
        nargs="*",
        help="scale, connections, starts, reading, kubernetes, maglev, gc, userspace, forward, xdp (default: "
        "these), cluster",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--backends", type=int, default=10, help="of each Service")
    parser.add_argument("--changes", type=int, default=400, help="of one endpoint")
    parser.add_argument("--repeat", type=int, default=1_000_000, help="of a packet, in a round")
    parser.add_argument("--packets", type=int, default=20_000, help="that xdp_lb sees in a pass")
    parser.add_argument("--rounds", type=int, default=80, help="of connections")
    parser.add_argument("--milliseconds", type=int, default=100, help="of connections in a turn")
    parser.add_argument("--starts", type=int, default=7, help="of the agent and of commands")
    parser.add_argument("--nodes", type=int, default=5_000, help="of the cluster")
    parser.add_argument("--cluster-services", type=int, default=5_000, help="of the cluster")
    parser.add_argument("--cluster-endpoints", type=int, default=50, help="of each Service of the cluster")
    parser.add_argument("--seconds", type=float, default=20, help="of each rate of changes")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[10, 50, 100, 200],
        help="changes of EndpointSlices a second",
    )
    options = parser.parse_args()
    wanted = options.only or [
        "scale",
        "connections",
        "starts",
        "reading",
        "kubernetes",
        "maglev",
        "gc",
        "userspace",
        "forward",
        "xdp",
    ]
    figures: dict[str, Any] = {"machine": machine()}
    if "maglev" in wanted:
        figures["maglev"] = maglev.measure()
    try:
        if "gc" in wanted:
            figures["gc"] = collector.measure()
        with Topology(pod_count=1) as net:
            first = [f"10.245.0.{number}" for number in range(1, options.backends + 1)]
            net.pods[0].netns.shell("".join(f"ip addr add {each}/32 dev lo\n" for each in first))
            net.node.shell(f"ip route add 10.245.0.0/24 via {net.pods[0].v4}")
            if {"scale", "connections", "reading"} & set(wanted):
                figures |= scale(net, options, first)
            if "connections" in wanted:
                figures["connections"] = connections(net, options, first)
            if "reading" in wanted:
                figures["reading"] = reading(net, options)
        if "kubernetes" in wanted:
            figures["kubernetes"] = kubernetes(options)
        if "cluster" in wanted:
            figures |= cluster(options)
        if "starts" in wanted:
            figures["start"] = starts(options)
        if "userspace" in wanted:
            with compiled("connect") as program:
                figures |= userspace.measure(options, program, PORT)
        if "forward" in wanted:
            figures["forward"] = forward.measure(options.milliseconds * 5, options.starts)
        if "xdp" in wanted:
            figures |= xdp.measure((1, options.services), options.packets)
    except (AssertionError, subprocess.SubprocessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    left = leaks.find()
    assert not left, left
    print(json.dumps(figures, indent=2) if options.json else table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
