"""Which service a packet finds, and what happens where there is none: every verdict of tc_lb."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import raw

from ebpfproxy.libbpf import Map, Object, lib
from ebpfproxy.loader import OBJECTS
from packets.node import (
    NODE_PORTS,
    PROTOCOLS,
    Family,
    Node,
    finished,
    frame,
    struct_of,
    to_bytes,
    translated,
)

pytestmark = pytest.mark.root

PORT = 80
NODE_PORT = 30080


def syn(family: Family, dst: str, dport: int, src: str | None = None, sport: int = 40000) -> object:
    """Return a SYN from outside the node."""
    return finished(frame(family, TCP(sport=sport, dport=dport, flags="S"), src or family.client, dst))


@dataclass(frozen=True)
class Case:
    """A SYN, from where, to where."""

    name: str
    source: str  # client | pod
    to: str  # vip | other_vip | node
    port: int
    verdict: str
    backend: int | None = None  # index of the address it goes to

    def __str__(self) -> str:
        return self.name


#: On the node: cluster IP vip:80 (policy Cluster for pods, Local for others), external IP other_vip:443,
#: NodePort 30080 on the address node.
CASES = [
    Case("cluster IP from a pod", "pod", "vip", 80, "NEW", 0),
    Case("cluster IP from outside: its own pool", "client", "vip", 80, "NEW", 1),
    Case("external IP from outside", "client", "other_vip", 443, "NEW", 2),
    Case("unused port of a cluster IP", "client", "vip", 81, "REJECT_UNUSED"),
    Case("unused port of an external IP", "pod", "other_vip", 80, "REJECT_UNUSED"),
    Case("NodePort from outside", "client", "node", NODE_PORT, "NEW", 2),
    Case("NodePort from a pod", "pod", "node", NODE_PORT, "NEW", 2),
    Case("a node port without a service", "client", "node", NODE_PORT + 1, "NOT_OURS"),
    Case("the node's own services, below the range", "client", "node", 22, "NOT_OURS"),
    Case("the range's first port", "client", "node", NODE_PORTS[0], "NOT_OURS"),
    Case("above the range", "client", "node", NODE_PORTS[1] + 1, "NOT_OURS"),
    Case("NodePort on a cluster IP", "client", "vip", NODE_PORT, "REJECT_UNUSED"),
    Case("a local address that serves no NodePort", "client", "other_client", NODE_PORT, "NOT_OURS"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_which_service(node: Node, family: Family, case: Case) -> None:
    a, b, c = family.backends
    internal = node.service(family.vip, 80, [a], scopes=[lib.SCOPE_INTERNAL])
    external = node.service(family.vip, 80, [b], scopes=[lib.SCOPE_EXTERNAL])
    node.service(family.other_vip, 443, [c], kind=lib.VIP_EXTERNAL_IP)
    node.service(family.any, NODE_PORT, [c], kind=lib.VIP_NODE)
    node.vip(family.node, lib.VIP_NODE | lib.VIP_LOCAL)
    node.vip(family.other_client, lib.VIP_LOCAL)
    node.local_source(family.pods)

    packet = syn(family, getattr(family, case.to), case.port, getattr(family, case.source))
    verdict, arrived = node.ingress(packet)
    assert verdict == case.verdict
    if case.backend is not None:
        assert raw(arrived) == translated(packet, dst=family.backends[case.backend], dport=8080)
    elif case.verdict == "NOT_OURS":
        assert raw(arrived) == raw(packet)
    else:
        assert arrived is not None
        assert arrived[TCP].flags == "RA"
    assert len(node.flows()) == (2 if verdict == "NEW" else 0)
    assert node.service_stats(internal) == (int(case.backend == 0), 0)
    assert node.service_stats(external) == (int(case.backend == 1), 0)


def test_an_address_of_the_node_that_is_an_external_ip(node: Node, family: Family) -> None:
    """Its own frontend first, then NodePorts, then the node's own programs: never a rejection."""
    node.service(family.node, 443, [family.backends[0]], kind=lib.VIP_EXTERNAL_IP)
    node.service(family.any, NODE_PORT, [family.backends[1]], kind=lib.VIP_NODE)
    node.vip(family.node, lib.VIP_EXTERNAL_IP | lib.VIP_NODE | lib.VIP_LOCAL)
    found = {port: node.ingress(syn(family, family.node, port)).verdict for port in (443, NODE_PORT, 22)}
    assert found == {443: "NEW", NODE_PORT: "NEW", 22: "NOT_OURS"}


def test_protocols_are_apart(node: Node, family: Family) -> None:
    node.service(family.vip, 53, [family.backends[0]], proto="UDP")
    ask = finished(frame(family, UDP(sport=5, dport=53), family.client, family.vip))
    assert node.ingress(ask).verdict == "NEW"
    assert node.ingress(syn(family, family.vip, 53)).verdict == "REJECT_UNUSED"


@pytest.mark.parametrize(
    ("flags", "verdict"), [(0, "REJECT_EMPTY"), (lib.SERVICE_DROP_EMPTY | lib.SERVICE_LOCAL, "DROP_EMPTY")]
)
def test_no_backend(node: Node, family: Family, flags: int, verdict: str) -> None:
    service = node.service(family.vip, PORT, [], flags=flags)
    outcome = node.ingress(syn(family, family.vip, PORT))
    assert outcome.verdict == verdict
    assert (outcome.packet is None) == (verdict == "DROP_EMPTY")
    assert node.service_stats(service) == (0, 1)
    assert not node.flows()


