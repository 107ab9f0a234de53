"""Kubernetes objects as plain dicts, with as few words as a test needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

Object = dict[str, Any]


def service(
    name: str,
    *ports: int | Object,
    ips: Iterable[str] = (),
    annotations: dict[str, str] | None = None,
    ingress: Iterable[str] = (),
    **spec: Any,
) -> Object:
    """Return a Service.

    Args:
        name: in namespace ``default``.
        ports: a number is a TCP port; a dict is the port as Kubernetes writes it.
        ips: the cluster IPs to ask for, one or one of each family; none = allocate.
        annotations: as they are.
        ingress: load-balancer addresses for the status.
        spec: the rest of the spec, in Kubernetes' words.
    """
    listed = [port if isinstance(port, dict) else {"port": port} for port in ports]
    addresses = list(ips)
    if addresses:
        spec |= {
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilies": ["IPv6" if ":" in address else "IPv4" for address in addresses],
        }
        if len(addresses) > 1:
            spec["ipFamilyPolicy"] = "RequireDualStack"
    made: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations or {}},
        "spec": {"ports": listed, **spec},
    }
    if ingress:
        made["status"] = {"loadBalancer": {"ingress": [{"ip": address} for address in ingress]}}
    return made


def endpoint(address: str, *, node: str = "node-1", **conditions: bool) -> Object:
    """Return one endpoint of a slice; ``conditions`` as Kubernetes names them."""
    return {"addresses": [address], "nodeName": node, "conditions": conditions}


def endpoint_slice(
    service_name: str, endpoints: Iterable[str | Object], *ports: int | Object, suffix: str = ""
) -> Object:
    """Return an EndpointSlice for a Service; the family is that of the first endpoint.

    Args:
        service_name: in namespace ``default``.
        endpoints: an address (ready, on this node) or an :func:`endpoint`.
        ports: a number is a TCP port.
        suffix: tells several slices of one Service and family apart.
    """
    listed = [endpoint(item) if isinstance(item, str) else item for item in endpoints]
    is_v6 = bool(listed) and ":" in listed[0]["addresses"][0]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-{'v6' if is_v6 else 'v4'}{suffix}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": "IPv6" if is_v6 else "IPv4",
        "endpoints": listed,
        "ports": [
            {"name": "", "protocol": "TCP", **(port if isinstance(port, dict) else {"port": port})}
            for port in ports
        ],
    }
