"""Full maps: established flows never feel it, new ones are still served or refused and counted, and it shows.

A flood is a packet each of EBPFPROXY_FLOOD_SOURCES sources (a million by default). The maps are tiny.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import raw

from ebpfproxy.dataplane.bpf import view
from ebpfproxy.libbpf import lib
from packets.loading import load
from packets.node import BACKEND_PORT, PORT, TC_ACT_UNSPEC, V4, Backend, Family, Node, finished, frame
from packets.path import XDP_PASS, Driver, know_reply_hops, remote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebpfproxy.loader import Loaded
    from packets.node import Service
    from rig import kernel

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

SOURCES = int(os.environ.get("EBPFPROXY_FLOOD_SOURCES", "1000000"))
SIZES = {"conntrack": 64, "new_flows": 512, "affinity": 128, "fragments": 128}


@pytest.fixture(scope="module")
def programs(host: kernel.Netns) -> Iterator[Loaded]:
    """The programs, with tiny maps."""
    with load("libbpf", host, SIZES) as loaded:
        yield loaded


def local(node: Node, family: Family, proto: str = "TCP", affinity_s: int = 0) -> Service:
    """Make a Service whose one backend is on this node."""
    backend = Backend(family.backends[0], BACKEND_PORT, flags=lib.BACKEND_LOCAL)
    return node.service(
        family.vip, PORT, [backend], proto=proto, kind=lib.VIP_LOAD_BALANCER, affinity_s=affinity_s
    )


def request(family: Family, sport: int, flags: str, src: str = "") -> bytes:
    """Return a client's packet."""
    l4 = TCP(sport=sport, dport=PORT, flags=flags)
    data: bytes = raw(finished(frame(family, l4, src or family.client, family.vip)))
    return data


def reply(family: Family, dport: int, flags: str) -> bytes:
    """Return what a local backend says to the client."""
    l4 = TCP(sport=BACKEND_PORT, dport=dport, flags=flags)
    data: bytes = raw(finished(frame(family, l4, family.backends[0], family.client)))
    return data


def establish(driver: Driver, family: Family, sport: int) -> None:
    """Let the client and a local backend shake hands."""
    assert driver(request(family, sport, "S")).verdict == "NEW"
    assert driver.node.egress(reply(family, sport, "SA")).verdict == "REPLY"
    assert driver(request(family, sport, "A")).verdict == "ESTABLISHED"


def goes_on(driver: Driver, family: Family, sport: int) -> bool:
    """Whether the connection works both ways."""
    there = driver(request(family, sport, "PA"))
    back = driver.node.egress(reply(family, sport, "PA"))
    assert back.packet is not None
    seen = there.frame[family.layer].dst, back.packet[family.layer].src
    return (there.verdict, back.verdict, *seen) == (
        "ESTABLISHED",
        "REPLY",
        family.backends[0],
        family.vip,
    )


def sources(family: Family, packet: bytes, count: int) -> Iterator[bytes]:
    """Yield the packet from so many sources, its checksums left as they are: nobody checks them here."""
    made = bytearray(packet)
    at = 14 + (12 if family is V4 else 20)
    for n in range(count):
        # 10.0.0.0/8 upwards; 2001:db8:1:: and so on.
        struct.pack_into(">I", made, at, 0x0B000000 + n)
        yield bytes(made)


def counted(node: Node, before: dict[str, int]) -> dict[str, int]:
    """Return the verdicts since then that there were."""
    return {name: count - before[name] for name, count in node.verdicts().items() if count != before[name]}


class Opened(view.Maps):
    """The maps of loaded programs; an agent would have pinned them."""

    def __init__(self, loaded: Loaded) -> None:
        self._open = dict(loaded.maps)

    def names(self) -> list[str]:
        """Return the names of all maps."""
        return sorted(self._open)


def rows(node: Node) -> dict[str, view.MapRow]:
    """Return what `ebpfproxy maps` shows, by map."""
    return {row.name: row for row in view.map_usage(Opened(node.loaded))}


