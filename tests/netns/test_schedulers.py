"""Each scheduler, end to end: who gets which share of new connections."""

from __future__ import annotations

import collections
import struct
from contextlib import ExitStack
from socket import SO_LINGER, SOCK_STREAM, SOL_SOCKET
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.wait import eventually

from . import catalogue as known
from .dataplanes import skip_limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

SCHEDULERS = ("random", "rr", "wrr", "sh", "dh", "maglev", "lc", "wlc", "sed", "nq")
WEIGHTS = "10.244.0.11=4,10.244.0.12=2,10.244.0.13=1"
ORIGINS = ["node", "outside"]
RESET = (SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST: no TIME_WAIT, socket(7)


#: The feature that each belongs to, see capabilities.
FEATURES = {"rr": "rr", "wrr": "wrr", "random": "random", "sh": "sh", "dh": "sh", "maglev": "maglev"}


def needs(mode: str, scheduler: str) -> None:
    skip_limits(mode, FEATURES.get(scheduler, "lc"))


@pytest.fixture(scope="module")
def probes(nothing_left: None, mode: str) -> Iterator[dict[str, Probe]]:
    """Clients for an agent with one Service per scheduler, see ``vip``, without weights and with."""
    from rig.servers import name_servers
    from rig.topology import Topology

    from .conftest import serving

    with ExitStack() as stack:
        net: Topology = stack.enter_context(Topology(pod_count=3))
        stack.enter_context(name_servers(serving(net), 8080))
        agent = Agent(net, mode=mode, config=known.CONFIG)
        for name in SCHEDULERS:
            for is_weighted in (False, True):
                annotations = {"ebpfproxy.io/scheduler": name}
                if is_weighted:
                    annotations["ebpfproxy.io/weights"] = WEIGHTS
                label = f"{name}-weighted" if is_weighted else name
                agent.write(
                    service(label, known.HTTP, ips=[vip(name, is_weighted)], annotations=annotations),
                    *known.slices(label, net.pods, known.TO_HTTP)[:1],
                    file=f"{label}.json",
                )
        net.node.shell("ip addr add 198.18.0.0/24 dev lo")  # clients' addresses for the hashes
        net.outside.shell("ip addr add 198.18.1.0/24 dev lo")
        net.node.shell("ip route add 198.18.1.0/24 via 192.0.2.100")
        stack.enter_context(agent)
        yield {
            origin: stack.enter_context(Probe(place))
            for origin, place in [("node", net.on_node), ("outside", net.from_outside)]
        }


def vip(scheduler: str, is_weighted: bool) -> str:
    return f"10.96.0.{100 + 2 * SCHEDULERS.index(scheduler) + is_weighted}"


def client(origin: str, number: int) -> tuple[str, int]:
    return f"198.18.{ORIGINS.index(origin)}.{number}", 0


def held(probe: Probe, address: str, count: int) -> collections.Counter[str]:
    """Open that many connections side by side; return how many each backend holds."""
    with ExitStack() as stack:
        names = []
        for _ in range(count):
            connection = stack.enter_context(probe.socket(SOCK_STREAM))
            connection.connect(address, 80)
            names.append(connection.ask())
    return collections.Counter(names)


# Expected shares: IPVS' definitions (ipvsadm(8), net/netfilter/ipvs/ip_vs_{rr,wrr,lc,wlc,sed,nq}.c).
# rows: scheduler, weighted, connections held at once, how many each of pod1, pod2, pod3 gets
EXACT = [
    ("rr", False, 9, (3, 3, 3)),
    ("rr", True, 9, (3, 3, 3)),  # round robin knows no weights but 0
    ("wrr", False, 9, (3, 3, 3)),
    ("wrr", True, 14, (8, 4, 2)),
    ("lc", False, 9, (3, 3, 3)),
    ("wlc", False, 9, (3, 3, 3)),
    ("wlc", True, 14, (8, 4, 2)),
    ("sed", False, 9, (3, 3, 3)),
    ("sed", True, 14, (8, 4, 2)),
    ("nq", False, 9, (3, 3, 3)),
    ("nq", True, 3, (1, 1, 1)),  # an idle one first, whatever its weight
]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(("scheduler", "is_weighted", "count", "shares"), EXACT)
def test_exact_shares(
    probes: dict[str, Probe],
    mode: str,
    origin: str,
    scheduler: str,
    is_weighted: bool,
    count: int,
    shares: tuple[int, int, int],
) -> None:
    needs(mode, scheduler)
    expected = dict(zip(("pod1", "pod2", "pod3"), shares, strict=True))
    # A proxy process may learn a moment later that an earlier test's connections have ended.
    eventually(
        lambda: held(probes[origin], vip(scheduler, is_weighted), count) == expected,
        f"{expected}",
        timeout_s=0 if scheduler in FEATURES else 5,
    )


@pytest.mark.parametrize("origin", ORIGINS)
def test_random_reaches_all(probes: dict[str, Probe], origin: str) -> None:
    # Chance that one of three is left out of 60: 3 * (2/3)**60 < 1e-10.
    assert len(probes[origin].tcp(vip("random", False), 80, 60)) == 3


@pytest.mark.parametrize("origin", ORIGINS)
def test_weighted_random_prefers_the_heavy(probes: dict[str, Probe], mode: str, origin: str) -> None:
    skip_limits(mode, "random-weights")
    # Of 140, 80 and 20 are expected; that the order turns round is a matter of 6 standard deviations.
    counts = probes[origin].tcp(vip("random", True), 80, 140)
    assert counts["pod1"] > counts["pod3"]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
def test_source_hash_goes_by_client_address(
    probes: dict[str, Probe], mode: str, origin: str, is_weighted: bool
) -> None:
    needs(mode, "sh")
    address = vip("sh", is_weighted)
    chosen = {
        number: set(probes[origin].tcp(address, 80, 3, bind=client(origin, number)))
        for number in range(1, 41)
    }
    assert all(len(names) == 1 for names in chosen.values()), "one client, one backend"
    assert len(set().union(*chosen.values())) == 3, "40 clients reach all three"


@pytest.mark.parametrize("origin", ORIGINS)
def test_destination_hash_goes_by_vip(probes: dict[str, Probe], mode: str, origin: str) -> None:
    needs(mode, "dh")
    names = {
        name
        for number in range(1, 6)
        for name in probes[origin].tcp(vip("dh", False), 80, 3, bind=client(origin, number))
    }
    assert len(names) == 1, "one VIP, one backend"


def test_maglev_spreads_flows(probes: dict[str, Probe], mode: str) -> None:
    needs(mode, "maglev")
    # Each backend has a third of the table: 3 * (2/3)**60 < 1e-10.
    assert len(probes["outside"].tcp(vip("maglev", False), 80, 60)) == 3


def test_maglev_gives_one_flow_one_backend(probes: dict[str, Probe], mode: str) -> None:
    """The same five-tuple again, after the first connection is closed."""
    needs(mode, "maglev")
    names = set()
    bind = (client("outside", 9)[0], 20001)  # below the ports that others are given
    for _ in range(4):
        with probes["outside"].socket(SOCK_STREAM, bind=bind, options=[RESET]) as connection:
            connection.connect(vip("maglev", False), 80)
            names.add(connection.ask())
    assert len(names) == 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_weight_zero_drains(net: Topology, mode: str, scheduler: str) -> None:
    needs(mode, scheduler)
    annotations = {
        "ebpfproxy.io/scheduler": scheduler,
        "ebpfproxy.io/weights": "10.244.0.11=0,10.244.0.12=1",
    }
    agent = Agent(net, mode=mode, config=known.CONFIG)
    agent.write(
        service("web", known.HTTP, ips=known.WEB[:1], annotations=annotations),
        *known.slices("web", net.pods[:2], known.TO_HTTP)[:1],
    )
    with agent, Probe(net.on_node) as probe:
        assert set(probe.tcp(known.WEB[0], 80, 10)) == {"pod2"}
