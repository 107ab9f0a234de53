"""The same Services, made up at random, in every mode: who answers, and whom they see, must be the same.

No expected values: iptables rules in kube-proxy's layout are the second opinion on what our own programs do,
and nftables the third. The same few examples every time; ``ORACLE_EXAMPLES=100`` in the environment makes so
many new ones, and a difference says what it came from.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from ebpfproxy.dataplane.capabilities import limit
from rig.agent import Agent
from rig.objects import endpoint, endpoint_slice, service
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import GATEWAYS, NODE_IPS, NODE_NAME, Topology

from . import catalogue as known
from .conftest import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.objects import Object

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.timeout(3600)]

MODES = ("bpf", "nftables", "iptables")
PLACES = (NODE_NAME, "node-2")
OWN = {*NODE_IPS, *GATEWAYS}  # addresses of the node
DROPPED, REFUSED = {"dropped": ""}, {"refused": ""}


class Wanted(NamedTuple):
    """A Service, as far as chance decides it."""

    type: str
    protocol: str
    family: int  # 0 = IPv4
    endpoints: tuple[str, ...]  # conditions of pod1, pod2, pod3; "" = no endpoint
    internal: str
    external: str
    affinity: str
    ranges: tuple[str, ...]
    publishes: bool


#: Who may enter: the outside client's /24 or another; the pod's.
RANGES = {
    "outside": ("192.0.2.0/24", "2001:db8::/64"),
    "pods": ("10.244.0.0/24", "fd00:244::/64"),
    "nobody": ("198.51.100.0/24", "2001:db8:1::/64"),
}
CONDITIONS: dict[str, dict[str, bool]] = {
    "ready": {"ready": True},
    "terminating": {"ready": False, "serving": True, "terminating": True},
    "not-ready": {"ready": False, "serving": False},
}
POLICY = st.sampled_from(["Cluster", "Local"])
SERVICE = st.builds(
    Wanted,
    type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "external"]),
    protocol=st.sampled_from(["TCP", "UDP"]),
    family=st.sampled_from([0, 1]),
    endpoints=st.tuples(*[st.sampled_from(["", "ready", "ready", *CONDITIONS])] * 3),
    internal=POLICY,
    external=POLICY,
    affinity=st.sampled_from(["None", "None", "ClientIP"]),
    ranges=st.lists(st.sampled_from(list(RANGES)), max_size=2, unique=True).map(tuple),
    publishes=st.booleans(),
)  # fmt: skip


class Target(NamedTuple):
    """A frontend of a Service."""

    kind: str
    address: str
    port: int


def targets(wanted: Wanted, number: int) -> list[Target]:
    found = [Target("cluster IP", (f"10.96.1.{number}", f"fd00:96::1{number:03}")[wanted.family], 80)]
    if wanted.type in ("NodePort", "LoadBalancer"):
        found.append(Target("NodePort", NODE_IPS[wanted.family], 30100 + number))
    if wanted.type == "LoadBalancer":
        found.append(Target("load balancer", balanced(wanted, number), 80))
    if wanted.type == "external":
        found.append(Target("external IP", balanced(wanted, number), 80))
    return found


def balanced(wanted: Wanted, number: int) -> str:
    return (f"203.0.113.{100 + number}", f"2001:db8:f::1:{number}")[wanted.family]


def objects(wanted: Wanted, number: int, net: Topology, places: tuple[str, ...]) -> list[Object]:
    """Return the manifests of one Service; ``places`` are the nodes of the pods."""
    name, is_udp = f"s{number}", wanted.protocol == "UDP"
    port: Object = {"port": 80, "targetPort": 8080, "protocol": wanted.protocol}
    spec: dict[str, Any] = {
        "internalTrafficPolicy": wanted.internal,
        "sessionAffinity": wanted.affinity,
        "publishNotReadyAddresses": wanted.publishes,
    }
    ingress: list[str] = []
    if wanted.type == "external":
        spec |= {"externalIPs": [balanced(wanted, number)], "externalTrafficPolicy": wanted.external}
    elif wanted.type != "ClusterIP":
        port["nodePort"] = 30100 + number
        spec |= {"type": wanted.type, "externalTrafficPolicy": wanted.external}
    if wanted.type == "LoadBalancer":
        ingress = [balanced(wanted, number)]
        if wanted.ranges:
            spec["loadBalancerSourceRanges"] = [RANGES[each][wanted.family] for each in wanted.ranges]
    endpoints = [
        endpoint(pod.ips[wanted.family], node=place, **CONDITIONS[condition])
        for pod, condition, place in zip(net.pods, wanted.endpoints, places, strict=False)
        if condition
    ]
    made = [service(name, port, ips=[targets(wanted, number)[0].address], ingress=ingress, **spec)]
    if endpoints:
        target: Object = {"port": 8080, "protocol": "UDP" if is_udp else "TCP"}
        made.append(endpoint_slice(name, endpoints, target))
    return made


class Node(NamedTuple):
    mode: str
    net: Topology
    agent: Agent
    probes: dict[str, Probe]


@pytest.fixture(scope="module")
def nodes(nothing_left: None) -> Iterator[list[Node]]:
    """The same node three times, each with an agent of another mode."""
    with ExitStack() as stack:
        found = []
        for mode in MODES:
            net = stack.enter_context(Topology(pod_count=4))
            net.add_default_route()
            stack.enter_context(name_servers(serving(net), 8080))
            agent = Agent(net, mode=mode, config=known.CONFIG)
            agent.write(known.NODE, file="node.json")
            stack.enter_context(agent)
            places = {"node": net.on_node, "pod": net.pods[3].place, "outside": net.from_outside}
            probes = {name: stack.enter_context(Probe(place)) for name, place in places.items()}
            found.append(Node(mode, net, agent, probes))
        yield found


def ask(node: Node, origin: str, target: Target, wanted: Wanted, patience_s: float = 0.4) -> dict[str, str]:
    """Return who answers, and what each sees: the client's own address, or the node's."""
    probe, count = node.probes[origin], 6
    probe.call("timeout", patience_s)
    try:
        if wanted.protocol == "TCP":
            answers = probe.answers(target.address, target.port, count)
        else:
            answers = probe.call("udp", target.address, target.port, count, True, None)
    except (ConnectionRefusedError, PermissionError):
        return REFUSED
    except TimeoutError:
        return DROPPED
    pairs = (answer.split(" ")[:2] for answer in answers)
    return {name: "the node" if address in OWN else "the client" for name, address in pairs}


def agree(seen: dict[str, dict[str, str]], origin: str, target: Target, wanted: Wanted) -> bool:
    """Return whether all modes gave the same answer, as far as their capabilities go."""
    if origin == "node" and any(limit(mode, "drop-sockets") for mode in seen):
        seen = {mode: DROPPED if each == REFUSED else each for mode, each in seen.items()}
    answers = list(seen.values())
    if wanted.affinity == "ClientIP" and not any(each in (DROPPED, REFUSED) for each in answers):
        return {len(each) for each in answers} == {1}  # which one is a matter of chance
    if any(each.keys() != answers[0].keys() for each in answers):
        return False
    # kube-proxy gives all traffic to an external VIP under policy Cluster the node's address.
    is_given_ours = target.kind != "cluster IP" and wanted.external == "Cluster"
    exact = [each for mode, each in seen.items() if not (is_given_ours and limit(mode, "client-address"))]
    return all(each == exact[0] for each in exact)


def is_compared(origin: str, target: Target, wanted: Wanted) -> bool:
    """Return whether all modes do this at all."""
    # A socket on the node has no source address yet when sock_lb looks at it: see `ebpfproxy check`.
    return not (origin == "node" and target.kind == "load balancer" and wanted.ranges)


EXAMPLES = int(os.environ.get("ORACLE_EXAMPLES", "0"))


@settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes seconds, what differs is told
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(SERVICE, min_size=6, max_size=10), st.tuples(*[st.sampled_from(PLACES)] * 3))
def test_modes_agree(nodes: list[Node], wanted: list[Wanted], places: tuple[str, ...]) -> None:
    for node in nodes:
        made = [each for n, one in enumerate(wanted, 1) for each in objects(one, n, node.net, places)]
        node.agent.write(*made)
    for node in nodes:
        node.agent.wait_synced()
    differences = []
    for number, one in enumerate(wanted, 1):
        for target in targets(one, number):
            for origin in ("node", "pod", "outside"):
                if not is_compared(origin, target, one):
                    continue
                seen = {node.mode: ask(node, origin, target, one) for node in nodes}
                if not agree(seen, origin, target, one):  # on a busy machine an answer may take its time
                    seen = {node.mode: ask(node, origin, target, one, patience_s=5) for node in nodes}
                if not agree(seen, origin, target, one):
                    differences.append(f"{origin} to {target.kind} of {one}, pods on {places}: {seen}")
    note("\n".join(differences))
    assert not differences, "\n".join(differences)
