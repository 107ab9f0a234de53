"""Beside kube-proxy and after it: old connections go on through its rules, new ones through us, and back.

kube-proxy's rules are those of tests/netns/kube_proxy: one Service whose endpoint is pod1. The agent knows
pod2 and pod3 as its endpoints, so who answers tells who chose.
"""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rig.agent import START_S, Agent
from rig.objects import service
from rig.probe import Load, Probe, more
from rig.topology import NODE_IPS, OUTSIDE_IPS
from rig.wait import eventually

from . import catalogue as known
from .test_capabilities import only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rig.probe import RemoteSocket
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

FILES = Path(__file__).with_name("kube_proxy")
OURS = {"pod2", "pod3"}
VARIANTS = [f"{family}-{kind}" for family in ("iptables", "ip6tables") for kind in ("nft", "legacy")]


def text(name: str) -> str:
    return (FILES / name).read_text()


def load_iptables(kind: str) -> Callable[[Topology], None]:
    def load(net: Topology) -> None:
        for family, name in (("iptables", "v4"), ("ip6tables", "v6")):
            net.on_node_bare.run(f"{family}-{kind}-restore", text=text(f"iptables-{name}.txt"))

    return load


def load_nftables(net: Topology) -> None:
    net.on_node_bare.run("nft", "-f", "-", text=text("nftables.nft"))


MODES = {
    "iptables-nft": load_iptables("nft"),
    "iptables-legacy": load_iptables("legacy"),
    "nftables": load_nftables,
}


def rules(net: Topology) -> dict[str, list[str]]:
    """Return every rule, chain and table there is, without counters, by the tool that shows it."""
    found = {tool: net.on_node_bare.run(f"{tool}-save").stdout for tool in VARIANTS}
    found["nft"] = net.on_node_bare.run("nft", "--stateless", "list", "ruleset").stdout
    return {
        tool: [line.split(" [")[0] for line in shown.splitlines() if line[:1] not in ("", "#")]
        for tool, shown in found.items()
    }


def route_node(net: Topology) -> None:
    """Give the node a default route: a socket looks for one before its first packet meets a rule."""
    net.node.shell(f"ip route add default via {OUTSIDE_IPS[0]}; ip route add default via {OUTSIDE_IPS[1]}")


def write(agent: Agent, net: Topology) -> None:
    agent.write(
        service("web", known.HTTP | {"nodePort": 30080}, ips=known.WEB, type="NodePort"),
        *known.slices("web", net.pods[1:3], known.TO_HTTP),
    )


@pytest.fixture(params=list(MODES))
def taken(net: Topology, request: pytest.FixtureRequest) -> Iterator[tuple[Topology, Agent, list[Load]]]:
    """A node with kube-proxy's rules, connections through them, and an agent that started beside them."""
    route_node(net)
    MODES[request.param](net)
    agent = Agent(net, config=known.CONFIG)
    write(agent, net)
    with ExitStack() as stack:
        probes = [stack.enter_context(Probe(at)) for at in (net.on_node, net.pods[3].place, net.from_outside)]
        targets = [
            *((probe, address, 80) for probe in probes[:2] for address in known.WEB),
            (probes[2], NODE_IPS[0], 30080),
        ]
        kept = [
            stack.enter_context(probe.load(address, port, mode="keep", workers=1, pause_s=0.01))
            for probe, address, port in targets
        ]
        assert [set(each) for each in more(kept, 5)] == [{"pod1"}] * 5, "through kube-proxy's rules"
        stack.enter_context(agent)
        kept += [
            stack.enter_context(probe.load(address, port, mode="new", workers=1, pause_s=0.01))
            for probe, address, port in targets
        ]
        yield net, agent, kept
        # The loads' ends assert that no request failed.


def choosers(loads: list[Load]) -> str:
    """Return who chose the backend of each load's next requests."""
    said = ""
    for answers in more(loads, 20):
        assert {"pod1"} == answers.keys() or answers.keys() <= OURS
        said += "kube-proxy " if "pod1" in answers else "ebpfproxy "
    return said


