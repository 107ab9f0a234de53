"""Mode userspace against direct: connections a second, throughput, many connections at once."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import spread
from ebpfproxy.dataplane.userspace import protocol
from rig.agent import Agent
from rig.objects import endpoint_slice, service
from rig.servers import iperf3_server
from rig.topology import NODE_IPS, Topology

if TYPE_CHECKING:
    import argparse

    from rig.process import Place

VIP, HTTP, IPERF, HOLD = "10.96.0.10", 80, 5201, 7
HOLD_CHILD = Path(__file__).with_name("hold.py")
MANY = 10_000  # or what one process may have: two descriptors each
MEBIBYTES = 1024
COPYING = [("splice", "asyncio"), ("copy", "asyncio"), ("transports", "asyncio")]


def measure(options: argparse.Namespace, program: Path, server_port: int) -> dict[str, Any]:
    """Return the figures of all groups."""
    with ExitStack() as stack:
        net = stack.enter_context(Topology(pod_count=1))
        pod = net.pods[0]
        agent = Agent(net, mode="userspace")
        agent.write(
            service(
                "web",
                {"name": "http", "port": HTTP, "nodePort": 30080},
                {"name": "iperf", "port": IPERF, "nodePort": 30081},
                {"name": "hold", "port": HOLD, "nodePort": 30082},
                ips=[VIP],
                type="NodePort",
            ),
            endpoint_slice(
                "web",
                [pod.v4],
                {"name": "http", "port": server_port},
                {"name": "iperf", "port": IPERF},
                {"name": "hold", "port": HOLD},
            ),
        )
        stack.enter_context(agent)
        server = stack.enter_context(pod.place.start(program, "serve", str(server_port), pipes=True))
        assert server.stdout.readline(), server.output()
        stack.enter_context(iperf3_server(pod.place, IPERF))
        holder = stack.enter_context(
            pod.place.start(sys.executable, HOLD_CHILD, "serve", str(HOLD), pipes=True)
        )
        assert holder.stdout.readline(), holder.output()
        figures: dict[str, Any] = {}
        places = {"node": net.on_node_bare, "outside": net.from_outside}
        for name, place in places.items():
            vip = (VIP, HTTP) if name == "node" else (NODE_IPS[0], 30080)
            rates = _rates(options, program, place, vip, (pod.v4, server_port))
            figures |= {f"connections a second, {name}, {how}": each for how, each in rates.items()}
            port = IPERF if name == "node" else 30081
            for how, target in (("proxy", (vip[0], port)), ("direct", (pod.v4, IPERF))):
                figures[f"Gbit/s, {name}, {how}"] = _gbit(place, *target)
        return {"userspace": figures, "many at once": _many(agent, net), "copying": copying()}


def _rates(
    options: argparse.Namespace, program: Path, place: Place, vip: tuple[str, int], pod: tuple[str, int]
) -> dict[str, Any]:
    """Take turns, as the other benchmark of connections does."""
    rates: dict[str, list[float]] = {"proxy": [], "direct": []}
    for number in range(max(options.rounds // 4, 2) + 1):
        for name, (address, port) in {"proxy": vip, "direct": pod}.items():
            done = place.run(program, "load", str(options.milliseconds), str(port), address).stdout.split()
            if number:
                rates[name].append(int(done[0]) * 1e9 / int(done[1]))
    return {name: spread(values) for name, values in rates.items()}


def _gbit(place: Place, address: str, port: int) -> Any:
    rates = []
    for _ in range(3):
        said = json.loads(place.run("iperf3", "-J", "-t", "2", "-c", address, "-p", str(port)).stdout)
        rates.append(said["end"]["sum_received"]["bits_per_second"] / 1e9)
    return spread(rates)


def _many(agent: Agent, net: Topology) -> dict[str, Any]:
    """Open many connections through the proxy, use each, and see what they cost it."""
    count = min(MANY, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2)
    with protocol.connect(agent.state_dir / protocol.SOCKET, 10) as connection:
        hello = protocol.receive(connection)
        assert isinstance(hello, protocol.Hello)
        status = Path(f"/proc/{hello.pid}/status")
        before = _rss(status)
        command = [sys.executable, str(HOLD_CHILD), "load", VIP, str(HOLD), str(count)]
        with net.on_node_bare.start(*command, pipes=True) as load:
            line = load.stdout.readline()
            assert line, load.output()
            said = json.loads(line)
            connection.sendall(protocol.encode(protocol.Ask()))
            counts = protocol.receive(connection)
            assert isinstance(counts, protocol.Counts)
            return {
                "connections open in the proxy": counts.open_connections,
                "failures": counts.failures,
                **said,
                "KiB of memory a connection": (_rss(status) - before) / count,
            }


def _rss(status: Path) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def copying() -> dict[str, Any]:
    """Compare ways to copy; uvloop if it is installed."""
    cases = [*COPYING]
    if importlib.util.find_spec("uvloop"):
        cases += [(kind, "uvloop") for kind, _ in COPYING]
    figures: dict[str, Any] = {}
    from rig.process import HERE

    for kind, loop in cases:
        runs = [
            json.loads(
                HERE.run(sys.executable, "-m", "benchmarks.copying", kind, loop, str(MEBIBYTES)).stdout
            )
            for _ in range(5)
        ]
        figures[f"{kind}, {loop}, Gbit/s"] = spread([each["gbit_per_s"] for each in runs])
        figures[f"{kind}, {loop}, answers/s"] = spread([each["answers_per_s"] for each in runs])
    return figures
