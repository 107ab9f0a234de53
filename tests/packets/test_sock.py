"""Sockets of the node: what connect, send, receive, getpeername, bind and close do to them.

Real sockets in a cgroup and network namespace of their own. Backends are two servers on loopback, A on port
8081 and B on port 8082, in round-robin order. No VIP has a route: what is not translated fails.
"""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ebpfproxy.dataplane.bpf.attach import INITIAL_NETNS, is_in_initial_netns
from ebpfproxy.libbpf import Link, Map, Object, lib
from ebpfproxy.loader import OBJECTS
from packets.loading import CONFIG
from packets.node import SECOND_NS, V4, V6, Backend, Family, Node
from rig import kernel
from rig.kernel import REFUSED
from rig.probe import Probe
from rig.servers import name_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebpfproxy.libbpf import Program
    from ebpfproxy.loader import Loaded

pytestmark = pytest.mark.root

PORT = 80
NODE_PORT = 30080
NOBODY = 8083  # no server listens here
BACKEND_PORTS = {"A": 8081, "B": 8082}


@pytest.fixture(scope="module")
def servers(host: kernel.Netns) -> Iterator[None]:
    with ExitStack() as stack:
        for name, port in BACKEND_PORTS.items():
            stack.enter_context(name_servers([(name, host.place())], port))
        yield


@contextmanager
def attached(programs: list[Program], cgroup: Path) -> Iterator[None]:
    """Attach the socket programs among ``programs`` to a cgroup."""
    with ExitStack() as links:
        for each in programs:
            if each.name.startswith("sock_"):
                links.enter_context(Link.attach_cgroup(each, cgroup))
        yield


@pytest.fixture
def probe(programs: Loaded, host: kernel.Netns, servers: None, cgroup: Path) -> Iterator[Probe]:
    """A process on the node whose sockets are balanced."""
    with attached(list(programs.programs.values()), cgroup), Probe(host.place(cgroup)) as made:
        yield made


class Side(NamedTuple):
    """An IP version as a socket sees it."""

    name: str
    af: socket.AddressFamily
    family: Family
    loopback: str
    vip: str
    other_vip: str

    def __str__(self) -> str:
        return self.name


SIDES = [
    Side("v4", AF_INET, V4, "127.0.0.1", V4.vip, V4.other_vip),
    Side("v6", AF_INET6, V6, "::1", V6.vip, V6.other_vip),
    Side("mapped", AF_INET6, V4, "127.0.0.1", f"::ffff:{V4.vip}", f"::ffff:{V4.other_vip}"),
]


@pytest.fixture(params=SIDES, ids=str)
def side(request: pytest.FixtureRequest) -> Side:
    return request.param  # type: ignore[no-any-return]


def backends(side: Side, names: str = "AB") -> list[Backend]:
    return [Backend(side.loopback, BACKEND_PORTS[name]) for name in names]


def mapped(side: Side, address: str) -> str:
    """Return an address of the backends' version as a socket of this side writes it."""
    return f"::ffff:{address}" if side.name == "mapped" else address


def opened(node: Node, ids: list[int]) -> list[int]:
    return [node.backend_stats(each)[1] for each in ids]


# ---- connect and getpeername ----


def test_tcp(node: Node, probe: Probe, side: Side) -> None:
    service = node.service(side.family.vip, PORT, backends(side))
    for round_ in range(2):
        for name in "AB":
            with probe.socket(SOCK_STREAM, side.af) as client:
                client.connect(side.vip, PORT)
                assert client.ask() == name
                assert client.getpeername() == (side.vip, PORT)
                assert sum(opened(node, service.backends)) == 1
            assert opened(node, service.backends) == [0, 0]
        assert node.service_stats(service) == (2 * round_ + 2, 0)
    assert not node.sockets()


def test_connected_udp(node: Node, probe: Probe, side: Side) -> None:
    service = node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        client.connect(side.vip, PORT)
        for _ in range(3):
            client.send(b"?")
            data, sender = client.recvfrom()
            assert (data[:1], sender) == (b"A", (side.vip, PORT))
        assert client.getpeername() == (side.vip, PORT)
        assert opened(node, service.backends) == [1, 0]
    assert opened(node, service.backends) == [0, 0]
    assert not node.sockets()


