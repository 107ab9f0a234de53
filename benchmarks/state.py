"""Objects and Services by the thousand."""

from __future__ import annotations

import ipaddress
from typing import Any

from ebpfproxy.model.objects import Object, ObjectKey, Objects, decode, key_of
from ebpfproxy.model.services import Backend, Empty, Frontend, Pool, Protocol, Service, ServiceName

VIPS = ipaddress.IPv4Address("10.96.0.0")
BACKENDS = ipaddress.IPv4Address("10.128.0.0")
PORT = 80


def vip(number: int) -> str:
    """Return the cluster IP of Service ``number``, counted from 1."""
    return str(VIPS + number)


def endpoints(number: int, count: int) -> list[str]:
    """Return the addresses of its endpoints: its own, no other Service's."""
    return [str(BACKENDS + number * count + index) for index in range(count)]


def service(number: int) -> Object:
    """Return a Service as a source delivers it."""
    return _decode(
        "v1",
        "Service",
        {
            "metadata": {"name": f"service-{number}", "namespace": "default"},
            "spec": {"clusterIP": vip(number), "clusterIPs": [vip(number)], "ports": [{"port": PORT}]},
        },
    )


def endpoint_slice(number: int, addresses: list[str], port: int) -> Object:
    """Return its EndpointSlice."""
    return _decode(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        {
            "metadata": {
                "name": f"service-{number}-v4",
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": f"service-{number}"},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
            "ports": [{"name": "", "port": port, "protocol": "TCP"}],
        },
    )


def objects(services: int, backends: int, first: list[str], port: int) -> Objects:
    """Return that many Services with that many endpoints each; ``first`` are those of Service 1."""
    made: dict[ObjectKey, Object] = {}
    for number in range(1, services + 1):
        addresses = first if number == 1 else endpoints(number, backends)
        for each in (service(number), endpoint_slice(number, addresses, port)):
            made[key_of(each)] = each
    return made


def resolved(
    name: str,
    frontend: Frontend,
    backends: tuple[Backend, ...],
    *,
    port_name: str = "",
    version: int = 4,
    is_dsr: bool = False,
) -> Service:
    """Return a TCP Service as the resolver makes it, with one frontend and policies Cluster."""
    return Service(
        name=ServiceName("default", name, port_name, version),
        protocol=Protocol.TCP,
        frontends=(frontend,),
        backends=backends,
        cluster=Pool(backends),
        local=Pool((), Empty.DROP),
        is_dsr=is_dsr,
    )


def _decode(version: str, kind: str, body: dict[str, Any]) -> Object:
    made = decode({"apiVersion": version, "kind": kind, **body})
    assert made is not None
    return made
