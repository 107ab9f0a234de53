"""Nanoseconds a packet that ``xdp_lb`` takes above an empty XDP program, in a namespace of its own.

Each packet is run once (a program that translates its packet would see another one the second time), over
many prebuilt packets: one pass. Of several passes the one with the smallest median counts, as other work on
the machine only slows one down. What an empty program takes for the same packets, found in the same way, is
subtracted, quartile by quartile. Before each pass flows are forgotten (new), or made fresh (established).

    established, 900 flows      so many are open: a working set that fits into the processor's caches
    established, all flows      each packet of another flow, in random order
    new, SNAT                   the first packet of a flow to a backend on another node: two entries
    new, SNAT, unknown hop      the same, and the kernel is asked for the way to the backend
    new, local                  to a backend on this node: two entries, no next hop
    new, DSR                    encapsulated to a backend on another node: one entry
    foreign                     to nobody's VIP
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import struct
import sys
import time
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import raw

from benchmarks import state
from benchmarks.figures import spread
from ebpfproxy import netlink
from ebpfproxy.dataplane.bpf import plan
from ebpfproxy.dataplane.bpf.features import program_features
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
    Service,
)
from rig.kernel import new_bpffs, new_netns
from rig.process import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

DEVICE, PEER, GATEWAY_MAC = "eth0", "wire", "02:00:00:00:00:fe"
SNAT_PORTS = (10000, 65535)  # more flows at once than a test machine has by default
BACKENDS = 10
FEW = 900  # flows whose entries stay in the processor's caches
PASSES = 5
XDP_PASS, XDP_TX = 2, 3
ETHERNET_BYTES = 14


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
        frontend = Frontend(FrontendKind.EXTERNAL_IP, family.vip(number), 80)
        made.append(
            state.resolved(f"s{number}", frontend, backends, version=family.version, is_dsr=kind == "dsr")
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

    def __init__(
        self, bpffs: Path, count: int, family: Family, kind: str, device: int, packets: int, empty: Program
    ) -> None:
        self.family, self.device, self.count, self.packets = family, device, count, packets
        self.kind, self.empty = kind, empty
        self.directory = bpffs / "maps"
        self.loaded: Loaded = choose("libbpf").load(
            LoadOptions(
                self.directory,
                objects=("xdp_lb",),
                config={
                    "snat_port_min": SNAT_PORTS[0],
                    "snat_port_max": SNAT_PORTS[1],
                    "features": program_features(),
                },
            )
        )
        maps = self.loaded.maps
        tables = Tables(read_tables(maps), {name: found.max_entries for name, found in maps.items()})
        wanted = DesiredState(
            tuple(services(family, count, kind)),
            NodePortAddresses(
                local=frozenset({family.node}),
                sources=frozenset({NodeSource(0, family.version, family.node)}),
            ),
        )
        assert not tables.update(wanted)
        plan.apply(plan.make_plan(tables.delta()), maps)
        self.program = self.loaded.programs["xdp_lb"]
        self.openings = self.frames("S")
        for each in self.openings[:100]:  # the way to some backend becomes known
            self.program.run(each, ifindex=device)

    def close(self) -> None:
        """Unload."""
        self.loaded.close()
        shutil.rmtree(self.directory)

    def new(self) -> dict[str, Any]:
        """Measure first packets."""
        name = {"snat": "new, SNAT", "local": "new, local", "dsr": "new, DSR"}[self.kind]
        action = XDP_PASS if self.kind == "local" else XDP_TX
        prepare = [self.forget]
        if self.kind != "local":
            prepare.append(partial(self.hops, are_known=True))
        found = {name: self.measure(self.openings, action, prepare)}
        if self.kind == "snat" and self.count * BACKENDS > self.packets:  # else most would be known soon
            prepare[-1] = partial(self.hops, are_known=False)
            found[f"{name}, unknown hop"] = self.measure(self.openings, action, prepare)
        return found

    def established(self) -> dict[str, Any]:
        """Measure packets of open connections, and of nobody's."""
        self.forget()
        acks = self.frames("A")
        foreign = [_to_nobody(acks[0], self.family)] * 5000
        found = {"foreign": self.measure(foreign, XDP_PASS, [])}
        self.establish(self.openings[:FEW], acks[:FEW])
        few = [acks[n % FEW] for n in range(self.packets)]
        random.Random(1).shuffle(few)
        found[f"established, {FEW} flows"] = self.measure(few, XDP_TX, [self.keep_fresh])
        self.establish(self.openings[FEW:], acks[FEW:])
        random.Random(1).shuffle(acks)
        found["established, all flows"] = self.measure(acks, XDP_TX, [self.keep_fresh])
        return found

    def frame(self, number: int, flags: str) -> bytes:
        """Return the frame of client ``number`` to some Service's VIP."""
        layer = IP if self.family.version == 4 else IPv6
        vip = self.family.vip(number % self.count)
        header = TCP(sport=1024 + number % 60000, dport=80, flags=flags)
        packet = Ether(dst="02:00:00:00:00:01", src=GATEWAY_MAC) / layer(
            src=self.family.client(number), dst=vip
        )
        return bytes(raw(packet / header / (b"x" * 64)))

    def frames(self, flags: str) -> list[bytes]:
        """Return one frame each of many clients: scapy's first one, and what differs written over it."""
        first = self.frame(0, flags)
        made = [self._like(first, number) for number in range(self.packets)]
        assert made[-1] == self.frame(self.packets - 1, flags)
        return made

    def _like(self, first: bytes, number: int) -> bytes:
        packet = bytearray(first)
        source, target, l4 = self._offsets()
        sums = [l4 + 16, *([ETHERNET_BYTES + 10] if self.family.version == 4 else [])]
        new_source = ip_address(self.family.client(number)).packed
        new_target = ip_address(self.family.vip(number % self.count)).packed
        for at, new in ((source, new_source), (target, new_target)):
            _replace(packet, at, new, sums)
        _replace(packet, l4, struct.pack("!H", 1024 + number % 60000), sums[:1])
        return bytes(packet)

    def _offsets(self) -> tuple[int, int, int]:
        """Return where source, destination and TCP header are in a frame."""
        if self.family.version == 4:
            return ETHERNET_BYTES + 12, ETHERNET_BYTES + 16, ETHERNET_BYTES + 20
        return ETHERNET_BYTES + 8, ETHERNET_BYTES + 24, ETHERNET_BYTES + 40

    def establish(self, openings: Iterable[bytes], acks: Iterable[bytes]) -> None:
        """Let each flow be opened, answered and confirmed."""
        source, target, l4 = self._offsets()
        size = target - source
        for opening, ack in zip(openings, acks, strict=True):
            sent = bytearray(self.program.run(opening, ifindex=self.device).data)
            client = sent[source:target]
            sent[source:target] = sent[target : target + size]
            sent[target : target + size] = client
            ports = struct.unpack_from("!HH", sent, l4)
            struct.pack_into("!HH", sent, l4, *ports[::-1])
            sent[l4 + 13] = 0x12  # SYN, ACK
            self.program.run(bytes(sent), ifindex=self.device)
            self.program.run(ack, ifindex=self.device)

    def forget(self) -> None:
        """Let no flow be known."""
        for name in ("new_flows", "conntrack"):
            found = self.loaded.maps[name]
            found.delete_batch([key for key, _ in found.items()])

    def hops(self, *, are_known: bool) -> None:
        """Let the way to each backend be known, or to none: all go through the same gateway."""
        ways = self.loaded.maps["backend_hops"]
        size = ways.definition.value_size
        kind = ffi.offsetof("struct backend_hop", "hop") + ffi.offsetof("struct next_hop", "kind")
        known = next((value for _, value in ways.items() if value[kind]), bytes(size))
        assert known[kind] == lib.HOP_FORWARD or not are_known
        at = ffi.offsetof("struct backend_hop", "hop") + ffi.offsetof("struct next_hop", "until")
        value = known[:at] + self._until() + known[at + 4 :] if are_known else bytes(size)
        ways.update_batch({struct.pack("=I", each): value for each in range(self.count * BACKENDS + 1)})

    def keep_fresh(self) -> None:
        """Let no next hop age, as no tc program is here to renew it, and let flows be fresh.

        What is done once a second for a flow is left out.
        """
        until = self._until()
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

    def _until(self) -> bytes:
        """Return the time when a next hop ages: not during this measurement."""
        return struct.pack("=I", (time.monotonic_ns() >> 30) + 2**30)

    def measure(
        self, packets: list[bytes], action: int, prepare: Sequence[Callable[[], None]]
    ) -> tuple[float, float, float]:
        """Return the median and the quartiles of single runs in the best pass, above an empty program."""
        took, nothing = [], []
        for _ in range(PASSES):
            for each in prepare:
                each()
            took.append(spread(list(self._durations(self.program, packets, action))))
            nothing.append(spread(list(self._durations(self.empty, packets, XDP_PASS))))
        median, low, high = (a - b for a, b in zip(min(took), min(nothing), strict=True))
        return median, low, high

    def _durations(self, program: Program, packets: list[bytes], action: int) -> Iterator[int]:
        for result, took_ns in program.time_each(packets, ifindex=self.device):
            assert result == action
            yield took_ns


