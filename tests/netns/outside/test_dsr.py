"""Direct server return between real hosts: flows that change their entry node, and packets in batches."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from rig.cluster import Cluster
from rig.objects import endpoint, endpoint_slice, service
from rig.servers import name_servers
from rig.topology import wait_listening
from rig.wait import eventually

from .conftest import MODES, World, start_agents
from .table import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.agent import Agent
    from rig.objects import Object
    from rig.process import Place

pytestmark = [pytest.mark.root, pytest.mark.netns]

FORWARDING = {"ebpfproxy.io/forwarding": "dsr"}
WEB = ("203.0.113.1", "2001:db8:f::1")
SINK = ("203.0.113.2", "2001:db8:f::2")
SINK_PORT = 9000
#: Of the client's link: its packets fit everywhere, also with another header in front.
MTU = 1400
SIZE_BYTES = 8_000_000

FAMILIES = (socket.AF_INET, socket.AF_INET6)
families = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])

#: Prints the hash of what comes; answers with as much.
SERVER = """
import hashlib, socket, sys
server = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    connection, _ = server.accept()
    seen, got = hashlib.sha256(), 0
    while data := connection.recv(1 << 20):
        seen.update(data)
        got += len(data)
    connection.sendall(seen.hexdigest().encode() + bytes(range(250)) * (got // 250))
    connection.close()
"""
CLIENT = """
import hashlib, random, socket, sys
data = random.Random(1).randbytes(int(sys.argv[3]))
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    answer = b""
    while part := connection.recv(1 << 20):
        answer += part
assert answer[:64].decode() == hashlib.sha256(data).hexdigest()
assert answer[64:] == bytes(range(250)) * (len(data) // 250)
"""


def sink(stack: ExitStack, cluster: Cluster) -> list[Object]:
    """Start the server of the hashes in pod21; return the objects of its Service."""
    place = cluster.pods["pod21"].place
    stack.enter_context(place.start(sys.executable, "-c", SERVER, str(SINK_PORT)))
    wait_listening(place, SINK_PORT)
    port: Object = {"name": "bulk", "port": SINK_PORT}
    return [
        service(
            *("sink", port),
            ips=("10.96.0.2", "fd00:96::2"),
            annotations=FORWARDING,
            type="LoadBalancer",
            ingress=SINK,
        ),
        *(endpoint_slice("sink", [endpoint(ip, node="node-2")], port) for ip in cluster.pods["pod21"].ips),
    ]


@pytest.fixture(scope="module", params=MODES, ids=str)
def world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    """Two nodes with two pods each; devices leave their work to the next one: packets come in batches."""
    with ExitStack() as stack:
        # A driver's XDP sees what comes from a wire: packets that are finished.
        offloads = request.param.name != "native"
        cluster = stack.enter_context(Cluster(node_count=2, mtus={"client": MTU}, offloads=offloads))
        stack.enter_context(name_servers([(name, pod.place) for name, pod in cluster.pods.items()], 8080))
        pods = [
            [endpoint(pod.ips[family], node=cluster.node_of(pod).node_name) for pod in cluster.pods.values()]
            for family in (0, 1)
        ]
        objects = [
            service(
                *("web", {"name": "http", "port": 80, "targetPort": 8080}),
                ips=("10.96.0.1", "fd00:96::1"),
                annotations=FORWARDING | {"ebpfproxy.io/scheduler": "maglev"},
                type="LoadBalancer",
                ingress=WEB,
            ),
            *(endpoint_slice("web", each, TARGETS[0]) for each in pods),
            *sink(stack, cluster),
        ]
        agents = start_agents(stack, cluster, objects, request.param)
        yield World(cluster, agents, stack)


@families
def test_flows_go_on_when_the_vip_is_routed_to_another_node(world: World, family: int) -> None:
    first, second = world.cluster.nodes
    probe = world.probe("client")
    with ExitStack() as stack:
        flows = [stack.enter_context(probe.socket(socket.SOCK_STREAM, FAMILIES[family])) for _ in range(20)]
        for flow in flows:
            flow.connect(WEB[family], 80)
        before = [flow.ask() for flow in flows]
        assert len(set(before)) > 2
        for node in (second, first):
            world.cluster.route_vips(node)
            assert [flow.ask() for flow in flows] == before


@families
def test_what_is_sent_in_batches_arrives_whole(world: World, family: int) -> None:
    world.probe("client")
    place: Place = world.cluster.place("client")
    place.run(sys.executable, "-c", CLIENT, SINK[family], str(SINK_PORT), str(SIZE_BYTES))


@families
def test_connections_say_which_way_they_go(world: World, family: int) -> None:
    with world.probe("client").socket(socket.SOCK_STREAM, FAMILIES[family]) as flow:
        flow.connect(SINK[family], SINK_PORT)

        def kinds(agent: Agent) -> set[str]:
            return {row["kind"] for row in agent.rows("connections") if row["service"] == "default/sink:bulk"}

        eventually(lambda: kinds(world.agents[0]) == {"dsr"}, "the flow on the node that was asked")
        eventually(lambda: kinds(world.agents[1]) == {"dsr-in"}, "the flow on the backend's node")


@pytest.fixture(scope="module", params=MODES, ids=str)
def small_world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    """Two nodes with links of the same size: no room for another header."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=2, pods_per_node=1))
        agents = start_agents(stack, cluster, sink(stack, cluster), request.param)
        yield World(cluster, agents, stack)


@families
@pytest.mark.parametrize("mtu", [1500, MTU])
def test_both_ends_learn_the_size_of_the_way(small_world: World, family: int, mtu: int) -> None:
    """The way in is told by node-1, or by the router and it; the way back by the router and both nodes."""
    cluster = small_world.cluster
    destinations = [("198.51.100.0/24", "2001:db8:c::/64")[family], cluster.nodes[1].pod_cidrs[family]]
    for name in ("client", "pod21"):
        cluster.place(name).run("ip", f"-{'46'[family]}", "route", "flush", "cache")
    cluster.narrow(destinations, mtu)
    try:
        place = cluster.place("client")
        place.run(sys.executable, "-c", CLIENT, SINK[family], str(SINK_PORT), str(SIZE_BYTES // 8))
        route = place.run("ip", "route", "get", SINK[family]).stdout
        assert f"mtu {mtu - (20, 40)[family]}" in route
    finally:
        cluster.narrow(destinations, 1500)