def test_takeover_and_cleanup(taken: tuple[Topology, Agent, list[Load]]) -> None:
    net, agent, loads = taken
    assert choosers(loads) == "kube-proxy " * 5 + "ebpfproxy " * 5
    before = rules(net)

    said = agent.cli("cleanup", "--kube-proxy", "--state-dir", agent.state_dir).stdout

    assert "removed" in said
    assert choosers(loads) == "kube-proxy " * 5 + "ebpfproxy " * 5, "nobody noticed"
    after = rules(net)
    assert "table ip kube-proxy" not in after["nft"]
    assert "table ip6 kube-proxy" not in after["nft"]
    left = {
        word for lines in after.values() for line in lines for word in re.findall(r"KUBE-[A-Z0-9-]+", line)
    }
    assert left <= {"KUBE-KUBELET-CANARY", "KUBE-FIREWALL", "KUBE-ROUTER-FORWARD"}
    for tool in VARIANTS:
        new = set(after[tool]) - set(before[tool])
        # Asking a legacy tool for a table makes one, with the kernel's own chains.
        assert not [line for line in new if not line.startswith("*") and not line.endswith(" ACCEPT")]
    for word in ("65000", "KUBE-KUBELET-CANARY", "KUBE-FIREWALL", "KUBE-ROUTER-FORWARD", "CNI-HOSTPORT-DNAT"):
        assert count(after, word) == count(before, word), f"{word} is not kube-proxy's"
    again = agent.cli("cleanup", "--kube-proxy", "--state-dir", agent.state_dir).stdout
    assert again == "there was nothing to remove\n"


def count(found: dict[str, list[str]], word: str) -> int:
    return sum(word in line for lines in found.values() for line in lines)


def test_and_back_again(net: Topology) -> None:
    """kube-proxy's rules are there again, the agent ends, and what it carries goes on until it ends."""
    agent = Agent(net, config=known.CONFIG)
    write(agent, net)
    with ExitStack() as stack:
        probes = [stack.enter_context(Probe(at)) for at in (net.on_node, net.pods[3].place)]
        stack.enter_context(agent)
        of_pod = stack.enter_context(ExitStack())
        kept = [
            scope.enter_context(socket_to(probe, address))
            for probe, scope in zip(probes, (stack, of_pod), strict=True)
            for address in known.WEB
        ]
        before = [each.ask() for each in kept]
        assert set(before) <= OURS
        route_node(net)
        load_nftables(net)
        agent.terminate()
        options: list[str | Path] = ["--state-dir", agent.state_dir, "--bpffs", net.bpffs]
        draining = stack.enter_context(net.on_node_bare.start(*Agent.program("drain", *options)))
        counted = "the two connections of the pod to be counted"
        eventually(lambda: "2 go on" in draining.output(), counted, timeout_s=START_S)
        for probe in probes:
            for address in known.WEB:
                assert set(probe.tcp(address, 80, 4)) == {"pod1"}, "kube-proxy's choice"
        assert [each.ask() for each in kept] == before
        assert draining.poll() is None
        of_pod.close()
        assert draining.wait() == 0
        assert "nothing goes through ebpfproxy any more" in draining.output()
        agent.cli("cleanup", *options)
        assert [each.ask() for each in kept[:2]] == before[:2], "sockets on the node need nobody"
        assert set(probes[1].tcp(known.WEB[0], 80, 4)) == {"pod1"}


