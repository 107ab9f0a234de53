"""Values of the BPF maps as Python records; sizes and offsets come from ``abi.h`` through cffi.

Fields in network byte order stay ``bytes`` here: an address is 16 of them (IPv4 as ``::ffff:a.b.c.d``),
a port two.
"""

from __future__ import annotations

import functools
import socket
import struct
from array import array
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ebpfproxy.libbpf import ffi
from ebpfproxy.model.services import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: The fields that ``abi.h`` declares ``__be16``; cffi resolves the typedef, so it can't say.
BIG_ENDIAN = frozenset({"port", "sport", "dport", "vip_port", "backend_port"})

PROTOCOL_NUMBER = {
    Protocol.TCP: socket.IPPROTO_TCP,
    Protocol.UDP: socket.IPPROTO_UDP,
    Protocol.SCTP: socket.IPPROTO_SCTP,
}
PROTOCOL_NAME = {number: protocol for protocol, number in PROTOCOL_NUMBER.items()}


def protocol_name(number: int) -> str:
    """Return a protocol as Services have it; one that they don't have as its number."""
    return PROTOCOL_NAME[number].value if number in PROTOCOL_NAME else str(number)


_V4_MAPPED = bytes(10) + b"\xff\xff"


class VipKey(NamedTuple):
    """Key of map vips."""

    w: bytes


class Vip(NamedTuple):
    """Value of map vips."""

    kinds: int


class ServiceKey(NamedTuple):
    """Key of map services."""

    vip: bytes
    port: bytes
    proto: int
    scope: int


class ServiceValue(NamedTuple):
    """Value of map services."""

    id: int
    slot_base: int
    slot_count: int
    affinity_s: int
    scheduler: int
    flags: int
    kind: int
    syn_tries: int


class BackendValue(NamedTuple):
    """Value of map backends."""

    address: bytes
    port: bytes
    proto: int
    state: int
    service: int
    weight: int
    flags: int


class BackendStats(NamedTuple):
    """Value of map backend_stats."""

    connections: int
    open: int
    packets: int
    octets: int
    reply_packets: int
    reply_octets: int


class ServiceStats(NamedTuple):
    """Value of map service_stats."""

    connections: int
    refused: int
    next: int
    retried: int
    ejected: int
    packets: int
    octets: int
    reply_packets: int
    reply_octets: int


class NameValue(NamedTuple):
    """Value of map service_names."""

    text: bytes
    proto: int
    family: int


class SocketKey(NamedTuple):
    """Key of map sockets."""

    cookie: int
    addr: bytes
    port: bytes
    proto: int
    kind: int


class SocketFlow(NamedTuple):
    """Value of map sockets."""

    vip: bytes
    backend_addr: bytes
    vip_port: bytes
    backend_port: bytes
    service: int
    backend: int
    last_used_ns: int


class FlowKey(NamedTuple):
    """Key of maps conntrack and new_flows."""

    src: bytes
    dst: bytes
    sport: bytes
    dport: bytes
    proto: int
    dir: int


class Flow(NamedTuple):
    """Value of maps conntrack and new_flows."""

    src: bytes
    dst: bytes
    sport: bytes
    dport: bytes
    state: int
    flags: int
    syn_tries: int
    service: int
    backend: int
    last_seen_ns: int
    octets: int
    packets: int
    hop: bytes


class DsrBackendKey(NamedTuple):
    """Key of map dsr_backends."""

    address: bytes
    service: int


class OutlierValue(NamedTuple):
    """Value of map outliers."""

    failures: int
    seconds: int
    most: int


class BackendHealth(NamedTuple):
    """Value of map backend_health."""

    ejected_until_ns: int
    failures: int
    ejections: int


class NodeSourceKey(NamedTuple):
    """Key of map node_sources."""

    device: int
    family: int


class VerdictCount(NamedTuple):
    """Value of map verdicts."""

    packets: int
    octets: int


class AffinityKey(NamedTuple):
    """Key of map affinity."""

    client: bytes
    service: int
    kind: int


class AffinityValue(NamedTuple):
    """Value of map affinity."""

    backend: int
    last_used_ns: int


class SourceRangeKey(NamedTuple):
    """Key of map source_ranges."""

    prefixlen: int
    service: int
    source: bytes


class LocalSourceKey(NamedTuple):
    """Key of map local_sources."""

    prefixlen: int
    source: bytes


R = TypeVar("R", bound="tuple[Any, ...]")


def _format(name: str, ctype: Any) -> str:
    """Return the ``struct`` format of one field."""
    if ctype.kind == "struct" or name in BIG_ENDIAN:
        return f"{ffi.sizeof(ctype)}s"
    if ctype.kind == "array":
        size = ffi.sizeof(ctype)
        return f"{size}x" if name.startswith("pad") else f"{size}s"
    code = {1: "B", 2: "H", 4: "I", 8: "Q"}[ffi.sizeof(ctype)]
    if name.startswith("pad"):
        return f"{ffi.sizeof(ctype)}x"
    return code.lower() if int(ffi.cast(ctype, -1)) < 0 else code


