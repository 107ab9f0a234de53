"""What a row of services.yaml can't say: affinity, health checks, many source ranges, SCTP."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkInitAck

from rig.cluster import CLIENT_IPS, CLUSTER_CIDRS, OTHER_CLIENT_IPS, Cluster
from rig.objects import endpoint, endpoint_slice, service
from rig.probe import Probe
from rig.servers import name_servers
from rig.wait import eventually

from . import table
from .conftest import MODES, World, start_agents

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rig.objects import Object
    from rig.probe import RemoteSocket

pytestmark = [pytest.mark.root, pytest.mark.netns]

FAMILIES = (socket.AF_INET, socket.AF_INET6)
families = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])

STICKY_NODE_PORT, HEALTH_PORT, SCTP_NODE_PORT = 30001, 30002, 30003
SCTP_PORT: Object = {"name": "sctp", "port": 132, "targetPort": 8132, "protocol": "SCTP"}


def vips(number: int) -> dict[str, Any]:
    """Return the arguments of :func:`service` that give it load balancer, external and cluster IPs."""
    return {
        "ips": (f"10.96.0.{number}", f"fd00:96::{number}"),
        "ingress": (f"203.0.113.{number}", f"2001:db8:f::{number}"),
        "externalIPs": [f"203.0.113.{100 + number}", f"2001:db8:f::{100 + number}"],
        "type": "LoadBalancer",
    }


def slices(cluster: Cluster, name: str, pods: Sequence[str], *ports: Object) -> list[Object]:
    """Return the EndpointSlices of both families."""
    return [
        endpoint_slice(
            name,
            [
                endpoint(cluster.pods[pod].ips[family], node=cluster.node_of(cluster.pods[pod]).node_name)
                for pod in pods
            ],
            *ports,
        )
        for family in (0, 1)
    ]


@pytest.fixture(scope="module", params=MODES, ids=str)
def world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=3, pods_per_node=2))
        stack.enter_context(name_servers([(name, pod.place) for name, pod in cluster.pods.items()], 8080))
        sticky = [port | {"nodePort": STICKY_NODE_PORT} for port in table.PORTS]
        objects = [
            service("sticky", *sticky, **vips(1), sessionAffinity="ClientIP"),
            *slices(cluster, "sticky", ["pod11", "pod12", "pod21", "pod22"], *table.TARGETS),
            service(
                "checked",
                *table.PORTS,
                externalTrafficPolicy="Local",
                healthCheckNodePort=HEALTH_PORT,
                **vips(2),
            ),
            *slices(cluster, "checked", ["pod11", "pod12", "pod21"], *table.TARGETS),
            service("sctp", SCTP_PORT | {"nodePort": SCTP_NODE_PORT}, **vips(3)),
            service("web", *table.PORTS, **vips(4)),
            *slices(cluster, "web", ["pod11", "pod21"], *table.TARGETS),
            *slices(cluster, "sctp", ["pod21"], {"name": "sctp", "port": 8132, "protocol": "SCTP"}),
        ]
        agents = start_agents(stack, cluster, objects, request.param)
        yield World(cluster, agents, stack)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
@families
def test_a_client_keeps_its_backend_through_every_vip(world: World, family: int, transport: str) -> None:
    probe = world.probe("client")
    node_port = (world.cluster.nodes[0].ips[family], STICKY_NODE_PORT)
    external = vips(1)["externalIPs"][family]
    for client in (CLIENT_IPS[family], OTHER_CLIENT_IPS[family]):
        answered = {
            name
            for address, port in [(vips(1)["ingress"][family], 80), node_port, (external, 80)] * 2
            for name in getattr(probe, transport)(address, port, 2, bind=(client, 0))
        }
        assert len(answered) == 1, answered


@families
def test_health_check_node_port(world: World, family: int) -> None:
    """Status, header and body as kube-proxy's; a load balancer asks it at every node."""
    for node, local in zip(world.cluster.nodes, (2, 1, 0), strict=True):
        address = node.ips[family]
        url = f"http://[{address}]:{HEALTH_PORT}/" if family else f"http://{address}:{HEALTH_PORT}/"
        answer = world.cluster.place("client").run("curl", "-sS", "--include", "--max-time", "5", url).stdout
        head, _, body = answer.replace("\r", "").partition("\n\n")
        assert head.split()[1] == ("200" if local else "503")
        assert f"x-load-balancing-endpoint-weight: {local}" in head.lower()
        assert json.loads(body)["localEndpoints"] == local
        assert json.loads(body)["service"] == {"namespace": "default", "name": "checked"}


# --- others on the node


