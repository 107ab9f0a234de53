"""Mode userspace without a process: rendering, rules as text, schedulers, filters, copying without pipes."""

from __future__ import annotations

import asyncio
import collections
import ipaddress
import itertools
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
from ebpfproxy import config
from ebpfproxy.dataplane.userspace import features, gate, netfilter, pump
from ebpfproxy.dataplane.userspace.balance import Balancer
from ebpfproxy.dataplane.userspace.protocol import Fate, Settings, Target
from ebpfproxy.dataplane.userspace.render import Door, render
from ebpfproxy.diff import diff
from ebpfproxy.errors import ConfigError
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Frontend,
    Policy,
    Protocol,
    Service,
)
from makers import cluster_ip, external_ip, load_balancer, node_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpfproxy.model.services import DesiredState, Frontend, Service

HERE, THERE = Backend("10.244.0.11", 8080, is_local=True), Backend("10.244.1.12", 8080)
CLUSTER_IP, NODE_PORT, BALANCED = cluster_ip(), node_port(), load_balancer("203.0.113.15")


def service(
    name: str = "web",
    *frontends: Frontend,
    backends: tuple[Backend, ...] = (HERE, THERE),
    **more: Any,
) -> Service:
    return makers.service(f"{name}:http", backends, frontends or (CLUSTER_IP,), **more)


def state(*services: Service) -> DesiredState:
    return makers.state(*services, serving="192.0.2.1 127.0.0.1", local_sources=frozenset({"10.244.0.0/24"}))


FATES = [
    # frontend, external policy, internal policy, backends -> inside, outside
    (CLUSTER_IP, "Cluster", "Cluster", (HERE, THERE), ("cluster", "cluster")),
    (CLUSTER_IP, "Cluster", "Local", (HERE, THERE), ("local", "local")),
    (CLUSTER_IP, "Cluster", "Local", (THERE,), ("drop", "drop")),
    (CLUSTER_IP, "Local", "Cluster", (THERE,), ("cluster", "cluster")),
    (NODE_PORT, "Local", "Cluster", (HERE, THERE), ("cluster", "local")),
    (NODE_PORT, "Local", "Local", (THERE,), ("cluster", "drop")),
    (BALANCED, "Local", "Cluster", (THERE,), ("cluster", "drop")),
    (BALANCED, "Cluster", "Cluster", (), None),  # refused: nothing listens
]


@pytest.mark.parametrize(("frontend", "external", "internal", "backends", "fates"), FATES)
def test_fate_by_policy_and_side(
    frontend: Frontend,
    external: str,
    internal: str,
    backends: tuple[Backend, ...],
    fates: tuple[str, str] | None,
) -> None:
    made = service(
        "web", frontend, backends=backends, external_policy=Policy(external), internal_policy=Policy(internal)
    )
    listeners = render(state(made), Settings(), ()).listeners
    assert [(each.inside, each.outside) for each in listeners.values()] == ([fates] if fates else [])


def test_source_ranges_guard_the_load_balancer_address_alone() -> None:
    made = service("web", CLUSTER_IP, NODE_PORT, BALANCED, source_ranges=("198.51.100.0/24",))
    want = render(state(made), Settings(), ())
    ranges = {door.address: want.listeners[key].ranges for door, key in want.redirects.to.items()}
    assert ranges == {"10.96.0.10": None, "": None, "203.0.113.15": ("198.51.100.0/24",)}


def test_the_node_and_its_pods_are_inside() -> None:
    assert set(render(state(), Settings(), ()).settings.inside) == {
        "10.244.0.0/24", "192.0.2.1/32", "127.0.0.1/32",
    }  # fmt: skip


def test_an_address_to_listen_on_stands_for_cluster_ips_or_for_the_vip_that_it_is() -> None:
    first = service("first", CLUSTER_IP, NODE_PORT, BALANCED)
    second = service("second", cluster_ip("10.96.0.11"))
    want = render(state(first, second), Settings(), ("192.0.2.1", "203.0.113.15", "2001:db8::1"))
    assert {(each.service, each.address, each.port) for each in want.listeners.values()} == {
        ("default/first:http/TCP/4", "192.0.2.1", 80),
        ("default/first:http/TCP/4", "192.0.2.1", 30080),
        ("default/first:http/TCP/4", "203.0.113.15", 80),
        ("default/first:http/TCP/4", "203.0.113.15", 30080),
    }
    (problem,) = want.problems
    assert problem.startswith("default/second:http: port 80 of 192.0.2.1 is default/first:http's already")
    assert not want.redirects.to


# --- rules


def test_elements_of_the_table() -> None:
    made = [service("web", CLUSTER_IP, NODE_PORT), service("empty", BALANCED, backends=())]
    want = render(state(*made), Settings(), ())
    ports = {key: 40000 + number for number, key in enumerate(sorted(want.listeners))}
    assert {
        key: data for key, data in netfilter.elements(want.redirects, ports).items() if "4" in key[0]
    } == {
        ("doors4", "10.96.0.10 . tcp . 80"): "192.0.2.1 . 40001",
        ("node_doors4", "tcp . 30080"): "192.0.2.1 . 40000",
        ("vips4", "10.96.0.10"): "",
        ("vips4", "203.0.113.15"): "",
        ("alive4", "10.96.0.10"): "",
        ("node4", "192.0.2.1"): "",
        ("node4", "127.0.0.1"): "",
    }


