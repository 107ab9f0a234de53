"""The way between client and backend: errors that come back from it, packets too large for it, fragments."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rig.cluster import ROUTER_IPS, Cluster
from rig.objects import endpoint, endpoint_slice, service
from rig.servers import iperf3_server, name_servers

from .conftest import MODES, World, start_agents
from .table import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.objects import Object

pytestmark = [pytest.mark.root, pytest.mark.netns]

FAMILIES = (socket.AF_INET, socket.AF_INET6)
#: What the small hop lets through; IPv6 asks for 1280 at least (RFC 8200 5).
SMALL_MTU = 1300
#: Fits a link, but not the small hop.
PAYLOAD = bytes(range(256)) * 5 + bytes(120)
MTU_DISCOVER = ((socket.IPPROTO_IP, 10), (socket.IPPROTO_IPV6, 23))  # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER
PMTUDISC_DO = 2  # never in fragments


class Target(NamedTuple):
    """A Service with one backend."""

    backend: str
    vips: tuple[str, str]

    def __str__(self) -> str:
        return self.backend


HERE = Target("pod11", ("203.0.113.1", "2001:db8:f::1"))
ELSEWHERE = Target("pod21", ("203.0.113.2", "2001:db8:f::2"))
EMPTY = Target("nobody", ("203.0.113.3", "2001:db8:f::3"))
BULK: Object = {"name": "bulk", "port": 5201}

families = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
targets = pytest.mark.parametrize("target", [HERE, ELSEWHERE], ids=str)


@pytest.fixture(scope="module", params=MODES, ids=str)
def world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    """Two nodes; the VIPs are routed to node-1."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=2, pods_per_node=1))
        stack.enter_context(name_servers([(name, pod.place) for name, pod in cluster.pods.items()], 8080))
        for pod in cluster.pods.values():
            stack.enter_context(iperf3_server(pod.place))
        objects: list[Object] = []
        for target in (HERE, ELSEWHERE, EMPTY):
            ports = (
                {"name": "http", "port": 80, "targetPort": 8080},
                {"name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP"},
                BULK,
            )
            number = target.vips[0].rpartition(".")[2]
            objects.append(
                service(
                    *(f"to-{target}", *ports),
                    ips=(f"10.96.0.{number}", f"fd00:96::{number}"),
                    type="LoadBalancer",
                    ingress=target.vips,
                )
            )
            if target is EMPTY:
                continue
            pod = cluster.pods[target.backend]
            node = cluster.node_of(pod).node_name
            objects += [
                endpoint_slice(f"to-{target}", [endpoint(address, node=node)], *TARGETS, BULK)
                for address in pod.ips
            ]
        agents = start_agents(stack, cluster, objects, request.param)
        yield World(cluster, agents, stack)


@pytest.fixture
def narrow(world: World) -> Iterator[None]:
    """Both the client's and node-2's pods' side of the router are small for the time of a test."""
    destinations = ["198.51.100.0/24", "2001:db8:c::/64", *world.cluster.nodes[1].pod_cidrs]
    world.cluster.narrow(destinations, SMALL_MTU)
    yield
    world.cluster.narrow(destinations, 1500)
    for name in ("client", "pod11", "pod21", "node-1", "node-2"):
        world.cluster.place(name).run("ip", "route", "flush", "cache")
        world.cluster.place(name).run("ip", "-6", "route", "flush", "cache")


# --- path-MTU discovery


@pytest.mark.parametrize("direction", ["up", "down"])
@families
@targets
def test_tcp_transfer_finishes(
    world: World, narrow: None, target: Target, family: int, direction: str
) -> None:
    """Without the error, the sender's full packets are lost for good; both ends announce 1500 bytes."""
    command = ["iperf3", "--client", target.vips[family], "--bytes", "300K", "--connect-timeout", "3000"]
    place = world.cluster.place("client")
    place.run(*command, *(["--reverse"] if direction == "down" else []), timeout_s=10)


@families
def test_client_learns_the_size_of_the_way_behind_the_node(world: World, narrow: None, family: int) -> None:
    """The router's error is about a packet that the node made; the client gets it about its own."""
    with world.probe("client").socket(socket.SOCK_DGRAM, FAMILIES[family]) as client:
        client.setsockopt(*MTU_DISCOVER[family], PMTUDISC_DO)
        client.connect(ELSEWHERE.vips[family], 80)
        client.send(PAYLOAD)
        client.settimeout(2)
        with pytest.raises(OSError, match="Message too long"):
            client.recv()
        client.send(PAYLOAD[:1000])
        assert client.recv().startswith(b"pod21 ")


@families
@targets
def test_backend_learns_the_size_of_the_way_to_the_client(
    world: World, narrow: None, target: Target, family: int
) -> None:
    """Its first answer is too large and lost, later ones come in fragments. The client learns as well."""
    vip = target.vips[family]
    with world.probe("client").socket(socket.SOCK_DGRAM, FAMILIES[family]) as client:
        client.connect(vip, 80)
        client.settimeout(0.5)
        answers = []
        for _ in range(6):
            with suppress(OSError):  # nothing comes, or "message too long" about the packet before
                client.send(PAYLOAD)
                answers.append(client.recv())
        assert {answer.split(b" ", 2)[2] for answer in answers} == {PAYLOAD}


# --- fragments


@families
@targets
@pytest.mark.parametrize("length", [1473, 4000, 60000])
def test_datagram_in_fragments(world: World, target: Target, family: int, length: int) -> None:
    payload = (bytes(range(256)) * 250)[:length]
    with world.probe("client").socket(socket.SOCK_DGRAM, FAMILIES[family]) as client:
        client.settimeout(2)
        client.sendto(payload, target.vips[family], 80)
        data, sender = client.recvfrom()
    assert data.split(b" ", 2)[2] == payload
    assert sender == (target.vips[family], 80)


# --- echo, traceroute


@families
@targets
def test_ping(world: World, target: Target, family: int) -> None:
    world.cluster.place("client").run("ping", "-n", "-c", "2", "-i", "0.1", "-W", "2", target.vips[family])


@families
def test_ping_of_a_vip_without_backends_is_not_answered(world: World, family: int) -> None:
    ping = ["ping", "-n", "-c", "1", "-W", "1", EMPTY.vips[family]]
    assert world.cluster.place("client").run(*ping, check=False).returncode == 1


@pytest.mark.parametrize("method", ["tcp", "udp"])
@families
@targets
def test_traceroute(world: World, target: Target, family: int, method: str) -> None:
    """Every hop answers; those behind a translated source show the node, and the VIP is the last."""
    first = world.cluster.nodes[0]
    hops = [ROUTER_IPS[family], first.ips[family]]
    if target is ELSEWHERE:
        hops += [first.ips[family]] * 2
    flags = {"tcp": ["-T", "-p", "80"], "udp": ["-U", "-p", "80"]}[method]
    command = ["traceroute", "-n", "-q", "1", "-w", "1", "-m", "7", *flags, target.vips[family]]
    lines = world.cluster.place("client").run(*command).stdout.splitlines()[1:]
    assert [line.split()[1] for line in lines] == [*hops, target.vips[family]]
