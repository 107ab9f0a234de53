"""Mode userspace: its own promises; and the tables of test_services where iptables leads to the proxy."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ebpfproxy
from ebpfproxy.dataplane.userspace import client, protocol
from ebpfproxy.dataplane.userspace.netfilter import TABLE
from rig.agent import Agent
from rig.names import temporary_directory
from rig.objects import service
from rig.probe import Load, Probe, more
from rig.process import HERE
from rig.servers import name_servers
from rig.topology import NODE_IPS, Topology
from rig.wait import eventually

from . import catalogue as known
from . import test_services as tables
from .conftest import World, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Pod

pytestmark = [pytest.mark.root, pytest.mark.netns]


def path_of(tool: str, net: Topology) -> dict[str, str]:
    """Return an environment in which the agent finds ``tool`` alone to write rules with."""
    if tool == "nft":
        return {}
    directory = net.directory / "path"
    directory.mkdir()
    for place in os.environ["PATH"].split(":"):
        for found in Path(place).glob("*"):
            with contextlib.suppress(FileExistsError):
                if found.name != "nft":
                    (directory / found.name).symlink_to(found)
    return {"PATH": str(directory)}


@pytest.fixture(scope="module")
def world(nothing_left: None) -> Iterator[World]:
    with ExitStack() as stack:
        net = stack.enter_context(Topology(pod_count=4))
        # The kernel tells a host once a second that a port is unreachable; here it asks more often.
        net.node.shell("echo 0 >/proc/sys/net/ipv4/icmp_ratelimit; echo 0 >/proc/sys/net/ipv6/icmp/ratelimit")
        stack.enter_context(name_servers([*serving(net), ("node", net.on_node_bare)], 8080, 8081))
        net.outside.shell(
            """
            ip addr add 192.0.2.101/24 dev eth0
            ip addr add 2001:db8::101/64 dev eth0 nodad preferred_lft 0
            """
        )
        agent = Agent(net, mode="userspace", config=known.CONFIG, env=path_of("iptables", net))
        agent.write(*known.objects(net.pods[:3]))
        stack.enter_context(agent)
        assert "iptables leads VIPs to the proxy" in agent.output()
        places = {"node": net.on_node_bare, "pod": net.pods[3].place, "outside": net.from_outside}
        yield World(net, agent, {name: stack.enter_context(Probe(place)) for name, place in places.items()})


def rows(listed: list[tables.Row], *, but: tuple[str, ...] = ()) -> list[object]:
    """Return a table of test_services for the places of this world."""
    found = []
    for row in listed:
        origins = tuple(origin for origin in row.origins if origin in ("node", "pod", "outside"))
        if row.what not in but:
            found.append(row._replace(origins=origins, marks=()))
    return tables.cases(found)


@pytest.mark.parametrize(("row", "origin", "family", "transport"), rows(tables.ANSWERED))
def test_answered_by(world: World, row: tables.Row, origin: str, family: int, transport: str) -> None:
    assert tables.ask(world, origin, row.vips[family], row.port, transport, 9) == row.names


# Unconnected sockets of UDP are not told of errors, but by a program inside sendmsg().
REFUSED = [
    row._replace(transports=tuple(each for each in row.transports if each != "udp")) for row in tables.REFUSED
]


@pytest.mark.parametrize(("row", "origin", "family", "transport"), rows(REFUSED, but=("loopback in a pod",)))
def test_refused_at_once(world: World, row: tables.Row, origin: str, family: int, transport: str) -> None:
    # A rule that rejects what a process on the node sends fails its sendmsg() with EPERM.
    errors = (ConnectionRefusedError, *([PermissionError] if origin == "node" and transport != "tcp" else []))
    with pytest.raises(errors):
        tables.ask(world, origin, row.vips[family], row.port, transport)


@pytest.mark.parametrize(("row", "origin", "family", "transport"), rows(tables.LOST))
def test_dropped(world: World, row: tables.Row, origin: str, family: int, transport: str) -> None:
    with world.probes[origin].impatient(), pytest.raises(TimeoutError):
        tables.ask(world, origin, row.vips[family], row.port, transport)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_source_ranges_let_their_sources_in(world: World, family: int) -> None:
    tables.test_source_ranges_let_their_sources_in(world, family)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("origin", ["node", "pod", "outside"])
def test_a_vip_with_backends_answers_echo_requests(world: World, origin: str, family: int) -> None:
    ping = ["ping", "-c", "1", "-W", "5", "-n", known.WEB[family]]
    world.probes[origin].place.run(*ping)


def test_backends_see_the_node(world: World) -> None:
    """The limit that `status` tells: the client's address does not reach the backend."""
    (answer,) = world.probes["outside"].answers(NODE_IPS[0], 30017)
    assert answer.split(" ")[1] == "10.244.0.1", "the node's address towards its pods"
    assert any("see the proxy's address" in text for text in world.agent.status()["unsupported"])


