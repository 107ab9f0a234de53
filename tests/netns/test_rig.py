"""The rig itself: what it makes works, and nothing stays."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import pytest

from rig import kernel, leaks
from rig.cluster import CLIENT_IPS, Cluster
from rig.probe import Load, Probe
from rig.process import Place
from rig.servers import dns_server, iperf3_server, name_servers
from rig.topology import GATEWAYS, OUTSIDE_IPS, Topology
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.netns]


def test_process_runs_in_its_namespace_and_cgroup(netns: kernel.Netns, cgroup: Path) -> None:
    place = netns.place(cgroup)
    links, member = place.run(
        "sh", "-c", "ip -brief link | wc -l; grep ^0:: /proc/self/cgroup"
    ).stdout.split()
    assert int(links) == 1, "only loopback"
    assert member == f"0::/{cgroup.name}"


def test_failed_command_shows_its_output() -> None:
    with pytest.raises(AssertionError, match="exit 3\nwhy"):
        Place().run("sh", "-c", "echo why; exit 3")


@pytest.mark.parametrize("make", [kernel.new_bpffs, kernel.new_cgroup, kernel.new_netns])
def test_things_are_removed_when_a_test_fails(
    make: Callable[[], AbstractContextManager[object]], nothing_left: None
) -> None:
    before = leaks.find()

    def fail() -> None:
        with make():
            assert len(leaks.find()) > len(before), "a thing that exists is found"
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert leaks.find() == before


def test_cgroup_is_removed_with_its_processes(nothing_left: None) -> None:
    with kernel.new_cgroup() as path:
        (path / "below").mkdir()
        sleeper = Place(cgroup=path / "below").start("sleep", "1000")
        eventually((path / "below" / "cgroup.procs").read_text, "the process to join")
    with sleeper:
        assert sleeper.wait() == -signal.SIGKILL
    assert not path.exists()


def test_bpffs_is_removed_with_its_pins(nothing_left: None) -> None:
    with kernel.new_bpffs() as path:
        (path / "directory" / "below").mkdir(parents=True)
    assert not path.exists()


# --- the topology, with plain connections and no agent


@pytest.fixture(scope="module")
def plain(nothing_left: None) -> Iterator[Topology]:
    with (
        Topology(pod_count=2) as made,
        name_servers(((pod.name, pod.place) for pod in made.pods), 8080),
    ):
        yield made


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("origin", ["node", "pod", "outside"])
def test_every_place_reaches_the_pods(plain: Topology, origin: str, family: int) -> None:
    first, second = plain.pods
    place = {"node": plain.on_node, "pod": plain.in_cgroup(first), "outside": plain.from_outside}[origin]
    own = {"node": GATEWAYS, "pod": first.ips, "outside": OUTSIDE_IPS}[origin][family]
    with Probe(place) as probe:
        assert probe.answers(second.ips[family], 8080) == [f"pod2 {own}"]
        assert probe.udp(second.ips[family], 8080, 3) == {"pod2": 3}
        assert probe.udp(second.ips[family], 8080, connect=True) == {"pod2": 1}


def test_curl_reaches_a_pod(plain: Topology) -> None:
    url = f"http://[{plain.pods[0].v6}]:8080/"
    assert plain.from_outside.run("curl", "-sS", url).stdout.startswith("pod1 ")


def test_errors_of_remote_sockets_are_raised_here(plain: Topology) -> None:
    with Probe(plain.on_node) as probe, probe.socket(socket.SOCK_STREAM) as remote:
        with pytest.raises(ConnectionRefusedError):
            remote.connect(plain.pods[0].v4, 9)
        with pytest.raises(OSError, match="not connected"):
            remote.getpeername()


@pytest.mark.parametrize("mode", ["new", "keep", "udp", "udp-keep"])
def test_load_counts_answers_and_failures(plain: Topology, mode: str) -> None:
    pod = plain.pods[0]
    with Probe(plain.on_node) as probe:
        with probe.load(pod.v4, 8080, mode=mode) as load:
            assert set(load.more(50)) == {"pod1"}
        if mode.startswith("udp"):  # an ICMP error does not reach an unconnected socket
            return
        load = Load(probe, probe.call("load", mode, pod.v4, 9, 1, 0.01))
        eventually(lambda: load.counts()[1], "a failure")
        answers, failures = load.stop()
        assert not answers
        assert "ConnectionRefusedError" in failures[0]


def test_dns_server_answers(plain: Topology) -> None:
    pod = plain.pods[0]
    with dns_server(pod.place, {"web.test": ("192.0.2.80", "2001:db8::80")}):
        for family, kind in enumerate(("A", "AAAA")):
            answer = plain.on_node.run("dig", f"@{pod.ips[family]}", "web.test", kind, "+short").stdout
            assert answer.strip() == ("192.0.2.80", "2001:db8::80")[family]


def test_iperf3_server_answers(plain: Topology) -> None:
    pod = plain.pods[0]
    with iperf3_server(pod.place):
        plain.on_node.run("iperf3", "-c", pod.v6, "-n", "1M")


def test_topology_is_removed_when_its_making_fails(
    nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Topology) -> None:
        raise LookupError

    before = leaks.find()
    monkeypatch.setattr(Topology, "connect_outside", fail)
    with pytest.raises(LookupError), Topology():
        pass
    assert leaks.find() == before


# --- the cluster, with plain connections and no agent


@pytest.fixture(scope="module")
def cluster(nothing_left: None) -> Iterator[Cluster]:
    with (
        Cluster(node_count=2, pods_per_node=1, mtus={"node-2": 1400}) as made,
        name_servers(((name, pod.place) for name, pod in made.pods.items()), 8080),
    ):
        yield made


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("origin", ["client", "node-1", "pod11"])
def test_every_place_reaches_the_pods_of_another_node(cluster: Cluster, origin: str, family: int) -> None:
    pod = cluster.pods["pod21"]
    own = {"client": CLIENT_IPS, "node-1": cluster.nodes[0].ips, "pod11": cluster.pods["pod11"].ips}
    with Probe(cluster.place(origin)) as probe:
        assert probe.answers(pod.ips[family], 8080) == [f"pod21 {own[origin][family]}"]
        assert probe.udp(pod.ips[family], 8080, 3) == {"pod21": 3}


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_what_a_link_of_the_cluster_does_not_carry_is_answered(cluster: Cluster, family: int) -> None:
    """RFC 1191 and RFC 8201: the sender learns the size, and the next packet is as small."""
    payload = 1400 - (28, 48)[family]  # IP and UDP headers
    with (
        Probe(cluster.place("client")) as probe,
        probe.socket(socket.SOCK_DGRAM, (socket.AF_INET, socket.AF_INET6)[family]) as client,
    ):
        client.connect(cluster.pods["pod21"].ips[family], 8080)
        level, option = ((socket.IPPROTO_IP, 10), (socket.IPPROTO_IPV6, 23))[family]  # ..._MTU_DISCOVER
        client.setsockopt(level, option, 2)  # ..._PMTUDISC_DO: never in fragments
        client.send(bytes(payload + 1))
        with pytest.raises(OSError, match="Message too long"):
            client.recv()
        client.send(bytes(1000))
        assert client.recv().startswith(b"pod21 ")
        with pytest.raises(OSError, match="Message too long"):
            client.send(bytes(payload + 1))


def test_vips_of_a_cluster_go_where_they_are_routed(cluster: Cluster) -> None:
    for node in reversed(cluster.nodes):
        cluster.route_vips(node)
        for vip in ("203.0.113.9", "2001:db8:f::9"):
            assert f"dev {node.node_name} " in cluster.router.shell(f"ip route get {vip}")
