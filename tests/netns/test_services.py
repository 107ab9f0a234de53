"""Who answers: every kind of Service, from every place, over TCP and UDP, IPv4 and IPv6."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ebpfproxy.dataplane.capabilities import limit
from rig import kernel
from rig.probe import Probe
from rig.topology import GATEWAYS, NODE_IPS, OUTSIDE_IPS

from . import catalogue as known
from .dataplanes import expect_limits

if TYPE_CHECKING:
    from .conftest import World

pytestmark = [pytest.mark.root, pytest.mark.netns]

FAMILIES = (socket.AF_INET, socket.AF_INET6)
EVERYWHERE = ("node", "pod", "pod-in-cgroup", "outside")
BY_SOCKET = ("node", "pod-in-cgroup")  # sock_lb
BY_PACKET = ("pod", "outside")  # tc_lb
LOOPBACK = ("127.0.0.1", "::1")
#: Else the programs don't know a node that is not the machine's own namespace.
knows_the_node = pytest.mark.skipif(not kernel.is_since(5, 14), reason="SO_NETNS_COOKIE came with Linux 5.14")

ALL = frozenset({"pod1", "pod2", "pod3"})
LOCAL = frozenset({"pod1", "pod2"})
NONE: frozenset[str] = frozenset()
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST, socket(7)


class Row(NamedTuple):
    what: str
    origins: tuple[str, ...]
    vips: tuple[str, str]  # IPv4, IPv6
    port: int
    names: frozenset[str]
    transports: tuple[str, ...] = ("tcp", "udp", "udp-connected")
    marks: tuple[pytest.MarkDecorator, ...] = ()
    needs: tuple[str, ...] = ()  # features that a mode may lack
    families: tuple[int, ...] = (0, 1)


ANSWERED = [
    Row("cluster IP", EVERYWHERE, known.WEB, 80, ALL),
    Row("cluster IP, second port", EVERYWHERE, known.WEB, 81, ALL, ("tcp",)),
    Row("cluster IP of a NodePort", EVERYWHERE, known.NODE_PORT, 80, ALL),
    Row("NodePort", EVERYWHERE, NODE_IPS, 30080, ALL),
    Row("NodePort at the node's other address", EVERYWHERE, GATEWAYS, 30080, ALL),
    Row(
        *("NodePort on 127.0.0.1", ("node",), LOOPBACK, 30080, ALL),
        marks=(knows_the_node,),
        needs=("loopback-node-ports",),
        families=(0,),
    ),
    Row(
        *("NodePort on ::1", ("node",), LOOPBACK, 30080, ALL),
        marks=(knows_the_node,),
        needs=("loopback-node-ports-6",),
        families=(1,),
    ),
    Row("external IP", EVERYWHERE, known.EXTERNAL, 80, ALL),
    Row("load balancer", EVERYWHERE, known.BALANCED, 80, ALL),
    Row("external policy Local, from outside", ("outside",), NODE_IPS, 30017, LOCAL),
    Row(
        *("external policy Local, from here", EVERYWHERE[:3], NODE_IPS, 30017, ALL),
        needs=("short-circuit",),
    ),
    Row("external policy Local, cluster IP", EVERYWHERE[:3], known.LOCAL_EXTERNAL, 80, ALL),
    Row("external policy Local, none local, from here", EVERYWHERE[:3], NODE_IPS, 30019, frozenset({"pod3"})),
    Row("internal policy Local", EVERYWHERE[:3], known.LOCAL_INTERNAL, 80, LOCAL),
    Row("only a terminating endpoint", EVERYWHERE, known.TERMINATING, 80, frozenset({"pod1"})),
    Row("named target port, other in each pod", EVERYWHERE, known.NAMED, 80, LOCAL, ("tcp",)),
    Row("no VIP: the node itself", EVERYWHERE, NODE_IPS, 8080, frozenset({"node"}), ("tcp",)),
]


def cases(rows: list[Row]) -> list[object]:
    return [
        pytest.param(
            *(row, origin, family, transport),
            id=f"{row.what}-{origin}-v{'46'[family]}-{transport}",
            marks=row.marks,
        )
        for row in rows
        for origin in row.origins
        for family in row.families
        for transport in row.transports
    ]


def ask(world: World, origin: str, address: str, port: int, transport: str, count: int = 1) -> set[str]:
    probe = world.probes[origin]
    if transport == "tcp":
        return set(probe.tcp(address, port, count))
    return set(probe.udp(address, port, count, connect=transport == "udp-connected"))


@pytest.mark.parametrize(("row", "origin", "family", "transport"), cases(ANSWERED))
def test_answered_by(
    world: World, request: pytest.FixtureRequest, row: Row, origin: str, family: int, transport: str
) -> None:
    expect_limits(request, world.mode, *row.needs)
    # Nine requests go three times around.
    assert ask(world, origin, row.vips[family], row.port, transport, 9) == row.names


UNUSED = ("reject-unused",)
REPORTED = ("tcp", "udp-connected")  # sockets that are told of an ICMP error
REFUSED = [
    Row("no endpoints", BY_SOCKET, known.EMPTY, 80, frozenset()),
    Row("no endpoints", BY_PACKET, known.EMPTY, 80, frozenset(), ("tcp", "udp-connected")),
    Row("unused port of a cluster IP", BY_SOCKET, known.WEB, 9999, frozenset(), needs=UNUSED),
    Row("unused port of a cluster IP", BY_PACKET, known.WEB, 9999, NONE, REPORTED, needs=UNUSED),
    Row("unused port of a load balancer", BY_SOCKET, known.BALANCED, 9999, frozenset(), needs=UNUSED),
    Row("unused port of a load balancer", BY_PACKET, known.BALANCED, 9999, NONE, ("tcp",), needs=UNUSED),
    Row("UDP on a TCP port", BY_SOCKET, known.WEB, 81, frozenset(), ("udp", "udp-connected"), needs=UNUSED),
    Row("UDP on a TCP port", BY_PACKET, known.WEB, 81, frozenset(), ("udp-connected",), needs=UNUSED),
    Row("a NodePort that no Service has", EVERYWHERE, NODE_IPS, 30999, frozenset(), ("tcp", "udp-connected")),
    Row("loopback in a pod", ("pod-in-cgroup",), LOOPBACK, 30080, frozenset(), ("tcp", "udp-connected")),
    Row("cluster IP's port on the node", EVERYWHERE, NODE_IPS, 80, frozenset(), ("tcp", "udp-connected")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "origin", "family", "transport"), cases(REFUSED))
def test_refused_at_once(
    world: World, request: pytest.FixtureRequest, row: Row, origin: str, family: int, transport: str
) -> None:
    expect_limits(request, world.mode, *row.needs)
    # In mode ipvs VIPs are addresses of the node, and unused ports are refused by an error that comes back.
    is_told_later = origin == "pod-in-cgroup" or (world.mode == "ipvs" and row.needs == UNUSED)
    if transport == "udp" and is_told_later:
        expect_limits(request, world.mode, "reject-unconnected")
    errors = (ConnectionRefusedError, *([kernel.REFUSED] if origin in BY_SOCKET else []))
    if origin == "node" and transport != "tcp" and limit(world.mode, "reject-errno"):
        errors = (*errors, PermissionError)
    # IPVS refuses by ICMP. An error that comes while connect() still holds its socket, as it may from another
    # namespace of the same kernel, is only noted; the SYN that follows after a second is refused for good.
    patience_s = 3 if world.mode == "ipvs" else 1
    with world.probes[origin].impatient(patience_s), pytest.raises(errors):
        ask(world, origin, row.vips[family], row.port, transport)


LOST = [
    Row("external policy Local, none local", ("outside",), NODE_IPS, 30019, frozenset(), ("tcp", "udp")),
    Row("internal policy Local, none local", ("pod",), known.REMOTE_ONLY, 80, frozenset(), ("tcp", "udp")),
    Row("outside the source ranges", ("outside",), known.GUARDED, 80, frozenset(), ("tcp", "udp")),
    Row("outside the source ranges, a pod", ("pod",), known.GUARDED, 80, frozenset(), ("tcp", "udp")),
]


@pytest.mark.parametrize(("row", "origin", "family", "transport"), cases(LOST))
def test_dropped(world: World, row: Row, origin: str, family: int, transport: str) -> None:
    with world.probes[origin].impatient(), pytest.raises(TimeoutError):
        ask(world, origin, row.vips[family], row.port, transport)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_source_ranges_let_their_sources_in(world: World, family: int) -> None:
    allowed = ("192.0.2.101", "2001:db8::101")[family]
    vip = known.GUARDED[family]
    assert set(world.probes["outside"].tcp(vip, 80, 6, bind=(allowed, 0))) == ALL
    assert set(world.probes["outside"].udp(vip, 80, 6, bind=(allowed, 0))) == ALL
    assert set(world.probes["outside"].tcp(("10.96.0.16", "fd00:96::10")[family], 80, 6)) == ALL, "cluster IP"


class Target(NamedTuple):
    what: str
    vips: tuple[str, str]
    port: int

    def seen(self, probe: Probe, family: int) -> dict[str, str]:
        """Return which client address each backend sees."""
        answers = probe.answers(self.vips[family], self.port, 9)
        return dict(answer.split(" ")[:2] for answer in answers)


CLUSTER_TARGETS = [
    Target("NodePort", NODE_IPS, 30080),
    Target("external IP", known.EXTERNAL, 80),
    Target("load balancer", known.BALANCED, 80),
]
LOCAL_TARGET = Target("external policy Local", NODE_IPS, 30017)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("target", [*CLUSTER_TARGETS, LOCAL_TARGET], ids=lambda target: target.what)
def test_client_address_reaches_the_backends_of_this_node(
    world: World, request: pytest.FixtureRequest, target: Target, family: int
) -> None:
    is_local = target is LOCAL_TARGET
    expect_limits(request, world.mode, "client-address-local" if is_local else "client-address")
    seen = target.seen(world.probes["outside"], family)
    assert {seen[name] for name in LOCAL} == {OUTSIDE_IPS[family]}


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("target", CLUSTER_TARGETS, ids=lambda target: target.what)
def test_backend_of_another_node_sees_this_node(
    world: World, request: pytest.FixtureRequest, target: Target, family: int
) -> None:
    """Its reply must come back through here."""
    expect_limits(request, world.mode, "snat")
    assert target.seen(world.probes["outside"], family)["pod3"] in (GATEWAYS[family], NODE_IPS[family])


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_cluster_ip_from_outside_the_cluster_is_masqueraded(
    world: World, request: pytest.FixtureRequest, family: int
) -> None:
    """With clusterCIDR set; who is in it keeps its address."""
    inside = Target("cluster IP", known.WEB, 80).seen(world.probes["pod"], family)
    if not limit(world.mode, "client-address-local"):
        assert set(inside.values()) == {world.net.pods[3].ips[family]}
    expect_limits(request, world.mode, "masquerade-all")
    outside = Target("cluster IP", known.WEB, 80).seen(world.probes["outside"], family)
    assert set(outside.values()) <= {GATEWAYS[family], NODE_IPS[family]}


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_pod_reaches_itself_through_its_service(world: World, family: int) -> None:
    own = world.backends[0]
    with Probe(world.net.in_cgroup(own)) as probe:
        answers = probe.answers(known.WEB[family], 80, 6)
    assert {answer.split(" ")[0] for answer in answers} == ALL
    if not limit(world.mode, "hairpin-address"):
        assert f"{own.name} {own.ips[family]}" in answers


# --- what the client sees


@pytest.mark.parametrize("origin", BY_SOCKET)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_peer_is_the_vip(world: World, origin: str, kind: socket.SocketKind, family: int) -> None:
    with world.probes[origin].socket(kind, FAMILIES[family]) as client:
        client.connect(known.WEB[family], 80)
        assert client.getpeername() == (known.WEB[family], 80)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_peer_of_a_mapped_socket_is_the_vip(world: World, kind: socket.SocketKind) -> None:
    """An IPv6 socket that talks IPv4, as Java and Go open them (RFC 4291 2.5.5.2)."""
    with world.probes["node"].socket(kind, socket.AF_INET6) as client:
        client.connect(f"::ffff:{known.WEB[0]}", 80)
        assert client.getpeername() == (f"::ffff:{known.WEB[0]}", 80)
        if kind is socket.SOCK_STREAM:
            assert client.ask() in ALL


def test_unconnected_mapped_socket_sees_the_vip(world: World) -> None:
    with world.probes["node"].socket(socket.SOCK_DGRAM, socket.AF_INET6) as client:
        client.sendto(b"?", f"::ffff:{known.WEB[0]}", 80)
        data, sender = client.recvfrom()
        assert data.split(b" ")[0].decode() in ALL
        assert sender == (f"::ffff:{known.WEB[0]}", 80)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_peer_of_a_direct_connection_is_left_alone(world: World, kind: socket.SocketKind) -> None:
    pod = world.backends[0]
    with world.probes["node"].socket(kind) as client:
        client.connect(pod.v4, 8080)
        assert client.getpeername() == (pod.v4, 8080)


def test_udp_socket_that_connects_again_sees_the_new_peer(world: World) -> None:
    pod = world.backends[0]
    with world.probes["node"].socket(socket.SOCK_DGRAM) as client:
        client.connect(known.WEB[0], 80)
        client.connect(pod.v4, 8080)
        assert client.getpeername() == (pod.v4, 8080)
        client.connect(known.NODE_PORT[0], 80)
        assert client.getpeername() == (known.NODE_PORT[0], 80)


def test_one_socket_talks_to_vips_and_others_at_once(world: World) -> None:
    pod = world.backends[0]
    with world.probes["node"].socket(socket.SOCK_DGRAM) as client:
        for address, port in [
            (known.WEB[0], 80),
            (pod.v4, 8080),
            (known.NODE_PORT[0], 80),
            (known.WEB[0], 80),
        ]:
            client.sendto(b"?", address, port)
            assert client.recvfrom()[1] == (address, port)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_connection_stays_with_its_backend(world: World, family: int) -> None:
    for origin in EVERYWHERE:
        with world.probes[origin].socket(socket.SOCK_STREAM, FAMILIES[family]) as client:
            client.connect(known.WEB[family], 80)
            assert len({client.ask() for _ in range(10)}) == 1


@pytest.mark.parametrize("origin", BY_PACKET)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_closed_connection_does_not_disturb_a_direct_one(
    world: World, request: pytest.FixtureRequest, origin: str, family: int
) -> None:
    """The same client port goes to the same backend, first through the VIP, then past it."""
    expect_limits(request, world.mode, "past-the-vip")
    pod = world.backends[0]
    source = ("::" if family else "0.0.0.0", 20001)  # below the ports that others are given
    options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]
    for address, port in [(known.TERMINATING[family], 80), (pod.ips[family], 8080)] * 2:
        with world.probes[origin].socket(
            socket.SOCK_STREAM, FAMILIES[family], bind=source, options=[*options, RESET]
        ) as client:
            client.connect(address, port)
            assert client.ask() == "pod1"


# --- NodePorts can't be stolen


@knows_the_node
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("address", ["0.0.0.0", "::", *NODE_IPS, *LOOPBACK])
def test_bind_to_a_node_port_is_refused_on_the_node(
    world: World, request: pytest.FixtureRequest, kind: socket.SocketKind, address: str
) -> None:
    expect_limits(request, world.mode, "bind")
    family = FAMILIES[":" in address]
    with world.probes["node"].socket(kind, family) as thief:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - which one depends on the kernel
            thief.bind(address, 30080)
        assert not isinstance(caught.value, TimeoutError)
    with world.probes["node"].socket(kind, family) as innocent:
        innocent.bind(address, 30999)
    with world.probes["pod-in-cgroup"].socket(kind, family) as elsewhere:
        elsewhere.bind("::" if ":" in address else "0.0.0.0", 30080)


# --- tools


@pytest.mark.parametrize("origin", EVERYWHERE)
def test_curl(world: World, origin: str) -> None:
    place = world.probes[origin].place
    for vip in (known.WEB[0], f"[{known.WEB[1]}]"):
        answer = place.run("curl", "-sS", "--max-time", "5", f"http://{vip}/", f"http://{vip}:81/").stdout
        assert len(answer.splitlines()) == 2
        assert {line.split(" ")[0] for line in answer.splitlines()} <= ALL


def test_headless_and_external_name_services_are_untouched(world: World) -> None:
    if world.mode != "bpf":
        pytest.skip("a question to the maps; the frontends of a Service are the same for every mode")
    assert "headless" not in str(world.agent.rows("services"))
