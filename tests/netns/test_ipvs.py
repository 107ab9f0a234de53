"""Mode ipvs, with ipvsadm(8) as the second opinion; needs a kernel with IPVS, see ``make test-vm``."""

from __future__ import annotations

import socket
import struct
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.wait import eventually

from . import catalogue as known
from .dataplanes import has_ipvs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Topology

pytestmark = [
    pytest.mark.root,
    pytest.mark.netns,
    pytest.mark.skipif(not has_ipvs(), reason="this kernel has no IPVS: make test-vm"),
]

SCHEDULERS = ("rr", "wrr", "lc", "wlc", "dh", "sh", "sed", "nq", "maglev")
ANNOTATION = "ebpfproxy.io/scheduler"
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST, socket(7)


class Node:
    def __init__(self, net: Topology, **ipvs: Any) -> None:
        self.net = net
        self.config = {**known.CONFIG, "ipvs": {"syncPeriod": "1s", "scheduler": "rr", **ipvs}}
        self.agent = Agent(net, mode="ipvs", config=self.config)

    def write(self, backends: int, **spec: Any) -> None:
        self.agent.write(
            service(
                "web", known.HTTP | {"nodePort": 30080}, known.UDP, ips=known.WEB, type="NodePort", **spec
            ),
            *known.slices("web", self.net.pods[:backends], known.TO_HTTP, known.TO_UDP),
        )

    def run(self, *command: str) -> str:
        return self.net.on_node_bare.run(*command).stdout

    def saved(self) -> set[str]:
        """Return what ``ipvsadm -Sn`` says."""
        return {line.strip() for line in self.run("ipvsadm", "-Sn").splitlines()}

    def has_servers(self, is_wanted: bool) -> bool:
        return bool(self.saved()) is is_wanted

    def has_chains(self, is_wanted: bool) -> bool:
        return ("KUBE-SVC-" in self.run("iptables-save")) is is_wanted

    def clean(self) -> str:
        flags = ("--state-dir", self.agent.state_dir, "--bpffs", self.net.bpffs)
        return self.agent.cli("cleanup", *flags).stdout


@pytest.fixture
def node(net: Topology) -> Iterator[Node]:
    made = Node(net)
    yield made
    made.agent.stop()


def test_ipvsadm_shows_what_an_administrator_expects(node: Node) -> None:
    node.write(2, sessionAffinity="ClientIP")
    with node.agent:
        one, two = (pod.v4 for pod in node.net.pods[:2])
        assert node.saved() >= {
            "-A -t 10.96.0.10:80 -s rr -p 10800",
            f"-a -t 10.96.0.10:80 -r {one}:8080 -m -w 1",
            f"-a -t 10.96.0.10:80 -r {two}:8080 -m -w 1",
            "-A -u 10.96.0.10:80 -s rr -p 10800",
            f"-a -u 10.96.0.10:80 -r {one}:8080 -m -w 1",
            "-A -t 192.0.2.1:30080 -s rr -p 10800",
            "-A -t [fd00:96::a]:80 -s rr -p 10800",
            f"-a -t [fd00:96::a]:80 -r [{node.net.pods[0].v6}]:8080 -m -w 1",
        }
        assert "10.96.0.10/32" in node.run("ip", "addr", "show", "kube-ipvs0")
        assert "10.96.0.10,tcp:80" in node.run("ipset", "list", "KUBE-CLUSTER-IP")
        assert "30080" in node.run("ipset", "list", "KUBE-NODE-PORT-TCP")
        with Probe(node.net.pods[3].place) as pod:
            assert len(pod.tcp(known.WEB[0], 80, 6)) == 1, "persistence"


def test_every_scheduler(node: Node) -> None:
    services = [
        service(name, known.HTTP, ips=(f"10.96.1.{number}",), annotations={ANNOTATION: name})
        for number, name in enumerate(SCHEDULERS, 1)
    ]
    node.agent.write(*services)
    with node.agent:
        for number, name in enumerate(SCHEDULERS, 1):
            shown = "mh -b mh-port" if name == "maglev" else name
            assert f"-A -t 10.96.1.{number}:80 -s {shown}" in node.saved()


