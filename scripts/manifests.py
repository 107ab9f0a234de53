"""Prints deploy/kubernetes/ebpfproxy.yaml: the Helm chart with its defaults, for those who don't use Helm.

Usage: .venv/bin/python scripts/manifests.py >deploy/kubernetes/ebpfproxy.yaml
A test compares the file with the chart.
"""

from __future__ import annotations

from pathlib import Path

from helm_python import Chart

CHART = Path(__file__).resolve().parents[1] / "deploy/helm/ebpfproxy"
# What others need is made first.
ORDER = ("serviceaccount", "rbac", "configmap", "daemonset")

HEAD = """\
# Made by scripts/manifests.py from deploy/helm/ebpfproxy with its defaults: kubectl apply -f ebpfproxy.yaml
# Before kube-proxy goes, say where the API server is (docs/deployment.md): --kube-api-server below, or
# clientConnection.kubeconfig in the ConfigMap.
"""


def document() -> str:
    """Return the manifests."""
    with Chart.load(CHART) as chart:
        rendered = chart.render(name="ebpfproxy", namespace="kube-system")
    parts = [rendered[f"ebpfproxy/templates/{name}.yaml"].strip() for name in ORDER]
    return HEAD + "---\n" + "\n---\n".join(parts) + "\n"


if __name__ == "__main__":
    print(document(), end="")