def test_metrics_have_the_counts_of_the_proxy(world: World) -> None:
    world.probes["outside"].tcp(NODE_IPS[0], 30080, 3)
    page = world.net.on_node_bare.run("curl", "-sS", "http://127.0.0.1:10249/metrics").stdout
    (line,) = [each for each in page.splitlines() if 'ebpfproxy_verdicts_total{verdict="proxied"}' in each]
    assert float(line.split(" ")[1]) >= 3


def test_the_proxy_is_behind_the_rules_only(world: World) -> None:
    """Its ports are not served to those who were not led there."""
    with contextlib.closing(client.Proxy(world.agent.state_dir)) as proxy:
        ports = {
            proxy.hello.ports[key] for key, each in proxy.hello.listeners.items() if "TCP" in each.service
        }
    for origin in ("outside", "node"):
        for port in sorted(ports)[:5]:
            with pytest.raises(ConnectionRefusedError):
                world.probes[origin].tcp(NODE_IPS[0], port)


# --- nothing is cut


def test_the_ports_of_the_proxy_are_free_for_the_other_family(net: Topology) -> None:
    """A client on the node whose port the proxy has in the other family gets its answers."""
    agent = Agent(net, mode="userspace", config=known.CONFIG)
    agent.write(*web(net.pods[0]))
    with agent, Probe(net.on_node_bare) as node, contextlib.closing(client.Proxy(agent.state_dir)) as proxy:
        taken: dict[int, set[int]] = {4: set(), 6: set()}
        for key, each in proxy.hello.listeners.items():
            served = proxy.hello.services[each.service]
            if served.protocol == "UDP":
                taken[served.family].add(proxy.hello.ports[key])
        for family, here, there in zip((4, 6), NODE_IPS, net.pods[0].ips, strict=True):
            for port in taken[10 - family] - taken[family]:
                assert node.udp(there, known.TO_UDP["port"], bind=(here, port)) == {"pod1": 1}


def web(*pods: Pod) -> list[dict[str, Any]]:
    return [
        service(
            "web",
            known.HTTP | {"nodePort": 30080},
            known.UDP | {"nodePort": 30080},
            ips=known.WEB,
            type="NodePort",
        ),
        *known.slices("web", pods, known.TO_HTTP, known.TO_UDP),
    ]


class Busy:
    """An agent with one Service under every kind of load."""

    def __init__(self, net: Topology, agent: Agent, loads: list[Load]) -> None:
        self.net, self.agent, self.loads = net, agent, loads

    def goes_on(self) -> list[set[str]]:
        return [set(answers) for answers in more(self.loads, 30)]

    def set_backends(self, *pods: Pod) -> None:
        self.agent.write(*web(*pods))
        eventually(lambda: set(more(self.loads[:1], 12)[0]) == {pod.name for pod in pods}, "the change")


