"""One Service of every kind, for a node with three pods; what the tables of this directory refer to.

pod1 and pod2 count as this node's, pod3 as another node's. The default scheduler is round robin, so that
a handful of requests shows every backend and nothing is left to chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rig.objects import endpoint, endpoint_slice, service
from rig.topology import NODE_IPS, NODE_NAME, POD_CIDRS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rig.objects import Object
    from rig.topology import Pod

CONFIG: dict[str, Any] = {
    "ipvs": {"scheduler": "rr"},
    "clusterCIDR": ",".join(POD_CIDRS),
    "detectLocalMode": "ClusterCIDR",
    "ebpfproxy": {"serviceClusterIPRange": "10.96.0.0/16,fd00:96::/112"},
}

WEB = ("10.96.0.10", "fd00:96::a")
EMPTY = ("10.96.0.11", "fd00:96::b")
TERMINATING = ("10.96.0.12", "fd00:96::c")
NODE_PORT = ("10.96.0.13", "fd00:96::d")
EXTERNAL = ("203.0.113.14", "2001:db8:f::e")
BALANCED = ("203.0.113.15", "2001:db8:f::f")
GUARDED = ("203.0.113.16", "2001:db8:f::10")
LOCAL_EXTERNAL = ("10.96.0.17", "fd00:96::11")
LOCAL_INTERNAL = ("10.96.0.18", "fd00:96::12")
REMOTE_ONLY = ("10.96.0.19", "fd00:96::13")
ANOTHER = ("10.96.0.20", "fd00:96::14")  # a VIP of no Service; the range's routes lead to the node
NAMED = ("10.96.0.21", "fd00:96::15")
DNS = ("10.96.0.53", "fd00:96::35")

NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": NODE_NAME},
    "spec": {"podCIDRs": list(POD_CIDRS)},
    "status": {"addresses": [{"type": "InternalIP", "address": address} for address in NODE_IPS]},
}

HTTP: Object = {"name": "http", "port": 80, "targetPort": 8080}
UDP: Object = {"name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP"}
TO_HTTP: Object = {"name": "http", "port": 8080}
TO_UDP: Object = {"name": "udp", "port": 8080, "protocol": "UDP"}


def slices(
    name: str, pods: Iterable[Pod], *ports: int | Object, nodes: Sequence[str] = (), **conditions: bool
) -> list[Object]:
    """Return the EndpointSlices of both families for a Service; ``nodes`` names each pod's node."""
    listed = list(pods)
    places = list(nodes) or [NODE_NAME] * len(listed)
    return [
        endpoint_slice(
            name,
            [
                endpoint(pod.ips[family], node=node, **conditions)
                for pod, node in zip(listed, places, strict=True)
            ],
            *ports,
        )
        for family in (0, 1)
    ]


def objects(pods: Sequence[Pod]) -> list[Object]:
    """Return the manifests."""
    nodes = [NODE_NAME, NODE_NAME, "node-2"]
    both = (TO_HTTP, TO_UDP)
    return [
        NODE,
        service("web", HTTP, UDP, {"name": "second", "port": 81, "targetPort": 8081}, ips=WEB),
        *slices("web", pods, *both, {"name": "second", "port": 8081}, nodes=nodes),
        service("empty", HTTP, UDP, ips=EMPTY),
        service("terminating", HTTP, UDP, ips=TERMINATING),
        *slices("terminating", pods[:1], *both, ready=False, serving=True, terminating=True),
        service(
            "node-port", HTTP | {"nodePort": 30080}, UDP | {"nodePort": 30080}, ips=NODE_PORT, type="NodePort"
        ),
        *slices("node-port", pods, *both, nodes=nodes),
        service("external", HTTP, UDP, ips=["10.96.0.14", "fd00:96::e"], externalIPs=list(EXTERNAL)),
        *slices("external", pods, *both, nodes=nodes),
        service(
            "balanced", HTTP, UDP, ips=["10.96.0.15", "fd00:96::f"], type="LoadBalancer", ingress=BALANCED
        ),
        *slices("balanced", pods, *both, nodes=nodes),
        service(
            *("guarded", HTTP, UDP),
            ips=["10.96.0.16", "fd00:96::10"],
            type="LoadBalancer",
            ingress=GUARDED,
            # pod1 and one of the outside client's addresses
            loadBalancerSourceRanges=[
                "10.244.0.11/32",
                "fd00:244::b/128",
                "192.0.2.101/32",
                "2001:db8::101/128",
            ],
        ),
        *slices("guarded", pods, *both, nodes=nodes),
        service(
            *("local-external", HTTP | {"nodePort": 30017}, UDP | {"nodePort": 30017}),
            ips=LOCAL_EXTERNAL,
            type="NodePort",
            externalTrafficPolicy="Local",
        ),
        *slices("local-external", pods, *both, nodes=nodes),
        service("local-internal", HTTP, UDP, ips=LOCAL_INTERNAL, internalTrafficPolicy="Local"),
        *slices("local-internal", pods, *both, nodes=nodes),
        service(
            *("remote-only", HTTP | {"nodePort": 30019}, UDP | {"nodePort": 30019}),
            ips=REMOTE_ONLY,
            type="NodePort",
            externalTrafficPolicy="Local",
            internalTrafficPolicy="Local",
        ),
        *slices("remote-only", pods[2:], *both, nodes=["node-2"]),
        service("headless", HTTP, clusterIP="None"),
        *slices("headless", pods, TO_HTTP),
        service("named", {"port": 80, "targetPort": "web"}, ips=NAMED, selector={"app": "named"}),
        *(pod_object("named", pod, 8080 + number) for number, pod in enumerate(pods[:2])),
    ]


def pod_object(app: str, pod: Pod, port: int) -> Object:
    """Return a ready Pod whose container port ``web`` is ``port``."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{app}-{pod.name}", "namespace": "default", "labels": {"app": app}},
        "spec": {
            "nodeName": NODE_NAME,
            "containers": [{"name": "main", "ports": [{"name": "web", "containerPort": port}]}],
        },
        "status": {
            "phase": "Running",
            "podIP": pod.v4,
            "podIPs": [{"ip": address} for address in pod.ips],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