def test_a_second_connect(node: Node, probe: Probe, side: Side) -> None:
    """A UDP socket may connect anew: to another VIP, to a backend itself."""
    one = node.service(side.family.vip, PORT, backends(side, "A"), proto="UDP")
    two = node.service(side.family.other_vip, PORT, backends(side, "B"), proto="UDP")
    direct = (mapped(side, side.loopback), BACKEND_PORTS["A"])
    with probe.socket(SOCK_DGRAM, side.af) as client:
        steps = [
            ((side.vip, PORT), b"A", [1], [0]),
            ((side.other_vip, PORT), b"B", [0], [1]),
            (direct, b"A", [0], [0]),
            ((side.vip, PORT), b"A", [1], [0]),
        ]
        for peer, name, open_one, open_two in steps:
            client.connect(*peer)
            assert client.getpeername() == peer
            client.send(b"?")
            data, sender = client.recvfrom()
            assert (data[:1], sender) == (name, peer)
            assert (opened(node, one.backends), opened(node, two.backends)) == (open_one, open_two)
    assert (opened(node, one.backends), opened(node, two.backends)) == ([0], [0])
    assert not node.sockets()


def test_connect_again_after_a_failure(node: Node, probe: Probe, side: Side) -> None:
    """A backend that does not listen refuses; the same socket may try again and is counted once."""
    dead = Backend(side.loopback, NOBODY)
    service = node.service(side.family.vip, PORT, [dead, *backends(side, "A")])
    with probe.socket(SOCK_STREAM, side.af) as client:
        client._call("setblocking", True)  # else the kernel wants a third connect()
        with pytest.raises(ConnectionRefusedError):
            client.connect(side.vip, PORT)
        client.connect(side.vip, PORT)
        client.settimeout(5)
        assert client.ask() == "A"
        assert opened(node, service.backends) == [0, 1]
    assert opened(node, service.backends) == [0, 0]


def test_getpeername_of_other_connections(node: Node, probe: Probe, side: Side) -> None:
    """Past the VIP: the backend is shown as it is."""
    node.service(side.family.vip, PORT, backends(side, "A"))
    direct = (mapped(side, side.loopback), BACKEND_PORTS["A"])
    with probe.socket(SOCK_STREAM, side.af) as client:
        client.connect(*direct)
        assert client.getpeername() == direct
    assert not node.sockets()


# ---- unconnected UDP ----


def ask(client: object, side: Side, vip: str | None = None) -> tuple[str, tuple[str, int]]:
    """Send a datagram to the VIP; return who answered and from where it seemed to come."""
    client.sendto(b"?", vip or side.vip, PORT)  # type: ignore[attr-defined]
    data, sender = client.recvfrom()  # type: ignore[attr-defined]
    return data[:1].decode(), sender


def test_unconnected_udp(node: Node, probe: Probe, side: Side) -> None:
    """A socket stays with its backend, another socket gets the next; answers come from the VIP."""
    node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as one, probe.socket(SOCK_DGRAM, side.af) as two:
        for _ in range(3):
            assert ask(one, side) == ("A", (side.vip, PORT))
            assert ask(two, side) == ("B", (side.vip, PORT))


def test_udp_after_silence(node: Node, probe: Probe, side: Side) -> None:
    service = node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        assert ask(client, side)[0] == "A"
        node.wait(59)
        assert ask(client, side)[0] == "A"
        node.wait(59)
        assert ask(client, side)[0] == "A"
        node.wait(61)
        assert ask(client, side)[0] == "B"
        assert opened(node, service.backends) == [0, 1]


def test_answers_keep_a_flow_alive(node: Node, probe: Probe, side: Side) -> None:
    """A stream that only comes in is traffic too, and what the agent finds idle it removes."""
    node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        client.sendto(b"?", side.vip, PORT)
        node.wait(59)
        assert client.recvfrom()[1] == (side.vip, PORT)
        node.wait(59)
        ages = {flow.last_used_ns for _, flow in node.sockets()}
        assert len(node.sockets()) == 2
        assert max(ages) - min(ages) < SECOND_NS  # both entries were touched
        assert ask(client, side)[0] == "A"


def test_a_connected_udp_socket_needs_no_traffic(node: Node, probe: Probe, side: Side) -> None:
    """Its one entry lives as long as the socket: the agent expires the two other kinds only."""
    node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        client.connect(side.vip, PORT)
        assert [key.kind for key, _ in node.sockets()] == [lib.SOCKET_CONNECTED]
        node.wait(1000)
        client.send(b"?")
        assert client.recvfrom()[1] == (side.vip, PORT)


