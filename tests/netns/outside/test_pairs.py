"""Features together: every pair of them in at least one Service that has both, asked as a client would.

allpairspy picks the combinations; the answers are worked out here from docs/semantics.md, not by the agent.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest
from allpairspy import AllPairs

from rig import kernel
from rig.cluster import CLIENT_IPS, Cluster
from rig.objects import endpoint, endpoint_slice, service
from rig.servers import name_servers

from . import table
from .conftest import MODES, World, start_agents

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.objects import Object

pytestmark = [pytest.mark.root, pytest.mark.netns]

#: A SYN is sent again after 1 s (RFC 6298 2.1): an answer that comes earlier came at once.
LOST_S = 0.3
REQUESTS = 6


class Combination(NamedTuple):
    """One Service, and one client of it."""

    client: str
    entry: str
    family: int
    transport: str
    external_policy: str
    internal_policy: str
    placement: str
    state: str
    affinity: str
    scheduler: str
    ranges: str
    forwarding: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


VALUES: dict[str, list[str | int]] = {
    "client": ["client", "pod12", "pod12+", "node-1"],
    "entry": ["node-port", "load-balancer", "external-ip", "cluster-ip"],
    "family": [0, 1],
    "transport": ["tcp", "udp"],
    "external_policy": ["Cluster", "Local"],
    "internal_policy": ["Cluster", "Local"],
    "placement": ["here", "there", "both"],
    "state": ["ready", "one ending", "all ending"],
    "affinity": ["None", "ClientIP"],
    "scheduler": ["rr", "sh", "maglev", "lc"],
    "ranges": ["open", "allowed", "others"],
    "forwarding": ["snat", "dsr", "hybrid"],
}
PLACES = {"here": ["pod11"], "there": ["pod21"], "both": ["pod11", "pod21", "pod31"]}


#: Of a single endpoint, the last one is the one that ends.
COMBINATIONS = [Combination(*each) for each in AllPairs(list(VALUES.values()))]


def expected(it: Combination) -> dict[str, str] | str:
    """Return who may answer and which address each of them sees, or the outcome if nobody answers."""
    is_outside, is_socket = it.client == "client", it.client in ("pod12+", "node-1")
    if it.entry == "load-balancer" and it.ranges == "others":
        return "denied" if is_socket else "lost"
    if it.entry == "cluster-ip":
        policy = it.internal_policy
    else:
        policy = it.external_policy if is_outside else "Cluster"
    pods = PLACES[it.placement]
    endings = {"ready": [], "one ending": pods[-1:], "all ending": pods}[it.state]
    if policy == "Local":
        pods = [pod for pod in pods if pod == "pod11"]
    usable = [pod for pod in pods if pod not in endings] or pods
    if not usable:
        return "denied" if is_socket else "lost"
    own = it.client.rstrip("+")
    if not is_outside:
        return dict.fromkeys(usable, own)
    if it.entry == "cluster-ip":
        return dict.fromkeys(usable, "node-1")
    if it.forwarding == "dsr" or (it.forwarding == "hybrid" and it.transport == "tcp"):
        return dict.fromkeys(usable, own)
    return {pod: own if pod == "pod11" else "node-1" for pod in usable}


def vips(number: int) -> dict[str, tuple[str, str]]:
    return {
        "cluster-ip": (f"10.96.0.{number}", f"fd00:96::{number}"),
        "load-balancer": (f"203.0.113.{number}", f"2001:db8:f::{number}"),
        "external-ip": (f"203.0.113.{100 + number}", f"2001:db8:f::{100 + number}"),
    }


def objects(cluster: Cluster, number: int, it: Combination) -> list[Object]:
    """Return the manifests of a combination."""
    addresses = vips(number)
    ranges = {
        "open": [],
        "allowed": [
            *(f"{CLIENT_IPS[0]}/32", f"{CLIENT_IPS[1]}/128"),
            *cluster.nodes[0].pod_cidrs,
            *("10.1.1.1/32", "fd00:1:1::1/128"),
        ],
        "others": ["192.0.2.0/24", "2001:db8:9::/64"],
    }[it.ranges]
    name = f"pair-{number}"
    pods = PLACES[it.placement]
    endings = {"ready": [], "one ending": pods[-1:], "all ending": pods}[it.state]
    is_ending = {"ready": False, "serving": True, "terminating": True}
    return [
        service(
            name,
            *(port | {"nodePort": 30000 + number} for port in table.PORTS),
            ips=addresses["cluster-ip"],
            ingress=addresses["load-balancer"],
            externalIPs=list(addresses["external-ip"]),
            type="LoadBalancer",
            annotations={"ebpfproxy.io/scheduler": it.scheduler, "ebpfproxy.io/forwarding": it.forwarding},
            externalTrafficPolicy=it.external_policy,
            internalTrafficPolicy=it.internal_policy,
            sessionAffinity=it.affinity,
            **({"loadBalancerSourceRanges": ranges} if ranges else {}),
        ),
        *(
            endpoint_slice(
                name,
                [
                    endpoint(
                        cluster.pods[pod].ips[family],
                        node=cluster.node_of(cluster.pods[pod]).node_name,
                        **(is_ending if pod in endings else {}),
                    )
                    for pod in pods
                ],
                *table.TARGETS,
            )
            for family in (0, 1)
        ),
    ]


@pytest.fixture(scope="module", params=MODES, ids=str)
def world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=3, pods_per_node=2))
        pods = [(name, pod.place) for name, pod in cluster.pods.items() if pod.number == 1]
        stack.enter_context(name_servers(pods, 8080))
        made = [
            each
            for number, combination in enumerate(COMBINATIONS, 1)
            for each in objects(cluster, number, combination)
        ]
        agents = start_agents(stack, cluster, made, request.param)
        yield World(cluster, agents, stack)


@pytest.mark.parametrize(("number", "it"), list(enumerate(COMBINATIONS, 1)), ids=str)
def test_pair(world: World, number: int, it: Combination) -> None:
    cluster = world.cluster
    if it.entry == "node-port":
        address, port = cluster.nodes[0].ips[it.family], 30000 + number
    else:
        address, port = vips(number)[it.entry][it.family], 80
    probe = world.probe(it.client)
    # Source ranges can judge a socket only if it is bound.
    own = {"client": CLIENT_IPS, "node-1": cluster.nodes[0].ips}.get(it.client) or cluster.pods["pod12"].ips
    bind = (own[it.family], 0)
    ask = probe.answers if it.transport == "tcp" else probe.udp_answers
    want = expected(it)
    if want == "lost":
        with probe.impatient(LOST_S), pytest.raises(TimeoutError):
            ask(address, port, 1, bind=bind)
        return
    if want == "denied":
        with pytest.raises((PermissionError, kernel.REFUSED)):
            ask(address, port, 1, bind=bind)
        return
    assert isinstance(want, dict)
    got = table.readable(ask(address, port, REQUESTS, bind=bind), table.owners(cluster, it.family))
    assert got <= {f"{pod}<{source}" for pod, source in want.items()}
    if it.affinity == "ClientIP" or it.scheduler == "sh":
        assert len(got) == 1
    elif it.scheduler == "rr":
        assert len(got) == len(want)


def test_every_pair_is_there() -> None:
    """What allpairspy promises, counted anew."""
    names = list(VALUES)
    missing = []
    for first, one in enumerate(names):
        for two in names[first + 1 :]:
            for left in VALUES[one]:
                for right in VALUES[two]:
                    chosen = {one: left, two: right}
                    if not any(all(getattr(c, k) == v for k, v in chosen.items()) for c in COMBINATIONS):
                        missing.append((left, right))
    assert not missing
