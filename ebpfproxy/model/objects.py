"""The Kubernetes objects we read, as frozen values: only the fields we use, checked, in canonical form.

``expand`` turns a document into single objects (``List`` kinds), ``decode`` turns one into a value.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from ebpfproxy.errors import InvalidObject
from ebpfproxy.model import addresses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LABEL_SERVICE_NAME = "kubernetes.io/service-name"
LABEL_SERVICE_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
LABEL_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
LABEL_SKIP_MIRROR = "endpointslice.kubernetes.io/skip-mirror"
LABEL_ZONE = "topology.kubernetes.io/zone"
LABEL_HOSTNAME = "kubernetes.io/hostname"
MIRRORING_CONTROLLER = "endpointslicemirroring-controller.k8s.io"


class ObjectKey(NamedTuple):
    """Names one object; ``namespace`` is "" for a Node."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """Return ``Service default/web`` or ``Node n1``."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class Problem(Struct, frozen=True, order=True):
    """Something that a user should mend; everything else goes on working."""

    kind: str
    namespace: str
    name: str
    field: str  # path, as in spec.ports[0].port
    message: str
    source: str = ""  # where the object came from: a file, if known

    def __str__(self) -> str:
        """Return ``FILE: Service default/web: spec.type: ...`` without what is not known."""
        name = f"{self.namespace}/{self.name}" if self.namespace else self.name
        what = f"{self.kind or 'object'} {name}".strip()
        return ": ".join(part for part in (self.source, what, self.field, self.message) if part)


def problems_of(error: InvalidObject, source: str = "") -> list[Problem]:
    """Return the problems of a refused object."""
    return [Problem(error.kind, error.namespace, error.name, *pair, source) for pair in error.errors]


def _camel(name: str) -> str:
    """Return the JSON name of a field: Kubernetes writes IP and CIDR in capitals after the first word."""
    first, *rest = name.split("_")
    capitals = {"ip": "IP", "ips": "IPs", "cidr": "CIDR", "cidrs": "CIDRs"}
    return first + "".join(capitals.get(word, word.capitalize()) for word in rest)


class _Part(Struct, frozen=True, rename=_camel, gc=False):
    """Base of everything below; other fields are ignored, as an older API server does."""


# --- metadata ----------------------------------------------------------------------------------------


class ObjectMeta(_Part, frozen=True, gc=False):
    """Metadata that every object has."""

    name: str = ""
    namespace: str = ""
    uid: str = ""  # set by an API server: what the object carries was allocated there
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: dt.datetime | None = None
    deletion_timestamp: dt.datetime | None = None


# --- Service -----------------------------------------------------------------------------------------


class ServicePort(_Part, frozen=True, gc=False):
    """One port of a Service."""

    name: str = ""
    protocol: str = "TCP"
    port: int = 0
    target_port: int | str = 0  # 0 = port
    node_port: int = 0


class ClientIPConfig(_Part, frozen=True, gc=False):
    """Session affinity by client address."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(_Part, frozen=True, gc=False):
    """Configuration of session affinity."""

    client_ip: ClientIPConfig | None = None


class ServiceSpec(_Part, frozen=True, gc=False):
    """What a Service should be."""

    type: str = "ClusterIP"
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = {}
    cluster_ip: str = ""
    cluster_ips: tuple[str, ...] = ()
    ip_families: tuple[str, ...] = ()
    ip_family_policy: str | None = None
    external_ips: tuple[str, ...] = ()
    external_name: str = ""
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str = ""
    health_check_node_port: int = 0
    load_balancer_ip: str = ""
    load_balancer_source_ranges: tuple[str, ...] = ()
    load_balancer_class: str | None = None
    allocate_load_balancer_node_ports: bool | None = None
    publish_not_ready_addresses: bool = False
    traffic_distribution: str | None = None


class LoadBalancerIngress(_Part, frozen=True, gc=False):
    """One address that a load balancer listens at."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str | None = None


class LoadBalancerStatus(_Part, frozen=True, gc=False):
    """The addresses of a load balancer."""

    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(_Part, frozen=True, gc=False):
    """What a Service is."""

    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(_Part, frozen=True, gc=False):
    """Service v1."""

    metadata: ObjectMeta = ObjectMeta()
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()

    @property
    def is_headless(self) -> bool:
        """Say whether it has no cluster IP on purpose."""
        return "None" in (self.spec.cluster_ip, *self.spec.cluster_ips)

    @property
    def cluster_ips(self) -> tuple[str, ...]:
        """Return its cluster IPs; objects of before 1.20 have only ``clusterIP``."""
        if self.is_headless:
            return ()
        return self.spec.cluster_ips or ((self.spec.cluster_ip,) if self.spec.cluster_ip else ())

    @property
    def ingress_ips(self) -> tuple[str, ...]:
        """Return the load-balancer addresses that belong to the node: those not of ``ipMode: Proxy``."""
        if self.spec.type != "LoadBalancer":
            return ()
        ingress = self.status.load_balancer.ingress
        return tuple(each.ip for each in ingress if each.ip and each.ip_mode != "Proxy")


