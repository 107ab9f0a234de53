"""The BPF dataplane on the real kernel: life, restart, attachment, the read side, clean-up."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ebpfproxy import netlink
from ebpfproxy.dataplane.bpf import features, view
from ebpfproxy.dataplane.bpf.attach import FILTER_PREFIX, NO_NETNS, netns_cookie, pin_name
from ebpfproxy.dataplane.bpf.cleanup import cleanup
from ebpfproxy.dataplane.bpf.dataplane import BpfDataplane, BpfOptions
from ebpfproxy.dataplane.bpf.explain import explain
from ebpfproxy.dataplane.bpf.layouts import U32
from ebpfproxy.errors import DataplaneError, KernelError, MapFullError
from ebpfproxy.libbpf import Link, Map, Object
from ebpfproxy.libbpf.probes import has_tcx
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Policy,
    Protocol,
    Readiness,
    Scheduler,
    Service,
)
from makers import cluster_ip, load_balancer, node_port, service, state
from rig.kernel import is_since
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rig.kernel import Netns

pytestmark = pytest.mark.root

needs_tcx = pytest.mark.skipif(not has_tcx(), reason="tcx links came with Linux 6.6")
both_ways = pytest.mark.parametrize(
    "use_tcx", [pytest.param(True, marks=needs_tcx, id="tcx"), pytest.param(False, id="clsact")]
)

CLONE_NEWNET = 0x40000000
SMALL = {"conntrack": 1024, "sockets": 1024, "affinity": 1024, "slots": 65536, "backends": 4096}
SMALL |= {"backend_stats": 4096}
A, B = Backend("10.1.0.1", 8080, is_local=True), Backend("10.1.0.2", 8080)


@pytest.fixture
def inside(netns: Netns) -> Iterator[Netns]:
    """This thread is in a network namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        assert libc.setns(fd, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        os.close(fd)

    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    enter(str(netns.path))
    try:
        yield netns
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


@pytest.fixture
def options(bpffs: Path, cgroup: Path, inside: Netns) -> BpfOptions:
    return BpfOptions(bpffs=bpffs, cgroup=cgroup, sizes=SMALL)


@contextmanager
def running(options: BpfOptions) -> Iterator[BpfDataplane]:
    dataplane = BpfDataplane(options)
    try:
        dataplane.start()
        yield dataplane
    finally:
        dataplane.close()


def add_device(netns: Netns, name: str) -> None:
    netns.shell(f"ip link add {name} type veth peer name peer-{name}")


def links(options: BpfOptions) -> dict[str, tuple[int, int]]:
    """Return pin name -> (link id, program id)."""
    found = {}
    for path in (options.bpffs / "ebpfproxy" / "links").iterdir():
        with Link.open(path) as link:
            info = link.info()
            found[path.name] = (info.id, info.program_id)
    return found


def on_devices(options: BpfOptions) -> dict[str, int]:
    """Return program@device, as a pin is named -> the device's index, of links and of filters."""
    found = {}
    for path in (options.bpffs / "ebpfproxy" / "links").glob("*@*"):
        with Link.open(path) as link:
            found[path.name] = link.info().ifindex
    names = {device.number: device.name for device in netlink.devices()}
    for each in netlink.list_filters(FILTER_PREFIX):
        program = each.name.removeprefix(FILTER_PREFIX)
        found[pin_name(program, names[each.device])] = each.device
    return found


def contents(options: BpfOptions) -> dict[str, object]:
    """Return all that the agent programmed."""
    found: dict[str, object] = {}
    with view.open_maps(options.bpffs) as maps:
        for name in ("services", "vips", "service_names"):
            found[name] = sorted(maps[name].items())
        for name in ("backends", "slots"):
            found[name] = bytes(maps[name].mmap())
    return found


WEB = service("web", [A, B], [cluster_ip("10.96.0.1"), node_port(30080)])


class TestLife:
    @both_ways
    def test_other_programs_are_swapped_inside_the_links_and_nothing_else_changes(
        self, options: BpfOptions, inside: Netns, use_tcx: bool
    ) -> None:
        add_device(inside, "v0")
        options = replace(options, use_tcx=use_tcx)
        with running(options) as dataplane:
            assert (dataplane.problems == []) == is_since(5, 18)
            dataplane.sync(state(WEB))
            before, maps_before = links(options), contents(options)
        with running(replace(options, snat_ports=(2000, 2999))) as dataplane:
            assert contents(options) == maps_before
            dataplane.sync(state(WEB))
            after = links(options)
        assert contents(options) == maps_before
        assert {name: link for name, (link, _) in after.items()} == {
            n: link for n, (link, _) in before.items()
        }
        assert all(after[name][1] != program for name, (_, program) in before.items())
        assert {"sock_connect4", "sock_release"} <= after.keys()
        assert ("tc_ingress@v0" in after) == use_tcx
        assert {"tc_ingress@v0", "tc_egress@v0"} <= on_devices(options).keys()

    @both_ways
    def test_a_restart_takes_the_programs_that_are_there(
        self, options: BpfOptions, inside: Netns, use_tcx: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_device(inside, "v0")
        options = replace(options, use_tcx=use_tcx)
        with running(options) as dataplane:
            dataplane.sync(state(WEB))
            before, maps_before, devices = links(options), contents(options), on_devices(options)
        with monkeypatch.context() as patch:
            patch.setattr(Object, "load", lambda *_, **__: pytest.fail("the kernel checks programs again"))
            with running(options) as dataplane:
                dataplane.sync(state(WEB))
        assert (links(options), contents(options), on_devices(options)) == (before, maps_before, devices)

    def test_programs_that_were_kept_in_part_are_loaded_anew(self, options: BpfOptions) -> None:
        with running(options):
            before = links(options)
        next((options.bpffs / "ebpfproxy/programs").glob("*/tc_egress")).unlink()
        with running(options):
            after = links(options)
        assert before.keys() == after.keys()
        assert all(after[name][1] != program for name, (_, program) in before.items())

    def test_programs_of_maps_of_another_size_are_others(self, options: BpfOptions) -> None:
        programs = options.bpffs / "ebpfproxy/programs"
        with running(options):
            before = links(options)
            (kept,) = programs.iterdir()
        with running(replace(options, sizes={**SMALL, "conntrack": 2 * SMALL["conntrack"]})):
            after = links(options)
            (others,) = programs.iterdir()
        assert kept != others
        assert all(after[name][1] != program for name, (_, program) in before.items())

    def test_another_layout_of_what_is_only_scratch_is_no_obstacle(self, options: BpfOptions) -> None:
        with running(options) as dataplane:
            dataplane.sync(state(WEB))
            maps_before = contents(options)
        pin = options.bpffs / "ebpfproxy/maps/scratch"
        with Map.open(pin) as old:
            other = old.definition._replace(value_size=old.definition.value_size + 8)
        pin.unlink()
        with Map.create(other) as made:
            made.pin(pin)
        with running(options):
            assert contents(options) == maps_before

    def test_another_cgroup_takes_the_links_along(self, options: BpfOptions, cgroup: Path) -> None:
        child = cgroup / "child"
        child.mkdir()
        with running(options):
            before = links(options)
        with running(replace(options, cgroup=child)):
            after = links(options)
        assert before.keys() == after.keys()
        with Link.open(options.bpffs / "ebpfproxy/links/sock_connect4") as link:
            assert link.info().cgroup_id == child.stat().st_ino
        (options.bpffs / "ebpfproxy/links").rename(options.bpffs / "ebpfproxy/gone")
        for path in (options.bpffs / "ebpfproxy/gone").iterdir():
            path.unlink()

    def test_a_cgroup_that_is_not_there_is_named(self, options: BpfOptions) -> None:
        with (
            pytest.raises(KernelError, match=r"nowhere: No such file or directory; name a cgroup2 directory"),
            running(replace(options, cgroup=options.cgroup / "nowhere")),
        ):
            pass

    def test_after_an_error_the_kernel_is_read_again(
        self, options: BpfOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running(options) as dataplane:
            dataplane.sync(state(WEB))
            wanted = contents(options)

            def fail(self: Map, items: object, flags: int = 0) -> None:
                raise KernelError("update map services: Cannot allocate memory", 12)

            with monkeypatch.context() as patch:
                patch.setattr(Map, "update_batch", fail)
                with pytest.raises(KernelError):
                    dataplane.sync(state(service("web", [A], WEB.frontends)))
            # Someone else's hand in the map meanwhile is mended as well.
            with view.open_maps(options.bpffs) as maps:
                maps["services"].delete_batch(maps.keys("services"))
            dataplane.sync(state(WEB))
            assert contents(options)["services"] == wanted["services"]
            with view.open_maps(options.bpffs) as maps:
                assert [row.state for row in view.backends(maps)] == ["ready", "ready"]

    def test_a_full_map_is_named_and_the_rest_is_programmed(self, options: BpfOptions) -> None:
        small = replace(options, sizes={**SMALL, "services": 5})
        more = [service(f"s{n}", [A], [cluster_ip(f"10.96.1.{n}")]) for n in (1, 2, 3)]
        with running(small) as dataplane:
            with pytest.raises(
                MapFullError, match=r"map services is full: all 5 .*mapSizes\.services.*default/s3"
            ):
                dataplane.sync(state(*more))
            with view.open_maps(options.bpffs) as maps:
                assert [row.name for row in view.services(maps)] == ["default/s1", "default/s2"]
        # The way out that the message names works, and loses nothing.
        with running(options) as dataplane:
            dataplane.sync(state(*more))
            with view.open_maps(options.bpffs) as maps:
                assert len(view.services(maps)) == 3

    def test_ids_of_gone_backends_are_freed(
        self, options: BpfOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ebpfproxy.dataplane.bpf.gc.PASS_S", 0.0)
        with running(options) as dataplane:
            dataplane.sync(state(WEB))
            dataplane.sync(state())
            with view.open_maps(options.bpffs) as maps:
                assert [row.state for row in view.backends(maps)] == ["gone", "gone"]
                dataplane.tick()
                dataplane.tick()
                assert view.backends(maps) == []
                assert maps["service_names"].items() == maps["vips"].items() == []


class TestDevices:
    @both_ways
    def test_devices_come_go_and_come_back_with_another_number(
        self, options: BpfOptions, inside: Netns, use_tcx: bool
    ) -> None:
        options = replace(options, use_tcx=use_tcx)
        for name in ("v0", "v1", "v0.100"):
            add_device(inside, name)
        inside.shell("ip link add br0 type bridge; ip link set v1 master br0")
        with running(options) as dataplane:
            assert dataplane.devices == ["br0", "peer-v0", "peer-v0.100", "peer-v1", "v0", "v0.100"]
            assert {"tc_ingress@v0%2E100", "tc_egress@br0"} <= on_devices(options).keys()
            add_device(inside, "v2")
            dataplane.tick()
            assert "v2" in dataplane.devices
            first = on_devices(options)["tc_ingress@v2"]
            inside.shell("ip link delete v2")
            add_device(inside, "v3")
            add_device(inside, "v2")
            dataplane.tick()
            assert on_devices(options)["tc_ingress@v2"] != first
            inside.shell("ip link delete v2")
            dataplane.tick()
            assert "v2" not in dataplane.devices
            assert not any("v2" in name for name in on_devices(options))

    @both_ways
    def test_a_device_is_told_of_once(
        self,
        options: BpfOptions,
        inside: Netns,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        use_tcx: bool,
    ) -> None:
        """All devices are attached to anew now and then: that is no news."""
        monkeypatch.setattr("ebpfproxy.dataplane.bpf.dataplane.RECHECK_S", 0.0)
        add_device(inside, "v0")
        options = replace(options, devices=("v0",), use_tcx=use_tcx)
        with caplog.at_level("INFO"), running(options) as dataplane:
            dataplane.tick()
            dataplane.tick()
        wanted = f"attached to device v0 by {'tcx' if use_tcx else 'clsact'}"
        assert [each for each in caplog.messages if "attached" in each] == [wanted]

    def test_only_named_devices(self, options: BpfOptions, inside: Netns) -> None:
        for name in ("v0", "v1", "x0"):
            add_device(inside, name)
        with running(replace(options, devices=("v*",))) as dataplane:
            assert dataplane.devices == ["v0", "v1"]
        with running(replace(options, devices=("x0",))) as dataplane:
            assert dataplane.devices == ["x0"]
            assert not any("@v" in name for name in on_devices(options))

    def test_clsact_filters_where_there_is_no_tcx(self, options: BpfOptions, inside: Netns) -> None:
        add_device(inside, "v0")
        clsact = replace(options, use_tcx=False)

        def show(direction: str) -> str:
            return inside.shell(f"tc filter show dev v0 {direction}")

        with running(clsact) as dataplane:
            assert dataplane.devices == ["peer-v0", "v0"]
            first = show("ingress")
            assert "ebpfproxy_tc_ingress direct-action" in first
            assert "ebpfproxy_tc_egress direct-action" in show("egress")
            assert not any("@" in name for name in links(options))
        with running(replace(clsact, snat_ports=(2000, 2999))):
            again = show("ingress")
            assert again.count("ebpfproxy_tc_ingress") == 1
            assert again != first  # another program in the same place
        inside.shell("tc filter add dev v0 ingress prio 7 bpf direct-action bytecode '1,6 0 0 0'")
        removed = cleanup(options.bpffs)
        assert "filter ebpfproxy_tc_ingress on device v0" in removed
        assert show("egress") == ""
        assert "bytecode" in show("ingress")
        assert "ebpfproxy" not in show("ingress")

    def test_the_qdisc_goes_with_its_last_filter(self, options: BpfOptions, inside: Netns) -> None:
        add_device(inside, "v0")
        with running(replace(options, use_tcx=False)):
            assert "clsact" in inside.shell("tc qdisc show dev v0")
        cleanup(options.bpffs)
        assert "clsact" not in inside.shell("tc qdisc show dev v0")

    def test_a_qdisc_of_others_stays_though_empty(self, options: BpfOptions, inside: Netns) -> None:
        add_device(inside, "v0")
        inside.shell("tc qdisc add dev v0 clsact")
        with running(replace(options, use_tcx=False)):
            pass
        with running(replace(options, use_tcx=False)):  # a restart does not mistake it for ours
            pass
        cleanup(options.bpffs)
        assert "ebpfproxy" not in inside.shell("tc filter show dev v0 ingress")
        assert "clsact" in inside.shell("tc qdisc show dev v0")

    @needs_tcx
    def test_links_follow_filters(self, options: BpfOptions, inside: Netns) -> None:
        """The kernel was upgraded to one with tcx: no packet may be translated twice."""
        add_device(inside, "v0")
        with running(replace(options, use_tcx=False)):
            pass
        with running(options):
            assert "tc_ingress@v0" in links(options)
            assert inside.shell("tc filter show dev v0 ingress") == ""


class TestHops:
    """When the programs' next hops are void."""

    def epoch(self, dataplane: BpfDataplane) -> int:
        return int.from_bytes(dataplane._running().maps["epochs"].mmap()[:4], sys.byteorder)

    @pytest.mark.parametrize(
        ("change", "counts"),
        [
            ("ip route add 198.51.100.0/24 via 192.0.2.2", True),
            ("ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:03 dev v0 nud stale", True),
            ("ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev v0 nud reachable", False),
        ],
        ids=["route", "another MAC address", "the same one"],
    )
    def test_what_voids_them(self, options: BpfOptions, inside: Netns, change: str, counts: bool) -> None:
        add_device(inside, "v0")
        inside.shell("ip link set v0 up; ip link set peer-v0 up; ip addr add 192.0.2.1/24 dev v0")
        with running(options) as dataplane:
            inside.shell("ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev v0 nud stale")
            last = -1
            while (now := self.epoch(dataplane)) != last:  # the device may still be coming up
                last = now
                time.sleep(0.5)
            inside.shell(change)
            if counts:
                eventually(lambda: self.epoch(dataplane) > last, "next hops to be void")
            else:
                time.sleep(0.5)
                assert self.epoch(dataplane) == last


class TestCleanup:
    @both_ways
    def test_removes_all_of_ours_twice_without_error_and_nothing_of_others(
        self, options: BpfOptions, bpffs: Path, inside: Netns, use_tcx: bool
    ) -> None:
        options = replace(options, use_tcx=use_tcx)
        add_device(inside, "v0")
        (bpffs / "theirs").mkdir()
        before = {path.name for path in bpffs.iterdir()}
        with running(options) as dataplane:
            dataplane.sync(state(WEB))
        removed = cleanup(bpffs)
        assert f"pin {bpffs}/ebpfproxy/maps/services" in removed
        on_device = f"pin {bpffs}/ebpfproxy/links/tc_ingress@v0", "filter ebpfproxy_tc_ingress on device v0"
        assert [each in removed for each in on_device] == [use_tcx, not use_tcx]
        assert {path.name for path in bpffs.iterdir()} == before
        assert cleanup(bpffs) == []
        with pytest.raises(DataplaneError, match="nothing is programmed here"):
            view.open_maps(bpffs)


def connect_in(cgroup: Path, address: str, port: int) -> str:
    """Connect from a process in the cgroup; return what getpeername says, or the error's name."""
    program = (
        "import os, socket, sys, errno\n"
        "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "try:\n"
        "    s = socket.create_connection((sys.argv[2], int(sys.argv[3])), timeout=5)\n"
        "    print(*s.getpeername()[:2], flush=True)\n"
        "    sys.stdin.read()\n"
        "except OSError as error:\n"
        "    print(errno.errorcode.get(error.errno, error))\n"
    )
    import subprocess

    child = subprocess.Popen(
        [sys.executable, "-c", program, str(cgroup), address, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    answer = child.stdout.readline().strip()
    connect_in.children.append(child)  # type: ignore[attr-defined]
    return answer


connect_in.children = []  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _children_end() -> Iterator[None]:
    yield
    for child in connect_in.children:  # type: ignore[attr-defined]
        child.communicate()
    connect_in.children.clear()  # type: ignore[attr-defined]


class TestView:
    def test_a_socket_is_sent_to_a_backend_and_seen_in_every_view(
        self, options: BpfOptions, cgroup: Path
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, running(options) as dataplane:
            port = server.getsockname()[1]
            backend = Backend("127.0.0.1", port)
            web = service("web", [backend], [cluster_ip("10.96.0.1")], affinity_s=600)
            dataplane.sync(state(web, service("empty", [], [cluster_ip("10.96.0.2")])))
            assert connect_in(cgroup, "10.96.0.1", 80) == "10.96.0.1 80"
            refused = "ECONNREFUSED" if is_since(5, 18) else "EPERM"
            assert connect_in(cgroup, "10.96.0.2", 80) == refused
            assert connect_in(cgroup, "10.96.0.1", 81) == refused
            with view.open_maps(options.bpffs) as maps:
                (connection,) = view.connections(maps)
                assert (connection.kind, connection.vip, connection.backend, connection.service) == (
                    "socket",
                    "10.96.0.1:80",
                    f"127.0.0.1:{port}",
                    "default/web",
                )
                rows = {row.name: row for row in view.services(maps)}
                assert rows["default/web"].connections == rows["default/web"].open == 1
                assert rows["default/empty"].refused == 1
                (row,) = view.affinity(maps)
                assert row.backend == f"127.0.0.1:{port}"
                assert row.client.startswith("netns ")
                assert 590 < row.expires_s <= 600
                counts = {row.verdict: row.count for row in view.verdicts(maps)}
                assert (counts["new"], counts["reject-empty"], counts["reject-unused"]) == (1, 1, 1)

    def test_services_backends_and_usage(self, options: BpfOptions) -> None:
        ending = Backend("10.1.0.3", 8080, readiness=Readiness.TERMINATING)
        with running(options) as dataplane:
            dataplane.sync(state(service("web", [A, B, ending], WEB.frontends, scheduler=Scheduler.RR)))
            with view.open_maps(options.bpffs) as maps:
                (row,) = view.services(maps)
                assert (row.name, row.protocol, row.family, row.scheduler) == ("default/web", "TCP", 4, "rr")
                assert row.kinds == ("ClusterIP", "NodePort")
                assert row.frontends == ("10.96.0.1:80", "*:30080")
                assert (row.backends_usable, row.backends_total) == (2, 3)
                assert [(b.address, b.state, b.is_usable, b.is_local) for b in view.backends(maps)] == [
                    ("10.1.0.1", "ready", True, True),
                    ("10.1.0.2", "ready", True, False),
                    ("10.1.0.3", "terminating", False, False),
                ]
                usage = {row.name: row for row in view.map_usage(maps)}
                assert (usage["services"].entries, usage["services"].limit) == (4, 131072)
                assert (usage["backends"].entries, usage["backends"].limit) == (3, 4096)
                assert usage["slots"].entries == 2
                assert usage["backends"].bytes >= 4096 * 32

    def test_reading_is_fast(self, options: BpfOptions) -> None:
        """Generously: the aim is a tenth of this."""
        with running(options) as dataplane:
            dataplane.sync(state(WEB))
        started = time.process_time()
        with view.open_maps(options.bpffs) as maps:
            view.services(maps)
            view.backends(maps)
            view.connections(maps)
            view.map_usage(maps)
        assert time.process_time() - started < 1

    @pytest.mark.parametrize(
        ("vip", "port", "source", "answer"),
        [
            ("10.96.0.1", 80, None, "goes to one of 1 backends of default/web"),
            ("10.96.0.1", 81, None, "no Service uses 10.96.0.1:81/TCP: it is rejected"),
            ("192.0.2.9", 80, "203.0.113.7", "goes to one of 1 backends of default/web"),
            (
                "192.0.2.9",
                80,
                "198.51.100.1",
                "dropped: 198.51.100.1 is in none of the loadBalancerSourceRanges",
            ),
            ("192.0.2.1", 30080, "198.51.100.1", "goes to one of 1 backends of default/web"),
            ("192.0.2.1", 30081, None, "192.0.2.1 is this node's own address"),
            ("10.96.0.2", 80, None, "rejected: default/empty has no usable backend"),
            ("192.0.2.8", 80, "198.51.100.1", "dropped: default/far has no usable backend on this node"),
            ("8.8.8.8", 53, None, "8.8.8.8 is no address of any Service here"),
            ("127.0.0.1", 30080, "127.0.0.1", "goes to one of 1 backends of default/web"),
            ("127.0.0.9", 30080, "127.0.0.1", "goes to one of 1 backends of default/web"),
        ],
    )
    def test_explain_answers(
        self, explained: view.Maps, vip: str, port: int, source: str | None, answer: str
    ) -> None:
        assert answer in explain(explained, vip, port, Protocol.TCP, source).answer

    def test_explain_says_why_not(self, explained: view.Maps) -> None:
        (match,) = explain(explained, "192.0.2.9", 80, Protocol.TCP, "203.0.113.7").matches
        assert (match.scope, match.policy, match.service) == ("external", "Local", "default/web")
        assert [candidate.backend for candidate in match.candidates] == ["10.1.0.1:8080"]
        (inner,) = explain(explained, "10.96.0.1", 80, Protocol.TCP, "10.244.0.9").matches
        assert inner.scope == "internal"
        assert {each.backend: each.reason for each in match.excluded} == {
            "10.1.0.2:8080": "on another node, and the traffic policy is Local",
            "10.1.0.3:8080": "not ready",
            "10.1.0.4:8080": "terminating while others are ready",
            "10.1.0.5:8080": "weight 0: drained",
        }

    @pytest.fixture
    def explained(self, options: BpfOptions) -> Iterator[view.Maps]:
        backends = [
            A,
            Backend("10.1.0.2", 8080),
            Backend("10.1.0.3", 8080, readiness=Readiness.NOT_READY, is_local=True),
            Backend("10.1.0.4", 8080, readiness=Readiness.TERMINATING, is_local=True),
            Backend("10.1.0.5", 8080, weight=0, is_local=True),
        ]
        frontends = [cluster_ip("10.96.0.1"), node_port(30080), load_balancer("192.0.2.9")]
        web = service(
            "web", backends, frontends, external_policy=Policy.LOCAL, source_ranges=("203.0.113.0/24",)
        )
        web = replace_pool(web)
        far = service("far", [B], [load_balancer("192.0.2.8")], external_policy=Policy.LOCAL)
        empty = service("empty", [], [cluster_ip("10.96.0.2")])
        wanted = state(web, far, empty, serving="192.0.2.1 127.0.0.1")
        wanted = DesiredState(wanted.services, wanted.addresses, frozenset({"10.244.0.0/16"}))
        with running(options) as dataplane:
            dataplane.sync(wanted)
        with view.open_maps(options.bpffs) as maps:
            yield maps


def replace_pool(web: Service) -> Service:
    """Let policy Cluster use what policy Local uses, so that both scopes have one answer."""
    import msgspec

    return msgspec.structs.replace(web, cluster=web.local)


def test_features_are_asked_without_a_trace(options: BpfOptions, inside: Netns) -> None:
    before = inside.shell("bpftool prog show | grep -c probe || true")
    found = {feature.name: feature for feature in features.probe()}
    assert features.usable() is None
    assert found["cgroup hook of sock_connect4"].ok
    assert inside.shell("bpftool prog show | grep -c probe || true") == before


def test_service_ids_are_unique(options: BpfOptions) -> None:
    with running(options) as dataplane:
        dataplane.sync(state(*(service(f"s{n}", [A], [cluster_ip(f"10.96.2.{n}")]) for n in range(1, 30))))
        with view.open_maps(options.bpffs) as maps:
            assert {U32.unpack(key)[0] for key in maps.keys("service_names")} == set(range(1, 30))


def test_the_netns_cookie_is_of_the_thread_s_namespace(inside: Netns) -> None:
    here = netns_cookie()
    there: list[int] = []
    thread = threading.Thread(target=lambda: there.append(netns_cookie()))
    thread.start()
    thread.join()
    assert here == there[0]
    assert is_since(5, 14) == (here != NO_NETNS)
