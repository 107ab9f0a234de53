"""Mode nftables: others who change the ruleset, restarts, and what a change touches."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import raw

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.topology import NODE_IPS
from rig.wait import eventually

from . import catalogue as known
from .test_reject import mac

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Pod, Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture
def agent(net: Topology) -> Iterator[Agent]:
    with Agent(net, mode="nftables", config=known.CONFIG) as made:
        write(made, *net.pods[:3])
        eventually(lambda: "default/web/http" in ruleset(net), "the Service's chain")
        yield made


def write(agent: Agent, *pods: Pod) -> None:
    agent.write(
        service(
            *("web", known.HTTP | {"nodePort": 30080}, known.UDP | {"nodePort": 30080}),
            ips=known.WEB,
            type="NodePort",
            sessionAffinity="ClientIP",
        ),
        *known.slices("web", pods, known.TO_HTTP, known.TO_UDP),
        service("other", known.HTTP, ips=known.NAMED),
        *known.slices("other", pods, known.TO_HTTP),
    )


def ruleset(net: Topology) -> str:
    return net.node.shell("nft list ruleset")


def chains(net: Topology) -> dict[str, int]:
    """Return the chains of Services and their handles, which a chain keeps as long as it lives."""
    listed: list[Any] = json.loads(net.node.shell("nft -j list chains"))["nftables"]
    found = [each["chain"] for each in listed if "chain" in each]
    return {f"{each['family']} {each['name']}": each["handle"] for each in found if "/" in each["name"]}


def wait_served(probe: Probe, vip: str, port: int, names: set[str]) -> None:
    def served() -> bool:
        try:
            with probe.impatient(1):
                return set(probe.tcp(vip, port, 6)) == names
        except OSError:
            return False

    eventually(served, f"{vip}:{port} to be served by {names}")


ALL = {"pod1", "pod2", "pod3"}


@pytest.mark.parametrize(
    "reload",
    [
        "nft flush ruleset",
        "nft delete table ip ebpfproxy",
        # What a distribution's nftables.service does with a file of rules.
        "nft 'flush ruleset; add table inet f; add chain inet f a { type filter hook input priority 0; }'",
    ],
    ids=["flush", "delete", "reload"],
)
def test_a_flush_is_mended_and_connections_live(net: Topology, agent: Agent, reload: str) -> None:
    with Probe(net.pods[3].place) as probe, probe.socket(socket.SOCK_STREAM) as connection:
        connection.connect(known.WEB[0], 80)
        first = connection.ask()
        net.node.shell(reload)
        wait_served(probe, known.NAMED[0], 80, ALL)
        wait_served(probe, known.NAMED[1], 80, ALL)
        assert connection.ask() == first
        assert "it is programmed again" in agent.output()


def test_flushed_chains_are_mended_at_the_next_full_sync(net: Topology) -> None:
    config = known.CONFIG | {"mode": "nftables", "nftables": {"syncPeriod": "1s"}}
    with Agent(net, mode="nftables", config=config) as agent, Probe(net.pods[3].place) as probe:
        write(agent, *net.pods[:3])
        wait_served(probe, known.NAMED[0], 80, ALL)
        net.node.shell("nft flush table ip ebpfproxy")
        wait_served(probe, known.NAMED[0], 80, ALL)
        name = next(each for each in chains(net) if "svc" in each and "default/other" in each)
        net.node.shell("nft 'delete element ip ebpfproxy cluster-ips { 10.96.0.21 . tcp . 80 }'")
        wait_served(probe, known.NAMED[0], 80, ALL)
        assert name in chains(net)


def test_other_peoples_tables_are_left_alone(net: Topology, agent: Agent) -> None:
    net.node.shell("nft 'add table ip others; add chain ip others c; add table inet ebpfproxy-like'")
    before = net.node.shell("nft list table ip others; nft list table inet ebpfproxy-like")
    write(agent, net.pods[0])
    eventually(lambda: "10.244.0.12" not in ruleset(net), "the endpoints to be gone")
    agent.restart()
    agent.terminate()
    agent.cli("cleanup", "--state-dir", agent.state_dir)
    assert net.node.shell("nft list table ip others; nft list table inet ebpfproxy-like") == before
    assert "table ip ebpfproxy " not in ruleset(net)


def test_restart_changes_nothing(net: Topology, agent: Agent) -> None:
    before, generation = chains(net), net.node.shell("nft list ruleset | sha256sum")
    with Probe(net.from_outside) as probe, probe.socket(socket.SOCK_STREAM) as connection:
        connection.connect(NODE_IPS[0], 30080)
        first = connection.ask()
        (again,) = probe.tcp(NODE_IPS[0], 30080, 4)
        assert again == first, "affinity"
        agent.restart()
        assert chains(net) == before
        assert connection.ask() == first
        assert set(probe.tcp(NODE_IPS[0], 30080, 4)) == {first}, "affinity outlives a restart"
    assert generation != "", "the ruleset was listed"


def test_a_change_touches_the_chains_of_its_service_alone(net: Topology, agent: Agent) -> None:
    before = chains(net)
    objects = json.loads((agent.manifests / "objects.json").read_text())["items"]
    for each in objects:
        if each["kind"] == "EndpointSlice" and each["metadata"]["name"].startswith("other"):
            each["endpoints"] = each["endpoints"][:1]
    agent.write(*objects)
    eventually(lambda: chains(net) != before, "the change")
    web = {name: handle for name, handle in before.items() if "default/web" in name}
    now = chains(net)
    assert {name: handle for name, handle in now.items() if "default/web" in name} == web
    others = {name for name in now if "default/other" in name}
    assert not others & before.keys(), "new content, new chains"
    assert len(others) == 2, "and the old ones are gone"


def test_changes_while_no_agent_runs_are_made_up_for(net: Topology, agent: Agent) -> None:
    agent.kill()
    write(agent, net.pods[2])
    agent.start()
    with Probe(net.pods[3].place) as probe:
        wait_served(probe, known.WEB[0], 80, {"pod3"})
    assert "10.244.0.11" not in ruleset(net)


def test_loopback_is_closed_to_others(net: Topology, agent: Agent) -> None:
    """route_localnet, which NodePorts on 127.0.0.1 need, opens loopback to the link (CVE-2020-8558)."""
    assert net.node.shell("cat /proc/sys/net/ipv4/conf/all/route_localnet").strip() == "1"
    frame = (
        Ether(src=mac(net.from_outside, "eth0"), dst=mac(net.on_node_bare, "eth0"))
        / IP(src="192.0.2.100", dst="127.0.0.2")
        / UDP(sport=5000, dport=5353)
        / b"?"
    )
    with (
        Probe(net.on_node_bare) as node,
        node.socket(socket.SOCK_DGRAM) as server,
        Probe(net.from_outside) as outside,
        outside.socket(socket.SOCK_RAW, socket.AF_PACKET, bind=("eth0", 0)) as link,
    ):
        server.bind("127.0.0.2", 5353)
        server.settimeout(0.5)
        link.send(raw(frame))
        with pytest.raises(TimeoutError):
            server.recv()
        net.node.shell("nft flush chain ip ebpfproxy guard")
        link.send(raw(frame))
        assert server.recv() == b"?", "it is our rule that keeps it out"