# --- EndpointSlice -----------------------------------------------------------------------------------


class EndpointConditions(_Part, frozen=True, gc=False):
    """The condition of an endpoint; None is unset."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(_Part, frozen=True, gc=False):
    """A zone or node that should use an endpoint."""

    name: str = ""


class EndpointHints(_Part, frozen=True, gc=False):
    """Who should use an endpoint."""

    for_zones: tuple[Hint, ...] = ()
    for_nodes: tuple[Hint, ...] = ()


class Endpoint(_Part, frozen=True, gc=False):
    """One endpoint; its addresses are interchangeable, so the first one is used."""

    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions = EndpointConditions()
    hints: EndpointHints | None = None
    node_name: str = ""
    zone: str = ""
    hostname: str = ""
    topology: dict[str, str] | None = None  # v1beta1 only, and deprecatedTopology's place


class EndpointPort(_Part, frozen=True, gc=False):
    """A port of every endpoint of a slice; no number stands for all ports, which no Service uses."""

    name: str = ""
    protocol: str = "TCP"
    port: int | None = None


class EndpointSlice(_Part, frozen=True, gc=False):
    """EndpointSlice discovery.k8s.io/v1; v1beta1 becomes one."""

    metadata: ObjectMeta = ObjectMeta()
    address_type: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()


# --- Endpoints ---------------------------------------------------------------------------------------


class EndpointAddress(_Part, frozen=True, gc=False):
    """One address of an Endpoints subset."""

    ip: str = ""
    node_name: str = ""
    hostname: str = ""


class EndpointSubset(_Part, frozen=True, gc=False):
    """Addresses times ports."""

    addresses: tuple[EndpointAddress, ...] = ()
    not_ready_addresses: tuple[EndpointAddress, ...] = ()
    ports: tuple[EndpointPort, ...] = ()


class Endpoints(_Part, frozen=True, gc=False):
    """Endpoints v1."""

    metadata: ObjectMeta = ObjectMeta()
    subsets: tuple[EndpointSubset, ...] = ()


# --- Node --------------------------------------------------------------------------------------------


class Taint(_Part, frozen=True, gc=False):
    """A taint of a node."""

    key: str = ""
    effect: str = ""


class NodeSpec(_Part, frozen=True, gc=False):
    """What a node should be."""

    pod_cidr: str = ""
    pod_cidrs: tuple[str, ...] = ()
    taints: tuple[Taint, ...] = ()


class NodeAddress(_Part, frozen=True, gc=False):
    """One address of a node."""

    type: str = ""
    address: str = ""


class NodeStatus(_Part, frozen=True, gc=False):
    """What a node is."""

    addresses: tuple[NodeAddress, ...] = ()


class Node(_Part, frozen=True, gc=False):
    """Node v1."""

    metadata: ObjectMeta = ObjectMeta()
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def zone(self) -> str:
        """Return its zone, "" if it has none."""
        return self.metadata.labels.get(LABEL_ZONE, "")

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """Return the prefixes of its pods."""
        return self.spec.pod_cidrs or ((self.spec.pod_cidr,) if self.spec.pod_cidr else ())

    @property
    def ips(self) -> tuple[str, ...]:
        """Return its own IP addresses."""
        kinds = ("InternalIP", "ExternalIP")
        return tuple(each.address for each in self.status.addresses if each.type in kinds)

    @property
    def is_being_deleted(self) -> bool:
        """Say whether it goes away: deleted, or tainted by the cluster autoscaler (as kube-proxy checks)."""
        tainted = any(taint.key == "ToBeDeletedByClusterAutoscaler" for taint in self.spec.taints)
        return tainted or self.metadata.deletion_timestamp is not None


# --- Pod ---------------------------------------------------------------------------------------------


class ContainerPort(_Part, frozen=True, gc=False):
    """A port that a container names."""

    name: str = ""
    container_port: int = 0
    protocol: str = "TCP"


class Container(_Part, frozen=True, gc=False):
    """One container of a pod."""

    ports: tuple[ContainerPort, ...] = ()
    restart_policy: str | None = None


class PodSpec(_Part, frozen=True, gc=False):
    """What a pod should be."""

    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    node_name: str = ""
    hostname: str = ""


class PodCondition(_Part, frozen=True, gc=False):
    """One condition of a pod."""

    type: str = ""
    status: str = ""


class PodIP(_Part, frozen=True, gc=False):
    """One address of a pod."""

    ip: str = ""


class PodStatus(_Part, frozen=True, gc=False):
    """What a pod is."""

    phase: str = ""
    conditions: tuple[PodCondition, ...] = ()
    pod_ip: str = ""
    pod_ips: tuple[PodIP, ...] = ()


class Pod(_Part, frozen=True, gc=False):
    """Pod v1."""

    metadata: ObjectMeta = ObjectMeta()
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ips(self) -> tuple[str, ...]:
        """Return its addresses."""
        ips = tuple(each.ip for each in self.status.pod_ips)
        return ips or ((self.status.pod_ip,) if self.status.pod_ip else ())

    @property
    def is_ready(self) -> bool:
        """Say whether its Ready condition is true."""
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions)


Object: TypeAlias = Service | EndpointSlice | Endpoints | Node | Pod
Objects: TypeAlias = "Mapping[ObjectKey, Object]"
_T = TypeVar("_T", bound=Object)

_KINDS: dict[tuple[str, str], type[Object]] = {
    ("", "Service"): Service,
    ("discovery.k8s.io", "EndpointSlice"): EndpointSlice,
    ("", "Endpoints"): Endpoints,
    ("", "Node"): Node,
    ("", "Pod"): Pod,
}
_VERSIONS = {"": ("v1",), "discovery.k8s.io": ("v1", "v1beta1")}
KINDS: tuple[str, ...] = tuple(kind for _, kind in _KINDS)


def key_of(obj: Object) -> ObjectKey:
    """Return the key of an object."""
    return ObjectKey(type(obj).__name__, obj.metadata.namespace, obj.metadata.name)


# --- from documents to objects -----------------------------------------------------------------------


def expand(document: Any) -> Iterator[Any]:
    """Yield the objects of a document: itself, or the items of a ``List``, ``ServiceList``, ... kind.

    Items of a typed list may leave out kind and version, as in an API server's answers.
    """
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or not kind.endswith("List") or not isinstance(document.get("items"), list):
        if document is not None and not (kind == "List" and document.get("items") is None):
            yield document
        return
    implied = {"apiVersion": document.get("apiVersion"), "kind": kind.removesuffix("List")}
    for item in document["items"]:
        if kind != "List" and isinstance(item, dict):
            yield implied | item
        else:
            yield from expand(item)


def decode(document: Any) -> Object | None:
    """Return the object in a parsed YAML or JSON document, or None for a kind that is not ours.

    Addresses come out in canonical form, an object without a namespace is in ``default``.

    Raises:
        InvalidObject: it names every field that is wrong, in the API server's words.
    """
    from ebpfproxy.model.validation import errors_of  # it needs the types above

    if not isinstance(document, dict):
        raise InvalidObject("", "", "", [("", f"must be an object, not {type(document).__name__}")])
    identity = _identity(document)
    missing = [path for path in ("apiVersion", "kind") if not isinstance(document.get(path), str)]
    if missing:
        raise InvalidObject(*identity, [(path, "Required value") for path in missing])
    kind, api_version = document["kind"], document["apiVersion"]
    group, slash, version = api_version.rpartition("/")
    cls = _KINDS.get((group, kind))
    if cls is None:
        return None
    if version not in _VERSIONS[group]:
        known = ", ".join(f'"{group}{slash}{each}"' for each in _VERSIONS[group])
        wrong = f'Unsupported value: "{api_version}": supported values: {known}'
        raise InvalidObject(*identity, [("apiVersion", wrong)])
    obj = _with_namespace(_convert(document, cls, identity))
    errors = errors_of(obj)
    if errors:
        raise InvalidObject(*identity, errors)
    return _canonical(obj)


class _Decoders(dict[type[Struct], msgspec.json.Decoder[Any]]):
    """One for each type, made when it is first needed."""

    def __missing__(self, cls: type[Struct]) -> msgspec.json.Decoder[Any]:
        self[cls] = decoder = msgspec.json.Decoder(cls)
        return decoder


_decoders = _Decoders()


def decode_served(data: bytes | msgspec.Raw, cls: type[_T]) -> tuple[_T | None, list[tuple[str, str]]]:
    """Return the object of a known kind in an API server's JSON, and what of it can't be used and why.

    Its rules were checked there, see ``admission``; None: nothing of it can be used.

    Raises:
        InvalidObject: it does not have the shape of its kind.
    """
    from ebpfproxy.model.admission import admit  # it needs the types above

    try:
        obj: _T = _decoders[cls].decode(data)
    except msgspec.ValidationError:  # null where there could be nothing, mostly
        document = msgspec.json.decode(data)
        if not isinstance(document, dict):
            raise InvalidObject(cls.__name__, "", "", [("", "must be an object")]) from None
        identity = _identity({**document, "kind": cls.__name__})
        obj = _convert(document, cls, identity)
    usable, errors = admit(_with_namespace(obj))
    return (None if usable is None else _canonical(usable)), errors  # type: ignore[return-value]


def _identity(document: dict[Any, Any]) -> tuple[str, str, str]:
    """Return kind, namespace and name as far as they can be known."""
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    kind, name = document.get("kind") or "", metadata.get("name") or ""
    namespace = "" if kind == "Node" else metadata.get("namespace") or "default"
    return str(kind), str(namespace), str(name)


def _convert(document: dict[str, Any], cls: type[_T], identity: tuple[str, str, str]) -> _T:
    """Return the document as a value; null counts as unset, as everywhere in Kubernetes."""
    try:
        return msgspec.convert(document, cls)
    except msgspec.ValidationError:
        pass
    try:
        return msgspec.convert(without_nulls(document), cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        message = re.sub("`", "", message)
        raise InvalidObject(*identity, [(path.rstrip("`").lstrip("."), f"Invalid type: {message}")]) from None


def without_nulls(value: Any) -> Any:
    """Return a document without its keys whose value is null: to Kubernetes' decoder they are not set."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def _with_namespace(obj: _T) -> _T:
    metadata = obj.metadata
    namespace = "" if isinstance(obj, Node) else metadata.namespace or "default"
    created = metadata.creation_timestamp
    if created is not None and created.tzinfo is None:
        created = created.replace(tzinfo=dt.UTC)
    if namespace == metadata.namespace and created is metadata.creation_timestamp:
        return obj
    return _replace(obj, metadata=_replace(metadata, namespace=namespace, creation_timestamp=created))


