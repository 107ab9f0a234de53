"""The same objects in half of the memory: what nobody reads is left out, what is equal is one value.

A hundred thousand endpoints are on a few nodes in three zones, and nearly all are ready.
"""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec.structs import replace

from ebpfproxy.model.objects import Endpoint, EndpointSlice, Node, Object, ObjectMeta, Service

_T = TypeVar("_T")

# The labels and annotations that mean something to a proxy. kubectl's copy of what was applied, and what
# others keep there for themselves, is often larger than all of the rest.
_LABELS = ("service.kubernetes.io/", "kubernetes.io/", "endpointslice.kubernetes.io/")
_ANNOTATIONS = ("ebpfproxy.io/", "endpoints.kubernetes.io/", "service.kubernetes.io/")
_SHARED_MAX = 200_000  # values; far above what one cluster has


class Shares:
    """Makes equal values one; belongs to one thread."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def lean(self, obj: Object) -> Object:
        """Return an equal object as far as a proxy looks at it."""
        if len(self._values) > _SHARED_MAX:
            self._values.clear()
        match obj:
            case EndpointSlice():
                metadata = replace(self._metadata(obj.metadata), creation_timestamp=None)
                one = self._values.setdefault  # this runs 100,000 times at a start
                endpoints = tuple(
                    [
                        Endpoint(
                            each.addresses,
                            one(each.conditions, each.conditions),
                            each.hints and one(each.hints, each.hints),
                            one(each.node_name, each.node_name),
                            one(each.zone, each.zone),
                            each.hostname,
                        )
                        for each in obj.endpoints
                    ]
                )
                return EndpointSlice(
                    metadata, self._share(obj.address_type), endpoints, self._share(obj.ports)
                )
            case Service():
                spec = obj.spec
                spec = replace(
                    spec,
                    type=self._share(spec.type),
                    ports=self._share(spec.ports),
                    cluster_ips=(spec.cluster_ip,)
                    if spec.cluster_ips == (spec.cluster_ip,)
                    else spec.cluster_ips,
                    ip_families=self._share(spec.ip_families),
                    ip_family_policy=self._share(spec.ip_family_policy),
                    session_affinity=self._share(spec.session_affinity),
                    session_affinity_config=self._share(spec.session_affinity_config),
                    internal_traffic_policy=self._share(spec.internal_traffic_policy),
                    external_traffic_policy=self._share(spec.external_traffic_policy),
                )
                return Service(self._metadata(obj.metadata), spec, self._share(obj.status))
            case Node():
                return obj
        return replace(obj, metadata=self._metadata(obj.metadata))

    def _metadata(self, metadata: ObjectMeta) -> ObjectMeta:
        return replace(
            metadata,
            namespace=self._share(metadata.namespace),
            uid="",
            labels=_chosen(metadata.labels, _LABELS),
            annotations=_chosen(metadata.annotations, _ANNOTATIONS),
        )

    def _share(self, value: _T) -> _T:
        found: _T = self._values.setdefault(value, value)
        return found


_NONE: dict[str, str] = {}  # never written to


def _chosen(many: dict[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Return what begins with one of the prefixes."""
    return {name: value for name, value in many.items() if name.startswith(prefixes)} or _NONE
