"""What can be used of an object that an API server has validated already.

Its rules are not checked again: a newer server knows values that we don't. What this version can't use, or
must not, is left out and named, and the rest of the object goes on working: an endpoint at a loopback
address, a port of a protocol that is not known here, an annotation of ours that says nothing sensible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from msgspec.structs import replace

from ebpfproxy.model import addresses, annotation
from ebpfproxy.model.objects import (
    Endpoint,
    Endpoints,
    EndpointSlice,
    EndpointSubset,
    Node,
    Object,
    Service,
)
from ebpfproxy.model.services import Policy
from ebpfproxy.model.validation import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Callable

Errors = list[tuple[str, str]]

_T = TypeVar("_T")
_NOT_USED = "; it is not used"
_POLICIES = tuple(Policy)


def admit(obj: Object) -> tuple[Object | None, Errors]:
    """Return what can be used of an object, and the path and the reason of all that can't.

    None: nothing; a Service that would be open to more clients than it says.
    """
    errors: Errors = []
    match obj:
        case EndpointSlice():
            return _slice(obj, errors), errors
        case Service():
            return _service(obj, errors), errors
        case Endpoints():
            return _endpoints(obj, errors), errors
        case Node():
            return _node(obj, errors), errors
    return obj, errors


def _kept(
    many: tuple[_T, ...], path: str, why_not: Callable[[_T], tuple[object, str] | None], errors: Errors
) -> tuple[_T, ...]:
    """Return those that there is nothing against; the identical tuple when that is all of them."""
    wrong = {i: why for i, each in enumerate(many) if (why := why_not(each))}
    if not wrong:
        return many
    errors += [
        (f"{path}[{i}]", f'Invalid value: "{value}": {why}{_NOT_USED}') for i, (value, why) in wrong.items()
    ]
    return tuple(each for i, each in enumerate(many) if i not in wrong)


# --- endpoints ---------------------------------------------------------------------------------------


def _slice(obj: EndpointSlice, errors: Errors) -> EndpointSlice:
    wanted = {"IPv4": 4, "IPv6": 16}.get(obj.address_type)
    if wanted is None:  # FQDN, and what is not known yet: no Service has addresses of that kind
        return obj if not obj.endpoints else replace(obj, endpoints=())
    pack, special = addresses.pack, addresses.special

    def why_not(endpoint: Endpoint) -> tuple[object, str] | None:
        address = endpoint.addresses[0] if endpoint.addresses else ""
        packed = pack(address)
        if packed is None or len(packed) != wanted:
            return address, f"must be a valid {obj.address_type} address"
        why = special(packed)
        return (address, why) if why else None

    for endpoint in obj.endpoints:  # nearly always there is nothing wrong with any
        texts = endpoint.addresses
        if not texts or (packed := pack(texts[0])) is None or len(packed) != wanted or special(packed):
            return replace(obj, endpoints=_kept(obj.endpoints, "endpoints", why_not, errors))
    return obj


def _endpoints(obj: Endpoints, errors: Errors) -> Endpoints:
    subsets = []
    for i, subset in enumerate(obj.subsets):
        lists = {}
        for name, field in (("addresses", "addresses"), ("not_ready_addresses", "notReadyAddresses")):
            path = f"subsets[{i}].{field}"
            lists[name] = _kept(getattr(subset, name), path, lambda each: _unusable(each.ip), errors)
        subsets.append(EndpointSubset(**lists, ports=subset.ports))
    return replace(obj, subsets=tuple(subsets)) if errors else obj


def _unusable(address: str) -> tuple[object, str] | None:
    """Return why nothing can be sent to an address, None: it can."""
    packed = addresses.pack(address)
    why = "must be a valid IP address" if packed is None else addresses.special(packed)
    return (address, why) if why else None


def _unreadable(address: str) -> tuple[object, str] | None:
    return (address, "must be a valid IP address") if addresses.pack(address) is None else None


# --- Service, Node -----------------------------------------------------------------------------------


def _service(obj: Service, errors: Errors) -> Service | None:
    spec = obj.spec
    wrong = [each for each in spec.load_balancer_source_ranges if addresses.canonical_cidr(each) is None]
    if wrong and spec.type == "LoadBalancer":
        why = "must be a valid CIDR value; without it the Service would be open to all, so it is not used"
        errors.append(("spec.loadBalancerSourceRanges", f'Invalid value: "{wrong[0]}": {why}'))
        return None
    changes: dict[str, Any] = {
        "ports": _kept(
            spec.ports,
            "spec.ports",
            lambda each: None if each.protocol in PROTOCOLS else (each.protocol, "is not a known protocol"),
            errors,
        ),
        "external_ips": _kept(spec.external_ips, "spec.externalIPs", _unusable, errors),
    }
    if not obj.is_headless:
        changes["cluster_ips"] = _kept(obj.cluster_ips, "spec.clusterIPs", _unreadable, errors)
    if spec.load_balancer_ip and _unreadable(spec.load_balancer_ip):
        changes["load_balancer_ip"] = ""  # only a wish, which the server's side has granted or not
    for name, field in (
        ("internal_traffic_policy", "spec.internalTrafficPolicy"),
        ("external_traffic_policy", "spec.externalTrafficPolicy"),
    ):
        value = getattr(spec, name)
        if value and value not in _POLICIES:  # kube-proxy: everything but Local is Cluster
            errors.append((field, f'Unsupported value: "{value}"; Cluster is used'))
            changes[name] = Policy.CLUSTER.value
    ingress = _kept(
        obj.status.load_balancer.ingress,
        "status.loadBalancer.ingress",
        lambda each: _unreadable(each.ip) if each.ip else None,
        errors,
    )
    metadata = replace(obj.metadata, annotations=_annotations(obj.metadata.annotations, errors))
    if not errors and "load_balancer_ip" not in changes:
        return obj
    cluster_ips = changes.get("cluster_ips")
    if cluster_ips is not None:
        changes["cluster_ip"] = cluster_ips[0] if cluster_ips else ""
    return Service(
        metadata,
        replace(spec, **changes),
        replace(obj.status, load_balancer=replace(obj.status.load_balancer, ingress=ingress)),
    )


def _annotations(found: dict[str, str], errors: Errors) -> dict[str, str]:
    """Return the annotations without ours that are wrong: the server does not look at them."""
    wrong = set()
    for name, known in annotation.CHOICES.items():
        if name in found and found[name] not in known:
            wrong.add(name)
            words = ", ".join(f'"{each}"' for each in sorted(known))
            reason = f'Unsupported value: "{found[name]}": supported values: {words}{_NOT_USED}'
            errors.append((f"metadata.annotations[{name}]", reason))
    for name, parse in annotation.PARSED.items():
        try:
            if name in found:
                parse(found[name])
        except ValueError as error:
            wrong.add(name)
            errors.append((f"metadata.annotations[{name}]", f"Invalid value: {error}{_NOT_USED}"))
    return {key: value for key, value in found.items() if key not in wrong} if wrong else found


def _node(obj: Node, errors: Errors) -> Node:
    kinds = ("InternalIP", "ExternalIP")
    own = _kept(
        obj.status.addresses,
        "status.addresses",
        lambda each: _unreadable(each.address) if each.type in kinds else None,
        errors,
    )
    return replace(obj, status=replace(obj.status, addresses=own)) if errors else obj