@pytest.fixture
def masquerade(world: World) -> Iterator[None]:
    """What a CNI plugin sets up: pods that talk to the outside have their node's address."""
    nodes = world.cluster.nodes
    rules = "".join(
        f"{kind} saddr {cidr} {kind} daddr != {cidr} masquerade\n"
        for kind, cidr in zip(("ip", "ip6"), CLUSTER_CIDRS, strict=True)
    )
    table = f"table inet cni {{ chain out {{ type nat hook postrouting priority srcnat\n{rules}}}\n}}"
    for node in nodes:
        node.on_node_bare.run("nft", "-f", "-", text=table)
    yield
    for node in nodes:
        node.netns.shell("nft delete table inet cni")


@families
def test_masquerade_beside_us(world: World, masquerade: None, family: int) -> None:
    """The kernel's own translation and ours do not see each other's flows."""
    cluster = world.cluster
    who = table.owners(cluster, family)
    with name_servers([("outside", cluster.client.place())], 8080):
        for pod in ("pod12", "pod21"):
            node = cluster.node_of(cluster.pods[pod]).node_name
            asked = world.probe(pod).answers(CLIENT_IPS[family], 8080, 3)
            assert table.readable(asked, who) == {f"outside<{node}"}
    load_balancer = vips(4)["ingress"][family]
    asked = world.probe("client").answers(load_balancer, 80, 8, bind=(CLIENT_IPS[family], 0))
    assert table.readable(asked, who) == {"pod11<client", "pod21<node-1"}
    asked = world.probe("pod12").answers(load_balancer, 80, 8)
    assert table.readable(asked, who) == {"pod11<pod12", "pod21<pod12"}


@families
def test_the_nodes_own_connections_to_the_backend(world: World, family: int) -> None:
    """They come from the address that our source translation uses, too, and go to the same place."""
    backend = world.cluster.pods["pod21"].ips[family]
    with (
        world.probe("client").load(vips(4)["ingress"][family], 80, workers=4, pause_s=0) as load,
        Probe(world.cluster.nodes[0].on_node_bare) as probe,
    ):
        load.more(50)
        assert probe.tcp(backend, 8080, 300) == {"pod21": 300}
        load.more(50)


@families
def test_connections_show_the_translated_source(world: World, family: int) -> None:
    """The address and port that the backend's own kernel names as the other end."""
    cluster, vip = world.cluster, vips(4)["ingress"][family]
    node, pod = cluster.nodes[0], cluster.pods["pod21"]
    with ExitStack() as stack:
        for _ in range(4):  # to both backends: round robin
            held = stack.enter_context(
                world.probe("client").socket(
                    socket.SOCK_STREAM, FAMILIES[family], bind=(CLIENT_IPS[family], 0)
                )
            )
            held.connect(vip, 80)
            held.ask()
        wanted = ("--vip", vip, "--client", CLIENT_IPS[family], "--state", "established")
        rows = world.agents[0].rows("connections", "web", *wanted)
        lines = pod.place.run("ss", "-Htn", "state", "established", "sport = :8080").stdout.splitlines()
    remote = {row["source"] for row in rows if pod.ips[family] in row["backend"]}
    assert remote
    assert remote <= {line.split()[-1] for line in lines}
    assert all(node.ips[family] in source for source in remote)
    assert {row["source"] for row in rows if pod.ips[family] not in row["backend"]} == {""}


# --- SCTP, packet by packet: raw sockets at both ends, as the test kernel may have no SCTP


def received(raw: RemoteSocket, family: int) -> tuple[SCTP, str]:
    """Return the next SCTP packet, its checksum verified, and who it comes from."""
    ipv4_header = 20
    data, (sender, _) = raw.recvfrom()
    packet = SCTP(data if family else data[ipv4_header:])
    again = packet.copy()
    del again.chksum
    assert bytes(again) == bytes(packet), "CRC32c"
    return packet, sender


@pytest.mark.parametrize("target", ["load balancer", "NodePort"])
@families
def test_sctp_association_with_a_backend_on_another_node(world: World, family: int, target: str) -> None:
    node = world.cluster.nodes[0]
    vip, port = {
        "load balancer": (vips(3)["ingress"][family], 132),
        "NodePort": (node.ips[family], SCTP_NODE_PORT),
    }[target]
    with (
        world.probe("client").socket(socket.SOCK_RAW, FAMILIES[family], proto=socket.IPPROTO_SCTP) as client,
        world.probe("pod21").socket(socket.SOCK_RAW, FAMILIES[family], proto=socket.IPPROTO_SCTP) as server,
    ):
        client.settimeout(2)
        init = SCTPChunkInit(init_tag=7, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1)
        client.sendto(bytes(SCTP(sport=5000 + port, dport=port, tag=0) / init), vip, 0)
        request, sender = received(server, family)
        assert sender == node.ips[family]
        assert (request.dport, bytes(request.payload)) == (8132, bytes(init))
        answer = SCTPChunkInitAck(init_tag=9, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1)
        server.sendto(bytes(SCTP(sport=8132, dport=request.sport, tag=7) / answer), sender, 0)
        assert received(client, family) == (
            SCTP(bytes(SCTP(sport=port, dport=5000 + port, tag=7) / answer)),
            vip,
        )


