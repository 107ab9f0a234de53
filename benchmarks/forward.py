"""Packets a second through a node: its kernel's plain forwarding, its iptables, and ours."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compiled import compiled
from benchmarks.figures import spread
from rig.agent import Agent
from rig.objects import endpoint, endpoint_slice, service
from rig.process import HERE
from rig.topology import NODE_IPS, Topology, offloads

if TYPE_CHECKING:
    from collections.abc import Callable

PORT, NODE_PORT = 8080, 30080
PLAIN = "plain forwarding"
FLOWS = 900


def _plain(_net: Topology, _stack: ExitStack) -> None:
    """Nothing but routes."""


def _iptables(net: Topology, _stack: ExitStack) -> None:
    """What an administrator writes by hand: one rule of each kind."""
    pod = net.pods[0].v4
    for rule in (
        f"PREROUTING -d {NODE_IPS[0]} -p udp --dport {NODE_PORT} -j DNAT --to {pod}:{PORT}",
        f"POSTROUTING -d {pod} -j MASQUERADE",
    ):
        net.node.shell(f"iptables -w -t nat -A {rule}")


def _agent(xdp_mode: str) -> Callable[[Topology, ExitStack], None]:
    def start(net: Topology, stack: ExitStack) -> None:
        arguments = ["--xdp-mode", xdp_mode, "--xdp-devices", f"eth0,{net.pods[0].device}"]
        agent = Agent(net, arguments=arguments)
        port = {"name": "udp", "port": PORT, "protocol": "UDP"}
        agent.write(
            service("flood", port | {"nodePort": NODE_PORT}, type="NodePort"),
            # Not this node's, so sources are translated too.
            endpoint_slice("flood", [endpoint(net.pods[0].v4, node="node-2")], port),
        )
        stack.enter_context(agent)

    return start


WAYS: dict[str, tuple[Callable[[Topology, ExitStack], None], bool]] = {
    PLAIN: (_plain, False),
    "iptables DNAT and MASQUERADE": (_iptables, True),
    "ebpfproxy, tc": (_agent("off"), True),
    "ebpfproxy, XDP generic": (_agent("generic"), True),
    "ebpfproxy, XDP native": (_agent("native"), True),
}


def measure(milliseconds: int, rounds: int) -> dict[str, Any]:
    """Return packets a second that reach the backend, ns a packet, and the ratio to plain forwarding.

    Each way has a network of its own, and a round is one turn of each: what the machine does otherwise meets
    all of them, and a ratio compares turns that were a moment apart. The first round does not count.
    """
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    with compiled("datagrams") as binary, ExitStack() as stack:
        turns = {name: _way(name, binary, stack) for name in WAYS}
        for number in range(rounds + 1):
            for name, (net, address, port) in turns.items():
                rate = _round(net, binary, milliseconds, address, port)
                if number:
                    rates[name].append(rate)
    figures: dict[str, Any] = {}
    for name, found in rates.items():
        figures[f"{name}, packets per second"] = spread(found)
        figures[f"{name}, ns a packet"] = spread([1e9 / rate for rate in found])
        if name != PLAIN:
            ratios = [rate / plain for rate, plain in zip(found, rates[PLAIN], strict=True)]
            figures[f"{name}, of plain"] = spread(ratios)
    return figures


def _way(name: str, binary: Path, stack: ExitStack) -> tuple[Topology, str, int]:
    """Make the network of a way; return it, and where a client of it sends to."""
    prepare, is_translated = WAYS[name]
    net = stack.enter_context(Topology(pod_count=1))
    pod = net.pods[0]
    # As network cards: finished checksums, and ends that take what XDP sends.
    offloads(net.from_outside, "eth0", "off", ("tx", "tso", "gso"))
    offloads(pod.place, "eth0", "on", ("gro",))
    offloads(net.from_outside, "eth0", "on", ("gro",))
    sink = stack.enter_context(pod.place.start(binary, "sink", str(PORT), pipes=True))
    assert sink.stdout.readline(), sink.output()
    prepare(net, stack)
    return (net, NODE_IPS[0], NODE_PORT) if is_translated else (net, pod.v4, PORT)


def _round(net: Topology, binary: Path, milliseconds: int, address: str, port: int) -> float:
    counter = Path("/sys/class/net/eth0/statistics/rx_packets")
    read: list[str | Path] = ["ip", "netns", "exec", net.pods[0].netns.name, "cat", counter]
    before = int(HERE.run(*read).stdout)
    output = net.from_outside.run(binary, "flood", str(milliseconds), str(FLOWS), address, str(port)).stdout
    received = int(HERE.run(*read).stdout) - before
    assert received > 100, "the backend got nothing"
    return received * 1e9 / int(output.split()[1])