@pytest.mark.parametrize("scheduler", ["lblc", "lblcr"])
def test_a_scheduler_that_ipvs_alone_has(net: Topology, scheduler: str) -> None:
    node = Node(net, scheduler=scheduler)
    node.write(2)
    with node.agent:
        assert f"-A -t 10.96.0.10:80 -s {scheduler}" in node.saved()


def test_a_connection_to_an_endpoint_that_goes_lives_until_it_ends(node: Node) -> None:
    node.write(2)
    with node.agent, Probe(node.net.pods[3].place) as pod:
        clients = [pod.socket(socket.SOCK_STREAM, options=[RESET]) for _ in range(2)]
        for client in clients:
            client.connect(known.WEB[0], 80)
        names = [client.ask() for client in clients]
        gone = clients[names.index("pod2")]
        node.write(1)
        drained = f"-a -t 10.96.0.10:80 -r {node.net.pods[1].v4}:8080 -m -w 0"
        eventually(lambda: drained in node.saved(), "weight 0", timeout_s=60)
        assert gone.ask() == "pod2"
        assert set(pod.tcp(known.WEB[0], 80, 4)) == {"pod1"}
        gone.close()
        # A connection that was reset is remembered for 10 s, one that was closed for two minutes.
        eventually(lambda: drained not in node.saved(), "its end", timeout_s=120)


def test_a_flush_is_noticed_and_mended(node: Node) -> None:
    node.write(1)
    with node.agent, Probe(node.net.pods[3].place) as pod, pod.impatient(1):
        for command in (
            ("ipvsadm", "-C"),
            ("ip", "link", "del", "kube-ipvs0"),
            ("iptables", "-t", "nat", "-F"),
        ):
            node.run(*command)

            def answers() -> bool:
                try:
                    return set(pod.tcp(known.WEB[0], 80)) == {"pod1"}
                except OSError:
                    return False

            eventually(answers, f"an answer after {' '.join(command)}", timeout_s=60)
            lost = f"mode ipvs to see {' '.join(command)}"
            eventually(lambda: "writing it again" in node.agent.output(), lost, timeout_s=60)


def test_cleanup_takes_what_is_ours_and_leaves_what_is_others(net: Topology) -> None:
    node = Node(net, excludeCIDRs=["203.0.113.0/24"], strictARP=True)
    node.run("ipvsadm", "-A", "-t", "198.51.100.1:80", "-s", "rr")
    node.run("ipvsadm", "-A", "-t", "203.0.113.1:80", "-s", "rr")
    before = node.run("sysctl", "net.ipv4.vs.expire_nodest_conn", "net.ipv4.conf.all.arp_ignore")
    node.write(1)
    with node.agent:
        assert node.run("sysctl", "-n", "net.ipv4.conf.all.arp_ignore").strip() == "1"
        node.agent.terminate()
        node.clean()
    assert node.saved() == {"-A -t 198.51.100.1:80 -s rr", "-A -t 203.0.113.1:80 -s rr"}
    assert node.run("ipset", "list", "-n") == ""
    assert "KUBE" not in node.run("iptables-save")
    assert "kube-ipvs0" not in node.run("ip", "link")
    assert before == node.run("sysctl", "net.ipv4.vs.expire_nodest_conn", "net.ipv4.conf.all.arp_ignore")


def test_switch_from_and_to_iptables(node: Node) -> None:
    node.write(1)
    node.net.add_default_route()
    with node.agent, Probe(node.net.pods[3].place) as pod:
        assert set(pod.tcp(known.WEB[0], 80)) == {"pod1"}
        for mode, has_servers in (("iptables", False), ("ipvs", True)):
            node.agent.kill()
            node.agent.mode = mode
            node.agent.start()
            assert set(pod.tcp(known.WEB[0], 80, 3)) == {"pod1"}
            # What the old mode made goes once the new one is complete.
            eventually(partial(node.has_servers, has_servers), "virtual servers to come or go", timeout_s=60)
            eventually(partial(node.has_chains, not has_servers), "chains to come or go", timeout_s=60)
            assert set(pod.tcp(known.WEB[0], 80, 3)) == {"pod1"}