# --- source ranges


def test_ten_thousand_source_ranges(nothing_left: None, record_property: Any) -> None:
    """One Service with 5,000 prefixes of each family; in force soon, the last of them too, and taken back."""
    many = [f"100.{64 + n // 256}.{n % 256}.0/24" for n in range(4999)]
    many += [f"2001:db8:{n:x}::/48" for n in range(0x1000, 0x1000 + 4999)]
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=1, pods_per_node=1))
        stack.enter_context(name_servers([("pod11", cluster.pods["pod11"].place)], 8080))

        def objects(ranges: list[str]) -> list[Object]:
            return [
                service("guarded", *table.PORTS, **vips(1), loadBalancerSourceRanges=ranges),
                *slices(cluster, "guarded", ["pod11"], *table.TARGETS),
                *table.node_objects(cluster),
            ]

        (agent,) = start_agents(stack, cluster, objects(many), MODES[0])
        probe = stack.enter_context(Probe(cluster.place("client")))
        probe.call("timeout", 0.2)

        def enters(family: int, client: str) -> bool:
            try:
                return set(probe.tcp(vips(1)["ingress"][family], 80, bind=(client, 0))) == {"pod11"}
            except TimeoutError:
                return False

        clients, others = CLIENT_IPS, OTHER_CLIENT_IPS
        assert not any(enters(family, clients[family]) for family in (0, 1))
        began = time.monotonic()
        agent.write(*objects([*many, f"{clients[0]}/32", f"{clients[1]}/128"]))
        eventually(lambda: all(enters(f, clients[f]) for f in (0, 1)), "the new ranges", timeout_s=30)
        record_property("one range more, seconds", round(time.monotonic() - began, 3))
        assert not any(enters(family, others[family]) for family in (0, 1))
        limit = {row["name"]: row["entries"] for row in agent.rows("maps")}["source_ranges"]
        assert limit >= 2 * 10_000, "a Service port is TCP or UDP: each has its own"
        agent.write(*objects(many))
        eventually(lambda: not any(enters(f, clients[f]) for f in (0, 1)), "the ranges' end", timeout_s=30)


# --- one IP family alone


@families
def test_single_stack(nothing_left: None, family: int) -> None:
    """Nodes, pods and Services without an address of the other family."""
    cidr, cluster_range = CLUSTER_CIDRS[family], ("10.96.0.0/16", "fd00:96::/112")[family]
    config: dict[str, Any] = {
        "ipvs": {"scheduler": "rr"},
        "clusterCIDR": cidr,
        "ebpfproxy": {"serviceClusterIPRange": cluster_range},
    }
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=2, pods_per_node=2, families=(family,)))
        stack.enter_context(name_servers([(name, pod.place) for name, pod in cluster.pods.items()], 8080))
        addresses = vips(1)
        objects = []
        for name, port in (("web", 30001), ("empty", 30002)):
            ip = addresses["ingress" if name == "web" else "externalIPs"][family]
            made = service(name, *(each | {"nodePort": port} for each in table.PORTS), type="NodePort")
            made["spec"] |= {"ipFamilies": [("IPv4", "IPv6")[family]], "externalIPs": [ip]}
            objects.append(made)
        objects.append(slices(cluster, "web", ["pod11", "pod21"], *table.TARGETS)[family])
        agents = start_agents(stack, cluster, objects, MODES[0], config, families=(family,))
        who = table.owners(cluster, family)
        client = stack.enter_context(Probe(cluster.place("client")))
        node = cluster.nodes[0].ips[family]
        bind = (CLIENT_IPS[family], 0)
        for address, port in ((node, 30001), (addresses["ingress"][family], 80)):
            for answers in (
                client.answers(address, port, 4, bind),
                client.udp_answers(address, port, 4, bind=bind),
            ):
                assert table.readable(answers, who) == {"pod11<client", "pod21<node-1"}
        with client.impatient(0.9), pytest.raises(ConnectionRefusedError):
            client.tcp(node, 30002, bind=bind)
        assert not agents[0].status()["problems"]
