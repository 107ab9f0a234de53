"""Every kind of endpoint as EndpointSlices: slices themselves, Endpoints made by hand, and Pods.

Source: the endpoint slice controller and the mirroring controller, which do this with an API server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.model import addresses
from ebpfproxy.model.objects import (
    LABEL_MANAGED_BY,
    LABEL_SKIP_MIRROR,
    MIRRORING_CONTROLLER,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    ObjectKey,
    Pod,
    Service,
    ServicePort,
    key_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


class Group(NamedTuple):
    """Endpoints with the same ports and address family, and the object that they come from."""

    origin: ObjectKey
    slice: EndpointSlice


def groups_of(
    service: Service,
    slices: Sequence[EndpointSlice],
    endpoints: Endpoints | None,
    pods: Iterable[Pod],
    zones: Mapping[str, str],
) -> list[Group]:
    """Return the endpoints of a Service, wherever they come from, none twice.

    Args:
        service: whose they are.
        slices: its slices, by label, in a fixed order.
        endpoints: the Endpoints object of its name.
        pods: those that its selector selects, in a fixed order.
        zones: zone of each node.

    A Service with a selector has its endpoints written by a controller: its slices count, else its pods,
    else its Endpoints. One without has them made by hand: slices, and Endpoints unless they were
    mirrored into slices already.
    """
    ours = [Group(key_of(each), each) for each in slices if each.address_type != "FQDN"]
    if service.spec.selector:
        if slices:
            return ours
        derived = [group for pod in pods for group in _from_pod(service, pod, zones)]
        if derived or endpoints is None:
            return derived
    elif endpoints is None or _is_mirrored(slices, endpoints):
        return ours
    return ours + list(_from_endpoints(endpoints))


def _is_mirrored(slices: Iterable[EndpointSlice], endpoints: Endpoints) -> bool:
    """Say whether slices stand for the Endpoints: mirrored, or its owner said that nothing needs to be."""
    if endpoints.metadata.labels.get(LABEL_SKIP_MIRROR) == "true":
        return True
    return any(each.metadata.labels.get(LABEL_MANAGED_BY) == MIRRORING_CONTROLLER for each in slices)


def _from_endpoints(endpoints: Endpoints) -> Iterator[Group]:
    origin = key_of(endpoints)
    for subset in endpoints.subsets:
        for family in (4, 6):
            found = tuple(
                Endpoint((each.ip,), EndpointConditions(ready=ready), node_name=each.node_name)
                for ready, many in ((True, subset.addresses), (False, subset.not_ready_addresses))
                for each in many
                if addresses.family(each.ip) == family
            )
            if found:
                yield Group(origin, EndpointSlice(endpoints.metadata, f"IPv{family}", found, subset.ports))


def _from_pod(service: Service, pod: Pod, zones: Mapping[str, str]) -> Iterator[Group]:
    """Yield a pod's endpoints; one that has ended or has no address yet has none."""
    if pod.status.phase in ("Succeeded", "Failed"):
        return
    is_terminating = pod.metadata.deletion_timestamp is not None
    conditions = EndpointConditions(
        ready=pod.is_ready and not is_terminating, serving=pod.is_ready, terminating=is_terminating
    )
    numbers = ((port, _target_port(port, pod)) for port in service.spec.ports)
    ports = tuple(EndpointPort(port.name, port.protocol, number) for port, number in numbers if number)
    node = pod.spec.node_name
    for address in pod.ips:
        endpoint = Endpoint((address,), conditions, node_name=node, zone=zones.get(node, ""))
        family = f"IPv{addresses.family(address)}"
        yield Group(key_of(pod), EndpointSlice(pod.metadata, family, (endpoint,), ports))


def _target_port(port: ServicePort, pod: Pod) -> int | None:
    """Return the number of a Service's target port in a pod, None if the pod does not name it.

    Init containers count when they are sidecars (``restartPolicy: Always``).
    """
    if isinstance(port.target_port, int):
        return port.target_port or port.port
    sidecars = (each for each in pod.spec.init_containers if each.restart_policy == "Always")
    for container in (*pod.spec.containers, *sidecars):
        for each in container.ports:
            if each.name == port.target_port and each.protocol == port.protocol:
                return each.container_port
    return None