def test_a_changed_element_is_deleted_before_it_is_added() -> None:
    have = {("doors4", "10.96.0.10 . tcp . 80"): "192.0.2.1 . 1", ("node4", "192.0.2.1"): ""}
    want = {("doors4", "10.96.0.10 . tcp . 80"): "192.0.2.1 . 2"}
    assert netfilter.nft_change(have, diff(have, want)).splitlines() == [
        "delete element inet ebpfproxy-userspace node4 { 192.0.2.1 }",
        "delete element inet ebpfproxy-userspace doors4 { 10.96.0.10 . tcp . 80 }",
        "add element inet ebpfproxy-userspace doors4 { 10.96.0.10 . tcp . 80 : 192.0.2.1 . 2 }",
    ]
    assert netfilter.nft_change(have, diff(have, have)) == ""


def test_a_node_port_has_one_iptables_rule_for_each_address() -> None:
    want = render(state(service("web", NODE_PORT)), Settings(), ())
    (key,) = want.listeners
    lines = netfilter.iptables_whole(4, want.redirects, {key: 40000}).splitlines()
    assert [line for line in lines if "DNAT --to" in line] == [
        f"-A EBPFPROXY-USER -d {address} -p tcp --dport 30080 -j DNAT --to-destination 192.0.2.1:40000"
        for address in ("127.0.0.1", "192.0.2.1")
    ]


def test_an_address_of_the_node_as_external_ip_refuses_its_own_port_only() -> None:
    frontend = external_ip("192.0.2.1", 443)
    redirects = render(state(service("web", frontend, backends=())), Settings(), ()).redirects
    assert redirects.refused == {Door(4, "192.0.2.1", "TCP", 443)}
    assert redirects.vips[4] == frozenset()


# --- schedulers

A, B, C = (Target(f"10.0.0.{number}", 80) for number in (1, 2, 3))


def picks(
    scheduler: str, targets: Sequence[Target], count: int, clients: Sequence[str] = ("192.0.2.9",)
) -> list[Target]:
    balancer, found = Balancer(), []
    for number, client in zip(range(count), itertools.cycle(clients), strict=False):
        found.append(balancer.order(targets, scheduler, 0, (client, 1000 + number), "door", 0.0)[0])
        balancer.opened(found[-1])
    return found


@pytest.mark.parametrize(
    ("scheduler", "weights", "expected"),
    [
        ("rr", (1, 1, 1), "ABCABC"),
        ("wrr", (4, 3, 2), "AABABCABC"),  # LVS documentation, weighted round-robin scheduling
        ("lc", (1, 1, 1), "ABCABC"),
        ("sed", (1, 2, 3), "CBCABC"),  # (open + 1) / weight, worked out by hand
        ("nq", (1, 1, 9), "ABCCCC"),  # never queue: an idle one first, then as sed
    ],
)
def test_order_of_picks(scheduler: str, weights: tuple[int, ...], expected: str) -> None:
    targets = [each._replace(weight=weight) for each, weight in zip((A, B, C), weights, strict=True)]
    names = {target[:2]: name for target, name in zip(targets, "ABC", strict=True)}
    got = [names[pick[:2]] for pick in picks(scheduler, targets, len(expected))]
    if scheduler in ("nq", "sed"):  # which of two equals comes first is not said anywhere
        assert collections.Counter(got) == collections.Counter(expected)
    else:
        assert got == list(expected)


@pytest.mark.parametrize("scheduler", ["random", "sh", "maglev"])
def test_weights_are_shares(scheduler: str) -> None:
    targets = [A._replace(weight=1), B._replace(weight=3)]
    clients = [str(ipaddress.ip_address(0x0A000000 + number)) for number in range(4000)]
    got = collections.Counter(pick.address for pick in picks(scheduler, targets, len(clients), clients))
    # Binomial: a standard deviation is 27, so 8 of them never happen.
    assert abs(got[B.address] - 3000) < 8 * 27


@pytest.mark.parametrize("scheduler", ["sh", "dh"])
def test_a_hash_is_the_same_every_time(scheduler: str) -> None:
    assert len(set(picks(scheduler, [A, B, C], 20))) == 1


def test_maglev_moves_only_the_flows_of_the_backend_that_goes() -> None:
    before, after = picks("maglev", [A, B, C], 300), picks("maglev", [C, A], 300)
    assert {old for old, new in zip(before, after, strict=True) if old != new} == {B}


