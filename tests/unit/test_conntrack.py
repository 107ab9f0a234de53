"""Which UDP flows have to end when Services change, and that the kernel ends them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ebpfproxy import conntrack
from ebpfproxy.conntrack import Endpoint, Flow
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Protocol,
    Readiness,
)
from makers import cluster_ip, node_port, service, state

if TYPE_CHECKING:
    from ebpfproxy.model.services import DesiredState
    from rig.kernel import Netns

VIP, ANOTHER, NODE = "10.96.0.53", "10.96.0.54", "192.0.2.1"
A, B = Endpoint("10.244.0.1", 5353), Endpoint("10.244.0.2", 5353)
BOTH = frozenset({A, B})
NONE: frozenset[Endpoint] = frozenset()


class Row(NamedTuple):
    what: str
    before: dict[Endpoint, frozenset[Endpoint]]
    now: dict[Endpoint, frozenset[Endpoint]]
    flow: tuple[Endpoint, Endpoint]
    is_stale: bool


DNS, OTHER, NODE_PORT = Endpoint(VIP, 53), Endpoint(ANOTHER, 53), Endpoint("", 30053)
ROWS = [
    Row("a backend is gone", {DNS: BOTH}, {DNS: frozenset({A})}, (DNS, B), True),
    Row("the other backend's flows go on", {DNS: BOTH}, {DNS: frozenset({A})}, (DNS, A), False),
    Row("the last backend is gone", {DNS: frozenset({A})}, {DNS: NONE}, (DNS, A), True),
    Row("the Service is gone", {DNS: BOTH}, {}, (DNS, A), True),
    Row("the first backend came: untranslated", {DNS: NONE}, {DNS: frozenset({A})}, (DNS, DNS), True),
    Row("a new Service: untranslated", {}, {DNS: frozenset({A})}, (DNS, DNS), True),
    Row("a backend came", {DNS: frozenset({A})}, {DNS: BOTH}, (DNS, A), False),
    Row("another Service's flows", {DNS: BOTH, OTHER: BOTH}, {DNS: NONE, OTHER: BOTH}, (OTHER, A), False),
    Row("the same VIP, a port of no Service", {DNS: BOTH}, {}, (Endpoint(VIP, 54), A), False),
    Row("a NodePort", {NODE_PORT: BOTH}, {NODE_PORT: frozenset({A})}, (Endpoint(NODE, 30053), B), True),
    Row("somebody else's node", {NODE_PORT: BOTH}, {}, (Endpoint("192.0.2.9", 30053), B), False),
    Row("nothing changed", {DNS: BOTH}, {DNS: BOTH}, (DNS, Endpoint("10.9.9.9", 5)), False),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_stale(row: Row) -> None:
    flow = Flow(*row.flow, b"")
    assert bool(conntrack.stale([flow], row.before, row.now, frozenset({NODE}))) is row.is_stale


def dns(*backends: Backend, protocol: Protocol = Protocol.UDP) -> DesiredState:
    frontends = [cluster_ip(VIP, 53), node_port(30053)]
    return state(service("dns", backends, frontends, protocol=protocol))


def test_view_keeps_what_terminates() -> None:
    ends = Backend(*A, readiness=Readiness.TERMINATING), Backend(*B, readiness=Readiness.NOT_READY)
    assert conntrack.view(dns(*ends)) == {DNS: frozenset({A}), NODE_PORT: frozenset({A})}
    assert conntrack.view(dns(Backend(*A), protocol=Protocol.TCP)) == {}


# The kernel's part runs in a namespace of its own, in a process of its own: "before" and "now" are given as
# backends, and what is said is how many flows were ended and what conntrack(8) still shows.
SCRIPT = """
import sys
sys.path[:0] = ["tests", "tests/unit"]
from test_conntrack import dns
from ebpfproxy.conntrack import UdpCleaner
from ebpfproxy.model.services import Backend
cleaner = UdpCleaner()
def state(*ends):
    return dns(*(Backend(end, 5353) for end in ends))
print(cleaner.clean(state("10.244.0.1", "10.244.0.2")),
      cleaner.clean(state("10.244.0.1", "10.244.0.2")),
      cleaner.clean(state("10.244.0.2")), cleaner.clean(state("10.244.0.2")))
"""


@pytest.mark.root
def test_the_kernel_ends_them(netns: Netns) -> None:
    place = netns.place()
    place.run("ip", "link", "set", "lo", "up")
    for source, client in (("10.244.0.1", 4001), ("10.244.0.2", 4002)):
        place.run(
            *("conntrack", "-I", "-p", "udp", "-t", "60", "-s", "192.0.2.7", "-d", VIP),
            *("--sport", str(client), "--dport", "53", "-r", source, "-q", "192.0.2.7"),
            *("--reply-port-src", "5353", "--reply-port-dst", str(client)),
        )
    done = place.run(sys.executable, "-c", SCRIPT)
    assert done.stdout.split() == ["0", "0", "1", "0"]
    left = place.run("conntrack", "-L", "-p", "udp").stdout
    assert "src=10.244.0.2" in left
    assert "src=10.244.0.1" not in left