@pytest.mark.parametrize("state", [lib.BACKEND_NOT_READY, lib.BACKEND_GONE, lib.BACKEND_FREE])
def test_udp_leaves_a_backend_that_stops_serving(node: Node, probe: Probe, side: Side, state: int) -> None:
    service = node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        assert ask(client, side)[0] == "A"
        node.set_backend(service.backends[0], state=state)
        assert ask(client, side) == ("B", (side.vip, PORT))


def test_udp_stays_with_a_backend_that_terminates(node: Node, probe: Probe, side: Side) -> None:
    service = node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        assert ask(client, side)[0] == "A"
        node.set_backend(service.backends[0], state=lib.BACKEND_TERMINATING)
        assert ask(client, side)[0] == "A"


def test_two_vips_of_one_backend(node: Node, probe: Probe, side: Side) -> None:
    """Question by question, each answer comes from the VIP that was asked."""
    service = node.service(side.family.vip, PORT, backends(side, "A"), proto="UDP")
    node.service(side.family.other_vip, PORT, [], table=[0], proto="UDP", pool=service)
    with probe.socket(SOCK_DGRAM, side.af) as client:
        for vip in (side.vip, side.other_vip, side.vip, side.other_vip):
            assert ask(client, side, vip) == ("A", (vip, PORT))


def test_sendto_on_a_connected_socket(node: Node, probe: Probe, side: Side) -> None:
    """The kernel lets only the connected peer answer: sendto() the same VIP must go there."""
    node.service(side.family.vip, PORT, backends(side), proto="UDP")
    with probe.socket(SOCK_DGRAM, side.af) as client:
        client.connect(side.vip, PORT)
        for _ in range(2):
            assert ask(client, side) == ("A", (side.vip, PORT))


def test_datagrams_past_the_vip(node: Node, probe: Probe, side: Side) -> None:
    node.service(side.family.vip, PORT, backends(side, "A"), proto="UDP")
    direct = (mapped(side, side.loopback), BACKEND_PORTS["B"])
    with probe.socket(SOCK_DGRAM, side.af) as client:
        assert ask(client, side) == ("A", (side.vip, PORT))
        client.sendto(b"?", *direct)
        data, sender = client.recvfrom()
        assert (data[:1], sender) == (b"B", direct)


# ---- refusals ----


@dataclass(frozen=True)
class Refusal:
    """A call that must fail at once."""

    name: str
    flags: int
    port: int
    error: type[OSError]
    verdict: str

    def __str__(self) -> str:
        return self.name


REFUSALS = [
    Refusal("no backend", 0, PORT, REFUSED, "REJECT_EMPTY"),
    Refusal(
        "no local backend", lib.SERVICE_DROP_EMPTY | lib.SERVICE_LOCAL, PORT, PermissionError, "DROP_EMPTY"
    ),
    Refusal("unused port", 0, PORT + 1, REFUSED, "REJECT_UNUSED"),
]


def calls(probe: Probe, side: Side, port: int) -> Iterator[tuple[str, object]]:
    """Yield (protocol, call) for every way to reach a VIP."""
    for proto, kind in (("TCP", SOCK_STREAM), ("UDP", SOCK_DGRAM)):
        with probe.socket(kind, side.af) as client:
            yield proto, lambda client=client: client.connect(side.vip, port)
    with probe.socket(SOCK_DGRAM, side.af) as client:
        yield "UDP", lambda: client.sendto(b"?", side.vip, port)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refused(node: Node, probe: Probe, side: Side, refusal: Refusal) -> None:
    for proto in ("TCP", "UDP"):
        node.service(side.family.vip, PORT, [], proto=proto, flags=refusal.flags)
    for _, call in calls(probe, side, refusal.port):
        before = node.verdicts()[refusal.verdict]
        with pytest.raises(refusal.error):
            call()  # type: ignore[operator]
        assert node.verdicts()[refusal.verdict] == before + 1
    assert not node.sockets()


@contextmanager
def own_programs(node: Node, **config: int) -> Iterator[Object]:
    """Open sock_lb once more, with the node's maps but other constants; not loaded yet."""
    with Object(OBJECTS / "sock_lb.bpf.o") as made:
        constants = made.constant("config", "struct config")
        for name, value in {**CONFIG, **config}.items():
            setattr(constants, name, value)
        yield made


def test_without_bpf_set_retval(node: Node, host: kernel.Netns, servers: None, cgroup: Path) -> None:
    """Kernels before 5.18 know one error only."""
    node.service(V4.vip, PORT, [])
    with own_programs(node, features=0) as made, ExitStack() as stack:
        for name in made.maps:
            made.reuse(name, node.map(name))
        made.load()
        programs = [stack.enter_context(made.program(name)) for name in made.programs]
        stack.enter_context(attached(programs, cgroup))
        client = stack.enter_context(Probe(host.place(cgroup))).socket(SOCK_STREAM)
        with pytest.raises(PermissionError):
            client.connect(V4.vip, PORT)


