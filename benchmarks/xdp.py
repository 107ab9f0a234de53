"""Nanoseconds a packet that ``xdp_lb`` takes above an empty XDP program; run in a namespace of its own.

Each packet is run once (a program that translates its packet would see another one the second time), over
many prebuilt packets, and the median counts. What an empty program takes for the same packets is subtracted.

    established, 900 flows      a working set that fits into the processor's caches
    established, all flows      each packet of another flow, in random order
    new, SNAT                   the first packet of a flow to a backend on another node: two entries
    new, local                  to a backend on this node: two entries, no next hop
    new, DSR                    encapsulated to a backend on another node: one entry
    foreign                     to nobody's VIP
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import raw

from ebpfproxy import netlink
from ebpfproxy.dataplane.bpf import plan
from ebpfproxy.dataplane.bpf.read import read_tables
from ebpfproxy.dataplane.bpf.tables import Tables
from ebpfproxy.libbpf import XDP_NATIVE, Link, Program, ffi, lib
from ebpfproxy.loader import Loaded, LoadOptions, choose
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKind,
    NodePortAddresses,
    NodeSource,
    Pool,
    Protocol,
    Service,
    ServiceName,
)
from rig.process import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DEVICE, PEER, GATEWAY_MAC = "eth0", "wire", "02:00:00:00:00:fe"
SNAT_PORTS = (10000, 65535)  # more flows at once than a test machine has by default
BACKENDS = 10
XDP_PASS, XDP_TX = 2, 3


class Family(NamedTuple):
    """Addresses of one IP version."""

    version: int
    node: str
    gateway: str
    vip: Callable[[int], str]
    backend: Callable[[int, int], str]
    client: Callable[[int], str]


FAMILIES = (
    Family(
        4,
        "192.0.2.1",
        "192.0.2.254",
        lambda n: f"203.0.{113 + n // 250}.{1 + n % 250}",
        lambda n, b: f"10.{100 + n // 2500}.{n // 10 % 250}.{1 + n % 10 * 25 + b}",
        lambda n: f"198.{18 + n // 62500}.{n // 250 % 250}.{1 + n % 250}",
    ),
    Family(
        6,
        "2001:db8::1",
        "2001:db8::fe",
        lambda n: f"2001:db8:f::{n + 1:x}",
        lambda n, b: f"fd00:{n + 1:x}::{b + 1:x}",
        lambda n: f"2001:db8:c::{n + 1:x}",
    ),
)


def services(family: Family, count: int, kind: str) -> list[Service]:
    """Return that many Services with an external IP and ten backends each."""
    made = []
    for number in range(count):
        backends = tuple(
            Backend(family.backend(number, b), 8080, is_local=kind == "local") for b in range(BACKENDS)
        )
        made.append(
            Service(
                ServiceName("default", f"s{number}", "", family.version),
                Protocol.TCP,
                (Frontend(FrontendKind.EXTERNAL_IP, family.vip(number), 80),),
                backends,
                Pool(backends),
                Pool(()),
                is_dsr=kind == "dsr",
            )
        )
    return made


def wire() -> int:
    """Make a device with a gateway behind it, both families; return its index."""
    HERE.run("ip", "link", "add", DEVICE, "type", "veth", "peer", "name", PEER)
    for line in (
        f"link set {DEVICE} up",
        f"link set {PEER} up",
        *(
            f"address add {f.node}/{(24, 64)[f.version == 6]} dev {DEVICE} {'nodad' * (f.version == 6)}"
            for f in FAMILIES
        ),
        *(f"neigh add {f.gateway} lladdr {GATEWAY_MAC} dev {DEVICE} nud permanent" for f in FAMILIES),
        *(f"route add default via {f.gateway} dev {DEVICE}" for f in FAMILIES),
    ):
        HERE.run("ip", *line.split())
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        Path("/proc/sys", *name.split(".")).write_text("1")
    return next(each.number for each in netlink.devices() if each.name == DEVICE)


class Bench:
    """The program with maps that hold a number of Services."""

    def __init__(self, bpffs: Path, count: int, family: Family, kind: str, device: int, packets: int) -> None:
        self.family, self.device, self.count, self.packets = family, device, count, packets
        self.loaded: Loaded = choose("libbpf").load(
            LoadOptions(
                bpffs / f"{count}-{family.version}-{kind}",
                objects=("xdp_lb",),
                config={"snat_port_min": SNAT_PORTS[0], "snat_port_max": SNAT_PORTS[1]},
            )
        )
        maps = self.loaded.maps
        tables = Tables(read_tables(maps), {name: found.max_entries for name, found in maps.items()})
        state = DesiredState(
            tuple(services(family, count, kind)),
            NodePortAddresses(
                local=frozenset({family.node}),
                sources=frozenset({NodeSource(0, family.version, family.node)}),
            ),
        )
        assert not tables.update(state)
        plan.apply(plan.make_plan(tables.delta()), maps)
        self.program = self.loaded.programs["xdp_lb"]
        self.random = random.Random(1)

    def close(self) -> None:
        """Unload."""
        self.loaded.close()

    def frame(self, number: int, flags: str) -> bytes:
        """Return the frame of client ``number`` to some Service's VIP."""
        layer = IP if self.family.version == 4 else IPv6
        vip = self.family.vip(number % self.count)
        header = TCP(sport=1024 + number % 60000, dport=80, flags=flags)
        packet = Ether(dst="02:00:00:00:00:01", src=GATEWAY_MAC) / layer(
            src=self.family.client(number), dst=vip
        )
        return bytes(raw(packet / header / (b"x" * 64)))

    def frames(self, flags: str, offset: int = 0) -> list[bytes]:
        """Return one frame each of many clients. Only what differs is made anew: scapy is slow."""
        return [self.frame(offset + number, flags) for number in range(self.packets)]

    def establish(self, openings: Iterable[bytes], acks: Iterable[bytes]) -> None:
        """Let each flow be opened, answered and confirmed."""
        l3 = 14
        l4 = l3 + (20 if self.family.version == 4 else 40)
        size, start = (4, l3 + 12) if self.family.version == 4 else (16, l3 + 8)
        for opening, ack in zip(openings, acks, strict=True):
            sent = bytearray(self.program.run(opening, ifindex=self.device).data)
            source, target = sent[start : start + size], sent[start + size : start + 2 * size]
            sent[start : start + size], sent[start + size : start + 2 * size] = target, source
            ports = struct.unpack_from("!HH", sent, l4)
            struct.pack_into("!HH", sent, l4, *ports[::-1])
            sent[l4 + 13] = 0x12  # SYN, ACK
            self.program.run(bytes(sent), ifindex=self.device)
            self.program.run(ack, ifindex=self.device)

    def keep_hops(self) -> None:
        """Let no next hop age, as no tc program is here to renew it, and let flows be fresh.

        What is done once a second for a flow is left out.
        """
        until = struct.pack("=I", (time.monotonic_ns() >> 30) + 2**30)
        fresh = struct.pack("=Q", time.monotonic_ns() + 10**11)
        seen = ffi.offsetof("struct flow", "last_seen_ns")
        for name, struct_name in (
            ("backend_hops", "backend_hop"),
            ("conntrack", "flow"),
            ("new_flows", "flow"),
        ):
            at = ffi.offsetof(f"struct {struct_name}", "hop", "until")
            changed = {}
            for key, value in self.loaded.maps[name].items():
                if any(value):
                    made = value[:at] + until + value[at + 4 :]
                    is_flow = struct_name == "flow"
                    changed[key] = made[:seen] + fresh + made[seen + 8 :] if is_flow else made
            self.loaded.maps[name].update_batch(changed)

    def measure(self, packets: list[bytes], action: int, empty: Program) -> float:
        """Return the median of single runs, what an empty program takes subtracted."""
        self.keep_hops()
        assert self.program.run(packets[0], ifindex=self.device).retval == action
        took = [self.program.run(each, ifindex=self.device).duration_ns for each in packets[1:]]
        nothing = [empty.run(each, ifindex=self.device).duration_ns for each in packets[1:]]
        return statistics.median(took) - statistics.median(nothing)


