"""One Kubernetes Service and its endpoints -> the Services of the model, one for each port and family."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from ebpfproxy.model import addresses, annotation
from ebpfproxy.model.objects import (
    LABEL_SERVICE_PROXY_NAME,
    EndpointHints,
    Problem,
    ServicePort,
    key_of,
)
from ebpfproxy.model.objects import Service as KubernetesService
from ebpfproxy.model.services import (
    MAGLEV_SIZE,
    Backend,
    Empty,
    Forwarding,
    Frontend,
    FrontendKind,
    OutlierEjection,
    Policy,
    Pool,
    Protocol,
    Readiness,
    Scheduler,
    Service,
    ServiceName,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ebpfproxy.resolve.endpoints import Group

DEFAULT_AFFINITY_S = 10800
EVERY_NODE_ADDRESS = ""  # the address of a NodePort's frontend

_READY, _TERMINATING, _NOT_READY = Readiness  # enum look-ups count in what runs for each endpoint
_RANK = {_READY: 0, _TERMINATING: 1, _NOT_READY: 2}
_REJECT = Pool(())
_DROP = Pool((), Empty.DROP)


class NodeContext(msgspec.Struct, frozen=True):
    """This node, as far as it decides who gets traffic."""

    name: str = ""
    zone: str = ""


class ResolveOptions(msgspec.Struct, frozen=True):
    """What the configuration file decides."""

    # Of Services without the annotation:
    scheduler: Scheduler = Scheduler.RANDOM
    maglev_size: int = MAGLEV_SIZE
    forwarding: Forwarding = Forwarding.SNAT
    syn_retries: int = 0
    outliers: OutlierEjection | None = None


# A VIP and port that only one Service can have: address (EVERY_NODE_ADDRESS for a NodePort), port, protocol.
Claim: TypeAlias = tuple[str, int, str]


def is_handled(service: KubernetesService) -> bool:
    """Say whether a Service gets frontends here.

    Not headless and ExternalName (DNS only), nor one left to another proxy by its label, nor one that has
    no cluster IP yet.
    """
    return (
        service.spec.type != "ExternalName"
        and LABEL_SERVICE_PROXY_NAME not in service.metadata.labels
        and bool(service.cluster_ips)
    )


def vips_of(service: KubernetesService) -> frozenset[str]:
    """Return every VIP of a handled Service; node addresses are none."""
    own = service.cluster_ips
    if service.spec.type == "ClusterIP" and not service.spec.external_ips:
        return frozenset(own)
    return frozenset((*own, *service.spec.external_ips, *service.ingress_ips))


def claims_of(service: KubernetesService) -> list[Claim]:
    """Return everything that a handled Service wants for itself, each once."""
    spec = service.spec
    ports = spec.ports
    claims = [(vip, port.port, port.protocol) for vip in vips_of(service) for port in ports]
    if spec.type == "ClusterIP":
        return claims
    claims += [(EVERY_NODE_ADDRESS, port.node_port, port.protocol) for port in ports if port.node_port]
    if number := _health_check_node_port(service):
        claims.append((EVERY_NODE_ADDRESS, number, "TCP"))
    return claims


def build(
    service: KubernetesService,
    groups: Sequence[Group],
    node: NodeContext,
    options: ResolveOptions,
    lost: Mapping[Claim, str],
    refused: Collection[str],
) -> tuple[tuple[Service, ...], list[Problem]]:
    """Return what a node must serve for a handled Service, and what was left out.

    Args:
        service: the Service.
        groups: its endpoints.
        node: this node.
        options: from the configuration.
        lost: claims that an older Service has, with its name.
        refused: endpoint addresses that can't be used because they are VIPs.
    """
    problems = _endpoint_problems(groups, refused) if refused else []
    problems += _lost_problems(service, lost) if lost else []
    if service.spec.external_ips or service.spec.type == "LoadBalancer":
        problems += _family_problems(service)
    spec = service.spec
    text = service.metadata.annotations.get(annotation.WEIGHTS)
    weights = annotation.parse_weights(text) if text else {}
    source_ranges = _source_ranges(service)
    health_check = _health_check_node_port(service)
    if (EVERY_NODE_ADDRESS, health_check, "TCP") in lost:
        health_check = 0
    services = []
    for cluster_ip in service.cluster_ips:
        family = addresses.family(cluster_ip)
        in_family = [group for group in groups if group.slice.address_type == f"IPv{family}"]
        for port in spec.ports:
            found, hints = _merge(service, port, in_family, node, weights, refused)
            backends, cluster, local = _pools(found, hints, node)
            is_dsr = _asks_for_dsr(service, port, options)
            if is_dsr and (shared := _shared_address(backends)):
                problems.append(_dsr_problem(service, port, shared))
                is_dsr = False
            services.append(
                Service(
                    ServiceName(service.metadata.namespace, service.metadata.name, port.name, family),
                    Protocol(port.protocol),
                    _frontends(service, port, cluster_ip, lost),
                    backends,
                    cluster,
                    local,
                    Policy(spec.internal_traffic_policy or Policy.CLUSTER),
                    Policy(spec.external_traffic_policy or Policy.CLUSTER),
                    _scheduler(service, options),
                    _affinity_s(service),
                    tuple([each for each in source_ranges if addresses.family(each) == family]),
                    bool(source_ranges),
                    health_check,
                    spec.type,
                    _maglev_size(service, options),
                    is_dsr,
                    _syn_retries(service, options),
                    _outliers(service, options),
                )
            )
    return tuple(services), problems


# --- frontends ---------------------------------------------------------------------------------------


def _node_port(service: KubernetesService, port: ServicePort) -> int:
    return port.node_port if service.spec.type in ("NodePort", "LoadBalancer") else 0


def _health_check_node_port(service: KubernetesService) -> int:
    spec = service.spec
    is_needed = spec.type == "LoadBalancer" and spec.external_traffic_policy == Policy.LOCAL
    return spec.health_check_node_port if is_needed else 0


def _frontends(
    service: KubernetesService, port: ServicePort, cluster_ip: str, lost: Collection[Claim]
) -> tuple[Frontend, ...]:
    """Return a port's frontends in one family, each VIP once.

    An address that is both an external and a load-balancer IP is the latter: that one is guarded by the
    source ranges.
    """
    family = addresses.family(cluster_ip)
    kinds = dict.fromkeys(service.spec.external_ips, FrontendKind.EXTERNAL_IP)
    kinds |= dict.fromkeys(service.ingress_ips, FrontendKind.LOAD_BALANCER)
    kinds[cluster_ip] = FrontendKind.CLUSTER_IP
    frontends = [
        Frontend(kind, vip, port.port) for vip, kind in kinds.items() if addresses.family(vip) == family
    ]
    if node_port := _node_port(service, port):
        frontends.append(Frontend(FrontendKind.NODE_PORT, EVERY_NODE_ADDRESS, node_port))
    if lost:
        frontends = [each for each in frontends if (each.address, each.port, port.protocol) not in lost]
    if len(frontends) > 1:
        frontends.sort(key=lambda each: (each.kind, each.address))
    return tuple(frontends)


def _source_ranges(service: KubernetesService) -> tuple[str, ...]:
    return service.spec.load_balancer_source_ranges if service.spec.type == "LoadBalancer" else ()


def _scheduler(service: KubernetesService, options: ResolveOptions) -> Scheduler:
    name = service.metadata.annotations.get(annotation.SCHEDULER)
    return options.scheduler if name is None else Scheduler(name)


def _maglev_size(service: KubernetesService, options: ResolveOptions) -> int:
    return int(service.metadata.annotations.get(annotation.MAGLEV_SIZE, options.maglev_size))


def _syn_retries(service: KubernetesService, options: ResolveOptions) -> int:
    """Return how many more backends an unanswered opening may try; with affinity only on request."""
    text = service.metadata.annotations.get(annotation.SYN_RETRIES)
    if text is not None:
        return annotation.parse_syn_retries(text)
    return 0 if service.spec.session_affinity == "ClientIP" else options.syn_retries


def _outliers(service: KubernetesService, options: ResolveOptions) -> OutlierEjection | None:
    text = service.metadata.annotations.get(annotation.OUTLIER_EJECTION)
    return options.outliers if text is None else annotation.parse_outlier_ejection(text)


def _asks_for_dsr(service: KubernetesService, port: ServicePort, options: ResolveOptions) -> bool:
    """Return whether outside traffic of a port may go to other nodes, and shall be encapsulated then."""
    spec = service.spec
    if spec.external_traffic_policy == Policy.LOCAL or (spec.type == "ClusterIP" and not spec.external_ips):
        return False
    name = service.metadata.annotations.get(annotation.FORWARDING, options.forwarding)
    return name == Forwarding.DSR or (name == Forwarding.HYBRID and port.protocol == Protocol.TCP)


def _shared_address(backends: Sequence[Backend]) -> str:
    """Return an address that two backends, sorted by address, have; "" if there is none.

    The node that gets an encapsulated packet knows the backend by the address that it was sent to.
    """
    return next((one.address for one, other in pairwise(backends) if one.address == other.address), "")


def _dsr_problem(service: KubernetesService, port: ServicePort, shared: str) -> Problem:
    return Problem(
        *key_of(service),
        f"metadata.annotations[{annotation.FORWARDING}]",
        f"port {port.name or port.port}: dsr needs endpoints of different addresses, {shared} has two ports: "
        "snat is used",
    )


def _affinity_s(service: KubernetesService) -> int:
    spec = service.spec
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    client_ip = None if config is None else config.client_ip
    timeout_s = None if client_ip is None else client_ip.timeout_seconds
    return DEFAULT_AFFINITY_S if timeout_s is None else timeout_s


# --- backends ----------------------------------------------------------------------------------------


def _merge(
    service: KubernetesService,
    port: ServicePort,
    groups: Sequence[Group],
    node: NodeContext,
    weights: Mapping[str, int],
    refused: Collection[str],
) -> tuple[dict[tuple[str, int], Backend], dict[tuple[str, int], EndpointHints]]:
    """Return the backends of one port, each address and port once, and their topology hints.

    A port of a slice belongs to the Service's port of the same name and protocol. Of endpoints that are
    there twice the most usable one counts, a local one first.
    """
    found: dict[tuple[str, int], Backend] = {}
    hints: dict[tuple[str, int], EndpointHints] = {}
    is_published = service.spec.publish_not_ready_addresses
    here = node.name or None
    for group in groups:
        for slice_port in group.slice.ports:
            number = slice_port.port
            if slice_port.name != port.name or slice_port.protocol != port.protocol or number is None:
                continue
            for endpoint in group.slice.endpoints:
                address = endpoint.addresses[0]
                if refused and address in refused:
                    continue
                conditions = endpoint.conditions
                if is_published or conditions.ready or conditions.ready is None:
                    readiness = _READY
                else:
                    readiness = _TERMINATING if conditions.serving and conditions.terminating else _NOT_READY
                node_name = endpoint.node_name
                weight = weights.get(address, 1) if weights else 1
                is_local = node_name == here
                backend = Backend(  # by position: this runs 100,000 times at a start
                    address, number, readiness, is_local, False, weight, node_name, endpoint.zone
                )
                key = address, number
                if key in found:
                    if _preference(found[key]) <= _preference(backend):
                        continue
                    hints.pop(key, None)
                found[key] = backend
                if endpoint.hints is not None:
                    hints[key] = endpoint.hints
    return found, hints


def _preference(backend: Backend) -> tuple[int, bool, str, str]:
    return _RANK[backend.readiness], not backend.is_local, backend.node, backend.zone


def _pools(
    found: dict[tuple[str, int], Backend],
    hints: dict[tuple[str, int], EndpointHints],
    node: NodeContext,
) -> tuple[tuple[Backend, ...], Pool, Pool]:
    """Return all backends, and the pools of policy Cluster and of policy Local.

    Ready ones count, with none those that terminate and still serve, decided for each pool on its own;
    hints apply to ready ones under Cluster only. A backend of weight 0 is in no pool.

    Source: Kubernetes' "Virtual IPs and Service Proxies", "Traffic to terminating endpoints" and
    "Topology Aware Routing", "Safeguards".
    """
    for key in _hinted_elsewhere(found, hints, node) if hints else ():
        found[key] = msgspec.structs.replace(found[key], is_hinted_elsewhere=True)
    backends = tuple([found[key] for key in sorted(found)])
    ready = [each for each in backends if each.readiness is _READY and each.weight]
    ending = [each for each in backends if each.readiness is _TERMINATING and each.weight]
    if not ready and not ending:
        return backends, _REJECT, _REJECT
    cluster = [each for each in ready if not each.is_hinted_elsewhere] if hints else ready
    cluster = cluster or ending
    pool = Pool(backends if len(cluster) == len(backends) else tuple(cluster))
    local = [each for each in ready if each.is_local] or [each for each in ending if each.is_local]
    return backends, pool, Pool(tuple(local)) if local else _DROP


def _hinted_elsewhere(
    found: Mapping[tuple[str, int], Backend],
    hints: Mapping[tuple[str, int], EndpointHints],
    node: NodeContext,
) -> list[tuple[str, int]]:
    """Return the ready backends that other nodes should use.

    Node hints go before zone hints; either kind counts only when every ready backend has it and at least
    one names this node or its zone.
    """
    ready = [key for key, each in found.items() if each.readiness is _READY and each.weight]
    if not all(key in hints for key in ready):
        return []
    for here, names in (
        (node.name, {key: [hint.name for hint in hints[key].for_nodes] for key in ready}),
        (node.zone, {key: [hint.name for hint in hints[key].for_zones] for key in ready}),
    ):
        if all(names.values()) and any(here in each for each in names.values()):
            return [key for key, each in names.items() if here not in each]
    return []


# --- problems ----------------------------------------------------------------------------------------


def _endpoint_problems(groups: Sequence[Group], refused: Collection[str]) -> list[Problem]:
    problems = []
    for origin, each in groups:
        for i, endpoint in enumerate(each.endpoints):
            if (address := endpoint.addresses[0]) in refused:
                paths = {"EndpointSlice": f"endpoints[{i}].addresses[0]", "Pod": "status.podIPs"}
                path = paths.get(origin.kind, "subsets")
                why = (
                    f'Invalid value: "{address}": may not be the VIP of a Service; this endpoint is not used'
                )
                problems.append(Problem(*origin, path, why))
    return problems


def _lost_problems(service: KubernetesService, lost: Mapping[Claim, str]) -> list[Problem]:
    """Return a problem for each frontend that another Service has."""
    problems = []
    for claim, winner in sorted(lost.items()):
        path, what = _place_of(service, claim)
        problems.append(Problem(*key_of(service), path, f"{what} is already used by Service {winner}"))
    return problems


def _place_of(service: KubernetesService, claim: Claim) -> tuple[str, str]:
    spec = service.spec
    address, number, protocol = claim
    if address == EVERY_NODE_ADDRESS:
        for i, port in enumerate(spec.ports):
            if (port.node_port, port.protocol) == (number, protocol):
                return f"spec.ports[{i}].nodePort", f"node port {number}/{protocol}"
        return "spec.healthCheckNodePort", f"node port {number}/{protocol}"
    what = f"{_host(address)}:{number}/{protocol}"
    if address in service.cluster_ips:
        return f"spec.clusterIPs[{service.cluster_ips.index(address)}]", what
    for i, ingress in enumerate(service.status.load_balancer.ingress):
        if ingress.ip == address and address in service.ingress_ips:
            return f"status.loadBalancer.ingress[{i}].ip", what
    return f"spec.externalIPs[{spec.external_ips.index(address)}]", what


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _family_problems(service: KubernetesService) -> list[Problem]:
    """Return a problem for each VIP of a family that the Service does not have."""
    families = {addresses.family(each) for each in service.cluster_ips}
    listed = [(f"spec.externalIPs[{i}]", each) for i, each in enumerate(service.spec.external_ips)]
    for i, ingress in enumerate(service.status.load_balancer.ingress):
        if ingress.ip in service.ingress_ips:
            listed.append((f"status.loadBalancer.ingress[{i}].ip", ingress.ip))
    return [
        Problem(*key_of(service), path, f'Invalid value: "{vip}": the Service has no IPv{family} cluster IP')
        for path, vip in listed
        if (family := addresses.family(vip)) not in families
    ]