def test_a_flood_of_openings_leaves_established_flows_alone(driver: Driver, family: Family) -> None:
    node = driver.node
    service = local(node, family)
    flows = range(40000, 40016)
    for sport in flows:
        establish(driver, family, sport)
    before = node.verdicts()
    run = node.loaded.programs[driver.program].run
    passes = XDP_PASS if driver.is_xdp else TC_ACT_UNSPEC
    for n, packet in enumerate(sources(family, request(family, 1024, "S"), SOURCES)):
        assert run(packet).retval == passes
        if n % 10_000 == 0:
            assert goes_on(driver, family, flows[n // 10_000 % len(flows)])
    verdicts = counted(node, before)
    assert verdicts["NEW"] == SOURCES
    assert set(verdicts) == {"NEW", "ESTABLISHED", "REPLY"}
    assert node.service_stats(service) == (SOURCES + len(flows), 0)
    for sport in flows:
        assert goes_on(driver, family, sport)
    assert node.map("new_flows").count() <= SIZES["new_flows"]


def test_a_full_conntrack_keeps_its_flows_and_new_ones_are_served(driver: Driver, family: Family) -> None:
    node = driver.node
    local(node, family)
    ports = range(20000, 20000 + SIZES["conntrack"])  # two entries each: twice as many as fit
    for sport in ports:
        establish(driver, family, sport)
    held = {key for key, _ in node.map("conntrack").items()}
    assert SIZES["conntrack"] * 0.9 <= len(held) <= SIZES["conntrack"]
    # None was pushed out, and those that found no room go on among the new ones.
    for sport in ports:
        assert goes_on(driver, family, sport)
    establish(driver, family, 50000)
    assert goes_on(driver, family, 50000)
    assert held <= {key for key, _ in node.map("conntrack").items()}


def test_no_flow_is_among_the_established_by_half(driver: Driver, family: Family) -> None:
    node = driver.node
    local(node, family)
    for sport in range(20000, 20000 + SIZES["conntrack"]):
        establish(driver, family, sport)
    assert node.map("conntrack").count() % 2 == 0
    assert len(node.flows()) == 2 * SIZES["conntrack"]


def test_a_full_conntrack_shows(driver: Driver, family: Family) -> None:
    node = driver.node
    local(node, family)
    assert rows(node)["conntrack"].percent == 0
    for sport in range(20000, 20000 + SIZES["conntrack"]):
        establish(driver, family, sport)
    row = rows(node)["conntrack"]
    assert (row.limit, row.entries) == (SIZES["conntrack"], node.map("conntrack").count())
    assert row.percent >= 90


def test_translated_sources_under_a_flood(driver: Driver, family: Family) -> None:
    """Ports run out, refused and counted; who has one keeps it."""
    node = driver.node
    service = remote(node, family)
    opened = driver(request(family, 40000, "S"))
    assert opened.does == "send"
    taken = opened.frame[TCP].sport
    answer = finished(
        frame(family, TCP(sport=BACKEND_PORT, dport=taken, flags="SA"), family.backends[0], family.node)
    )
    know_reply_hops(node)
    assert driver(answer).verdict == "REPLY"
    assert driver(request(family, 40000, "A")).verdict == "ESTABLISHED"
    before = node.verdicts()
    run = node.loaded.programs[driver.program].run
    for packet in sources(family, request(family, 1024, "S"), 20_000):
        run(packet)
    verdicts = counted(node, before)
    served, refused = verdicts["NEW"], verdicts.get("SNAT_FULL", 0)
    assert served + refused == 20_000
    assert node.service_stats(service) == (served + 1, refused)
    assert driver(request(family, 40000, "PA")).frame[TCP].sport == taken
    know_reply_hops(node)
    assert driver(answer).frame[family.layer].dst == family.client


def test_full_affinity_serves_new_clients(driver: Driver, family: Family) -> None:
    node = driver.node
    local(node, family, affinity_s=10800)
    before = node.verdicts()
    run = node.loaded.programs[driver.program].run
    for packet in sources(family, request(family, 1024, "S"), 5_000):
        run(packet)
    assert counted(node, before) == {"NEW": 5_000}
    row = rows(node)["affinity"]
    assert row.entries <= row.limit == SIZES["affinity"]
    assert row.percent >= 50


def test_full_fragments_take_new_packets(node: Node, family: Family) -> None:
    """The newest fragments find their first."""
    local(node, family, proto="UDP")
    whole = finished(frame(family, UDP(sport=1024, dport=PORT), family.client, family.vip, b"x" * 16))
    first = bytearray(raw(whole))
    if family is V4:
        first[20:22] = b"\x20\x00"
    else:
        first[54:54] = bytes([17, 0, 0, 1, 0, 0, 0, 1])
        first[20] = 44
        first[18:20] = (len(first) - 54).to_bytes(2, "big")
    at = 18 if family is V4 else 58
    before = node.verdicts()
    for n in range(2_000):
        struct.pack_into(">H", first, at, n)
        node.loaded.programs["tc_ingress"].run(bytes(first))
    assert counted(node, before) == {"NEW": 1, "ESTABLISHED": 1_999}
    later = bytearray(first)
    if family is V4:
        later[20:22] = b"\x00\x03"
    else:
        later[56:58] = b"\x00\x18"
    assert node.ingress(bytes(later)).verdict == "ESTABLISHED"
    assert rows(node)["fragments"].percent >= 50