def test_map_full(node: Node, host: kernel.Netns, servers: None, cgroup: Path) -> None:
    """A map without room (a small hash stands in): the connection is refused, nothing is counted."""
    service = node.service(V4.vip, PORT, [Backend("127.0.0.1", BACKEND_PORTS["A"])])
    definition = node.map("sockets").definition
    full = Map.create(definition._replace(type=lib.BPF_MAP_TYPE_HASH, max_entries=1, name="full"))
    full.update(bytes(definition.key_size), bytes(definition.value_size))
    with full, own_programs(node) as made, ExitStack() as stack:
        for name in made.maps:
            made.reuse(name, full if name == "sockets" else node.map(name))
        made.load()
        programs = [stack.enter_context(made.program(name)) for name in made.programs]
        stack.enter_context(attached(programs, cgroup))
        client = stack.enter_context(Probe(host.place(cgroup))).socket(SOCK_STREAM)
        before = node.verdicts()["MAP_FULL"]
        with pytest.raises(REFUSED):
            client.connect(V4.vip, PORT)
        assert node.verdicts()["MAP_FULL"] == before + 1
        assert node.backend_stats(service.backends[0]) == (0, 0)
        assert node.service_stats(service) == (0, 1)


# ---- NodePorts ----


LOOPBACKS = [
    (AF_INET, "127.0.0.1"),
    (AF_INET, "127.1.2.3"),
    (AF_INET6, "::1"),
    (AF_INET6, "::ffff:127.0.0.1"),
]


def node_ports(node: Node) -> None:
    """Serve NodePort 30080 over TCP and UDP on the loopback and node addresses of both versions."""
    for side in SIDES[:2]:
        for proto in ("TCP", "UDP"):
            node.service(side.family.any, NODE_PORT, backends(side, "A"), kind=lib.VIP_NODE, proto=proto)
        for address in (side.loopback, side.family.node):
            node.vip(address, lib.VIP_NODE | lib.VIP_LOCAL)


@pytest.mark.parametrize(("af", "address"), LOOPBACKS)
def test_node_port_on_loopback(node: Node, probe: Probe, af: socket.AddressFamily, address: str) -> None:
    node_ports(node)
    with probe.socket(SOCK_STREAM, af) as client:
        client.connect(address, NODE_PORT)
        assert client.ask() == "A"
        assert client.getpeername() == (address, NODE_PORT)
    with probe.socket(SOCK_DGRAM, af) as client:
        client.sendto(b"?", address, NODE_PORT)
        data, sender = client.recvfrom()
        assert (data[:1], sender) == (b"A", (address, NODE_PORT))


@pytest.mark.parametrize(("af", "address"), LOOPBACKS)
def test_loopback_of_a_pod_is_its_own(
    node: Node, programs: Loaded, netns: kernel.Netns, cgroup: Path, af: socket.AddressFamily, address: str
) -> None:
    node_ports(node)
    with attached(list(programs.programs.values()), cgroup), Probe(netns.place(cgroup)) as pod:
        before = node.verdicts()["NOT_OURS"]
        with pod.socket(SOCK_STREAM, af) as client, pytest.raises(ConnectionRefusedError):
            client.connect(address, NODE_PORT)
        assert node.verdicts()["NOT_OURS"] > before


@pytest.mark.skipif(not is_in_initial_netns(), reason="not in the initial network namespace")
def test_loopback_of_the_initial_namespace(node: Node, netns: kernel.Netns, cgroup: Path) -> None:
    """Before Linux 5.14 nobody can ask for a namespace's cookie, but the programs know the initial one's."""
    node.service(V4.any, NODE_PORT, [Backend("127.0.0.1", NOBODY)], kind=lib.VIP_NODE)
    node.vip("127.0.0.1", lib.VIP_NODE | lib.VIP_LOCAL)
    with own_programs(node, host_netns=INITIAL_NETNS) as made, ExitStack() as stack:
        for name in made.maps:
            made.reuse(name, node.map(name))
        made.load()
        programs = [stack.enter_context(made.program(name)) for name in made.programs]
        stack.enter_context(attached(programs, cgroup))
        for place, verdict in ((kernel.OwnNetns().place(cgroup), "NEW"), (netns.place(cgroup), "NOT_OURS")):
            client = stack.enter_context(Probe(place)).socket(SOCK_STREAM)
            before = node.verdicts()[verdict]
            with pytest.raises(ConnectionRefusedError):
                client.connect("127.0.0.1", NODE_PORT)
            assert node.verdicts()[verdict] == before + 1


