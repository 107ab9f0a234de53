"""UDP through VIPs: DNS with real tools, which address answers, and backends that go away."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from ebpfproxy import sockdiag
from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.servers import dns_server
from rig.wait import eventually

from . import catalogue as known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.objects import Object
    from rig.probe import RemoteSocket
    from rig.process import Place
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

PORTS: tuple[Object, ...] = (
    {"name": "udp", "port": 53, "protocol": "UDP"},
    {"name": "tcp", "port": 53},
)


@pytest.fixture
def agent(net: Topology, mode: str) -> Iterator[Agent]:
    """Not started yet: what is written before the start works when it is ready."""
    made = Agent(net, mode=mode, config=known.CONFIG)
    yield made
    made.stop()


@pytest.fixture
def bpf_agent(net: Topology) -> Iterator[Agent]:
    """The same for what only our own programs could get wrong."""
    made = Agent(net, config=known.CONFIG)
    yield made
    made.stop()


def place_of(net: Topology, origin: str) -> Place:
    pod = net.pods[3]
    return {
        "node": net.on_node,
        "pod": pod.place,
        "pod-in-cgroup": net.in_cgroup(pod),
        "outside": net.from_outside,
    }[origin]


def test_dig_through_a_vip(net: Topology, agent: Agent) -> None:
    agent.write(
        service("dns", *PORTS, ips=known.DNS),
        *known.slices("dns", net.pods[:2], *PORTS),
    )
    records = {"web.test": ("192.0.2.80", "2001:db8::80")}
    with dns_server(net.pods[0].place, records), dns_server(net.pods[1].place, records), agent:
        for origin in ("node", "pod", "pod-in-cgroup", "outside"):
            for vip in known.DNS:
                for transport in ("+notcp", "+tcp"):
                    # dig refuses an answer from another address than it asked.
                    command = [
                        "dig",
                        f"@{vip}",
                        "web.test",
                        "A",
                        "web.test",
                        "AAAA",
                        "+short",
                        "+tries=1",
                        transport,
                    ]
                    answer = place_of(net, origin).run(*command).stdout.split()
                    assert answer == ["192.0.2.80", "2001:db8::80"], (origin, vip, transport)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("origin", ["node", "pod", "pod-in-cgroup", "outside"])
def test_next_query_goes_elsewhere_when_the_backend_goes(
    net: Topology, agent: Agent, origin: str, family: int
) -> None:
    """One unconnected socket: it keeps its backend, and loses it at once when the endpoint is removed."""
    vip = known.WEB[family]
    pods = {pod.name: pod for pod in net.pods[:2]}
    web = service("web", known.UDP, ips=known.WEB)
    agent.write(web, *known.slices("web", pods.values(), known.TO_UDP))
    with (
        agent,
        Probe(place_of(net, origin)) as probe,
        probe.socket(socket.SOCK_DGRAM, (socket.AF_INET, socket.AF_INET6)[family]) as client,
    ):

        def ask() -> str:
            client.sendto(b"?", vip, 80)
            data, sender = client.recvfrom()
            assert sender == (vip, 80)
            return data.split(b" ")[0].decode()

        first = ask()
        assert {ask() for _ in range(10)} == {first}, "a flow stays where it is"
        (other,) = set(pods) - {first}
        agent.write(web, *known.slices("web", [pods[other]], known.TO_UDP))
        agent.wait_backends("default/web:udp", {pods[other].ips[family]})
        assert ask() == other


@pytest.mark.skipif(sockdiag.why_not() is not None, reason="this kernel ends no sockets for others")
@pytest.mark.parametrize("kind", ["v4", "v6", "mapped"])
@pytest.mark.parametrize("origin", ["node", "pod-in-cgroup"])
def test_connected_socket_ends_with_its_backend(
    net: Topology, bpf_agent: Agent, origin: str, kind: str
) -> None:
    """The process is told (ECONNABORTED) and connects anew; sockets to other backends notice nothing.

    Where packets are translated, its next datagram goes elsewhere by itself.
    """
    agent = bpf_agent
    vip = {"v4": known.WEB[0], "v6": known.WEB[1], "mapped": f"::ffff:{known.WEB[0]}"}[kind]
    family = socket.AF_INET if kind == "v4" else socket.AF_INET6
    pods = {pod.name: pod for pod in net.pods[:2]}
    web = service("web", known.UDP, ips=known.WEB)
    agent.write(web, *known.slices("web", pods.values(), known.TO_UDP))

    def ask(client: RemoteSocket) -> str:
        client.send(b"?")
        return client.recv().split(b" ")[0].decode()

    with agent, Probe(place_of(net, origin)) as probe, ExitStack() as stack:
        by_name: dict[str, RemoteSocket] = {}
        while len(by_name) < 2:
            client = stack.enter_context(probe.socket(socket.SOCK_DGRAM, family))
            client.connect(vip, 80)
            by_name[ask(client)] = client
        agent.write(web, *known.slices("web", [pods["pod2"]], known.TO_UDP))
        with pytest.raises(ConnectionAbortedError):
            by_name["pod1"].recv()
        assert ask(by_name["pod2"]) == "pod2"
        by_name["pod1"].connect(vip, 80)
        assert ask(by_name["pod1"]) == "pod2"
        eventually(lambda: "closed 1 UDP sockets" in agent.output(), "the agent to say it")


@pytest.mark.parametrize("origin", ["pod", "outside"])
@pytest.mark.parametrize("offload", ["on", "off"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_checksums_for_every_length(
    net: Topology, bpf_agent: Agent, origin: str, offload: str, family: int
) -> None:
    """With offloads off the sender writes the checksum in full and the receiver checks what we changed."""
    agent = bpf_agent
    agent.write(
        service("web", known.UDP, ips=known.WEB),
        *known.slices("web", net.pods[:1], known.TO_UDP),
    )
    place = place_of(net, origin)
    for where, device in [
        (place, "eth0"),
        (net.pods[0].place, "eth0"),
        (net.on_node_bare, net.pods[0].device),
        (net.on_node_bare, {"pod": net.pods[3].device, "outside": "eth0"}[origin]),
    ]:
        where.run("ethtool", "-K", device, "tx", offload, "gso", offload, "gro", offload)
    vip = known.WEB[family]
    with (
        agent,
        Probe(place) as probe,
        probe.socket(socket.SOCK_DGRAM, (socket.AF_INET, socket.AF_INET6)[family]) as client,
    ):
        client.connect(vip, 80)

        for length in [*range(40), 511, 512, 1399, 1400, 1401]:
            payload = (bytes(range(256)) * 6)[:length]
            client.send(payload)
            assert client.recv().split(b" ", 2)[2] == payload
