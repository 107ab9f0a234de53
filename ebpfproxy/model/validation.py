"""What a valid object is: the API server's rules for the fields that we read, in its words.

Source: Kubernetes API validation as documented for each kind and as its 422 answers put it
("spec.ports[0].port: Invalid value: 70000: must be between 1 and 65535, inclusive").
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from ebpfproxy.model import addresses, annotation
from ebpfproxy.model.objects import (
    Endpoint,
    EndpointPort,
    Endpoints,
    EndpointSlice,
    EndpointSubset,
    Node,
    Object,
    ObjectMeta,
    Pod,
    Service,
    ServicePort,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

PROTOCOLS = ("SCTP", "TCP", "UDP")
FAMILIES = ("IPv4", "IPv6")
MAX_ENDPOINTS = 1000  # of a slice
MAX_ADDRESSES = 100  # of an endpoint
MAX_AFFINITY_S = 86400

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")

_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', "
    "and must start and end with an alphanumeric character"
)
_LABEL_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', "
    "start with an alphabetic character, and end with an alphanumeric character"
)
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
    "and must start and end with an alphanumeric character"
)
_IP_RULE = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
_CIDR_RULE = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
_PORT_RULE = "must be between 1 and 65535, inclusive"


def port_name_error(name: str) -> str | None:
    """Return why a text can't name a container's port (RFC 6335 5.1), or None if it can."""
    if len(name) > 15:
        return "must be no more than 15 characters"
    if not re.fullmatch(r"[-a-z0-9]+", name):
        return "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
    if not re.search(r"[a-z]", name):
        return "must contain at least one letter (a-z)"
    if "--" in name:
        return "must not contain consecutive hyphens"
    if name[0] == "-" or name[-1] == "-":
        return "must not begin or end with a hyphen"
    return None


class _Errors(list[tuple[str, str]]):
    """(field path, message) pairs, phrased as the API server does."""

    def required(self, path: str, why: str = "") -> None:
        self.append((path, f"Required value: {why}" if why else "Required value"))

    def invalid(self, path: str, value: object, why: str) -> None:
        self.append((path, f"Invalid value: {json.dumps(value, ensure_ascii=False)}: {why}"))

    def forbidden(self, path: str, why: str) -> None:
        self.append((path, f"Forbidden: {why}"))

    def duplicate(self, path: str, value: object) -> None:
        self.append((path, f"Duplicate value: {json.dumps(value, ensure_ascii=False)}"))

    def one_of(self, path: str, value: str, supported: Collection[str]) -> None:
        if value not in supported:
            known = ", ".join(f'"{each}"' for each in sorted(supported))
            self.append((path, f"Unsupported value: {json.dumps(value)}: supported values: {known}"))

    def at_most(self, path: str, count: int, limit: int) -> None:
        if count > limit:
            self.append((path, f"Too many: {count}: must have at most {limit} items"))

    def label(self, path: str, value: str) -> None:
        self._name(path, value, _LABEL, _LABEL_RULE, 63)

    def subdomain(self, path: str, value: str) -> None:
        self._name(path, value, _SUBDOMAIN, _SUBDOMAIN_RULE, 253)

    def label_1035(self, path: str, value: str) -> None:
        self._name(path, value, _LABEL_1035, _LABEL_1035_RULE, 63)

    def _name(self, path: str, value: str, pattern: re.Pattern[str], rule: str, limit: int) -> None:
        if len(value) > limit:
            self.invalid(path, value, f"must be no more than {limit} characters")
        if not pattern.fullmatch(value):
            self.invalid(path, value, rule)

    def port(self, path: str, value: int) -> None:
        if not 1 <= value <= 65535:
            self.invalid(path, value, _PORT_RULE)

    def ip(self, path: str, value: str, *, usable: bool = False) -> bool:
        """Check an address; ``usable``: one that traffic can be sent to."""
        packed = addresses.pack(value)
        if packed is None:
            self.invalid(path, value, _IP_RULE)
        elif usable and (why := addresses.special(packed)):
            self.invalid(path, value, why)
        return packed is not None


def errors_of(obj: Object) -> list[tuple[str, str]]:
    """Return the field path and the message of all that is wrong with an object."""
    errors = _Errors()
    match obj:
        case Service():
            _metadata(errors, obj.metadata)
            if obj.metadata.name:
                errors.label_1035("metadata.name", obj.metadata.name)
            _service(errors, obj)
        case EndpointSlice():
            _metadata(errors, obj.metadata, is_subdomain=True)
            _slice(errors, obj)
        case Endpoints():
            _metadata(errors, obj.metadata, is_subdomain=True)
            for i, subset in enumerate(obj.subsets):
                _subset(errors, f"subsets[{i}]", subset)
        case Node():
            _metadata(errors, obj.metadata, is_subdomain=True)
            _node(errors, obj)
        case Pod():
            _metadata(errors, obj.metadata, is_subdomain=True)
            _pod(errors, obj)
    return errors


def _metadata(errors: _Errors, metadata: ObjectMeta, *, is_subdomain: bool = False) -> None:
    if not metadata.name:
        errors.required("metadata.name", "name or generateName is required")
    elif is_subdomain:
        errors.subdomain("metadata.name", metadata.name)
    if metadata.namespace:
        errors.label("metadata.namespace", metadata.namespace)


# --- Service -----------------------------------------------------------------------------------------


def _service(errors: _Errors, service: Service) -> None:
    spec = service.spec
    errors.one_of("spec.type", spec.type, ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort"))
    if spec.type == "ExternalName":
        name = spec.external_name.removesuffix(".")
        if name:
            errors.subdomain("spec.externalName", name)
        else:
            errors.required("spec.externalName")
    elif not spec.ports and not service.is_headless:
        errors.required("spec.ports")
    if service.is_headless and spec.type in ("LoadBalancer", "NodePort"):
        errors.invalid("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {spec.type} services")
    _service_ports(errors, service)
    _service_ips(errors, service)
    _service_affinity(errors, service)
    _service_external(errors, service)
    _annotations(errors, service.metadata)


def _service_ports(errors: _Errors, service: Service) -> None:
    ports = service.spec.ports
    names: set[str] = set()
    numbers: set[tuple[str, int]] = set()
    node_ports: set[tuple[str, int]] = set()
    for i, port in enumerate(ports):
        path = f"spec.ports[{i}]"
        if port.name:
            errors.label(f"{path}.name", port.name)
            if port.name in names:
                errors.duplicate(f"{path}.name", port.name)
            names.add(port.name)
        elif len(ports) > 1:
            errors.required(f"{path}.name")
        errors.one_of(f"{path}.protocol", port.protocol, PROTOCOLS)
        errors.port(f"{path}.port", port.port)
        if (port.protocol, port.port) in numbers:
            errors.duplicate(path, {"protocol": port.protocol, "port": port.port})
        numbers.add((port.protocol, port.port))
        _target_port(errors, f"{path}.targetPort", port)
        if not port.node_port:
            continue
        if service.spec.type not in ("LoadBalancer", "NodePort"):
            errors.forbidden(f"{path}.nodePort", f"may not be used when `type` is '{service.spec.type}'")
        errors.port(f"{path}.nodePort", port.node_port)
        if (port.protocol, port.node_port) in node_ports:
            errors.duplicate(f"{path}.nodePort", port.node_port)
        node_ports.add((port.protocol, port.node_port))


def _target_port(errors: _Errors, path: str, port: ServicePort) -> None:
    if isinstance(port.target_port, int):
        if port.target_port:
            errors.port(path, port.target_port)
    elif (why := port_name_error(port.target_port)) is not None:
        errors.invalid(path, port.target_port, why)


def _service_ips(errors: _Errors, service: Service) -> None:
    spec = service.spec
    for i, address in enumerate(spec.external_ips):
        errors.ip(f"spec.externalIPs[{i}]", address, usable=True)
    for i, ingress in enumerate(service.status.load_balancer.ingress):
        path = f"status.loadBalancer.ingress[{i}]"
        if ingress.ip:
            errors.ip(f"{path}.ip", ingress.ip)
        if ingress.ip_mode is None:
            continue
        errors.one_of(f"{path}.ipMode", ingress.ip_mode, ("Proxy", "VIP"))
        if not ingress.ip:
            errors.forbidden(f"{path}.ipMode", "may not be specified when `ip` is not set")
    if spec.type == "ExternalName":
        for path, value in (("spec.clusterIP", spec.cluster_ip), ("spec.clusterIPs", spec.cluster_ips)):
            if value:
                errors.forbidden(path, "may not be set for ExternalName services")
        for path, fields in (
            ("spec.ipFamilies", spec.ip_families),
            ("spec.ipFamilyPolicy", spec.ip_family_policy),
        ):
            if fields:
                errors.forbidden(path, "may not be set for ExternalName services")
        return
    _families(errors, service)
    _cluster_ips(errors, service)


def _families(errors: _Errors, service: Service) -> None:
    spec = service.spec
    if spec.ip_family_policy is not None:
        policies = ("PreferDualStack", "RequireDualStack", "SingleStack")
        errors.one_of("spec.ipFamilyPolicy", spec.ip_family_policy, policies)
    for i, family in enumerate(spec.ip_families):
        errors.one_of(f"spec.ipFamilies[{i}]", family, FAMILIES)
        if family in spec.ip_families[:i]:
            errors.duplicate(f"spec.ipFamilies[{i}]", family)
    for name, values in (("ipFamilies", spec.ip_families), ("clusterIPs", spec.cluster_ips)):
        if len(values) > 1 and spec.ip_family_policy in (None, "SingleStack"):
            why = f"must be 'RequireDualStack' or 'PreferDualStack' when multiple '{name}' are specified"
            if spec.ip_family_policy is None:
                errors.required("spec.ipFamilyPolicy", why)
            else:
                errors.invalid("spec.ipFamilyPolicy", spec.ip_family_policy, why)
            return


def _cluster_ips(errors: _Errors, service: Service) -> None:
    spec = service.spec
    if not spec.cluster_ips:
        if spec.cluster_ip and spec.cluster_ip != "None" and errors.ip("spec.clusterIP", spec.cluster_ip):
            _expect_families(errors, "spec.clusterIP", (spec.cluster_ip,), spec.ip_families)
        return
    ips = list(spec.cluster_ips)
    if not spec.cluster_ip:
        errors.required("spec.clusterIP", "must be set when `clusterIPs` is specified")
    elif spec.cluster_ip != ips[0]:
        errors.invalid("spec.clusterIPs[0]", ips[0], "must match `clusterIP`")
    if "None" in ips:
        if len(ips) > 1:
            errors.invalid("spec.clusterIPs", ips, "'None' must be the first and only value")
        return
    if len(ips) > 2:
        errors.invalid("spec.clusterIPs", ips, "may only hold up to 2 values")
    valid = [each for i, each in enumerate(ips) if errors.ip(f"spec.clusterIPs[{i}]", each)]
    if valid != ips:
        return
    if len({addresses.family(each) for each in ips}) < len(ips):
        errors.invalid("spec.clusterIPs", ips, "may specify no more than one IP for each IP family")
        return
    _expect_families(errors, "spec.clusterIPs", ips, spec.ip_families)


def _expect_families(errors: _Errors, path: str, ips: Sequence[str], families: Sequence[str]) -> None:
    for i, (address, family) in enumerate(zip(ips, families, strict=False)):
        if f"IPv{addresses.family(address)}" != family:
            where = path if path.endswith("IP") else f"{path}[{i}]"
            errors.invalid(where, address, f"expected an {family} value as indicated by `ipFamilies[{i}]`")


def _service_affinity(errors: _Errors, service: Service) -> None:
    spec = service.spec
    errors.one_of("spec.sessionAffinity", spec.session_affinity, ("ClientIP", "None"))
    config = spec.session_affinity_config
    if config is None or config.client_ip is None:
        return
    if spec.session_affinity == "None":
        errors.forbidden("spec.sessionAffinityConfig", "must not be set when session affinity is None")
    timeout_s = config.client_ip.timeout_seconds
    if timeout_s is not None and not 1 <= timeout_s <= MAX_AFFINITY_S:
        path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        errors.invalid(path, timeout_s, f"must be greater than 0 and less than {MAX_AFFINITY_S}")


def _service_external(errors: _Errors, service: Service) -> None:
    spec = service.spec
    is_external = spec.type in ("LoadBalancer", "NodePort") or bool(spec.external_ips)
    if spec.external_traffic_policy:
        errors.one_of("spec.externalTrafficPolicy", spec.external_traffic_policy, ("Cluster", "Local"))
        if not is_external:
            why = "may only be set for externally-accessible services"
            errors.invalid("spec.externalTrafficPolicy", spec.external_traffic_policy, why)
    if spec.internal_traffic_policy is not None:
        errors.one_of("spec.internalTrafficPolicy", spec.internal_traffic_policy, ("Cluster", "Local"))
    if spec.traffic_distribution is not None:
        known = ("PreferClose", "PreferSameNode", "PreferSameZone")
        errors.one_of("spec.trafficDistribution", spec.traffic_distribution, known)
    if spec.health_check_node_port:
        path = "spec.healthCheckNodePort"
        if spec.type != "LoadBalancer" or spec.external_traffic_policy != "Local":
            why = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
            errors.invalid(path, spec.health_check_node_port, why)
        errors.port(path, spec.health_check_node_port)
        for i, port in enumerate(spec.ports):
            if port.node_port == spec.health_check_node_port:
                errors.duplicate(f"spec.ports[{i}].nodePort", port.node_port)
    if spec.load_balancer_ip:
        errors.ip("spec.loadBalancerIP", spec.load_balancer_ip)
    for i, each in enumerate(spec.load_balancer_source_ranges):
        if addresses.canonical_cidr(each) is None:
            errors.invalid(f"spec.loadBalancerSourceRanges[{i}]", each, _CIDR_RULE)
    if spec.type == "LoadBalancer":
        return
    for path, value in (
        ("spec.loadBalancerSourceRanges", spec.load_balancer_source_ranges or None),
        ("spec.allocateLoadBalancerNodePorts", spec.allocate_load_balancer_node_ports),
        ("spec.loadBalancerClass", spec.load_balancer_class),
    ):
        if value is not None:
            errors.forbidden(path, "may only be used when `type` is 'LoadBalancer'")


def _annotations(errors: _Errors, metadata: ObjectMeta) -> None:
    for name, known in annotation.CHOICES.items():
        if (value := metadata.annotations.get(name)) is not None:
            errors.one_of(f"metadata.annotations[{name}]", value, known)
    for name, parse in annotation.PARSED.items():
        if (value := metadata.annotations.get(name)) is not None:
            try:
                parse(value)
            except ValueError as error:
                errors.invalid(f"metadata.annotations[{name}]", value, str(error))


# --- EndpointSlice, Endpoints ------------------------------------------------------------------------


def _slice(errors: _Errors, each: EndpointSlice) -> None:
    if not each.address_type:
        errors.required("addressType")
    else:
        errors.one_of("addressType", each.address_type, ("FQDN", *FAMILIES))
    errors.at_most("endpoints", len(each.endpoints), MAX_ENDPOINTS)
    wanted = {"IPv4": 4, "IPv6": 16}.get(each.address_type, 0)
    pack, special = addresses.pack, addresses.special
    for i, endpoint in enumerate(each.endpoints):
        texts = endpoint.addresses
        is_plain = len(texts) == 1 and not endpoint.hostname and endpoint.hints is None
        if is_plain and (packed := pack(texts[0])) and len(packed) == wanted and special(packed) is None:
            continue  # what nearly every endpoint looks like
        _endpoint(errors, f"endpoints[{i}]", endpoint, each.address_type)
    names: set[str] = set()
    for i, port in enumerate(each.ports):
        if port.name in names:
            errors.duplicate(f"ports[{i}].name", port.name)
        names.add(port.name)
    _endpoint_ports(errors, "ports", each.ports)


def _endpoint(errors: _Errors, path: str, endpoint: Endpoint, address_type: str) -> None:
    if not endpoint.addresses:
        errors.required(f"{path}.addresses", "must contain at least 1 address")
    errors.at_most(f"{path}.addresses", len(endpoint.addresses), MAX_ADDRESSES)
    for j, address in enumerate(endpoint.addresses):
        where = f"{path}.addresses[{j}]"
        if address_type == "FQDN":
            errors.subdomain(where, address.removesuffix("."))
        elif address_type in FAMILIES:
            packed = addresses.pack(address)
            if packed is None or len(packed) != (4 if address_type == "IPv4" else 16):
                errors.invalid(where, address, f"must be a valid {address_type} address")
            elif why := addresses.special(packed):
                errors.invalid(where, address, why)
    if endpoint.hostname:
        errors.label(f"{path}.hostname", endpoint.hostname)
    if endpoint.hints is not None:
        errors.at_most(f"{path}.hints.forZones", len(endpoint.hints.for_zones), 8)
        errors.at_most(f"{path}.hints.forNodes", len(endpoint.hints.for_nodes), 8)
        _unique_hints(errors, f"{path}.hints.forZones", (hint.name for hint in endpoint.hints.for_zones))
        _unique_hints(errors, f"{path}.hints.forNodes", (hint.name for hint in endpoint.hints.for_nodes))


def _unique_hints(errors: _Errors, path: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if not name:
            errors.required(f"{path}[{i}].name")
        elif name in seen:
            errors.duplicate(f"{path}[{i}].name", name)
        seen.add(name)


def _endpoint_ports(errors: _Errors, path: str, ports: Sequence[EndpointPort]) -> None:
    for i, port in enumerate(ports):
        where = f"{path}[{i}]"
        if port.name:
            errors.label(f"{where}.name", port.name)
        errors.one_of(f"{where}.protocol", port.protocol, PROTOCOLS)
        if port.port is not None:
            errors.port(f"{where}.port", port.port)


def _subset(errors: _Errors, path: str, subset: EndpointSubset) -> None:
    if not subset.addresses and not subset.not_ready_addresses:
        errors.required(path, "must specify `addresses` or `notReadyAddresses`")
    for name, many in (("addresses", subset.addresses), ("notReadyAddresses", subset.not_ready_addresses)):
        for i, address in enumerate(many):
            errors.ip(f"{path}.{name}[{i}].ip", address.ip, usable=True)
            if address.hostname:
                errors.label(f"{path}.{name}[{i}].hostname", address.hostname)
    for i, port in enumerate(subset.ports):
        if port.port is None:
            errors.invalid(f"{path}.ports[{i}].port", 0, _PORT_RULE)
        if not port.name and len(subset.ports) > 1:
            errors.required(f"{path}.ports[{i}].name")
    _endpoint_ports(errors, f"{path}.ports", subset.ports)


# --- Node, Pod ---------------------------------------------------------------------------------------


def _node(errors: _Errors, node: Node) -> None:
    for i, address in enumerate(node.status.addresses):
        if address.type in ("InternalIP", "ExternalIP"):
            errors.ip(f"status.addresses[{i}].address", address.address)
    for i, cidr in enumerate(node.pod_cidrs):
        if addresses.canonical_cidr(cidr) is None:
            errors.invalid(f"spec.podCIDRs[{i}]", cidr, _CIDR_RULE)


def _pod(errors: _Errors, pod: Pod) -> None:
    if pod.status.pod_ip:
        errors.ip("status.podIP", pod.status.pod_ip, usable=True)
    for i, each in enumerate(pod.status.pod_ips):
        errors.ip(f"status.podIPs[{i}].ip", each.ip, usable=True)
    for kind, containers in (
        ("containers", pod.spec.containers),
        ("initContainers", pod.spec.init_containers),
    ):
        for i, container in enumerate(containers):
            for j, port in enumerate(container.ports):
                path = f"spec.{kind}[{i}].ports[{j}]"
                errors.port(f"{path}.containerPort", port.container_port)
                errors.one_of(f"{path}.protocol", port.protocol, PROTOCOLS)
                if port.name and (why := port_name_error(port.name)) is not None:
                    errors.invalid(f"{path}.name", port.name, why)