def test_node_port_on_the_nodes_address(node: Node, probe: Probe, side: Side) -> None:
    node_ports(node)
    address = mapped(side, side.family.node)
    with probe.socket(SOCK_STREAM, side.af) as client:
        client.connect(address, NODE_PORT)
        assert (client.ask(), client.getpeername()) == ("A", (address, NODE_PORT))


@dataclass(frozen=True)
class Bind:
    """A bind() on the node, where NodePort 30080 is served over IPv4 TCP only."""

    name: str
    af: socket.AddressFamily
    kind: socket.SocketKind
    address: str
    port: int
    is_refused: bool

    def __str__(self) -> str:
        return self.name


BINDS = [
    Bind("any address", AF_INET, SOCK_STREAM, "0.0.0.0", NODE_PORT, True),
    Bind("any address of both versions", AF_INET6, SOCK_STREAM, "::", NODE_PORT, True),
    Bind("loopback, served to the node itself", AF_INET, SOCK_STREAM, "127.0.0.1", NODE_PORT, True),
    Bind("another loopback address", AF_INET, SOCK_STREAM, "127.9.9.9", NODE_PORT, True),
    Bind("mapped loopback", AF_INET6, SOCK_STREAM, "::ffff:127.0.0.1", NODE_PORT, True),
    Bind("IPv6 loopback", AF_INET6, SOCK_STREAM, "::1", NODE_PORT, False),
    Bind("another protocol", AF_INET, SOCK_DGRAM, "0.0.0.0", NODE_PORT, False),
    Bind("another port in the range", AF_INET, SOCK_STREAM, "0.0.0.0", NODE_PORT + 1, False),
    Bind("outside the range", AF_INET, SOCK_STREAM, "0.0.0.0", 8099, False),
]


@pytest.mark.parametrize("bind", BINDS, ids=str)
def test_bind(node: Node, probe: Probe, bind: Bind) -> None:
    node.service(V4.any, NODE_PORT, backends(SIDES[0], "A"), kind=lib.VIP_NODE)
    node.vip("127.0.0.1", lib.VIP_NODE | lib.VIP_LOCAL)
    node.vip("::1", lib.VIP_NODE | lib.VIP_LOCAL)
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    before = node.verdicts()["BIND_DENIED"]
    with probe.socket(bind.kind, bind.af, options=[reuse]) as server:
        if bind.is_refused:
            in_use = "Address already in use" if kernel.is_since(5, 18) else "Operation not permitted"
            with pytest.raises(OSError, match=in_use):
                server.bind(bind.address, bind.port)
        else:
            server.bind(bind.address, bind.port)
            assert server.getsockname() == (bind.address, bind.port)
    assert node.verdicts()["BIND_DENIED"] - before == bind.is_refused


def test_bind_in_a_pod(node: Node, programs: Loaded, netns: kernel.Netns, cgroup: Path) -> None:
    """A pod's ports are its own."""
    node_ports(node)
    with (
        attached(list(programs.programs.values()), cgroup),
        Probe(netns.place(cgroup)) as pod,
        pod.socket(SOCK_STREAM) as server,
    ):
        server.bind("0.0.0.0", NODE_PORT)


def test_bind_to_an_address_without_node_ports(node: Node, probe: Probe) -> None:
    node.service(V4.any, NODE_PORT, backends(SIDES[0], "A"), kind=lib.VIP_NODE)
    node.vip("127.0.0.1", lib.VIP_LOCAL)
    with probe.socket(SOCK_STREAM) as server:
        server.bind("127.0.0.1", NODE_PORT)


# ---- who asks ----


def test_source_ranges(node: Node, probe: Probe) -> None:
    """Checked against the bound address; a socket that is not bound is left to the real load balancer."""
    service = node.service(
        V4.vip,
        PORT,
        backends(SIDES[0], "A"),
        kind=lib.VIP_LOAD_BALANCER,
        flags=lib.SERVICE_SOURCE_RANGES,
    )
    node.source_range(service, "127.0.0.8/29")
    with probe.socket(SOCK_STREAM, bind=("127.0.0.9", 0)) as client:
        client.connect(V4.vip, PORT)
        assert client.ask() == "A"
    for bind in (None, ("127.0.0.1", 0)):
        with probe.socket(SOCK_STREAM, bind=bind) as client, pytest.raises(OSError) as caught:  # noqa: PT011
            client.connect(V4.vip, PORT)
        assert caught.value.errno in {errno.ENETUNREACH, errno.EINVAL}  # went to the VIP, which has no route


