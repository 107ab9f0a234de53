"""What the garbage collector costs: the processor time of whole passes over a full conntrack map."""

from __future__ import annotations

import time
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from benchmarks.figures import spread
from ebpfproxy.dataplane.bpf.gc import PASS_S, Collector, Timeouts
from ebpfproxy.dataplane.bpf.layouts import FLOW, FLOW_KEY, pack_address, pack_port
from ebpfproxy.libbpf import ffi, lib
from ebpfproxy.loader import LoadOptions, choose
from rig.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ebpfproxy.libbpf import Map

ENTRIES = 100_000
PASSES = 5
BACKENDS = 200
_TCP = 6
_NO_HOP = bytes(ffi.sizeof("struct next_hop"))


def flows(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of established TCP connections: two each."""
    vip, now = pack_address("10.96.0.10"), time.monotonic_ns()
    for number in range(count // 2):
        client = pack_address(str(IPv4Address("100.64.0.0") + number // 8))
        port = pack_port(40000 + number % 8)
        id_ = 1 + number % BACKENDS
        backend = pack_address(str(IPv4Address("10.244.0.0") + id_))
        rest = (lib.FLOW_REPLIED, 0, 0, 1, id_, now, 0, 0, _NO_HOP)
        yield (
            FLOW_KEY.pack(client, vip, port, pack_port(80), _TCP, lib.FLOW_FORWARD),
            FLOW.pack(client, backend, port, pack_port(8080), *rest),
        )
        yield (
            FLOW_KEY.pack(backend, client, pack_port(8080), port, _TCP, lib.FLOW_REPLY),
            FLOW.pack(vip, client, pack_port(80), port, *rest),
        )


def pass_s(maps: Mapping[str, Map], collector: Collector, now_s: float) -> tuple[float, float, int]:
    """Return the processor time of one pass, its longest step, and how many steps it took."""
    total = longest = 0.0
    for step in range(1, 1000):
        begin = time.process_time()
        unused = collector.step(set(), set(), dict, now_s + step)  # the agent's tick: once a second
        took = time.process_time() - begin
        total += took
        longest = max(longest, took)
        if unused is not None:
            return total, longest, step
    raise AssertionError("the pass never ended")


def measure() -> dict[str, Any]:
    """Return the figures."""
    with Topology(pod_count=0) as net:
        loaded = choose("libbpf").load(LoadOptions(net.bpffs / "maps"))
        conntrack = loaded.maps["conntrack"]
        conntrack.update_batch(dict(flows(ENTRIES)))
        collector = Collector(loaded.maps, Timeouts())
        passes = [pass_s(loaded.maps, collector, number * PASS_S * 10) for number in range(1, PASSES + 1)]
        assert conntrack.count() == ENTRIES, "all of them live"
        loaded.close()
    return {
        "entries": ENTRIES,
        "a pass, ms of a core": spread([total * 1000 for total, _, _ in passes]),
        "longest step, ms": spread([longest * 1000 for _, longest, _ in passes]),
        "steps in a pass": passes[0][2],
        "% of a core": spread([100 * total / PASS_S for total, _, _ in passes]),
    }