@contextmanager
def socket_to(probe: Probe, address: str) -> Iterator[RemoteSocket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with probe.socket(socket.SOCK_STREAM, family) as made:
        made.connect(address, 80)
        yield made


def test_what_keeps_old_connections_goes_with_us(net: Topology) -> None:
    load_nftables(net)
    agent = Agent(net)
    agent.cli("cleanup", "--kube-proxy", "--state-dir", agent.state_dir)
    assert count(rules(net), "ebpfproxy-takeover") == 2, "one table of each family"
    agent.cli("cleanup", "--bpffs", net.bpffs, "--state-dir", agent.state_dir)
    assert count(rules(net), "ebpfproxy-takeover") == 0
    agent.stop()


@pytest.mark.parametrize(
    ("kind", "more", "status"),
    [("nft", [], 0), ("legacy", [], 1), ("legacy", ["net_raw"], 0)],
)
def test_rights_that_cleanup_needs(net: Topology, kind: str, more: list[str], status: int) -> None:
    """Rules that can't be looked at are an error, not nothing."""
    load_iptables(kind)(net)
    command = Agent.program("cleanup", "--kube-proxy", "--state-dir", net.directory / "none")
    done = net.on_node_bare.run(*only("net_admin", *more), *command, check=False)
    assert done.returncode == status
    assert ("iptables-legacy can't read" in done.stderr) == bool(status)
    assert (count(rules(net), "KUBE-SVC-") > 0) == bool(status)


def test_what_the_ipvs_mode_left(net: Topology) -> None:
    """Chains, sets and the device; a bridge stands for it, as a kernel may lack dummy devices."""
    node = net.on_node_bare
    node.run("ipset", "restore", text=text("ipvs-sets.txt"))
    node.run("iptables-restore", text=text("ipvs-iptables.txt"))
    node.run("ip", "link", "add", "kube-ipvs0", "type", "bridge")
    node.run("ip", "address", "add", "10.96.0.10/32", "dev", "kube-ipvs0")
    agent = Agent(net)
    said = agent.cli("cleanup", "--kube-proxy", "--state-dir", agent.state_dir).stdout
    assert "removed device kube-ipvs0" in said
    assert "removed ipset KUBE-6-CLUSTER-IP" in said
    assert node.run("ipset", "list", "-n").stdout == "administrators\n"
    assert "kube-ipvs0" not in node.run("ip", "link").stdout
    saved = node.run("iptables-save").stdout
    assert set(re.findall(r"KUBE-[A-Z0-9-]+", saved)) == {"KUBE-FIREWALL"}, "kubelet's"
    assert "--match-set administrators src -j DROP" in saved
    agent.stop()


def test_takeover_from_ipvs(net: Topology) -> None:
    node = net.on_node_bare
    if node.run("ipvsadm", "--list", check=False).returncode:
        pytest.skip("this kernel has no IPVS")
    net.node.shell("ip link add kube-ipvs0 type dummy; ip address add 10.96.0.10/32 dev kube-ipvs0")
    node.run("ipset", "restore", text=text("ipvs-sets.txt"))
    node.run("iptables-restore", text=text("ipvs-iptables.txt"))
    for server, backend in (
        ("10.96.0.10:80", f"{net.pods[0].v4}:8080"),
        ("192.0.2.1:30080", f"{net.pods[0].v4}:8080"),
        ("192.0.2.7:443", f"{net.pods[1].v4}:8080"),  # keepalived's, say
    ):
        node.run("ipvsadm", "-A", "-t", server, "-s", "rr")
        node.run("ipvsadm", "-a", "-t", server, "-r", backend, "-m")
    agent = Agent(net, config=known.CONFIG)
    write(agent, net)
    clean = ("cleanup", "--kube-proxy", "--state-dir", agent.state_dir)
    with Probe(net.pods[3].place) as pod, socket_to(pod, known.WEB[0]) as kept:
        assert kept.ask() == "pod1"
        with agent:
            assert set(pod.tcp(known.WEB[0], 80, 6)) <= OURS
            assert kept.ask() == "pod1"
            refused = agent.cli(*clean, check=False)
            assert refused.returncode == 1
            assert "1 connections go through it" in refused.stderr
            assert kept.ask() == "pod1", "nothing was touched"
            said = agent.cli(*clean, "--now").stdout
            for line in ("virtual server 10.96.0.10:80/tcp", "virtual server 192.0.2.1:30080/tcp"):
                assert f"removed IPVS {line}" in said
            assert "removed device kube-ipvs0" in said
            saved = node.run("ipvsadm", "--save", "--numeric").stdout
            assert re.findall(r"^-A -t (\S+)", saved, re.MULTILINE) == ["192.0.2.7:443"]
            assert set(pod.tcp(known.WEB[0], 80, 6)) <= OURS
