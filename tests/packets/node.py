"""A node as the programs see it: maps that a test fills, packets in, packets and verdicts out."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw, raw

from ebpfproxy.libbpf import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ebpfproxy.libbpf import Map
    from ebpfproxy.loader import Loaded

SECOND_NS = 10**9
#: Of most Services here, their backends and clients.
PORT, BACKEND_PORT, CLIENT_PORT = 80, 8080, 40000
NODE_PORTS = (30000, 32767)
SNAT_PORTS = (61000, 61999)
UDP_IDLE_S = 60
#: Actions of tc programs, linux/pkt_cls.h: the next filter's turn, drop, send it from a device.
TC_ACT_UNSPEC = 0xFFFFFFFF
TC_ACT_SHOT = 2
TC_ACT_REDIRECT = 7
#: Verdicts whose packet is an answer, sent back; every other packet goes on.
REJECTIONS = {"REJECT_EMPTY", "REJECT_UNUSED", "HOPS", "TOO_BIG", "ECHO"}

VERDICTS = {
    getattr(lib, name): name.removeprefix("VERDICT_")
    for name in dir(lib)
    if name.startswith("VERDICT_") and name not in {"VERDICT_MAX", "VERDICT_CONTINUE"}
}


class Family(NamedTuple):
    """Addresses of one IP version."""

    version: int
    client: str
    other_client: str
    pod: str  # in local_sources
    vip: str
    other_vip: str
    node: str
    backends: tuple[str, ...]
    any: str
    pods: str
    layer: type[Packet]
    ethertype: int

    def __str__(self) -> str:
        return f"v{self.version}"


V4 = Family(
    4,
    "192.0.2.7",
    "192.0.2.8",
    "10.244.0.9",
    "10.96.0.10",
    "198.51.100.1",
    "203.0.113.5",
    ("10.244.1.1", "10.244.1.2", "10.244.1.3"),
    "0.0.0.0",
    "10.244.0.0/24",
    IP,
    0x0800,
)
V6 = Family(
    6,
    "2001:db8:1::7",
    "2001:db8:1::8",
    "fd00:10:244::9",
    "fd00:10:96::a",
    "2001:db8:2::1",
    "2001:db8:5::5",
    ("fd00:10:244:1::1", "fd00:10:244:1::2", "fd00:10:244:1::3"),
    "::",
    "fd00:10:244::/64",
    IPv6,
    0x86DD,
)

PROTOCOLS = {
    "TCP": socket.IPPROTO_TCP,
    "UDP": socket.IPPROTO_UDP,
    "SCTP": socket.IPPROTO_SCTP,
}
L4 = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


@dataclass(frozen=True)
class Backend:
    """One backend of a service, as the agent would write it."""

    address: str
    port: int = 8080
    weight: int = 1
    state: int = lib.BACKEND_READY
    flags: int = 0


@dataclass
class Service:
    """A service in the maps."""

    id: int
    backends: list[int]  # ids
    keys: list[bytes] = field(default_factory=list)
    value: Any = None


class Outcome(NamedTuple):
    """What a program did with one packet."""

    verdict: str
    packet: Packet | None  # None: dropped; of a rejection: the answer


def packed(address: str) -> bytes:
    """Return an address as struct addr has it (RFC 4291 2.5.5.2 for IPv4)."""
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


def struct_of(name: str, **fields: Any) -> Any:
    """Return a new struct of abi.h; addresses are text, ports are numbers in host byte order."""
    made = ffi.new(f"struct {name} *")
    for key, value in fields.items():
        member = getattr(made, key)
        if isinstance(value, str):
            ffi.memmove(ffi.addressof(made, key), packed(value), 16)
        elif key in {"port", "sport", "dport", "vip_port", "backend_port"}:
            setattr(made, key, socket.htons(value))
        else:
            assert isinstance(member, int)
            setattr(made, key, value)
    return made


def to_bytes(made: Any) -> bytes:
    """Return the bytes of a struct."""
    return bytes(ffi.buffer(made))


def number(value: int) -> bytes:
    """Return a __u32."""
    return to_bytes(ffi.new("__u32 *", value))


class Node:
    """Fills the maps and runs packets through the programs."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._next_service = self._next_backend = 1
        self._next_slot = 0
        for name in (
            "vips",
            "services",
            "source_ranges",
            "local_sources",
            "node_sources",
            "dsr_backends",
            "outliers",
            "conntrack",
            "new_flows",
            "affinity",
            "fragments",
            "sockets",
        ):
            entries = self.map(name)
            entries.delete_batch([key for key, _ in entries.items()])
        self.reject_from(0)

    def map(self, name: str) -> Map:
        """Return a map."""
        return self.loaded.maps[name]

    # ---- what the agent writes ----

    def vip(self, address: str, kinds: int) -> None:
        """Make ``address`` an address of these kinds."""
        self.map("vips").update(packed(address), to_bytes(struct_of("vip", kinds=kinds)))

    def local_source(self, prefix: str) -> None:
        """Count sources in ``prefix`` as this node's pods."""
        network = ipaddress.ip_network(prefix)
        bits = network.prefixlen + (96 if network.version == 4 else 0)
        key = struct_of("local_source_key", prefixlen=bits, source=str(network.network_address))
        self.map("local_sources").update(to_bytes(key), number(lib.SOURCE_LOCAL | lib.SOURCE_OWN))

    def source_range(self, service: Service, prefix: str) -> None:
        """Let sources in ``prefix`` use the load-balancer VIPs of ``service``."""
        network = ipaddress.ip_network(prefix)
        bits = network.prefixlen + (96 if network.version == 4 else 0)
        key = struct_of(
            "source_range_key",
            prefixlen=32 + bits,
            service=service.id,
            source=str(network.network_address),
        )
        self.map("source_ranges").update(to_bytes(key), number(1))

    def service(
        self,
        vip: str,
        port: int,
        backends: Iterable[str | Backend],
        *,
        proto: str = "TCP",
        kind: int = lib.VIP_CLUSTER_IP,
        scheduler: int = lib.SCHED_RR,
        table: Sequence[int] | None = None,
        affinity_s: int = 0,
        flags: int = 0,
        syn_tries: int = 0,
        scopes: Iterable[int] = (lib.SCOPE_INTERNAL, lib.SCOPE_EXTERNAL),
        pool: Service | None = None,
    ) -> Service:
        """Write a service with one frontend.

        Args:
            vip: its address; the "any" address for a NodePort, whose node addresses are written apart.
            port: its port.
            backends: its backends.
            proto: TCP, UDP or SCTP.
            kind: of the frontend.
            scheduler: how it chooses.
            table: its slots, as indexes into ``backends``; default: each usable backend once.
            affinity_s: timeout of ClientIP.
            flags: enum service_flag.
            syn_tries: how many more backends an unanswered opening may try.
            scopes: for which sources.
            pool: another service whose id and backends it shares: a second frontend.
        """
        wanted = [Backend(each) if isinstance(each, str) else each for each in backends]
        made = pool or Service(self._next_service, [])
        if pool is None:
            self._next_service += 1
            self.map("service_stats").update(number(made.id), to_bytes(struct_of("service_stats")))
            for each in wanted:
                made.backends.append(self.backend(made, each, proto))
        if table is None:
            table = [n for n, each in enumerate(wanted) if each.weight] or list(range(len(made.backends)))
        base = self._next_slot
        self._next_slot += len(table)
        slots = {number(base + n): number(made.backends[index]) for n, index in enumerate(table)}
        self.map("slots").update_batch(slots)
        made.value = struct_of(
            "service",
            id=made.id,
            slot_base=base,
            slot_count=len(table),
            affinity_s=affinity_s,
            scheduler=scheduler,
            flags=flags,
            kind=kind,
            syn_tries=syn_tries,
        )
        for scope in scopes:
            key = struct_of("service_key", vip=vip, port=port, proto=PROTOCOLS[proto], scope=scope)
            self.map("services").update(to_bytes(key), to_bytes(made.value))
            made.keys.append(to_bytes(key))
        if kind != lib.VIP_NODE:
            self.vip(vip, kind)
        return made

    def eject(self, service: Service, *, failures: int, seconds: int, most: int) -> None:
        """Let backends of ``service`` that fail so often be passed over for so long, so many at a time."""
        value = struct_of("outlier", failures=failures, seconds=seconds, most=most)
        self.map("outliers").update(number(service.id), to_bytes(value))
        for each in service.backends:
            self.map("backend_health").update(number(each), to_bytes(struct_of("backend_health")))

    def backend(self, service: Service, backend: Backend, proto: str = "TCP") -> int:
        """Write a backend; return its id."""
        made = self._next_backend
        self._next_backend += 1
        self.write_backend(made, service, backend, proto)
        self.map("backend_stats").update(number(made), to_bytes(struct_of("backend_stats")))
        return made

    def write_backend(self, number_: int, service: Service, backend: Backend, proto: str = "TCP") -> None:
        """Write a backend under a given id."""
        value = struct_of(
            "backend",
            address=backend.address,
            port=backend.port,
            proto=PROTOCOLS[proto],
            state=backend.state,
            service=service.id,
            weight=backend.weight,
            flags=backend.flags,
        )
        self.map("backends").update(number(number_), to_bytes(value))

    def set_backend(self, number_: int, **fields: int) -> None:
        """Change fields of a backend."""
        value = ffi.new("struct backend *")
        ffi.memmove(value, self.map("backends").get(number(number_)), ffi.sizeof("struct backend"))
        for name, new in fields.items():
            setattr(value, name, new)
        self.map("backends").update(number(number_), to_bytes(value))

    def set_service(self, service: Service, **fields: int) -> None:
        """Change fields of a service in every frontend."""
        for name, new in fields.items():
            setattr(service.value, name, new)
        for key in service.keys:
            self.map("services").update(key, to_bytes(service.value))

    def set_open(self, backend: int, open_: int) -> None:
        """Pretend that a backend has so many open connections."""
        self.map("backend_stats").update(number(backend), to_bytes(struct_of("backend_stats", open=open_)))

    # ---- what the programs write ----

    def backend_stats(self, backend: int) -> tuple[int, int]:
        """Return (connections ever, open now)."""
        stats = ffi.from_buffer("struct backend_stats *", self.map("backend_stats").get(number(backend)))
        return stats.connections, stats.open

    def service_stats(self, service: Service) -> tuple[int, int]:
        """Return (connections, refused)."""
        stats = ffi.from_buffer("struct service_stats *", self.map("service_stats").get(number(service.id)))
        return stats.connections, stats.refused

    def flows(self) -> dict[bytes, Any]:
        """Return the entries of maps conntrack and new_flows, as structs by key."""
        return self._structs("conntrack", "struct flow *") | self._structs("new_flows", "struct flow *")

    def sockets(self) -> list[tuple[Any, Any]]:
        """Return the entries of map sockets, as pairs of structs."""
        return [
            (ffi.from_buffer("struct socket_key *", key), value)
            for key, value in self._structs("sockets", "struct socket_flow *").items()
        ]

    def forget_flows(self, direction: int | None = None) -> int:
        """Evict conntrack entries, as a full LRU map does; return how many."""
        wanted = []
        for key in self.flows():
            parsed = ffi.from_buffer("struct flow_key *", key)
            if direction is None or parsed.dir == direction:
                wanted.append(key)
        return self.map("conntrack").delete_batch(wanted) + self.map("new_flows").delete_batch(wanted)

    def wait(self, seconds: float) -> None:
        """Let time pass: makes everything that is remembered older."""
        for name, struct, member in (
            ("conntrack", "struct flow *", "last_seen_ns"),
            ("new_flows", "struct flow *", "last_seen_ns"),
            ("affinity", "struct affinity *", "last_used_ns"),
            ("sockets", "struct socket_flow *", "last_used_ns"),
        ):
            for key, value in self._structs(name, struct).items():
                # The programs subtract modulo 2**64: it may be before the machine started.
                setattr(value, member, (getattr(value, member) - int(seconds * SECOND_NS)) % 2**64)
                self.map(name).update(key, to_bytes(value))
        health = self.map("backend_health")
        for key, value in health.items():
            each = ffi.from_buffer("struct backend_health *", value)
            if each.ejected_until_ns:
                until = (each.ejected_until_ns - int(seconds * SECOND_NS)) % 2**64
                changed = struct_of("backend_health", ejected_until_ns=until, failures=each.failures)
                health.update(key, to_bytes(changed))

    def reject_from(self, time_ns: int) -> None:
        """Let every CPU's budget for rejections be spent up to a CLOCK_MONOTONIC time."""
        entry = self.map("rejects")
        each = to_bytes(struct_of("reject", paid_ns=time_ns))
        assert len(each) == entry.stride
        entry.update(number(0), each * lib.libbpf_num_possible_cpus())

    def _structs(self, name: str, struct: str) -> dict[bytes, Any]:
        found = {}
        for key, value in self.map(name).items():
            made = ffi.new(struct)
            ffi.memmove(made, value, len(value))
            found[key] = made
        return found

    def verdicts(self) -> dict[str, int]:
        """Return all counters by name."""
        counters = self.map("verdicts")
        return {name: counters.get_percpu_sums(number(index))[0] for index, name in VERDICTS.items()}

    # ---- packets ----

    def ingress(self, packet: Packet | bytes) -> Outcome:
        """Let a packet enter the node."""
        return self._run("tc_ingress", packet)

    def egress(self, packet: Packet | bytes) -> Outcome:
        """Let a packet leave the node."""
        return self._run("tc_egress", packet)

    def _run(self, program: str, packet: Packet | bytes) -> Outcome:
        before = self.verdicts()
        result = self.loaded.programs[program].run(bytes(packet))
        after = self.verdicts()
        counted = [name for name, count in after.items() for _ in range(count - before[name])]
        assert len(counted) == 1, f"one packet, one verdict; counted {counted}"
        if result.retval == TC_ACT_SHOT:
            return Outcome(counted[0], None)
        assert result.retval == (TC_ACT_REDIRECT if counted[0] in REJECTIONS else TC_ACT_UNSPEC)
        return Outcome(counted[0], Ether(result.data))


def frame(
    family: Family,
    l4: Packet,
    src: str,
    dst: str,
    payload: bytes = b"",
) -> Packet:
    """Return an Ethernet frame."""
    body = l4 / Raw(payload) if payload else l4
    return Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02") / family.layer(src=src, dst=dst) / body


def finished(packet: Packet) -> Packet:
    """Return the packet with every checksum computed by scapy."""
    copy = packet.copy()
    for layer in (IP, TCP, UDP, SCTP):
        if copy.haslayer(layer):
            copy[layer].delfieldval("chksum")
    return Ether(raw(copy))


def translated(packet: Packet, **fields: Any) -> bytes:
    """Return a frame as it must look with other addresses or ports, checksums computed by scapy.

    Args:
        packet: the frame before.
        fields: src, dst, sport, dport.
    """
    copy = Ether(raw(packet))
    for name, value in fields.items():
        layer = next(
            each
            for each in (IP, IPv6, TCP, UDP, SCTP)
            if copy.haslayer(each) and name in [f.name for f in copy[each].fields_desc]
        )
        setattr(copy[layer], name, value)
    data: bytes = raw(finished(copy))
    return data
