"""Environment variables; the documented examples are in tests/scenarios."""

from __future__ import annotations

from ebpfproxy.model.objects import Object, ObjectKey, decode, key_of
from ebpfproxy.resolve import environment


def objects(*services: tuple[str, str, str]) -> dict[ObjectKey, Object]:
    found = {}
    for namespace, name, cluster_ip in services:
        metadata = {"namespace": namespace, "name": name}
        spec = {"clusterIP": cluster_ip, "ports": [{"port": 443}]}
        each = decode({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
        assert each is not None
        found[key_of(each)] = each
    return found


def test_a_namespaces_own_kubernetes_goes_before_the_masters() -> None:
    both = [("default", "kubernetes", "10.0.0.1"), ("prod", "kubernetes", "10.0.0.2")]
    for services in (both, both[::-1]):
        assert environment(objects(*services), "prod")["KUBERNETES_SERVICE_HOST"] == "10.0.0.2"
        assert environment(objects(*services), "other")["KUBERNETES_SERVICE_HOST"] == "10.0.0.1"


def test_only_service_kubernetes_is_seen_everywhere() -> None:
    services = [("default", "web", "10.0.0.1"), ("prod", "kubernetes", "10.0.0.2")]
    assert environment(objects(*services), "other") == {}


def test_a_service_without_a_cluster_ip_yet_has_none() -> None:
    assert environment(objects(("default", "web", "")), "default") == {}
