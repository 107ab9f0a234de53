"""What is used of objects that an API server has validated: everything but what can't be, or must not be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ebpfproxy.errors import InvalidObject
from ebpfproxy.model.objects import Endpoints, EndpointSlice, Node, Object, Service, decode, decode_served

META = {"name": "web", "namespace": "default"}


def served(kind: type[Object], **fields: Any) -> tuple[Any, list[tuple[str, str]]]:
    return decode_served(json.dumps({"metadata": META, **fields}).encode(), kind)


def slice_of(*addresses: str, kind: str = "IPv4") -> tuple[EndpointSlice, list[tuple[str, str]]]:
    endpoints = [{"addresses": [each], "conditions": {"ready": True}} for each in addresses]
    found: tuple[EndpointSlice, list[tuple[str, str]]] = served(
        EndpointSlice, addressType=kind, endpoints=endpoints, ports=[{"name": "", "port": 80}]
    )
    return found


GOOD = "10.1.0.1"


# The ranges are those of Kubernetes' validation of endpoint addresses.
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("169.254.0.1", "link-local range"),
        ("224.0.0.1", "link-local multicast"),
        ("0.0.0.0", "unspecified"),
        ("fd00::1", "must be a valid IPv4 address"),
        ("nowhere", "must be a valid IPv4 address"),
        ("", "must be a valid IPv4 address"),
    ],
)
def test_endpoints_that_must_not_be_are_left_out(bad: str, why: str) -> None:
    found, errors = slice_of(GOOD, bad)
    assert [each.addresses[0] for each in found.endpoints] == [GOOD]
    ((path, message),) = errors
    assert path == "endpoints[1]"
    assert message.startswith(f'Invalid value: "{bad}": ')
    assert why in message
    assert message.endswith("; it is not used")


@pytest.mark.parametrize("bad", ["::1", "fe80::1", "febf::1", "ff02::1", "::", "::ffff:10.1.0.1", "10.1.0.1"])
def test_ipv6_endpoints_that_must_not_be(bad: str) -> None:
    found, errors = slice_of("FD00:0::1", bad, kind="IPv6")
    assert [each.addresses[0] for each in found.endpoints] == ["fd00::1"]  # in canonical form
    assert len(errors) == 1


@pytest.mark.parametrize("kind", ["FQDN", "IPv9", ""])
def test_addresses_of_other_kinds_are_of_no_service(kind: str) -> None:
    found, errors = slice_of("somewhere.example", kind=kind)
    assert (found.endpoints, errors) == ((), [])


def test_an_endpoint_without_an_address_is_left_out() -> None:
    found, errors = served(EndpointSlice, addressType="IPv4", endpoints=[{"addresses": []}, {}])
    assert found.endpoints == ()
    assert len(errors) == 2


def test_endpoints_v1() -> None:
    bad = {"ip": "127.0.0.1"}
    subset = {"addresses": [{"ip": GOOD}, bad], "notReadyAddresses": [bad], "ports": [{"port": 80}]}
    found, errors = served(Endpoints, subsets=[subset])
    assert [each.ip for each in found.subsets[0].addresses] == [GOOD]
    assert found.subsets[0].not_ready_addresses == ()
    assert [path for path, _ in errors] == ["subsets[0].addresses[1]", "subsets[0].notReadyAddresses[0]"]


PORT = {"name": "a", "port": 80, "protocol": "TCP"}
IP = {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"]}


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ({}, []),
        (
            {
                "trafficDistribution": "PreferMoon",
                "sessionAffinity": "Cookie",
                "ipFamilyPolicy": "TripleStack",
            },
            [],
        ),
        ({"ports": [PORT, {"name": "b", "port": 81, "protocol": "QUIC"}]}, ["spec.ports[1]"]),
        ({"externalIPs": ["203.0.113.1", "127.0.0.1", "x"]}, ["spec.externalIPs[1]", "spec.externalIPs[2]"]),
        ({"externalTrafficPolicy": "Near"}, ["spec.externalTrafficPolicy"]),
        ({"internalTrafficPolicy": "Near"}, ["spec.internalTrafficPolicy"]),
        ({"clusterIPs": ["10.96.0.1", "10.96.0.300"]}, ["spec.clusterIPs[1]"]),
        ({"loadBalancerIP": "::zz"}, []),
    ],
)
def test_services_are_used_as_far_as_they_can_be(spec: dict[str, Any], paths: list[str]) -> None:
    found, errors = served(Service, spec={**IP, "ports": [PORT], **spec})
    assert [path for path, _ in errors] == paths
    assert [port.protocol for port in found.spec.ports] == ["TCP"]
    assert found.cluster_ips == ("10.96.0.1",)
    assert found.spec.external_ips in ((), ("203.0.113.1",))
    assert found.spec.external_traffic_policy in ("", "Cluster")
    assert found.spec.internal_traffic_policy in (None, "Cluster")


def test_an_object_that_nothing_is_wrong_with_is_what_a_manifest_becomes() -> None:
    spec = {**IP, "type": "LoadBalancer", "ports": [PORT], "externalIPs": ["2001:DB8::1"]}
    spec["loadBalancerSourceRanges"] = [" 192.0.2.0/24 "]
    document = {"apiVersion": "v1", "kind": "Service", "metadata": META, "spec": spec}
    document["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.9", "ipMode": "VIP"}]}}
    found, errors = decode_served(json.dumps(document).encode(), Service)
    assert errors == []
    assert found == decode(document)


def test_a_source_range_that_is_none_never_opens_a_service() -> None:
    spec = {**IP, "type": "LoadBalancer", "ports": [PORT], "loadBalancerSourceRanges": ["192.0.2.0/33"]}
    found, errors = served(Service, spec=spec)
    assert found is None
    assert "would be open to all" in errors[0][1]


@pytest.mark.parametrize(
    ("annotation", "value"), [("ebpfproxy.io/scheduler", "best"), ("ebpfproxy.io/weights", "10.1.0.1=heavy")]
)
def test_our_annotations_are_not_the_servers_to_check(annotation: str, value: str) -> None:
    metadata = META | {"annotations": {annotation: value, "other": "kept"}}
    found, errors = served(Service, metadata=metadata, spec={**IP, "ports": [PORT]})
    assert [path for path, _ in errors] == [f"metadata.annotations[{annotation}]"]
    assert found.metadata.annotations == {"other": "kept"}


def test_node() -> None:
    addresses = [
        {"type": "InternalIP", "address": "192.0.2.1"},
        {"type": "InternalIP", "address": "x"},
        {"type": "Hostname", "address": "node-1"},
    ]
    found, errors = served(Node, metadata={"name": "node-1"}, status={"addresses": addresses})
    assert (found.ips, [path for path, _ in errors]) == (("192.0.2.1",), ["status.addresses[1]"])


@pytest.mark.parametrize(
    "document",
    [b"[]", b'"x"', b'{"metadata": []}', b'{"metadata": {"name": "web"}, "spec": {"ports": 1}}'],
)
def test_a_wrong_shape_is_one_kind_of_error(document: bytes) -> None:
    with pytest.raises(InvalidObject):
        decode_served(document, Service)
