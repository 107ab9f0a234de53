"""From one mode to another on a live node: served all the time, and nothing is left behind."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe, more
from rig.topology import NODE_IPS
from rig.wait import eventually

from . import catalogue as known
from .test_cleanup import programs_on

if TYPE_CHECKING:
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]


def traces(net: Topology, mode: str) -> list[str]:
    """Return what a mode has in the kernel."""
    found = {
        "bpf": lambda: [*map(str, programs_on(net, net.cgroup)), *map(str, net.bpffs.glob("ebpfproxy/*/*"))],
        "nftables": lambda: net.node.shell("nft list tables | grep 'ebpfproxy$' || true").splitlines(),
        "iptables": lambda: net.node.shell(
            "iptables-save | grep KUBE- || true; ip6tables-save | grep KUBE- || true"
        ).splitlines(),
        "userspace": lambda: net.node.shell(
            "nft list tables | grep -w ebpfproxy-userspace || true"
        ).splitlines(),
    }
    return found[mode]()


def switch(agent: Agent, mode: str) -> None:
    agent.terminate()
    agent.mode = mode
    agent.start()


def make(net: Topology, mode: str) -> Agent:
    agent = Agent(net, mode=mode, config=known.CONFIG)
    agent.write(
        service(
            *("web", known.HTTP | {"nodePort": 30080}, known.UDP | {"nodePort": 30080}),
            ips=known.WEB,
            type="NodePort",
        ),
        *known.slices("web", net.pods[:3], known.TO_HTTP, known.TO_UDP),
    )
    net.add_default_route()
    return agent


EVERYWHERE = ("node", "pod", "outside")
# From, to, and the clients of which not one request may fail. Between bpf and netfilter a packet of a
# connection that began in the one may meet the other: what is under way then in packets is lost.
PAIRS = [
    ("bpf", "nftables", ("node",)),
    ("nftables", "bpf", ("node",)),
    ("nftables", "iptables", EVERYWHERE),
    ("iptables", "nftables", EVERYWHERE),
    ("userspace", "nftables", EVERYWHERE),
]


@pytest.mark.parametrize(("old", "new", "origins"), PAIRS)
def test_new_connections_are_served_all_the_time(
    net: Topology, old: str, new: str, origins: tuple[str, ...]
) -> None:
    places = {"node": net.on_node, "pod": net.pods[3].place, "outside": net.from_outside}
    agent = make(net, old)
    with agent, ExitStack() as stack:
        assert traces(net, old)
        probes = {name: stack.enter_context(Probe(place)) for name, place in places.items()}
        targets = {name: (NODE_IPS, 30080) if name == "outside" else (known.WEB, 80) for name in places}
        loads = [
            stack.enter_context(probes[name].load(vip, targets[name][1], workers=1, pause_s=0.01))
            for name in origins
            for vip in targets[name][0]
        ]
        more(loads, 5)
        switch(agent, new)
        eventually(lambda: f"switched from mode {old} to {new}" in agent.output(), "the end of the old mode")
        assert not traces(net, old)
        more(loads, 5)
        for name, (vips, port) in targets.items():
            for vip in vips:
                # So many because the loads take their turns, too.
                assert set(probes[name].tcp(vip, port, 30)) == {"pod1", "pod2", "pod3"}
        assert traces(net, new)
        assert json.loads((agent.state_dir / "modes.json").read_text()).keys() - {"nat"} == {new}
        # The loads' ends assert that no request failed.


#: From, to, and the clients whose established connections the kernel can keep.
KEPT = [
    ("bpf", "nftables", ("node",)),  # they lead to the backend directly
    ("nftables", "bpf", ("node",)),
    ("nftables", "iptables", EVERYWHERE),
    ("iptables", "nftables", EVERYWHERE),
]


@pytest.mark.parametrize(("old", "new", "origins"), KEPT)
def test_established_connections_go_on(net: Topology, old: str, new: str, origins: tuple[str, ...]) -> None:
    places = {"node": net.on_node, "pod": net.pods[3].place, "outside": net.from_outside}
    agent = make(net, old)
    with agent, ExitStack() as stack:
        connections = {}
        for origin in origins:
            probe = stack.enter_context(Probe(places[origin]))
            connection = stack.enter_context(probe.socket(socket.SOCK_STREAM))
            vip, port = (NODE_IPS[0], 30080) if origin == "outside" else (known.WEB[0], 80)
            connection.connect(vip, port)
            connections[connection] = connection.ask()
        switch(agent, new)
        eventually(
            lambda: f"switched from mode {old}" in agent.output(), "the end of the old mode", timeout_s=30
        )
        assert {each: each.ask() for each in connections} == connections


def test_the_last_connection_of_the_old_mode_ends_its_nat(net: Topology) -> None:
    net.node.shell("echo 1 >/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait")
    agent = make(net, "nftables")
    with agent, Probe(net.on_node) as probe:
        with probe.socket(socket.SOCK_STREAM) as connection:
            connection.connect(known.WEB[0], 80)
            first = connection.ask()
            switch(agent, "bpf")
            eventually(lambda: "switched from mode nftables" in agent.output(), "the end of the old mode")
            assert "ebpfproxy-takeover" in net.node.shell("nft list tables")
            assert connection.ask() == first
        eventually(lambda: "ebpfproxy" not in net.node.shell("nft list tables"), "its end", timeout_s=30)
        modes = agent.state_dir / "modes.json"  # written once the table is gone
        eventually(lambda: json.loads(modes.read_text()).keys() == {"bpf"}, "the note of it to go")


def test_auto_falls_back_and_says_why(net: Topology) -> None:
    """No cgroup v2 is mounted at what the agent is told: bpf can't run, nftables can."""
    agent = make(net, "auto")
    agent.arguments += ["--map-size", "services=4294967295"]  # the kernel refuses so large a map
    with agent, Probe(net.on_node) as probe:
        assert set(probe.tcp(known.WEB[0], 80, 3)) == {"pod1", "pod2", "pod3"}
        said = agent.status()
        assert said["mode"] == "nftables"
        (reason,) = said["passed_over"]
        assert reason.startswith("bpf: ")
        assert "mode bpf can't be used here" in agent.output()
        eventually(lambda: not traces(net, "bpf"), "what mode bpf began to be removed")
        metrics = net.on_node_bare.run("curl", "-s", "http://127.0.0.1:10249/metrics").stdout
        assert 'ebpfproxy_mode_passed_over{mode="bpf",reason="' in metrics


def test_cleanup_knows_every_mode(net: Topology) -> None:
    for mode in ("nftables", "bpf"):
        agent = make(net, mode)
        with agent:
            assert traces(net, mode)
            agent.kill()  # before it can remove anything
        agent.cli("cleanup", "--bpffs", net.bpffs, "--state-dir", agent.state_dir)
        assert not traces(net, mode)