def figures(bpffs: Path, counts: Iterable[int], packets: int) -> dict[str, float]:
    """Return nanoseconds by what was measured."""
    device = wire()
    empty = Program(lib.glue_load_trivial(lib.BPF_PROG_TYPE_XDP, 0, XDP_PASS))
    found: dict[str, float] = {}
    # The kernel lets a packet seem to come from a device only if that has queues for XDP.
    with Link.attach_xdp(empty, device, XDP_NATIVE):
        for count in counts:
            for family in FAMILIES:
                label = f"IPv{family.version}, {count} Service{'s' * (count > 1)}"
                for kind, action in (("snat", XDP_TX), ("local", XDP_PASS), ("dsr", XDP_TX)):
                    bench = Bench(bpffs, count, family, kind, device, packets)
                    try:
                        new = bench.frames("S")
                        for each in new[:100]:  # next hops become known
                            bench.program.run(each, ifindex=device)
                        name = {"snat": "SNAT", "local": "local", "dsr": "DSR"}[kind]
                        found[f"new, {name}, {label}"] = bench.measure(new[100:], action, empty)
                        if kind != "snat":
                            continue
                        acks = bench.frames("A")
                        bench.establish(new, acks)
                        bench.random.shuffle(acks)
                        some = [acks[n % 900] for n in range(packets)]
                        found[f"established, 900 flows, {label}"] = bench.measure(some, action, empty)
                        found[f"established, all flows, {label}"] = bench.measure(acks, action, empty)
                        foreign = _to_nobody(bench.frame(0, "A"), family)
                        found[f"foreign, {label}"] = bench.measure(foreign, XDP_PASS, empty)
                    finally:
                        bench.close()
    empty.close()
    return found


def _to_nobody(frame: bytes, family: Family) -> list[bytes]:
    """Return the frame often, to an address that is nobody's VIP."""
    packet = Ether(frame)
    packet[IP if family.version == 4 else IPv6].dst = "192.0.2.77" if family.version == 4 else "2001:db8::77"
    return [bytes(raw(packet))] * 5000


def main() -> int:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bpffs", type=Path, required=True)
    parser.add_argument("--packets", type=int, default=20_000)
    parser.add_argument("counts", type=int, nargs="+")
    options = parser.parse_args()
    sys.stdout.write(json.dumps(figures(options.bpffs, options.counts, options.packets)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