def test_affinity(node: Node, probe: Probe, side: Side) -> None:
    """Sockets that are not bound are one client by their namespace; a bound address is another."""
    node.service(side.family.vip, PORT, backends(side), affinity_s=100)
    assert [dict(probe.tcp(side.vip, PORT, 3))] == [{"A": 3}]
    bound = mapped(side, side.loopback)
    with probe.socket(SOCK_STREAM, side.af, bind=(bound, 0)) as client:
        client.connect(side.vip, PORT)
        assert client.ask() == "B"
    assert dict(probe.tcp(side.vip, PORT, 2)) == {"A": 2}
    node.wait(100)
    assert dict(probe.tcp(side.vip, PORT, 2)) == {"A": 2}  # round robin goes on: A, B, then A


def test_maglev_spreads_connections_of_one_client(node: Node, probe: Probe, side: Side) -> None:
    """No port is known before connect(): the socket's cookie stands in."""
    node.service(side.family.vip, PORT, backends(side), scheduler=lib.SCHED_MAGLEV, table=[0, 1] * 50 + [0])
    found = probe.tcp(side.vip, PORT, 40)
    assert set(found) == {"A", "B"}  # all 40 alike: 1 in 2^39


def test_least_connections(node: Node, probe: Probe, side: Side) -> None:
    node.service(side.family.vip, PORT, backends(side), scheduler=lib.SCHED_LC)
    with probe.socket(SOCK_STREAM, side.af) as one, probe.socket(SOCK_STREAM, side.af) as two:
        for client, name in ((one, "A"), (two, "B")):
            client.connect(side.vip, PORT)
            assert client.ask() == name
        with probe.socket(SOCK_STREAM, side.af) as three, probe.socket(SOCK_STREAM, side.af) as four:
            for client, name in ((three, "A"), (four, "B")):
                client.connect(side.vip, PORT)
                assert client.ask() == name
        # A and B have one each again.
        for _ in range(2):
            assert dict(probe.tcp(side.vip, PORT)) == {"A": 1}
        with probe.socket(SOCK_STREAM, side.af) as client:
            client.connect(side.vip, PORT)
            assert dict(probe.tcp(side.vip, PORT)) == {"B": 1}


# ---- other protocols ----

MPTCP = """
import socket
client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
client.connect(("{vip}", {port}))
client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
print(client.recv(4096).split(b"\\r\\n\\r\\n")[1].split()[0].decode())
"""


def test_mptcp(node: Node, probe: Probe) -> None:
    if not Path("/proc/sys/net/mptcp/enabled").exists():
        pytest.skip("this kernel has no MPTCP")
    node.service(V4.vip, PORT, backends(SIDES[0], "A"))
    script = MPTCP.format(vip=V4.vip, port=PORT)
    assert probe.place.run(sys.executable, "-c", script).stdout == "A\n"


PING = """
import socket
open("/proc/sys/net/ipv4/ping_group_range", "w").write("0 0")
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
client.connect(("127.0.0.1", 0))
client.send(bytes([8, 0, 0, 0, 0, 0, 0, 1]))
print(client.recv(100)[0])
"""


def test_ping(node: Node, probe: Probe) -> None:
    """ICMP sockets pass the same hooks and are not ours, not even where every port is rejected."""
    node.vip("127.0.0.1", lib.VIP_CLUSTER_IP)
    assert probe.place.run(sys.executable, "-c", PING).stdout == "0\n"


def test_a_shared_socket_closes_once(node: Node, probe: Probe) -> None:
    """A descriptor that fork() copied: the connection ends with the last of them."""
    service = node.service(V4.vip, PORT, backends(SIDES[0], "A"))
    script = f"""
import os, socket
client = socket.create_connection(("{V4.vip}", {PORT}))
copies = [os.dup(client.fileno()) for _ in range(3)]
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
for copy in copies:
    os.close(copy)
print(client.getpeername())
"""
    assert probe.place.run(sys.executable, "-c", script).stdout == f"('{V4.vip}', {PORT})\n"
    assert node.backend_stats(service.backends[0]) == (1, 0)
    assert not node.sockets()
