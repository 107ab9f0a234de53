"""The Services of the two nodes.

``python -m tests.vagrant.manifests DIRECTORY`` writes them for the provisioner.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rig.objects import endpoint, endpoint_slice, service

if TYPE_CHECKING:
    from collections.abc import Iterable

NODES = ("node-1", "node-2")
CLIENT_IPS = ("192.168.56.100", "fd00:56::100")
PODS = {f"pod{node}{pod}": f"node-{node}" for node in (1, 2) for pod in (1, 2)}
WEB_PORT, LOCAL_PORT, DIRECT_PORT = 30080, 30081, 30082
WEB_IPS, LOCAL_IPS = ("10.96.0.10", "fd00:96::a"), ("10.96.0.11", "fd00:96::b")
DIRECT_IPS = ("10.96.0.12", "fd00:96::c")
FILE = "services.json"


def node_ips(node: str) -> tuple[str, str]:
    number = node.removeprefix("node-")
    return f"192.168.56.1{number}", f"fd00:56::1{number}"


def pod_ips(pod: str) -> tuple[str, str]:
    node, number = pod[3], pod[4]
    return f"10.244.{node}.1{number}", f"fd00:244:{node}::1{number}"


def objects(pods: Iterable[str]) -> list[dict[str, Any]]:
    """Return the objects, with these pods as endpoints."""
    made: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node},
            "spec": {"podCIDRs": [f"10.244.{node[-1]}.0/24", f"fd00:244:{node[-1]}::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": each} for each in node_ips(node)]},
        }
        for node in NODES
    ]
    listed = sorted(pods)
    for name, port, ips, policy, marks in [
        ("web", WEB_PORT, WEB_IPS, "Cluster", {}),
        ("local", LOCAL_PORT, LOCAL_IPS, "Local", {}),
        ("direct", DIRECT_PORT, DIRECT_IPS, "Cluster", {"ebpfproxy.io/forwarding": "dsr"}),
    ]:
        ports = [
            {"name": "http", "port": 80, "targetPort": 8080, "nodePort": port},
            {"name": "udp", "port": 80, "targetPort": 8080, "nodePort": port, "protocol": "UDP"},
        ]
        made.append(
            service(
                name,
                *ports,
                ips=ips,
                annotations=marks,
                type="NodePort",
                externalTrafficPolicy=policy,
            )
        )
        made += [
            endpoint_slice(
                name,
                [endpoint(pod_ips(pod)[family], node=PODS[pod]) for pod in listed],
                {"name": "http", "port": 8080},
                {"name": "udp", "port": 8080, "protocol": "UDP"},
            )
            for family in (0, 1)
        ]
    return made


def text(pods: Iterable[str]) -> str:
    """Return the file's content."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects(pods)}, indent=1)


if __name__ == "__main__":
    Path(sys.argv[1], FILE).write_text(text(PODS))