class Layout(Generic[R]):
    """Packs and unpacks one struct of ``abi.h``.

    ``pack`` and ``unpack`` are the bound methods of ``struct.Struct``, for code that handles hundreds of
    thousands of values; ``read`` and ``write`` go through the record.
    """

    def __init__(self, name: str, record: type[R]) -> None:
        fields = ffi.typeof(f"struct {name}").fields
        names = [field for field, _ in fields if not field.startswith("pad")]
        if names != list(record._fields):  # type: ignore[attr-defined]
            raise TypeError(f"struct {name} has fields {names}, its record has others")
        self._struct = struct.Struct("=" + "".join(_format(field, info.type) for field, info in fields))
        self._record = record
        self._fields = fields
        self.size = ffi.sizeof(f"struct {name}")
        self.offsets = {field: info.offset for field, info in fields}
        if self._struct.size != self.size:
            raise TypeError(f"struct {name} has padding that abi.h does not name")
        self.pack = self._struct.pack
        self.unpack = self._struct.unpack
        self.iter_unpack = self._struct.iter_unpack

    def read(self, data: bytes | memoryview) -> R:
        """Return the record in ``data``."""
        return self._record(*self._struct.unpack(data))

    def read_all(self, data: bytes | memoryview) -> Iterator[R]:
        """Yield the records of an array."""
        record = self._record
        return (record(*fields) for fields in self._struct.iter_unpack(data))

    def columns(self, *names: str) -> Callable[[bytes | memoryview], Iterator[tuple[Any, ...]]]:
        """Return what yields only these fields of every record in an array, for loops where each counts.

        Args:
            names: in the order of the struct.
        """
        parts = (
            _format(field, info.type) if field in names else f"{ffi.sizeof(info.type)}x"
            for field, info in self._fields
        )
        return struct.Struct("=" + "".join(parts)).iter_unpack

    def write(self, record: R) -> bytes:
        """Return the bytes of ``record``."""
        return self._struct.pack(*record)


VIP_KEY = Layout("addr", VipKey)
VIP = Layout("vip", Vip)
SERVICE_KEY = Layout("service_key", ServiceKey)
SERVICE = Layout("service", ServiceValue)
BACKEND = Layout("backend", BackendValue)
BACKEND_STATS = Layout("backend_stats", BackendStats)
SERVICE_STATS = Layout("service_stats", ServiceStats)
OUTLIER = Layout("outlier", OutlierValue)
BACKEND_HEALTH = Layout("backend_health", BackendHealth)
SERVICE_NAME = Layout("service_name", NameValue)
SOCKET_KEY = Layout("socket_key", SocketKey)
SOCKET_FLOW = Layout("socket_flow", SocketFlow)
FLOW_KEY = Layout("flow_key", FlowKey)
FLOW = Layout("flow", Flow)
AFFINITY_KEY = Layout("affinity_key", AffinityKey)
AFFINITY = Layout("affinity", AffinityValue)
SOURCE_RANGE_KEY = Layout("source_range_key", SourceRangeKey)
LOCAL_SOURCE_KEY = Layout("local_source_key", LocalSourceKey)
DSR_BACKEND_KEY = Layout("dsr_backend_key", DsrBackendKey)
NODE_SOURCE_KEY = Layout("node_source_key", NodeSourceKey)
VERDICT_COUNT = Layout("verdict_count", VerdictCount)
U32 = struct.Struct("=I")
#: Bytes from one slot to the next: the kernel rounds the values of an array up to 8.
SLOT_SIZE = 8


def pack_slots(backends: Sequence[int]) -> bytes:
    """Return the memory of a range of map slots."""
    slots = array("I", bytes(SLOT_SIZE * len(backends)))
    slots[::2] = array("I", backends)
    return slots.tobytes()


def unpack_slots(data: bytes | memoryview) -> list[int]:
    """Return the backend ids in the memory of a range of map slots."""
    return array("I", bytes(data))[::2].tolist()


@functools.lru_cache(maxsize=1 << 18)
def pack_address(text: str) -> bytes:
    """Return the 16-byte form of an address."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return _V4_MAPPED + socket.inet_pton(socket.AF_INET, text)


def unpack_address(data: bytes) -> str:
    """Return the canonical text of a 16-byte address."""
    if data[:12] == _V4_MAPPED:
        return socket.inet_ntop(socket.AF_INET, data[12:])
    return socket.inet_ntop(socket.AF_INET6, data)


def any_address(family: int) -> bytes:
    """Return the 16-byte form of 0.0.0.0 or ``::``: every NodePort address of this node."""
    return _V4_MAPPED + bytes(4) if family == 4 else bytes(16)


def pack_prefix(cidr: str) -> tuple[int, bytes]:
    """Return (bits, 16-byte address) of a canonical CIDR; an IPv4 /24 has 120 bits."""
    address, _, bits = cidr.partition("/")
    offset = 0 if ":" in address else 96
    length = int(bits) if bits else 128 - offset
    return offset + length, pack_address(address)


def pack_port(port: int) -> bytes:
    """Return a port in network byte order."""
    return port.to_bytes(2, "big")


def unpack_port(data: bytes) -> int:
    """Return the number of a port in network byte order."""
    return int.from_bytes(data, "big")
