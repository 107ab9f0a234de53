"""A real API server takes what is in deploy/kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from kube.cluster import RefusedError

if TYPE_CHECKING:
    from kube.cluster import Cluster

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.kube, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/ebpfproxy.yaml").read_text()))
PATHS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/kube-system/configmaps",
    "DaemonSet": "/apis/apps/v1/namespaces/kube-system/daemonsets",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}


def try_out(cluster: Cluster, manifest: dict[str, Any]) -> Any:
    """Have the server do everything but keep it, under a name that nobody has."""
    metadata = manifest["metadata"] | {"name": "ebpfproxy-tried"}
    return cluster.request("POST", PATHS[manifest["kind"]] + "?dryRun=All", manifest | {"metadata": metadata})


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: str(each["kind"]))
def test_every_manifest_is_taken(cluster: Cluster, manifest: dict[str, Any]) -> None:
    made = try_out(cluster, manifest)
    assert made["metadata"]["name"] == "ebpfproxy-tried"
    if manifest["kind"] == "DaemonSet":
        wanted = manifest["spec"]["template"]["spec"]["containers"][0]["securityContext"]
        found = made["spec"]["template"]["spec"]["containers"][0]["securityContext"]
        assert found == wanted, "nothing of it is unknown to the server"


def test_a_wrong_one_is_not(cluster: Cluster) -> None:
    wrong = next(each for each in MANIFESTS if each["kind"] == "DaemonSet")
    with pytest.raises(RefusedError, match="selector"):
        try_out(cluster, wrong | {"spec": wrong["spec"] | {"selector": {"matchLabels": {"a": "b"}}}})
