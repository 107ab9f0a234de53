"""From documents to objects; the rules of validation are mostly in tests/scenarios."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from ebpfproxy.errors import InvalidObject
from ebpfproxy.model.annotation import parse_weights
from ebpfproxy.model.objects import (
    Endpoint,
    Endpoints,
    EndpointSlice,
    Node,
    ObjectKey,
    Pod,
    Problem,
    Service,
    decode,
    expand,
    key_of,
    problems_of,
)
from ebpfproxy.model.validation import port_name_error

DUAL = {"clusterIP": "None", "ipFamilyPolicy": "PreferDualStack"}


def document(kind: str, version: str = "v1", **fields: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": "x"}, **fields}


def errors(value: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidObject) as caught:
        decode(value)
    return caught.value.errors


def slice_of(*endpoints: Any, **fields: Any) -> dict[str, Any]:
    given = {"addressType": "IPv4", "endpoints": list(endpoints), "ports": [{"port": 80}], **fields}
    return document("EndpointSlice", "discovery.k8s.io/v1", **given)


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("ConfigMap", "v1"),
        ("Deployment", "apps/v1"),
        ("Service", "serving.knative.dev/v1"),
        ("EndpointSlice", "v1"),
        ("ServiceMonitor", "monitoring.coreos.com/v1"),
    ],
)
def test_other_kinds_are_not_ours(kind: str, version: str) -> None:
    assert decode(document(kind, version)) is None


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (None, ""),
        ([], ""),
        ("text", ""),
        ({"kind": "Service"}, "apiVersion"),
        ({"apiVersion": "v1"}, "kind"),
        ({"apiVersion": "v1", "kind": 1}, "kind"),
        (document("Service", "v2"), "apiVersion"),
        (document("EndpointSlice", "discovery.k8s.io/v1alpha1"), "apiVersion"),
        ({"apiVersion": "v1", "kind": "Service", "metadata": 1}, "metadata"),
        ({"apiVersion": "v1", "kind": "Service", "metadata": None}, "metadata.name"),
        ({"apiVersion": "v1", "kind": "Node"}, "metadata.name"),
    ],
)
def test_what_is_no_object_is_refused(value: Any, path: str) -> None:
    assert path in [where for where, _ in errors(value)]


def test_kubernetes_type_error_names_the_field() -> None:
    assert errors(document("Service", spec={"ports": [{"port": 80}, {"port": "x"}]})) == [
        ("spec.ports[1].port", "Invalid type: Expected int, got str")
    ]


def test_null_is_unset_everywhere() -> None:
    fields = {
        "ports": None,
        "selector": None,
        "clusterIP": "None",
        "externalIPs": None,
        "sessionAffinityConfig": None,
    }
    service = decode(document("Service", spec=fields, status=None))
    assert isinstance(service, Service)
    assert service.is_headless
    assert service.spec.ports == ()
    found = decode(slice_of() | {"endpoints": None, "ports": None})
    assert isinstance(found, EndpointSlice)
    assert found.endpoints == ()


def test_namespace_and_time_have_one_form() -> None:
    service = decode(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "x", "creationTimestamp": dt.datetime(2026, 1, 1)},
            "spec": {"clusterIP": "None"},
        }
    )
    assert service is not None
    assert service.metadata.namespace == "default"
    assert service.metadata.creation_timestamp == dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    assert key_of(service) == ObjectKey("Service", "default", "x")


def test_a_node_has_no_namespace() -> None:
    node = decode(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "n1.example.com", "namespace": "odd"},
            "spec": {"podCIDR": "10.1.0.0/24", "taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": "2001:DB8::1"},
                    {"type": "Hostname", "address": "n1"},
                    {"type": "ExternalIP", "address": "192.0.2.1"},
                ]
            },
        }
    )
    assert isinstance(node, Node)
    assert str(key_of(node)) == "Node n1.example.com"
    assert node.ips == ("2001:db8::1", "192.0.2.1")
    assert node.pod_cidrs == ("10.1.0.0/24",)
    assert node.is_being_deleted


def test_unknown_fields_are_ignored() -> None:
    assert isinstance(
        decode(document("Pod", spec={"containers": [{"name": "a", "image": "b"}]}, extra=1)), Pod
    )


def test_canonical_forms() -> None:
    service = decode(
        document(
            "Service",
            spec={
                "type": "LoadBalancer",
                "clusterIP": "FD00::A",
                "clusterIPs": ["FD00::A"],
                "externalIPs": ["2001:DB8:0:0::1"],
                "loadBalancerSourceRanges": ["2001:DB8::1/32", " 10.1.2.3/8"],
                "ports": [{"port": 80}],
            },
            status={"loadBalancer": {"ingress": [{"ip": "2001:DB8::2"}]}},
        )
    )
    assert isinstance(service, Service)
    assert service.cluster_ips == ("fd00::a",)
    assert service.spec.external_ips == ("2001:db8::1",)
    assert service.spec.load_balancer_source_ranges == ("2001:db8::/32", "10.0.0.0/8")
    assert service.ingress_ips == ("2001:db8::2",)


def test_v1beta1_becomes_v1() -> None:
    topology = {"kubernetes.io/hostname": "n1", "topology.kubernetes.io/zone": "a"}
    old = slice_of({"addresses": ["10.1.0.1"], "topology": topology}) | {
        "apiVersion": "discovery.k8s.io/v1beta1"
    }
    new = slice_of({"addresses": ["10.1.0.1"], "nodeName": "n1", "zone": "a"})
    assert decode(old) == decode(new)


def test_endpoint_of_a_slice() -> None:
    found = decode(slice_of({"addresses": ["10.1.0.1"], "hints": {"forZones": [{"name": "a"}]}}))
    assert isinstance(found, EndpointSlice)
    (endpoint,) = found.endpoints
    assert isinstance(endpoint, Endpoint)
    assert endpoint.hints is not None
    assert [hint.name for hint in endpoint.hints.for_zones] == ["a"]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (slice_of(addressType=""), "addressType"),
        (slice_of(addressType="IP"), "addressType"),
        (slice_of({"addresses": []}), "endpoints[0].addresses"),
        (slice_of({"addresses": ["10.1.0.1"] * 101}), "endpoints[0].addresses"),
        (slice_of({"addresses": ["10.1.0.1", "x"]}), "endpoints[0].addresses[1]"),
        (slice_of({"addresses": ["::1"]}), "endpoints[0].addresses[0]"),
        (slice_of({"addresses": ["10.1.0.1"], "hostname": "a.b"}), "endpoints[0].hostname"),
        (
            slice_of({"addresses": ["10.1.0.1"], "hints": {"forZones": [{"name": "a"}, {"name": "a"}]}}),
            "endpoints[0].hints.forZones[1].name",
        ),
        (slice_of(ports=[{"port": 0}]), "ports[0].port"),
        (slice_of(ports=[{"port": 1}, {"port": 2}]), "ports[1].name"),
        (slice_of(ports=[{"port": 1, "name": "UPPER"}]), "ports[0].name"),
        (slice_of(ports=[{"port": 1, "protocol": "tcp"}]), "ports[0].protocol"),
        (slice_of(*[{"addresses": ["10.1.0.1"]}] * 1001), "endpoints"),
        (slice_of({"addresses": ["not a name"]}, addressType="FQDN"), "endpoints[0].addresses[0]"),
        (document("Endpoints", subsets=[{"ports": [{"port": 1}]}]), "subsets[0]"),
        (document("Endpoints", subsets=[{"addresses": [{"ip": ""}]}]), "subsets[0].addresses[0].ip"),
        (
            document(
                "Endpoints",
                subsets=[
                    {"addresses": [{"ip": "10.1.0.1"}], "ports": [{"port": 1, "name": "a"}, {"port": 2}]}
                ],
            ),
            "subsets[0].ports[1].name",
        ),
        (
            document("Endpoints", subsets=[{"addresses": [{"ip": "10.1.0.1"}], "ports": [{}]}]),
            "subsets[0].ports[0].port",
        ),
        (document("Node", spec={"podCIDRs": ["10.0.0.0"]}), "spec.podCIDRs[0]"),
        (
            document("Node", status={"addresses": [{"type": "InternalIP", "address": "n1"}]}),
            "status.addresses[0].address",
        ),
        (document("Pod", status={"podIP": "127.0.0.1"}), "status.podIP"),
        (
            document("Pod", spec={"containers": [{"ports": [{"containerPort": 0}]}]}),
            "spec.containers[0].ports[0].containerPort",
        ),
        (document("Service", metadata={"name": "a" * 64}, spec={"clusterIP": "None"}), "metadata.name"),
        (
            document("Service", metadata={"name": "a", "namespace": "A"}, spec={"clusterIP": "None"}),
            "metadata.namespace",
        ),
        (
            document("Service", spec={"clusterIP": "None", "ports": [{"port": 1, "name": "a" * 64}]}),
            "spec.ports[0].name",
        ),
        (
            document("Service", spec=DUAL | {"clusterIPs": ["None", "10.96.0.1"]}),
            "spec.clusterIPs",
        ),
        (
            document("Service", spec=DUAL | {"ipFamilies": ["IPv4", "IPv4"]}),
            "spec.ipFamilies[1]",
        ),
        (document("Service", spec={"clusterIP": "None", "ipFamilyPolicy": "Dual"}), "spec.ipFamilyPolicy"),
        (
            document("Service", spec={"clusterIP": "None", "trafficDistribution": "Near"}),
            "spec.trafficDistribution",
        ),
        (
            document("Service", spec={"clusterIP": "None", "loadBalancerClass": "x/y"}),
            "spec.loadBalancerClass",
        ),
        (
            document("Service", spec={"clusterIP": "None", "allocateLoadBalancerNodePorts": False}),
            "spec.allocateLoadBalancerNodePorts",
        ),
        (
            document(
                "Service", spec={"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.1"}
            ),
            "spec.clusterIP",
        ),
        (
            document(
                "Service",
                spec={"clusterIP": "None"},
                status={"loadBalancer": {"ingress": [{"ip": "10.1.0.1", "ipMode": "Nat"}]}},
            ),
            "status.loadBalancer.ingress[0].ipMode",
        ),
        (
            document(
                "Service",
                spec={"clusterIP": "None"},
                status={"loadBalancer": {"ingress": [{"hostname": "a", "ipMode": "VIP"}]}},
            ),
            "status.loadBalancer.ingress[0].ipMode",
        ),
    ],
)
def test_a_wrong_field_is_named(value: Any, path: str) -> None:
    assert [where for where, _ in errors(value)] == [path]


def test_all_errors_come_at_once() -> None:
    wrong = document("Service", spec={"clusterIP": "x", "externalIPs": ["y"], "ports": [{"port": 0}]})
    assert [path for path, _ in errors(wrong)] == [
        "spec.ports[0].port",
        "spec.externalIPs[0]",
        "spec.clusterIP",
    ]


def test_a_problem_says_file_object_and_field() -> None:
    with pytest.raises(InvalidObject) as caught:
        decode(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web"},
                "spec": {"ports": [{"port": 70000}]},
            }
        )
    (problem,) = problems_of(caught.value, "web.yaml")
    assert problem == Problem(
        "Service",
        "default",
        "web",
        "spec.ports[0].port",
        "Invalid value: 70000: must be between 1 and 65535, inclusive",
        "web.yaml",
    )
    assert str(problem) == (
        "web.yaml: Service default/web: spec.ports[0].port: "
        "Invalid value: 70000: must be between 1 and 65535, inclusive"
    )


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, []),
        ({"kind": "Service"}, [{"kind": "Service"}]),
        ({"apiVersion": "v1", "kind": "List", "items": None}, []),
        ({"apiVersion": "v1", "kind": "List"}, []),
        (
            {
                "apiVersion": "v1",
                "kind": "List",
                "items": [{"kind": "A"}, {"kind": "List", "items": [{"kind": "B"}]}],
            },
            [{"kind": "A"}, {"kind": "B"}],
        ),
        (
            {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": [{"metadata": {}}]},
            [{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {}}],
        ),
        ({"kind": "ServiceList", "items": ["x"]}, ["x"]),
        ("text", ["text"]),
    ],
)
def test_expand(given: Any, want: list[Any]) -> None:
    assert list(expand(given)) == want


@pytest.mark.parametrize(
    "name", ["http", "a", "a1", "1a", "http-web-svc", "a-b-c", "123456789012345"[:14] + "a"]
)
def test_port_names_that_rfc_6335_allows(name: str) -> None:
    assert port_name_error(name) is None


@pytest.mark.parametrize("name", ["", "1", "1-2", "-a", "a-", "a--b", "A", "a_b", "a234567890123456"])
def test_port_names_that_rfc_6335_forbids(name: str) -> None:
    assert port_name_error(name) is not None


def test_weights() -> None:
    assert parse_weights(" 10.0.0.1 = 3 , FD00::1=0,") == {"10.0.0.1": 3, "fd00::1": 0}
    assert parse_weights("") == {}
    for text in ("10.0.0.1", "10.0.0.1=-1", "10.0.0.1=65536", "10.0.0.1=1.5", "=1"):
        with pytest.raises(ValueError, match=r"address|weight"):
            parse_weights(text)


def test_endpoints_keep_their_order_and_ports() -> None:
    found = decode(
        document(
            "Endpoints", subsets=[{"addresses": [{"ip": "FD00::1"}], "ports": [{"name": "a", "port": 1}]}]
        )
    )
    assert isinstance(found, Endpoints)
    assert found.subsets[0].addresses[0].ip == "fd00::1"
    assert found.subsets[0].ports[0].protocol == "TCP"