@pytest.fixture
def busy(net: Topology) -> Iterator[Busy]:
    agent = Agent(net, mode="userspace", config=known.CONFIG)
    agent.write(*web(*net.pods[:3]))
    with ExitStack() as stack:
        stack.enter_context(agent)
        node, pod, outside = (
            stack.enter_context(Probe(place))
            for place in (net.on_node_bare, net.pods[3].place, net.from_outside)
        )
        loads = [
            stack.enter_context(probe.load(address, port, mode=mode, workers=1, pause_s=0.005))
            for probe, address, port, mode in [
                (node, known.WEB[0], 80, "new"),
                (node, known.WEB[1], 80, "keep"),
                (pod, known.WEB[0], 80, "udp"),
                (pod, known.WEB[0], 80, "keep"),
                (outside, NODE_IPS[1], 30080, "new"),
                (outside, NODE_IPS[0], 30080, "udp-keep"),
                (outside, NODE_IPS[0], 30080, "keep"),
            ]
        ]
        yield Busy(net, agent, loads)
        # The loads' ends assert that no request failed.


def test_endpoints_change_under_load(busy: Busy) -> None:
    first, second, third = busy.net.pods[:3]
    kept = busy.goes_on()
    for pods in [(first, second), (second, third), (third,), (first, second, third), (second,)]:
        busy.set_backends(*pods)
    answered = busy.goes_on()
    assert answered[0] == answered[2] == answered[4] == answered[5] == {"pod2"}
    assert [answered[n] for n in (1, 3, 6)] == [kept[n] for n in (1, 3, 6)], "kept connections stay"


def test_the_agent_is_killed_and_comes_back_under_load(busy: Busy) -> None:
    pid = proxy_pid(busy.agent)
    busy.agent.kill()
    busy.goes_on()
    busy.agent.start()
    busy.goes_on()
    busy.agent.terminate()
    busy.goes_on()
    busy.agent.start()
    busy.set_backends(*busy.net.pods[:1])
    assert proxy_pid(busy.agent) == pid


def test_upgrade_under_load(busy: Busy) -> None:
    """A build that differs in one comment takes over from the one that runs."""
    old = proxy_pid(busy.agent)
    package = busy.net.directory / "ebpfproxy"
    shutil.copytree(Path(ebpfproxy.__file__).parent, package)
    with (package / "dataplane/userspace/pump.py").open("a") as file:
        file.write("# another build\n")
    busy.agent.terminate()
    busy.agent.env |= {"PYTHONPATH": str(busy.net.directory), "PYTHONSAFEPATH": "1"}
    busy.agent.start()
    busy.goes_on()
    new = proxy_pid(busy.agent)
    assert new != old
    assert Path(f"/proc/{old}").exists(), "it serves the connections that it has"
    for load in busy.loads:
        load.stop()
    eventually(lambda: is_gone(old), "the old process to end with its last connection", timeout_s=40)


def proxy_pid(agent: Agent) -> int:
    with protocol.connect(agent.state_dir / protocol.SOCKET, 10) as connection:
        hello = protocol.receive(connection)
    assert isinstance(hello, protocol.Hello)
    return hello.pid


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


# --- it mends


@pytest.fixture
def agent(net: Topology) -> Iterator[Agent]:
    made = Agent(net, mode="userspace", config=known.CONFIG)
    made.write(*web(*net.pods[:3]))
    with made:
        yield made


def test_a_proxy_that_is_killed_comes_back(net: Topology, agent: Agent) -> None:
    os.kill(proxy_pid(agent), signal.SIGKILL)
    with Probe(net.from_outside) as probe, probe.impatient(2):
        eventually(lambda: answers(probe, known.WEB[0], 80), "Services to work again")
        assert len(probe.tcp(known.WEB[0], 80, 6)) == 3
    assert "the userspace proxy ended" in agent.output()


def test_a_flushed_ruleset_comes_back(net: Topology, agent: Agent) -> None:
    net.node.shell("nft flush ruleset")
    with Probe(net.from_outside) as probe, probe.impatient():
        eventually(lambda: answers(probe, known.WEB[0], 80), "Services to work again")
    assert "somebody removed the rules" in agent.output()


