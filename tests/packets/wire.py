"""Packets as RFCs have them, read from bytes: the fuzz tests' own view. Scapy is too slow for a million.

A checksum is compared by its residual: what the sum of everything that it covers comes to. A packet whose
addresses and ports are translated keeps its residual, right or wrong, whole, in fragments or cut short.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

TCP, UDP, SCTP = 6, 17, 132
ICMP = {4: 1, 6: 58}
#: Where the checksum stands in the L4 header.
CHECK_AT = {TCP: 16, UDP: 6, SCTP: 8}
#: RFC 8200 4, RFC 6275, RFC 7401, RFC 5533.
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION, MOBILITY, HIP, SHIM6 = 0, 43, 44, 60, 135, 139, 140
EXTENSIONS = {HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION, MOBILITY, HIP, SHIM6}
#: Errors that quote a packet: RFC 792, RFC 4443.
ERRORS = {4: {3, 11, 12}, 6: {1, 2, 3, 4}}
ICMP_SIZE = 8


class Flow(NamedTuple):
    """What tells one flow from others."""

    proto: int
    src: bytes
    sport: int
    dst: bytes
    dport: int

    def turned(self) -> Flow:
        """Return the flow of the answers."""
        return Flow(self.proto, self.dst, self.dport, self.src, self.sport)


class Wire(NamedTuple):
    """An IP packet in a frame."""

    version: int
    l3: int
    l4: int
    end: int  # as its header has it: may be past the frame's end
    next: int  # what is at l4
    offset: int  # of a fragment; 0: whole, or the first
    is_fragment: bool
    addresses: tuple[bytes, bytes]
    ports: tuple[int, int] | None

    @property
    def flow(self) -> Flow | None:
        """The flow, if there are ports."""
        if self.ports is None:
            return None
        return Flow(self.next, self.addresses[0], self.ports[0], self.addresses[1], self.ports[1])


def ip_offset(frame: bytes | bytearray) -> int | None:
    """Return where IP begins behind Ethernet and at most two tags."""
    at = 12
    for _ in range(3):
        kind = frame[at : at + 2]
        if kind in (b"\x08\x00", b"\x86\xdd"):
            return at + 2
        if kind not in (b"\x81\x00", b"\x88\xa8"):
            return None
        at += 4
    return None


def read(frame: bytes | bytearray, l3: int | None = None) -> Wire | None:
    """Read the IP packet at ``l3``, or behind Ethernet; None if its header is not there or not one."""
    kind = b""
    if l3 is None:
        l3 = ip_offset(frame)
        kind = bytes(frame[l3 - 2 : l3]) if l3 else b""
    if l3 is None or len(frame) < l3 + 20:
        return None
    version = frame[l3] >> 4
    if version == 4 and kind != b"\x86\xdd":
        return _read4(frame, l3)
    if version == 6 and kind != b"\x08\x00" and len(frame) >= l3 + 40:
        return _read6(frame, l3)
    return None


def _read4(frame: bytes | bytearray, l3: int) -> Wire | None:
    size = (frame[l3] & 15) * 4
    if size < 20:
        return None
    total, _, fragment, _, proto = struct.unpack_from(">HHHBB", frame, l3 + 2)
    end = l3 + total if total else len(frame)
    offset = (fragment & 0x1FFF) * 8
    addresses = bytes(frame[l3 + 12 : l3 + 16]), bytes(frame[l3 + 16 : l3 + 20])
    l4 = l3 + size
    return Wire(
        4, l3, l4, end, proto, offset, bool(fragment & 0x3FFF), addresses, _ports(frame, l4, proto, offset)
    )


def _read6(frame: bytes | bytearray, l3: int) -> Wire | None:
    size, following = struct.unpack_from(">HB", frame, l3 + 4)
    end = l3 + 40 + size if size else len(frame)
    addresses = bytes(frame[l3 + 8 : l3 + 24]), bytes(frame[l3 + 24 : l3 + 40])
    l4, offset, is_fragment = l3 + 40, 0, False
    while following in EXTENSIONS and not offset:
        if len(frame) < l4 + 8:
            break
        length = 8
        if following == FRAGMENT:
            field = struct.unpack_from(">H", frame, l4 + 2)[0]
            offset, is_fragment = field & 0xFFF8, bool(field & 0xFFF9)
        else:
            length += frame[l4 + 1] * 8
        following = frame[l4]
        l4 += length
    if offset:  # RFC 8200 4.5: only the first fragment says for all what they carry
        following = FRAGMENT
    return Wire(
        6, l3, l4, end, following, offset, is_fragment, addresses, _ports(frame, l4, following, offset)
    )


def _ports(frame: bytes | bytearray, l4: int, proto: int, offset: int) -> tuple[int, int] | None:
    if offset or proto not in CHECK_AT or len(frame) < l4 + 8:
        return None
    sport, dport = struct.unpack_from(">HH", frame, l4)
    return sport, dport


def ones_sum(data: bytes | bytearray) -> int:
    """Return the ones' complement sum of RFC 1071, modulo 0xffff."""
    if len(data) % 2:
        data = data + b"\0"
    return int(sum(struct.unpack(f">{len(data) // 2}H", data)) % 0xFFFF)


