"""Reads services.yaml: Services to write as manifests, and rows to try."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rig.cluster import CLIENT_IPS, CLUSTER_CIDRS, OTHER_CLIENT_IPS, ROUTER_IPS, Cluster
from rig.objects import endpoint_slice, service

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rig.cluster import Node
    from rig.objects import Object

FILE = Path(__file__).with_name("services.yaml")
ZONES = ("a", "a", "b")  # of the nodes

#: Round robin, so that a handful of requests shows every backend and nothing is left to chance.
CONFIG: dict[str, Any] = {
    "ipvs": {"scheduler": "rr"},
    "clusterCIDR": ",".join(CLUSTER_CIDRS),
    "detectLocalMode": "ClusterCIDR",
    "ebpfproxy": {"serviceClusterIPRange": "10.96.0.0/16,fd00:96::/112"},
}

PORTS: tuple[Object, ...] = (
    {"name": "http", "port": 80, "targetPort": 8080},
    {"name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP"},
)
TARGETS: tuple[Object, ...] = (
    {"name": "http", "port": 8080},
    {"name": "udp", "port": 8080, "protocol": "UDP"},
)


@dataclass(frozen=True)
class Row:
    """One line of a Service's rows."""

    source: str
    target: str
    answers: frozenset[str]  # BACKEND<SOURCE
    outcome: str  # "answered", "refused" or "lost"


@dataclass(frozen=True)
class Case:
    """A Service with its rows; the fields are those of the file."""

    number: int  # its place in the file, from 1
    name: str
    what: str
    spec: dict[str, Any]
    endpoints: dict[str, dict[str, bool]]
    rows: list[Row]
    annotations: dict[str, str] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    transports: tuple[str, ...] = ("tcp", "udp")

    @property
    def cluster_ips(self) -> tuple[str, str]:
        return f"10.96.0.{self.number}", f"fd00:96::{self.number:x}"

    @property
    def load_balancers(self) -> tuple[str, str]:
        return f"203.0.113.{self.number}", f"2001:db8:f::{self.number:x}"

    @property
    def external_ips(self) -> tuple[str, str]:
        return f"203.0.113.{100 + self.number}", f"2001:db8:f::{0x100 + self.number:x}"

    @property
    def node_port(self) -> int:
        return 30000 + self.number

    def address(self, target: str, cluster: Cluster, family: int) -> tuple[str, int]:
        """Return the address and port that a row's target means."""
        kind, _, node = target.partition("@")
        if kind == "node-port":
            return _node(cluster, node).ips[family], self.node_port
        addresses = {
            "cluster-ip": self.cluster_ips,
            "load-balancer": self.load_balancers,
            "external-ip": self.external_ips,
            ROUTER_IPS[0]: ROUTER_IPS,
        }
        return addresses[kind][family], 80

    def objects(self, cluster: Cluster) -> list[Object]:
        """Return its manifests."""
        has_node_ports = self.spec.get("allocateLoadBalancerNodePorts", True)
        ports = [port | ({"nodePort": self.node_port} if has_node_ports else {}) for port in PORTS]
        spec = {"externalIPs": list(self.external_ips), **self.spec}
        made = service(self.name, *ports, ips=self.cluster_ips, annotations=self.annotations, **spec)
        ingress = [{"ip": address} for address in self.load_balancers]
        made["status"] = self.status or {"loadBalancer": {"ingress": ingress}}
        slices = []
        for family in (0, 1):
            listed = [
                {
                    "addresses": [cluster.pods[name].ips[family]],
                    "nodeName": cluster.node_of(cluster.pods[name]).node_name,
                    "zone": ZONES[cluster.pods[name].node - 1],
                    "conditions": conditions,
                    "hints": self.hints.get(name, {}),
                }
                for name, conditions in self.endpoints.items()
            ]
            if listed:
                slices.append(endpoint_slice(self.name, listed, *TARGETS))
        return [made, *slices]


def read() -> list[Case]:
    """Return the file's Services in their order."""
    return [
        Case(**fields | {"number": number, "rows": _rows(fields["rows"])})
        for number, fields in enumerate(yaml.safe_load(FILE.read_text()), 1)
    ]


def _rows(text: str) -> list[Row]:
    found = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        source, target, *answers = line.split()
        outcome = answers[0] if answers[0] in ("refused", "lost") else "answered"
        found.append(Row(source, target, frozenset(answers if outcome == "answered" else ()), outcome))
    return found


def _node(cluster: Cluster, name: str) -> Node:
    return next(node for node in cluster.nodes if node.node_name == name)


def node_objects(cluster: Cluster, families: Sequence[int] = (0, 1)) -> list[Object]:
    """Return the Node objects."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": node.node_name,
                "labels": {"topology.kubernetes.io/zone": ZONES[node.number - 1]},
            },
            "spec": {"podCIDRs": [node.pod_cidrs[family] for family in families]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": node.ips[family]} for family in families]
            },
        }
        for node in cluster.nodes
    ]


def owners(cluster: Cluster, family: int) -> dict[str, str]:
    """Return who has an address."""
    found = {CLIENT_IPS[family]: "client", OTHER_CLIENT_IPS[family]: "client2", ROUTER_IPS[family]: "router"}
    for node in cluster.nodes:
        found |= {node.ips[family]: node.node_name, node.gateways[family]: node.node_name}
        found |= {pod.ips[family]: pod.name for pod in node.pods}
    return found


def readable(answers: Iterable[str], who: dict[str, str]) -> frozenset[str]:
    """Return answers of name servers, "NAME ADDRESS", as the rows write them."""
    return frozenset(
        f"{name}<{who.get(address, address)}" for name, address in (line.split(" ")[:2] for line in answers)
    )