# --- canonical form ----------------------------------------------------------------------------------

_S = TypeVar("_S", bound=Struct)


def _replace(struct: _S, **changes: Any) -> _S:
    return msgspec.structs.replace(struct, **changes)


def _ip(address: str) -> str:
    return addresses.canonical(address) if ":" in address else address


def _ips(many: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_ip, many))


def _canonical(obj: Object) -> Object:
    """Return the object with IPv6 addresses in their one form, and v1beta1 turned into v1."""
    match obj:
        case EndpointSlice():
            if obj.address_type == "IPv4" and not any(each.topology for each in obj.endpoints):
                return obj
            is_ip = obj.address_type != "FQDN"
            return _replace(obj, endpoints=tuple(_endpoint(each, is_ip=is_ip) for each in obj.endpoints))
        case Service():
            return _service(obj)
        case Endpoints():
            return _replace(obj, subsets=tuple(map(_subset, obj.subsets)))
        case Node():
            own = (_replace(each, address=_ip(each.address)) for each in obj.status.addresses)
            return _replace(obj, status=_replace(obj.status, addresses=tuple(own)))
        case Pod():
            status = obj.status
            ips = tuple(PodIP(_ip(each.ip)) for each in status.pod_ips)
            return _replace(obj, status=_replace(status, pod_ip=_ip(status.pod_ip), pod_ips=ips))


