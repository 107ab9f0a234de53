"""Expiry, release of ids and the recount, on maps in memory."""

from __future__ import annotations

import pytest

from ebpfproxy.dataplane.bpf import gc
from ebpfproxy.dataplane.bpf.gc import PASS_S, Collector, Timeouts, Unused
from ebpfproxy.dataplane.bpf.layouts import (
    AFFINITY,
    AFFINITY_KEY,
    BACKEND_STATS,
    FLOW,
    FLOW_KEY,
    SERVICE_STATS,
    SOCKET_FLOW,
    SOCKET_KEY,
    pack_address,
    pack_port,
)
from ebpfproxy.libbpf import ffi, lib
from fake_maps import FakeMap

TCP, UDP, SCTP = 6, 17, 132
NO_HOP = bytes(ffi.sizeof("struct next_hop"))
NOW_S = 1_000_000
VIP, CLIENT, BACKEND = map(pack_address, ("10.96.0.1", "192.0.2.5", "10.1.0.1"))
BOTH_FINS = lib.FLOW_FIN_FORWARD | lib.FLOW_FIN_REPLY | lib.FLOW_REPLIED


class Rig:
    """The maps that the collector reads, and a clock."""

    def __init__(self) -> None:
        self.maps = {
            name: FakeMap(name, 64)
            for name in (
                *("conntrack", "new_flows", "sockets", "affinity"),
                *("backends", "backend_stats", "backend_health", "service_stats"),
            )
        }
        self.collector = Collector(self.maps, Timeouts(), lambda: NOW_S * 10**9)  # type: ignore[arg-type]
        self.now_s = 0.0

    def add_flow(
        self,
        proto: int = TCP,
        state: int = lib.FLOW_REPLIED,
        age_s: float = 0,
        backend: int = 1,
        port: int = 1000,
        counts: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        stamp = int((NOW_S - age_s) * 10**9)
        for key, value in (
            (
                FLOW_KEY.pack(CLIENT, VIP, pack_port(port), pack_port(80), proto, lib.FLOW_FORWARD),
                FLOW.pack(
                    CLIENT,
                    BACKEND,
                    pack_port(port),
                    pack_port(8080),
                    state,
                    0,
                    0,
                    1,
                    backend,
                    stamp,
                    counts[1],
                    counts[0],
                    NO_HOP,
                ),
            ),
            (
                FLOW_KEY.pack(BACKEND, CLIENT, pack_port(8080), pack_port(port), proto, lib.FLOW_REPLY),
                FLOW.pack(
                    *(VIP, CLIENT, pack_port(80), pack_port(port), state, 0, 0, 1, backend, stamp),
                    *(counts[3], counts[2], NO_HOP),
                ),
            ),
        ):
            self.maps["conntrack"].entries[key] = value

    def add_socket(self, kind: int, age_s: float = 0, backend: int = 1, cookie: int = 77) -> None:
        key = SOCKET_KEY.pack(cookie, VIP, pack_port(80), UDP, kind)
        stamp = int((NOW_S - age_s) * 10**9)
        value = SOCKET_FLOW.pack(VIP, BACKEND, pack_port(80), pack_port(8080), 1, backend, stamp)
        self.maps["sockets"].entries[key] = value

    def set_open(self, backend: int, value: int) -> None:
        self.maps["backend_stats"].mmap()[
            backend * BACKEND_STATS.size : (backend + 1) * BACKEND_STATS.size
        ] = BACKEND_STATS.pack(0, value, 0, 0, 0, 0)

    def open(self, backend: int) -> int:
        memory = self.maps["backend_stats"].memory
        return BACKEND_STATS.read(bytes(memory[backend * BACKEND_STATS.size :][: BACKEND_STATS.size])).open

    def collect(
        self,
        gone: set[int] | None = None,
        vips: set[bytes] | None = None,
        affinity_s: dict[int, int] | None = None,
    ) -> Unused:
        """Run one whole pass."""
        self.now_s += PASS_S
        for _ in range(100):
            unused = self.collector.step(gone or set(), vips or set(), lambda: affinity_s or {}, self.now_s)
            if unused is not None:
                return unused
        raise AssertionError("the pass never ended")


@pytest.mark.parametrize(
    ("proto", "state", "lives_s"),
    [
        # nf_conntrack-sysctl.rst: nf_conntrack_tcp_timeout_established, _syn_sent, _time_wait, _close;
        # kube-proxy's conntrack.tcpCloseWaitTimeout; _udp_timeout, _udp_timeout_stream; _sctp_timeout_*
        (TCP, lib.FLOW_REPLIED, 432000),
        (TCP, 0, 120),
        (TCP, lib.FLOW_REPLIED | lib.FLOW_FIN_REPLY, 3600),
        (TCP, BOTH_FINS, 120),
        (TCP, lib.FLOW_REPLIED | lib.FLOW_RESET, 10),
        (UDP, 0, 30),
        (UDP, lib.FLOW_REPLIED, 120),
        (SCTP, lib.FLOW_REPLIED, 210),
        (SCTP, BOTH_FINS, 10),
    ],
)
def test_a_flow_lives_as_long_as_the_kernel_would_keep_it(proto: int, state: int, lives_s: int) -> None:
    rig = Rig()
    rig.add_flow(proto, state, age_s=lives_s - 1, port=1)
    rig.add_flow(proto, state, age_s=lives_s + 1, port=2)
    rig.collect()
    assert len(rig.maps["conntrack"].entries) == 2  # both directions of the younger one


def test_an_id_is_free_once_nothing_refers_to_it() -> None:
    rig = Rig()
    rig.add_flow(backend=1)
    rig.add_socket(lib.SOCKET_CONNECTED, backend=2)
    assert rig.collect(gone={1, 2, 3}).backends == {3}
    rig.maps["conntrack"].entries.clear()
    assert rig.collect(gone={1, 2}).backends == {1}


def test_a_backend_that_comes_back_during_the_pass_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    current = iter([{1, 2}, {2}, {1, 2}, {1, 2}])  # 1 came back and went again
    monkeypatch.setattr("ebpfproxy.dataplane.bpf.gc.BUDGET_S", 0.0)  # one list of entries a step
    rig.add_flow(backend=9)
    rig.add_socket(lib.SOCKET_CONNECTED, backend=9)
    unused = None
    while unused is None:
        unused = rig.collector.step(next(current), set(), dict, 0.0)
    assert unused.backends == {2}


def test_udp_entries_to_a_gone_backend_go_at_once() -> None:
    rig = Rig()
    rig.add_flow(UDP, backend=1, port=1)
    rig.add_flow(TCP, backend=1, port=2)
    rig.add_flow(UDP, backend=2, port=3)
    rig.collector.step(set(), set(), dict, 0.0)
    rig.collector.hurry()
    assert rig.collector.step({1}, set(), dict, 0.001) is not None
    left = [
        (FLOW_KEY.read(key).proto, FLOW.read(value).backend) for key, value in rig.maps["conntrack"].items()
    ]
    assert sorted(left) == [(TCP, 1), (TCP, 1), (UDP, 2), (UDP, 2)]


def test_a_flow_that_took_the_place_of_an_old_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client uses its port again between the collector's look and its delete."""
    rig = Rig()
    conntrack = rig.maps["conntrack"]
    rig.add_flow(TCP, BOTH_FINS, age_s=1000)
    old = conntrack.items()
    rig.add_flow(TCP, 0)
    new = dict(conntrack.entries)
    monkeypatch.setattr(conntrack, "chunks", lambda _size: iter([old]))
    rig.collect()
    assert conntrack.entries == new


def test_a_backend_that_comes_back_during_a_pass_keeps_its_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.add_flow(UDP, backend=1)
    monkeypatch.setattr(gc, "CHUNK", 1)
    monkeypatch.setattr(gc, "BUDGET_S", 0.0)  # one chunk a step
    assert rig.collector.step({1}, set(), dict, 0.0) is None
    assert rig.collector.step(set(), set(), dict, 0.1) is None
    assert len(rig.maps["conntrack"].entries) == 1, (
        "what was read while it was gone is deleted, the rest stays"
    )


def test_an_address_is_free_once_no_flow_goes_to_it() -> None:
    rig = Rig()
    other = pack_address("10.96.0.2")
    rig.add_flow()
    assert rig.collect(vips={VIP, other}).vips == {other}


def test_idle_unconnected_sockets_expire_and_connected_ones_do_not() -> None:
    rig = Rig()
    rig.add_socket(lib.SOCKET_TO_VIP, age_s=121, cookie=1)
    rig.add_socket(lib.SOCKET_FROM_BACKEND, age_s=121, cookie=2)
    rig.add_socket(lib.SOCKET_TO_VIP, age_s=119, cookie=3)
    rig.add_socket(lib.SOCKET_CONNECTED, age_s=999_999, cookie=4)
    rig.collect()
    assert {SOCKET_KEY.read(key).cookie for key in rig.maps["sockets"].entries} == {3, 4}


def test_connected_udp_sockets_of_a_gone_backend_are_named() -> None:
    rig = Rig()
    rig.add_socket(lib.SOCKET_CONNECTED, backend=1, cookie=5)
    rig.add_socket(lib.SOCKET_CONNECTED, backend=2, cookie=6)
    rig.add_socket(lib.SOCKET_TO_VIP, backend=1, cookie=7)
    key = SOCKET_KEY.pack(8, VIP, pack_port(80), TCP, lib.SOCKET_CONNECTED)
    value = SOCKET_FLOW.pack(VIP, BACKEND, pack_port(80), pack_port(8080), 1, 1, NOW_S * 10**9)
    rig.maps["sockets"].entries[key] = value  # a TCP client notices by itself
    assert rig.collect(gone={1}).stranded == {5: (BACKEND, pack_port(8080))}
    assert rig.collect().stranded == {}


def test_affinity_expires_after_the_services_own_time() -> None:
    rig = Rig()
    for service, age_s, backend in ((1, 50, 1), (1, 70, 1), (2, 70, 1), (3, 1, 1), (2, 1, 9)):
        key = AFFINITY_KEY.pack(pack_address(f"192.0.2.{age_s}"), service, lib.CLIENT_ADDR)
        rig.maps["affinity"].entries[key] = AFFINITY.pack(backend, int((NOW_S - age_s) * 10**9))
    rig.collect(gone={9}, affinity_s={1: 60, 2: 3600})
    left = {AFFINITY_KEY.read(key)[:2] for key in rig.maps["affinity"].entries}
    assert left == {(pack_address("192.0.2.50"), 1), (pack_address("192.0.2.70"), 2)}


def test_a_counter_that_two_passes_find_wrong_is_mended() -> None:
    rig = Rig()
    rig.add_flow(backend=1, port=1)
    rig.add_flow(backend=1, port=2, state=BOTH_FINS)  # closed: not open
    rig.add_socket(lib.SOCKET_CONNECTED, backend=1, cookie=1)
    rig.add_socket(lib.SOCKET_TO_VIP, backend=1, cookie=2)
    rig.add_socket(lib.SOCKET_FROM_BACKEND, backend=1, cookie=3)  # the same socket's other entry
    rig.set_open(1, 7)
    rig.set_open(2, 4)
    rig.collect()
    assert (rig.open(1), rig.open(2)) == (7, 4)
    rig.set_open(2, 2)  # it moves by itself: only what both passes agree on is wrong
    rig.collect()
    assert (rig.open(1), rig.open(2)) == (3, 0)
    rig.collect()
    assert (rig.open(1), rig.open(2)) == (3, 0)


def test_what_an_expired_flow_had_counted_is_kept() -> None:
    rig = Rig()
    rig.add_flow(UDP, 0, age_s=31, backend=3, port=1, counts=(2, 100, 1, 900))
    rig.add_flow(UDP, 0, age_s=31, backend=3, port=2, counts=(5, 300, 0, 0))
    rig.add_flow(UDP, 0, age_s=29, backend=3, port=3, counts=(7, 700, 7, 700))  # lives: counts for itself
    rig.collect()
    rig.collect()
    memory = bytes(rig.maps["backend_stats"].memory)
    of_backend = BACKEND_STATS.read(memory[3 * BACKEND_STATS.size : 4 * BACKEND_STATS.size])
    memory = bytes(rig.maps["service_stats"].memory)
    of_service = SERVICE_STATS.read(memory[SERVICE_STATS.size : 2 * SERVICE_STATS.size])
    for found in (of_backend, of_service):
        assert (found.packets, found.octets, found.reply_packets, found.reply_octets) == (7, 400, 1, 900)