def _replace(packet: bytearray, at: int, new: bytes, sums: Sequence[int]) -> None:
    """Write over a part of a packet, and bring its checksums along (RFC 1624)."""
    words = struct.Struct(f"!{len(new) // 2}H")
    difference = sum(words.unpack(new)) + sum(0xFFFF - word for word in words.unpack_from(packet, at))
    packet[at : at + len(new)] = new
    for each in sums:
        (before,) = struct.unpack_from("!H", packet, each)
        total = (~before & 0xFFFF) + difference
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", packet, each, ~total & 0xFFFF)


def figures(bpffs: Path, counts: Iterable[int], packets: int) -> dict[str, dict[str, Any]]:
    """Return median and quartiles in nanoseconds, by what is loaded and what is measured."""
    device = wire()
    empty = Program(lib.glue_load_trivial(lib.BPF_PROG_TYPE_XDP, 0, XDP_PASS))
    found: dict[str, dict[str, Any]] = {}
    # The kernel lets a packet seem to come from a device only if that has queues for XDP.
    with Link.attach_xdp(empty, device, XDP_NATIVE):
        for count in counts:
            for family in FAMILIES:
                label = f"xdp_lb, IPv{family.version}, {count:,} Service{'s' * (count > 1)}, ns"
                found[label] = {}
                for kind in ("snat", "local", "dsr"):
                    with contextlib.closing(
                        Bench(bpffs, count, family, kind, device, packets, empty)
                    ) as bench:
                        found[label] |= bench.established() if kind == "snat" else {}
                        found[label] |= bench.new()
    empty.close()
    return found


def measure(counts: Sequence[int], packets: int) -> dict[str, dict[str, Any]]:
    """Return the figures for each number of Services, found in a process and a namespace of their own."""
    with new_netns("xdp") as netns, new_bpffs() as bpffs:
        command = [sys.executable, "-m", "benchmarks.xdp", "--bpffs", str(bpffs), "--packets", str(packets)]
        result = netns.place().run(*command, *map(str, counts), timeout_s=3600)
    made: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return made


def _to_nobody(frame: bytes, family: Family) -> bytes:
    """Return the frame with an address that is nobody's VIP."""
    packet = Ether(frame)
    packet[IP if family.version == 4 else IPv6].dst = "192.0.2.77" if family.version == 4 else "2001:db8::77"
    return bytes(raw(packet))


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