def test_a_udp_client_follows_its_service(net: Topology, agent: Agent) -> None:
    """The Service goes and comes again, on another port of the proxy; the client keeps its own port."""
    with (
        Probe(net.from_outside) as probe,
        probe.load(NODE_IPS[0], 30080, mode="udp-keep", workers=1) as before,
    ):
        before.more(20)
    with (
        Probe(net.from_outside) as probe,
        probe.impatient(0.3),
        probe.socket(socket.SOCK_DGRAM) as client_socket,
    ):

        def is_answered() -> bool:
            client_socket.sendto(b"?", NODE_IPS[0], 30080)
            with contextlib.suppress(OSError):
                return bool(client_socket.recv())
            return False

        eventually(is_answered, "an answer")
        agent.write(known.NODE)
        eventually(lambda: not is_answered(), "the Service to be gone")
        agent.write(*web(net.pods[0]))
        eventually(is_answered, "the same socket to be answered again", timeout_s=10)


def answers(probe: Probe, address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(probe.tcp(address, port))
    return False


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_cleanup_removes_everything(net: Topology, tool: str) -> None:
    def rules() -> str:
        return "".join(
            net.on_node_bare.run(*command).stdout
            for command in (["nft", "list", "ruleset"], ["iptables-save"], ["ip6tables-save"])
        )

    env = path_of(tool, net)
    made = Agent(net, mode="userspace", config=known.CONFIG, env=env)
    made.write(*web(*net.pods[:3]))
    with made:
        pid = proxy_pid(made)
        assert (TABLE if tool == "nft" else "EBPFPROXY-USER") in rules()
        made.terminate()
        said = made.cli("cleanup", "--state-dir", made.state_dir, "--bpffs", net.bpffs).stdout
    assert f"process {pid}" in said
    assert is_gone(pid)
    assert TABLE not in rules()
    assert "EBPFPROXY" not in rules()


# --- without privileges


def test_without_privileges_it_serves_addresses_that_it_is_given(net: Topology) -> None:
    """A user without a capability; the port below 1024 is opened to all by the administrator's sysctl."""
    directory = temporary_directory("nobody")
    manifests, state = directory / "manifests", directory / "state"
    manifests.mkdir()
    net.node.shell("echo 80 > /proc/sys/net/ipv4/ip_unprivileged_port_start")
    made = Agent(net, mode="userspace", config=known.CONFIG)
    made.write(*known.objects(net.pods[:3]))
    (manifests / "objects.json").write_text((made.manifests / "objects.json").read_text())
    assert made.config_file
    config = directory / "config.json"
    config.write_text(made.config_file.read_text())
    HERE.run("chown", "-R", "nobody", directory)
    made.stop()
    command = ["setpriv", "--reuid=nobody", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    command += [sys.executable, "-m", "ebpfproxy", "run", "--mode", "userspace", "--node-name", "node-1"]
    command += ["--listen", f"{NODE_IPS[0]},{NODE_IPS[1]}", "--healthz-bind-address", ""]
    command += ["--metrics-bind-address", "", "--config", str(config)]
    try:
        with net.on_node_bare.start(*command, "--manifests", manifests, "--state-dir", state) as process:
            eventually(lambda: "ready:" in process.output() or process.poll() is not None, "the agent")
            assert process.poll() is None, process.output()
            assert not net.on_node_bare.run("nft", "list", "ruleset").stdout
            with Probe(net.from_outside) as probe:
                for family in (0, 1):
                    assert set(probe.tcp(NODE_IPS[family], 30080, 9)) == {"pod1", "pod2", "pod3"}
                    assert set(probe.udp(NODE_IPS[family], 30080, 9)) == {"pod1", "pod2", "pod3"}
                    assert set(probe.tcp(NODE_IPS[family], 30017, 9)) == {"pod1", "pod2"}, "policy Local"
                    assert set(probe.tcp(NODE_IPS[family], 81, 9)) == {"pod1", "pod2", "pod3"}, "web:second"
                    with pytest.raises(ConnectionRefusedError):
                        probe.tcp(NODE_IPS[family], 82)
                    with probe.impatient(), pytest.raises((TimeoutError, ConnectionResetError)):
                        probe.tcp(NODE_IPS[family], 30019)  # it depends on the kernel which
                    with probe.impatient(), pytest.raises(TimeoutError):
                        probe.udp(NODE_IPS[family], 30019)
            assert "port 80 of 192.0.2.1 is default/" in process.output()
    finally:
        client.stop(state)
        shutil.rmtree(directory)
