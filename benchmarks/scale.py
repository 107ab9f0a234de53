"""Loads a node with Services, in its own namespaces, and measures the control plane and tc_lb.

Run by ``python -m benchmarks`` in a namespace that it made; prints one JSON object. What it programs stays
pinned for the measurements that follow.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import state
from benchmarks.figures import percentile
from benchmarks.packets import ns_per_packet
from ebpfproxy import netlink
from ebpfproxy.dataplane.bpf.dataplane import BpfDataplane, BpfOptions
from ebpfproxy.model.services import DesiredState
from ebpfproxy.resolve.resolver import NodeContext, Resolver
from ebpfproxy.store import Set, Store

if TYPE_CHECKING:
    from collections.abc import Callable


def timed(work: Callable[[], Any]) -> float:
    """Return how many seconds it took."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Node:
    """Store, resolver and dataplane, put together as the agent does it, without its thread."""

    def __init__(self, dataplane: BpfDataplane) -> None:
        self.dataplane = dataplane
        self.store = Store()
        self.resolver = Resolver()
        self.addresses = netlink.node_port_addresses(netlink.addresses(), ())
        self.desired = DesiredState(())

    def resolve(self) -> None:
        """Take what changed and resolve it."""
        changes = self.store.take()
        resolution = self.resolver.resolve(changes.objects, NodeContext("node"), changed=changes.changed)
        self.desired = DesiredState(resolution.services, self.addresses)

    def sync(self) -> None:
        """Program it."""
        self.dataplane.sync(self.desired)

    def change(self, number: int, addresses: list[str]) -> float:
        """Replace the endpoints of a Service; return the seconds from the event to the maps."""
        event = Set(state.endpoint_slice(number, addresses, state.PORT))
        start = time.perf_counter()
        self.store.apply(event)
        self.resolve()
        self.sync()
        took = time.perf_counter() - start
        self.dataplane.tick()  # once a second in the agent; frees what the change left
        return took


def measure(
    node: Node, services: int, backends: int, changes: int, first: list[str], port: int
) -> dict[str, Any]:
    """Return the figures of the control plane."""
    for each in state.objects(services, backends, first, port).values():
        node.store.apply(Set(each))
    gc.freeze()  # as the agent does when it is ready
    resolve_s = timed(node.resolve)
    sync_s = timed(node.sync)
    gc.freeze()
    repeated_s = timed(node.sync)
    took = []
    for count in range(changes // 2):
        number = 2 + count * 7919 % (services - 1)  # any but the first, which the connections use
        addresses = state.endpoints(number, backends)
        took += [node.change(number, addresses[:-1]), node.change(number, addresses)]
    return {
        "cold sync": {"resolve_s": resolve_s, "sync_s": sync_s, "total_s": resolve_s + sync_s},
        "sync without a change": {"s": repeated_s},
        "one endpoint": {
            "changes": len(took),
            "p50_ms": percentile(took, 50) * 1000,
            "p99_ms": percentile(took, 99) * 1000,
            "max_ms": max(took) * 1000,
        },
    }


def main() -> None:
    """Program, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bpffs", type=Path, required=True)
    parser.add_argument("--cgroup", type=Path, required=True)
    parser.add_argument("--services", type=int, required=True)
    parser.add_argument("--backends", type=int, required=True)
    parser.add_argument("--changes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--repeat", type=int, required=True)
    parser.add_argument("first", nargs="+", help="endpoints of the Service that the connections use")
    options = parser.parse_args()
    dataplane = BpfDataplane(BpfOptions(options.bpffs, options.cgroup, loader="libbpf"))
    dataplane.start()
    try:
        node = Node(dataplane)
        figures = measure(
            node, options.services, options.backends, options.changes, options.first, options.port
        )
    finally:
        dataplane.close()
    figures["tc_lb"] = ns_per_packet(options.bpffs / "ebpfproxy" / "maps", options.repeat)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
