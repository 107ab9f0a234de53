"""IP addresses and prefixes as canonical text, and which addresses an endpoint may not have."""

from __future__ import annotations

import ipaddress
import socket

_SPECIAL_V4 = frozenset((0, 127, 169, 224))  # first bytes of every special IPv4 range below

UNSPECIFIED = "may not be unspecified (0.0.0.0, ::)"
LOOPBACK = "may not be in the loopback range (127.0.0.0/8, ::1/128)"
LINK_LOCAL = "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
LINK_LOCAL_MULTICAST = "may not be in the link-local multicast range (224.0.0.0/24, ff02::/16)"


def pack(text: str) -> bytes | None:
    """Return the 4 or 16 bytes of an address, or None if it is none.

    Refused like an API server does: leading zeros, zones (``%eth0``) and IPv4-mapped IPv6.
    """
    try:
        if ":" not in text:
            return socket.inet_pton(socket.AF_INET, text)
        packed = socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        return None
    return None if packed.startswith(b"\0" * 10 + b"\xff\xff") else packed


def canonical(text: str) -> str:
    """Return the canonical text of a valid address (RFC 5952 for IPv6)."""
    if ":" not in text:
        return text
    return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))


def endpoint(address: str, port: int) -> str:
    """Return ADDRESS:PORT, an IPv6 address in brackets (RFC 3986 3.2.2)."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def family(address: str) -> int:
    """Return 4 or 6 for an address or a prefix that is known to be valid."""
    return 6 if ":" in address else 4


def special(packed: bytes) -> str | None:
    """Return why an endpoint or external IP may not have this address, or None if it may.

    Source: Kubernetes API validation of endpoint addresses (unspecified, loopback, link-local unicast
    and link-local multicast); RFC 4291 2.5 and 2.7 for the IPv6 ranges.
    """
    if len(packed) == 4:
        if packed[0] not in _SPECIAL_V4:
            return None
        if packed == b"\0\0\0\0":
            return UNSPECIFIED
        if packed[0] == 127:
            return LOOPBACK
        if packed[:2] == b"\xa9\xfe":
            return LINK_LOCAL
        return LINK_LOCAL_MULTICAST if packed[:3] == b"\xe0\0\0" else None
    if packed == b"\0" * 16:
        return UNSPECIFIED
    if packed == b"\0" * 15 + b"\1":
        return LOOPBACK
    if packed[0] == 0xFE and packed[1] & 0xC0 == 0x80:
        return LINK_LOCAL
    return LINK_LOCAL_MULTICAST if packed[:2] == b"\xff\x02" else None


def canonical_cidr(text: str) -> str | None:
    """Return a prefix as ``network/bits`` with its host bits cleared, or None if it is none.

    Surrounding white space is allowed, as in ``loadBalancerSourceRanges``.
    """
    address, slash, bits = text.strip().partition("/")
    if not slash or not bits.isdecimal() or (len(bits) > 1 and bits[0] == "0") or pack(address) is None:
        return None
    try:
        return str(ipaddress.ip_network(f"{address}/{bits}", strict=False))
    except ValueError:
        return None