def _endpoint(endpoint: Endpoint, *, is_ip: bool) -> Endpoint:
    topology = endpoint.topology or {}
    return _replace(
        endpoint,
        addresses=_ips(endpoint.addresses) if is_ip else endpoint.addresses,
        node_name=endpoint.node_name or topology.get(LABEL_HOSTNAME, ""),
        zone=endpoint.zone or topology.get(LABEL_ZONE, ""),
        topology=None,
    )


def _subset(subset: EndpointSubset) -> EndpointSubset:
    ready = tuple(_replace(each, ip=_ip(each.ip)) for each in subset.addresses)
    not_ready = tuple(_replace(each, ip=_ip(each.ip)) for each in subset.not_ready_addresses)
    return _replace(subset, addresses=ready, not_ready_addresses=not_ready)


def _service(service: Service) -> Service:
    spec = service.spec
    ranges = (addresses.canonical_cidr(each) for each in spec.load_balancer_source_ranges)
    spec = _replace(
        spec,
        cluster_ip=_ip(spec.cluster_ip),
        cluster_ips=_ips(spec.cluster_ips),
        external_ips=_ips(spec.external_ips),
        load_balancer_ip=_ip(spec.load_balancer_ip),
        load_balancer_source_ranges=tuple(each for each in ranges if each is not None),
    )
    ingress = tuple(_replace(each, ip=_ip(each.ip)) for each in service.status.load_balancer.ingress)
    status = ServiceStatus(LoadBalancerStatus(ingress))
    return _replace(service, spec=spec, status=status)
