"""Mode userspace against direct: connections a second, throughput, many connections at once."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import spread
from ebpfproxy.dataplane.userspace import protocol
from rig.agent import Agent
from rig.objects import endpoint_slice, service
from rig.process import HERE
from rig.servers import iperf3_server
from rig.topology import NODE_IPS, Topology
from rig.wait import eventually

if TYPE_CHECKING:
    import argparse

    from rig.process import Place

VIP, HTTP, IPERF, HOLD = "10.96.0.10", 80, 5201, 7
HOLD_CHILD = Path(__file__).with_name("hold.py")
MANY = 10_000  # or what one process may have: two descriptors each
MEBIBYTES = 1024
QUESTIONS = 10_000


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
            before, used_s = proxy_counts(agent)
            rates = _rates(options, program, place, vip, (pod.v4, server_port))
            after, used_s = proxy_counts(agent)[0], proxy_counts(agent)[1] - used_s
            figures |= {f"connections a second, {name}, {how}": each for how, each in rates.items()}
            count = after.connections - before.connections
            figures[f"CPU us a connection, {name}, proxy"] = used_s * 1e6 / count
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
    def run() -> Any:
        """Return the report; None while the server is busy with the end of the run before."""
        command = ["iperf3", "-J", "-t", "2", "-c", address, "-p", str(port)]
        said = json.loads(place.run(*command, check=False).stdout)
        return None if "error" in said else said

    reports = [eventually(run, "iperf3") for _ in range(3)]
    return spread([each["end"]["sum_received"]["bits_per_second"] / 1e9 for each in reports])


def _many(agent: Agent, net: Topology) -> dict[str, Any]:
    """Open many connections through the proxy, use each, and see what they cost it."""
    count = min(MANY, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2)
    status = Path(f"/proc/{proxy(agent).pid}/status")
    before = _rss(status)
    command = [sys.executable, str(HOLD_CHILD), "load", VIP, str(HOLD), str(count)]
    with net.on_node_bare.start(*command, pipes=True) as load:
        line = load.stdout.readline()
        assert line, load.output()
        counts, _ = proxy_counts(agent)
        return {
            "connections open in the proxy": counts.open_connections,
            "failures": counts.failures,
            **json.loads(line),
            "KiB of memory a connection": (_rss(status) - before) / count,
        }


def proxy(agent: Agent) -> protocol.Hello:
    """Return what the agent's proxy says of itself."""
    with protocol.connect(agent.state_dir / protocol.SOCKET, 60) as connection:
        hello = protocol.receive(connection)
    assert isinstance(hello, protocol.Hello)
    return hello


def proxy_counts(agent: Agent) -> tuple[protocol.Counts, float]:
    """Return what the agent's proxy counted, and how many seconds of processor time it used."""
    with protocol.connect(agent.state_dir / protocol.SOCKET, 60) as connection:
        hello = protocol.receive(connection)
        assert isinstance(hello, protocol.Hello)
        connection.sendall(protocol.encode(protocol.Ask()))
        counts = protocol.receive(connection)
        assert isinstance(counts, protocol.Counts)
    fields = Path(f"/proc/{hello.pid}/stat").read_text().rpartition(")")[2].split()
    return counts, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


def _rss(status: Path) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def copying() -> dict[str, Any]:
    """Compare ways to pass bytes on, in turns; uvloop if it is installed."""
    loops = ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]
    cases = [(kind, loop) for kind in ("splice", "copy", "transports") for loop in loops]
    rates: dict[str, list[float]] = {}
    for _ in range(5):
        for kind, loop in cases:
            for what, size in (("transfer", MEBIBYTES), ("questions", QUESTIONS)):
                command = ["-m", "benchmarks.copying", kind, loop, what, str(size)]
                said = json.loads(HERE.run(sys.executable, *command).stdout)
                name = f"{kind}, {loop}, "
                if what == "transfer":
                    rates.setdefault(name + "Gbit/s", []).append(size * 2**23 / said["s"] / 1e9)
                    rates.setdefault(name + "CPU s/GiB", []).append(said["cpu_s"] * 1024 / size)
                else:
                    rates.setdefault(name + "answers/s", []).append(size / said["s"])
                    rates.setdefault(name + "CPU us an answer", []).append(said["cpu_s"] * 1e6 / size)
    return {name: spread(values) for name, values in sorted(rates.items(), key=lambda each: each[0][-9:])}
