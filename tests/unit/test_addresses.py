"""Addresses, against Python's ipaddress as the second opinion."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.model import addresses

V4 = st.ip_addresses(v=4)
V6 = st.ip_addresses(v=6).filter(lambda each: each not in ipaddress.ip_network("::ffff:0:0/96"))
# Networks around every special range, so that their edges are hit.
EDGES = ("0.0.0.0/30", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/23", "::/126", "fe80::/9", "ff00::/13")
NEAR = st.sampled_from(EDGES).flatmap(lambda network: st.ip_addresses(network=network))
FORBIDDEN = (
    ("0.0.0.0/32", addresses.UNSPECIFIED),
    ("::/128", addresses.UNSPECIFIED),
    ("127.0.0.0/8", addresses.LOOPBACK),
    ("::1/128", addresses.LOOPBACK),
    ("169.254.0.0/16", addresses.LINK_LOCAL),
    ("fe80::/10", addresses.LINK_LOCAL),
    ("224.0.0.0/24", addresses.LINK_LOCAL_MULTICAST),
    ("ff02::/16", addresses.LINK_LOCAL_MULTICAST),
)


@given(V4 | V6 | NEAR)
def test_special_is_exactly_the_documented_ranges(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    why = [text for network, text in FORBIDDEN if address in ipaddress.ip_network(network)]
    assert addresses.special(address.packed) == (why[0] if why else None)


@given(V4 | V6)
def test_pack_reads_every_spelling(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    for text in (str(address), address.exploded, address.exploded.upper()):
        assert addresses.pack(text) == address.packed
        assert ipaddress.ip_address(addresses.canonical(text)) == address
        assert addresses.canonical(text) == addresses.canonical(str(address))
        assert addresses.family(text) == address.version


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0",
        "10.0.0.256",
        "010.0.0.1",
        "10.0.0.1 ",
        "::ffff:10.0.0.1",
        "fe80::1%eth0",
        "1::2::3",
        "web",
        "1\0",
    ],
)
def test_pack_refuses(text: str) -> None:
    assert addresses.pack(text) is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        (" 192.0.2.0/24\n", "192.0.2.0/24"),
        ("2001:DB8::1/32", "2001:db8::/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("10.0.0.1", None),
        ("10.0.0.0/33", None),
        ("10.0.0.0/255.0.0.0", None),
        ("10.0.0.0/08", None),
        ("10.0.0.0/-1", None),
        ("10.0.0.0/", None),
        ("/8", None),
        ("2001:db8::/129", None),
    ],
)
def test_canonical_cidr(text: str, want: str | None) -> None:
    assert addresses.canonical_cidr(text) == want
