"""Services and desired states as the resolver makes them, with as few words as a test needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Empty,
    Frontend,
    FrontendKind,
    NodePortAddresses,
    Pool,
    Protocol,
    Readiness,
    Service,
    ServiceName,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


def service(
    name: str = "web",
    backends: Iterable[Backend] = (),
    frontends: Iterable[Frontend] = (),
    *,
    family: int = 4,
    **more: Any,
) -> Service:
    """Return a Service whose pools follow from its backends as SERVICES.md section 4 says.

    Args:
        name: NAME, NAME:PORT or NAMESPACE/NAME:PORT.
        backends: in any order.
        frontends: its own.
        family: 4 | 6.
        more: other fields of the model; TCP if none says otherwise.
    """
    namespace, _, rest = name.rpartition("/")
    first, _, port = rest.partition(":")
    every = tuple(sorted(backends, key=lambda each: (each.address, each.port)))
    cluster = _pool(every, Empty.REJECT)
    local = [each for each in every if each.is_local]
    fields: dict[str, Any] = {
        "protocol": Protocol.TCP,
        "frontends": tuple(frontends),
        "backends": every,
        "cluster": cluster,
        "local": _pool(local, Empty.DROP if cluster.backends else Empty.REJECT),
        "has_source_ranges": bool(more.get("source_ranges")),
        **more,
    }
    return Service(ServiceName(namespace or "default", first, port, family), **fields)


def _pool(candidates: Iterable[Backend], on_empty: Empty) -> Pool:
    usable = [each for each in candidates if each.weight]
    for readiness in (Readiness.READY, Readiness.TERMINATING):
        if chosen := tuple(each for each in usable if each.readiness is readiness):
            return Pool(chosen)
    return Pool((), on_empty)


def cluster_ip(address: str = "10.96.0.10", port: int = 80) -> Frontend:
    return Frontend(FrontendKind.CLUSTER_IP, address, port)


def node_port(port: int = 30080) -> Frontend:
    return Frontend(FrontendKind.NODE_PORT, "", port)


def external_ip(address: str, port: int = 80) -> Frontend:
    return Frontend(FrontendKind.EXTERNAL_IP, address, port)


def load_balancer(address: str, port: int = 80) -> Frontend:
    return Frontend(FrontendKind.LOAD_BALANCER, address, port)


def state(*services: Service, serving: str = "", local: str = "", **more: Any) -> DesiredState:
    """Return a desired state.

    Args:
        services: what it has.
        serving: the node's addresses where NodePorts answer, with spaces between.
        local: its other addresses.
        more: other fields of the model.
    """
    addresses = NodePortAddresses(frozenset(serving.split()), frozenset(f"{serving} {local}".split()))
    return DesiredState(services, addresses, **more)