def header_residual(frame: bytes | bytearray, wire: Wire) -> int:
    """Return the residual of IPv4's header checksum; 0: it is right."""
    return ones_sum(frame[wire.l3 : wire.l4]) if wire.version == 4 else 0


def pseudo_sum(wire: Wire) -> int:
    """Return the sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1)."""
    source, destination = wire.addresses
    return ones_sum(source + destination) + max(wire.end - wire.l4, 0) + wire.next


def l4_residual(frame: bytes | bytearray, wire: Wire) -> int:
    """Return the residual of TCP, UDP or ICMP, over what the frame has of it; 0: the checksum is right."""
    data = frame[wire.l4 : wire.end]
    if wire.next == ICMP[4]:
        return ones_sum(data)
    return (pseudo_sum(wire) + ones_sum(data)) % 0xFFFF


def _crc_table() -> list[int]:
    """Return the table of CRC32c, RFC 9260 appendix A."""
    table = []
    for each in range(256):
        value = each
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def sctp_residual(frame: bytes | bytearray, wire: Wire) -> int:
    """Return computed XOR written checksum; 0: it is right."""
    data = bytearray(frame[wire.l4 : wire.end])
    written = int.from_bytes(data[8:12], "little")
    data[8:12] = bytes(4)
    value = 0xFFFFFFFF
    for each in data:
        value = value >> 8 ^ _CRC[(value ^ each) & 0xFF]
    return value ^ 0xFFFFFFFF ^ written


def mend(frame: bytearray) -> None:
    """Write every checksum anew, as far as the packet's own lengths make sense."""
    wire = read(frame)
    if wire is None or not wire.l4 <= wire.end <= len(frame):
        return
    if wire.version == 4:
        _exchange(frame, wire.l3 + 10, lambda: header_residual(frame, wire))
    if wire.is_fragment:
        return
    if wire.next == SCTP and wire.end >= wire.l4 + 12:
        frame[wire.l4 + 8 : wire.l4 + 12] = bytes(4)
        frame[wire.l4 + 8 : wire.l4 + 12] = sctp_residual(frame, wire).to_bytes(4, "little")
        return
    at = 2 if wire.next == ICMP[wire.version] else CHECK_AT.get(wire.next)
    if at is not None and wire.next != SCTP and wire.end >= wire.l4 + at + 2:
        _exchange(frame, wire.l4 + at, lambda: l4_residual(frame, wire))


def _exchange(frame: bytearray, at: int, residual: Callable[[], int]) -> None:
    frame[at : at + 2] = bytes(2)
    value = 0xFFFF - residual()
    struct.pack_into(">H", frame, at, value)
