"""Mode iptables in both variants of the tools: names, the end of what is gone, others' rules, flushes."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Any

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.wait import eventually

from . import catalogue as known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

TABLES = ("mangle", "filter", "nat")
#: A firewall's own rules; the second leads to a chain of ours, as some network plugins' do.
FOREIGN = """
iptables-{v} -A INPUT -s 198.51.100.1 -j DROP
iptables-{v} -t nat -N OTHERS
iptables-{v} -t nat -A OTHERS -s 198.51.100.1 -j {target}
"""


class Node:
    """A node with one Service in one variant of the tools."""

    def __init__(self, net: Topology, variant: str) -> None:
        self.net, self.variant = net, variant
        net.add_default_route()
        self.agent = Agent(
            net,
            mode="iptables",
            config={
                **known.CONFIG,
                "iptables": {"syncPeriod": "1s"},
                "ebpfproxy": {**known.CONFIG["ebpfproxy"], "iptablesVariant": variant},
            },
        )
        self.write(3)

    def write(self, backends: int, **spec: Any) -> None:
        self.agent.write(
            service("web", known.HTTP | {"nodePort": 30080}, ips=known.WEB, type="NodePort", **spec),
            *known.slices("web", self.net.pods[:backends], known.TO_HTTP),
        )

    def save(self, family: str = "") -> str:
        return self.net.on_node_bare.run(f"ip{family}tables-{self.variant}-save").stdout

    def clean(self) -> str:
        flags = ("--state-dir", self.agent.state_dir, "--bpffs", self.net.bpffs)
        return self.agent.cli("cleanup", *flags).stdout

    def answers(self) -> bool:
        with Probe(self.net.pods[3].place) as pod, pod.impatient(1):
            try:
                return bool(pod.tcp(known.WEB[0], 80) and pod.tcp(known.WEB[1], 80))
            except OSError:
                return False


@pytest.fixture(params=["nft", "legacy"])
def node(net: Topology, request: pytest.FixtureRequest) -> Iterator[Node]:
    made = Node(net, request.param)
    yield made
    made.agent.stop()


def test_names_are_kube_proxys(node: Node) -> None:
    """SHA-256 and base32 by other tools than ours."""
    bits = "cut -c1-64 | tr a-f A-F | basenc -d --base16"
    digest = node.net.on_node_bare.run(
        *("sh", "-c", f"printf %s default/web:httptcp | sha256sum | {bits} | basenc --base32 | cut -c1-16")
    ).stdout.strip()
    with node.agent:
        for family, vip in (("", known.WEB[0]), ("6", known.WEB[1])):
            text = node.save(family)
            comment = "default/web:http cluster IP"
            assert re.search(rf'-A KUBE-SERVICES -d {vip}/\d+ .*"{comment}".* -j KUBE-SVC-{digest}\n', text)
            assert f"-j KUBE-EXT-{digest}" in text
            assert len(re.findall(rf"-A KUBE-SVC-{digest} .*-j KUBE-SEP-", text)) == 3
            assert "0x4000/0x4000" in text
            assert "random-fully" in text


def test_only_what_changed_is_written(node: Node) -> None:
    """Counters of rules that did not change go on."""
    with node.agent:
        assert node.answers()
        node.write(2)
        eventually(lambda: node.save().count(":KUBE-SEP-") == 2, "the third endpoint's chain to be gone")
        text = node.net.on_node_bare.run(f"iptables-{node.variant}-save", "-c", "-t", "nat").stdout
        (packets,) = re.findall(r"\[(\d+):\d+] -A PREROUTING .*-j KUBE-SERVICES", text)
        assert int(packets) > 0
        assert node.answers()
        node.agent.write()
        eventually(lambda: "KUBE-SVC-" not in node.save(), "the Service's chains to be gone")


@pytest.mark.parametrize("how", ["flush and delete", "flush", "one table"])
def test_a_flush_is_noticed_and_mended(node: Node, how: str) -> None:
    tables = ("nat",) if how == "one table" else TABLES
    with node.agent:
        assert node.answers()
        for family in ("", "6"):
            for table in tables:
                tool = f"ip{family}tables-{node.variant}"
                if how == "flush and delete":  # at once, or the agent is quicker than the second half
                    node.net.node.shell(f"printf '*{table}\\nCOMMIT\\n' | {tool}-restore")
                else:
                    node.net.on_node_bare.run(tool, "-t", table, "-F")
        eventually(node.answers, "the rules to be there again", timeout_s=30)
        assert "somebody flushed what mode iptables had made" in node.agent.output()


def test_an_agent_that_starts_again_takes_its_chains_over(node: Node) -> None:
    with node.agent, Probe(node.net.pods[3].place) as pod:
        with pod.load(known.WEB[0], 80) as load:
            load.more(50)
            node.agent.kill()
            node.write(2)
            node.agent.start()
            load.more(50)
        before = node.save().count("-j KUBE-SERVICES")
        node.agent.restart()
        assert node.save().count("-j KUBE-SERVICES") == before, "a jump is there twice"
        assert node.save().count(":KUBE-SEP-") == 2


def test_cleanup_takes_what_is_ours_and_leaves_what_is_others(node: Node) -> None:
    with node.agent:
        node.net.node.shell(FOREIGN.format(v=node.variant, target="KUBE-MARK-MASQ"))
        localnet = node.net.on_node_bare.run("cat", "/proc/sys/net/ipv4/conf/all/route_localnet").stdout
        assert localnet.strip() == "1", "NodePorts on 127.0.0.1"
        node.agent.terminate()
        said = node.clean()
    assert "KUBE-MARK-MASQ of table nat; others lead to it" in said
    left = node.save()
    assert re.findall(r"KUBE-[A-Z-]+", left.replace("KUBE-MARK-MASQ", "")) == []
    assert "-A INPUT -s 198.51.100.1/32 -j DROP" in left
    assert "-A OTHERS -s 198.51.100.1/32 -j KUBE-MARK-MASQ" in left
    assert "KUBE" not in node.save("6")
    after = node.net.on_node_bare.run("cat", "/proc/sys/net/ipv4/conf/all/route_localnet").stdout
    assert after.strip() == "0"
    assert "nothing" in node.clean()


def test_affinity(node: Node) -> None:
    node.write(3, sessionAffinity="ClientIP")
    with node.agent, Probe(node.net.pods[3].place) as pod:
        for vip in known.WEB:
            assert len(pod.tcp(vip, 80, 12)) == 1


def test_a_udp_client_that_keeps_its_port_is_served_by_another_backend(node: Node) -> None:
    """Conntrack would send it to the old one for as long as it keeps asking."""
    to_udp = known.slices("dns", node.net.pods[:1], known.TO_UDP)
    node.agent.write(service("dns", known.UDP, ips=known.DNS), *to_udp)
    with node.agent, Probe(node.net.pods[3].place) as pod, pod.socket(socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.connect(known.DNS[0], 80)
        client.send(b"?")
        assert client.recv().startswith(b"pod1")
        to_udp = known.slices("dns", node.net.pods[1:2], known.TO_UDP)
        node.agent.write(service("dns", known.UDP, ips=known.DNS), *to_udp)

        def answered_by() -> bytes:
            client.send(b"?")
            try:
                return client.recv()
            except OSError:
                return b""

        eventually(lambda: answered_by().startswith(b"pod2"), "an answer of the other backend")