def test_established_connections_survive_an_empty_pool(node: Node, family: Family) -> None:
    service = node.service(family.vip, PORT, [family.backends[0]])
    assert node.ingress(syn(family, family.vip, PORT)).verdict == "NEW"
    node.set_service(service, slot_count=0)
    ack = finished(frame(family, TCP(sport=40000, dport=PORT, flags="A"), family.client, family.vip))
    assert node.ingress(ack).verdict == "ESTABLISHED"
    assert node.ingress(syn(family, family.vip, PORT, sport=2)).verdict == "REJECT_EMPTY"


#: Prefixes of the client's network, wide and narrow, by IP version.
RANGES = {
    4: ("192.0.2.0/24", "192.0.2.7/32", "0.0.0.0/0"),
    6: ("2001:db8:1::/48", "2001:db8:1::7/128", "::/0"),
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["network", "host", "everyone"])
def test_source_ranges(node: Node, family: Family, which: int) -> None:
    """LoadBalancerSourceRanges guard the load-balancer VIP, not the cluster IP of the same service."""
    service = node.service(
        family.vip, PORT, [family.backends[0]], kind=lib.VIP_LOAD_BALANCER, flags=lib.SERVICE_SOURCE_RANGES
    )
    node.service(family.other_vip, PORT, [], table=[0], pool=service)
    node.source_range(service, RANGES[family.version][which])
    stranger = family.pod if which == 0 else family.other_client
    everyone = which == 2
    assert node.ingress(syn(family, family.vip, PORT)).verdict == "NEW"
    assert node.service_stats(service) == (1, 0)
    verdict = node.ingress(syn(family, family.vip, PORT, stranger)).verdict
    assert verdict == ("NEW" if everyone else "DROP_SOURCE")
    assert node.service_stats(service) == ((2, 0) if everyone else (1, 1))
    assert node.ingress(syn(family, family.other_vip, PORT, stranger)).verdict == "NEW"


def test_source_ranges_of_another_service(node: Node, family: Family) -> None:
    guarded = node.service(
        family.vip, PORT, [family.backends[0]], kind=lib.VIP_LOAD_BALANCER, flags=lib.SERVICE_SOURCE_RANGES
    )
    other = node.service(family.other_vip, PORT, [family.backends[0]], kind=lib.VIP_LOAD_BALANCER)
    node.source_range(other, RANGES[family.version][2])
    assert node.ingress(syn(family, family.vip, PORT)).verdict == "DROP_SOURCE"
    assert guarded.id != other.id


def test_source_ranges_of_the_other_ip_version(node: Node, family: Family) -> None:
    """A range of the other version lets nobody in, be it as wide as can be."""
    service = node.service(
        family.vip, PORT, [family.backends[0]], kind=lib.VIP_LOAD_BALANCER, flags=lib.SERVICE_SOURCE_RANGES
    )
    node.source_range(service, "2001:db8::/32" if family.version == 4 else "0.0.0.0/0")
    assert node.ingress(syn(family, family.vip, PORT)).verdict == "DROP_SOURCE"


def test_rewrite_failed(node: Node, family: Family) -> None:
    """An entry of the other IP version can't be applied: the packet is dropped, not sent half translated."""
    key = struct_of(
        "flow_key",
        src=family.client,
        dst=family.vip,
        sport=40000,
        dport=PORT,
        proto=PROTOCOLS["TCP"],
        dir=lib.FLOW_FORWARD,
    )
    node.vip(family.vip, lib.VIP_CLUSTER_IP)
    other = "192.0.2.1" if family.version == 6 else "2001:db8::1"
    value = struct_of("flow", src=other, dst=other, sport=1, dport=1)
    node.map("conntrack").update(to_bytes(key), to_bytes(value))
    ack = finished(frame(family, TCP(sport=40000, dport=PORT, flags="A"), family.client, family.vip))
    assert node.ingress(ack) == ("REWRITE_FAILED", None)


def test_map_full(node: Node, family: Family) -> None:
    """An LRU map makes room by itself; one that can't (a small hash stands in) refuses the flow."""
    definition = node.map("new_flows").definition
    full = Map.create(definition._replace(type=lib.BPF_MAP_TYPE_HASH, max_entries=1, name="full"))
    with full, Object(OBJECTS / "tc_lb.bpf.o") as programs:
        for name in programs.maps:
            programs.reuse(name, full if name == "new_flows" else node.map(name))
        programs.load()
        service = node.service(family.vip, PORT, [family.backends[0]])
        before = node.verdicts()["MAP_FULL"]
        with programs.program("tc_ingress") as ingress:
            result = ingress.run(raw(syn(family, family.vip, PORT)))
        assert result.retval == 2  # TC_ACT_SHOT
        assert node.verdicts()["MAP_FULL"] == before + 1
        assert full.count() == 0  # no half of a flow stays
        assert node.service_stats(service) == (0, 1)
        assert node.backend_stats(service.backends[0]) == (0, 0)


def test_statistics(node: Node, family: Family) -> None:
    service = node.service(family.vip, PORT, family.backends[:2])
    for sport in range(5):
        node.ingress(syn(family, family.vip, PORT, sport=1000 + sport))
        node.ingress(syn(family, family.vip, PORT, sport=1000 + sport))  # again: the same connection
    assert node.service_stats(service) == (5, 0)
    assert [node.backend_stats(each) for each in service.backends] == [(3, 3), (2, 2)]