def test_affinity_lasts_until_the_timeout_and_follows_who_answered() -> None:
    balancer = Balancer()
    client = ("192.0.2.9", 1)
    balancer.bind("192.0.2.9", B[:2], 100.0)
    assert balancer.order([A, B, C], "rr", 10, client, "", 109.9) == [B, C, A]
    assert balancer.order([A, B, C], "rr", 10, client, "", 110.0)[0] == A, "over"
    assert balancer.order([A, C], "rr", 10, client, "", 101.0)[0] != B, "it has gone"
    balancer.expire(10, 110.0)
    assert not balancer.affinity


# --- filters


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_filter_admits_what_is_in_every_wall(data: st.DataObject) -> None:
    """Judged by the kernel, on UDP sockets of loopback, against the ipaddress module."""
    prefix = st.builds(
        lambda low, length: str(ipaddress.ip_network((0x7F000000 | low, length), strict=False)),
        st.integers(1, 0xFFFFFE),
        st.sampled_from([8, 9, 15, 16, 23, 24, 30, 31, 32]),
    )
    walls = data.draw(st.lists(st.lists(prefix, min_size=1, max_size=6), min_size=1, max_size=2))
    inner = [ipaddress.ip_network(each)[0] for wall in walls for each in wall]
    sources = [str(each) for each in inner if str(each) not in ("127.0.0.0", "127.255.255.255")]
    sources += ["127.0.0.1", "127.200.1.2"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        gate.attach(sink, gate.program(4, walls))
        sink.setblocking(False)
        for source in sources:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((source, 0))
                sender.sendto(b"?", sink.getsockname())  # loopback delivers before this returns
            address = ipaddress.ip_address(source)
            may = all(any(address in ipaddress.ip_network(each) for each in wall) for wall in walls)
            try:
                sink.recv(10)
                came = True
            except BlockingIOError:
                came = False
            assert came == may, (source, walls)


@pytest.mark.parametrize(
    ("prefixes", "may"),
    [(["::1/128"], True), (["::/127"], True), (["2001:db8::/32", "::2/127"], False), ([], False)],
)
def test_a_filter_of_ipv6(prefixes: list[str], may: bool) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sink:
        sink.bind(("::1", 0))
        sink.setblocking(False)
        gate.attach(sink, gate.program(6, [prefixes]))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"?", sink.getsockname()[:2])
        if may:
            assert sink.recv(10) == b"?"
        else:
            with pytest.raises(BlockingIOError):
                sink.recv(10)
            gate.attach(sink, None)  # none any more
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"!", sink.getsockname()[:2])
            assert sink.recv(10) == b"!"


def test_more_prefixes_than_the_kernel_takes_instructions() -> None:
    prefixes = [f"10.{high}.{low}.0/25" for high in range(40) for low in range(100)]
    assert gate.program(4, [prefixes]) is None
    assert gate.program(4, [prefixes[:800]]) is not None


# --- without pipes


def test_bytes_are_copied_where_no_pipe_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump.Pipes, "take", lambda _: None)
    blob = bytes(range(256)) * 20_000

    async def talk() -> bytes:
        loop = asyncio.get_running_loop()
        (here, client), (backend, there) = socket.socketpair(), socket.socketpair()
        for sock in (here, client, backend, there):
            sock.setblocking(False)
        ended = asyncio.Event()
        pump.Connection(loop, pump.Pipes(), client, backend, lambda _: ended.set())
        sending = loop.create_task(loop.sock_sendall(here, blob))
        received = b""
        while len(received) < len(blob):
            received += await loop.sock_recv(there, 1 << 20)
        await sending
        here.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(there, 10) == b""
        there.close()
        await ended.wait()
        here.close()
        return received

    assert asyncio.run(talk()) == blob


# --- configuration, what it does not do


def test_addresses_to_listen_on_are_checked() -> None:
    raw = {"apiVersion": config.API_VERSION, "kind": config.KIND}
    good = raw | {"ebpfproxy": {"userspace": {"listenAddresses": ["192.0.2.1", "2001:DB8::1", "192.0.2.1"]}}}
    assert config.parse(good).listen_addresses == ("192.0.2.1", "2001:db8::1")
    for bad in ("192.0.2", "0.0.0.0", "::", "ff02::1", "eth0"):
        with pytest.raises(ConfigError, match=r"ebpfproxy\.userspace\.listenAddresses"):
            config.parse(raw | {"ebpfproxy": {"userspace": {"listenAddresses": [bad]}}})


def test_what_it_does_not_do_is_said() -> None:
    sctp = service("phone", protocol=Protocol.SCTP)
    local = service("shop", NODE_PORT, external_policy=Policy.LOCAL)
    outside = service("mail", BALANCED)
    sentences = features.unsupported(state(sctp, local, outside), is_listening=True)
    about = [text.rsplit(": ", 1)[1] for text in sentences]
    assert about == ["default/phone:http", "default/shop:http", "default/mail:http"]
    assert features.unsupported(state(service()), is_listening=False) == []


def test_sctp_is_no_listener_but_its_vip_is_ours() -> None:
    want = render(state(service("phone", protocol=Protocol.SCTP)), Settings(), ())
    assert not want.listeners
    assert want.redirects.vips[4] == {"10.96.0.10"}
    assert Fate.REJECT not in {each.inside for each in want.listeners.values()}
