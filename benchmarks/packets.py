"""What tc_lb costs a packet: BPF_PROG_TEST_RUN against an empty program."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from ebpfproxy.dataplane.bpf.layouts import FLOW, FLOW_KEY, VIP, Flow, FlowKey, Vip, pack_address, pack_port
from ebpfproxy.libbpf import Program, ffi, lib
from ebpfproxy.loader import LoadOptions, choose

if TYPE_CHECKING:
    from pathlib import Path

    from ebpfproxy.libbpf import Map

ROUNDS = 9
# Far from everything that is programmed; RFC 5737 and RFC 3849 keep them for documentation.
ADDRESSES = {
    4: ("192.0.2.200", "198.51.100.10", "198.51.100.11"),
    6: ("2001:db8::200", "2001:db8:1::10", "2001:db8:1::11"),
}
CLIENT_PORT, VIP_PORT, BACKEND_PORT = 40000, 80, 8080


def frame(source: str, source_port: int, destination: str, port: int) -> bytes:
    """Return a TCP segment with 64 bytes."""
    ip = IPv6(src=source, dst=destination) if ":" in source else IP(src=source, dst=destination)
    return bytes(Ether() / ip / TCP(sport=source_port, dport=port, flags="A") / (b"x" * 64))


def ns_per_packet(maps_dir: Path, repeat: int) -> dict[str, float]:
    """Return nanoseconds a packet above what an empty program takes: the median of several rounds.

    The kernel runs a program again and again on the same packet, and what the program wrote stays. So the
    flows are entered in pairs that undo each other: every run translates, here to there or there to here.

    Args:
        maps_dir: pinned maps that are full of Services.
        repeat: runs in a round.
    """
    loaded = choose("libbpf").load(LoadOptions(maps_dir, objects=("tc_lb",)))
    empty = Program(lib.glue_load_trivial(lib.BPF_PROG_TYPE_SCHED_CLS, 0, 0))
    entered: list[tuple[Map, bytes]] = []

    def enter(name: str, key: bytes, value: bytes) -> None:
        loaded.maps[name].update(key, value)
        entered.append((loaded.maps[name], key))

    runs: dict[str, tuple[Program, bytes]] = {}
    ingress, egress = loaded.programs["tc_ingress"], loaded.programs["tc_egress"]
    for family, (client, vip, backend) in ADDRESSES.items():
        ends = [(vip, VIP_PORT), (backend, BACKEND_PORT)]
        for (here, here_port), (there, there_port) in (ends, ends[::-1]):
            enter("vips", pack_address(here), VIP.write(Vip(lib.VIP_CLUSTER_IP)))
            for direction, source, target, new_source, new_target in [
                (
                    lib.FLOW_FORWARD,
                    (client, CLIENT_PORT),
                    (here, here_port),
                    (client, CLIENT_PORT),
                    (there, there_port),
                ),
                (
                    lib.FLOW_REPLY,
                    (here, here_port),
                    (client, CLIENT_PORT),
                    (there, there_port),
                    (client, CLIENT_PORT),
                ),
            ]:
                flow = Flow(
                    src=pack_address(new_source[0]),
                    dst=pack_address(new_target[0]),
                    sport=pack_port(new_source[1]),
                    dport=pack_port(new_target[1]),
                    state=lib.FLOW_REPLIED,
                    flags=0,
                    syn_tries=0,
                    service=0,
                    backend=0,
                    last_seen_ns=0,
                    octets=0,
                    packets=0,
                    hop=bytes(ffi.sizeof("struct next_hop")),
                )
                key = FlowKey(
                    *(pack_address(source[0]), pack_address(target[0])),
                    *(pack_port(source[1]), pack_port(target[1])),
                    *(6, direction),
                )
                enter("conntrack", FLOW_KEY.write(key), FLOW.write(flow))
        foreign = frame(client, CLIENT_PORT, "203.0.113.1" if family == 4 else "2001:db8:2::1", 443)
        runs |= {
            f"ingress, not ours, IPv{family}": (ingress, foreign),
            f"egress, not ours, IPv{family}": (egress, foreign),
            f"ingress, established, IPv{family}": (ingress, frame(client, CLIENT_PORT, vip, VIP_PORT)),
            f"egress, reply, IPv{family}": (egress, frame(backend, BACKEND_PORT, client, CLIENT_PORT)),
        }
    try:
        return _measure(runs, empty, repeat)
    finally:
        for opened, entry in entered:
            opened.delete(entry)
        empty.close()
        loaded.close()


def _measure(runs: dict[str, tuple[Program, bytes]], empty: Program, repeat: int) -> dict[str, float]:
    for name, (program, packet) in runs.items():
        is_changed = program.run(packet).data != packet
        assert is_changed == ("not ours" not in name), f"{name}: the packet is translated, or left alone"
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (program, packet) in runs.items():
            base = empty.run(packet, repeat=repeat).duration_ns
            samples[name].append(program.run(packet, repeat=repeat).duration_ns - base)
    return {name: statistics.median(values) for name, values in samples.items()}
