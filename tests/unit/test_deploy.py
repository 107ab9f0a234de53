"""What is in deploy/: rendered by Helm, held against Kubernetes' schemas, and against what the agent needs.

Rendering and ``helm lint`` are those of Helm's own library, which the package helm-python-sdk carries; the
schemas are those of Kubernetes' OpenAPI documents, which kubernetes-validate carries version by version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, lint
from helm_python.errors import HelmError

import ebpfproxy
from ebpfproxy import config, documents
from ebpfproxy.cli import parser

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/ebpfproxy"
MANIFESTS = ROOT / "deploy/kubernetes/ebpfproxy.yaml"
INFORMATION, WARNING = 1, 2  # severities of helm lint

#: Values of every branch of the templates.
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kubeadm": {"existingConfigMap": "kube-proxy"},
    "all": {
        "image": {"repository": "registry.example/ebpfproxy", "tag": "1", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "config": {"clusterCIDR": "10.244.0.0/16", "ipvs": {"scheduler": "maglev"}},
        "apiServers": ["https://192.0.2.10:6443", "https://192.0.2.11:6443"],
        "extraArgs": ["--log-format=json"],
        "oldKernel": True,
        "serviceAccount": {"annotations": {"a": "b"}, "name": "proxy"},
        "affinity": {"nodeAffinity": {}},
        "resources": {"limits": {"memory": "1Gi"}},
        "podAnnotations": {"c": "d"},
        "podLabels": {"e": "f"},
    },
    "bare": {
        "privileged": True,
        "serviceAccount": {"create": False},
        "rbac": {"create": False},
        "livenessProbe": {"enabled": False},
    },
    "drain": {"drain": True},
}


def objects(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the chart makes with these values, by kind."""
    with Chart.load(CHART) as chart:
        rendered = chart.render(values, name="ebpfproxy", namespace="kube-system")
    made = [
        each
        for path, text in rendered.items()
        if path.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each
    ]
    by_kind = {each["kind"]: each for each in made}
    assert len(by_kind) == len(made)
    return by_kind


def container(values: dict[str, Any]) -> dict[str, Any]:
    (only,) = objects(values)["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("name", VALUES)
def test_helm_has_nothing_to_complain_of(name: str) -> None:
    report = lint(CHART, VALUES[name], strict=True)
    assert report["errors"] == []
    worse = [each for each in report["messages"] if each["severity"] > INFORMATION]
    assert worse == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", ["1.25", "1.29", "1.35"])
@pytest.mark.parametrize("name", VALUES)
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    """Strict: a field that the version does not know is an error."""
    for each in objects(VALUES[name]).values():
        kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_do_find_mistakes() -> None:
    made = objects({})["DaemonSet"]
    made["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostNetwrok"):
        kubernetes_validate.validate(made, "1.35", strict=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"imagee": {}}, "imagee"),
        ({"apiServers": ["192.0.2.10:6443"]}, "apiServers"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"healthzPort": 0}, "healthzPort"),
        ({"drain": "yes"}, "drain"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], reason: str) -> None:
    with Chart.load(CHART) as chart, pytest.raises(HelmError, match=reason):
        chart.validate_schema(values)


def test_every_value_is_documented_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text()
    with Chart.load(CHART) as chart:
        schema, values = chart.schema, chart.values
    assert schema
    assert schema["properties"].keys() - {"global"} == values.keys()  # Helm adds global by itself
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    for name in values:
        assert re.search(rf"\.Values\.{name}\b", templates), f"{name} is used"
        assert re.search(rf"^{name}:", text, re.MULTILINE)


def test_versions_are_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == ebpfproxy.__version__
    assert f"ebpfproxy:{ebpfproxy.__version__}" in (ROOT / "deploy/Containerfile").read_text()


@pytest.mark.parametrize("name", VALUES)
def test_the_command_line_and_the_configuration_are_good(name: str) -> None:
    made = container(VALUES[name])
    arguments = [each.replace("$(NODE_NAME)", "node-1") for each in made["args"]]
    parsed = parser.build().parse_args(arguments)
    servers = VALUES[name].get("apiServers", [])
    assert name == "drain" or list(parsed.kube_api_server or ()) == servers
    paths = {each["mountPath"] for each in made["volumeMounts"]}
    for flag in (parsed.bpffs, parsed.state_dir, getattr(parsed, "cgroup", None)):
        assert flag is None or str(flag) in paths, "each directory is mounted"
    if made_map := objects(VALUES[name]).get("ConfigMap"):
        (found,) = documents.read("config.yaml", made_map["data"]["config.yaml"].encode())
        assert config.parse(found).unused == ()


def test_it_may_do_no_more_than_it_needs() -> None:
    spec = objects({})["DaemonSet"]["spec"]["template"]["spec"]
    security = container({})["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["BPF", "NET_ADMIN", "PERFMON"]}
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert not {"hostPID", "hostIPC"} & spec.keys()
    assert container({"oldKernel": True})["securityContext"]["capabilities"]["add"][3:] == [
        "SYS_ADMIN",
        "SYS_RESOURCE",
    ]


def test_it_writes_nothing_to_the_cluster_but_events() -> None:
    rules = objects({})["ClusterRole"]["rules"]
    verbs: dict[str, set[str]] = {}
    for rule in rules:
        for resource in rule["resources"]:
            verbs.setdefault(resource, set()).update(rule["verbs"])
    assert verbs == {
        "services": {"list", "watch"},
        "nodes": {"list", "watch"},
        "endpoints": {"list", "watch"},
        "endpointslices": {"list", "watch"},
        "events": {"create"},
    }


def test_kubeadms_configuration_is_where_it_says() -> None:
    """The file config.conf names /var/lib/kube-proxy/kubeconfig.conf, of the same ConfigMap."""
    made = container(VALUES["kubeadm"])
    assert "--config=/etc/ebpfproxy/config.conf" in made["args"]
    assert "/var/lib/kube-proxy" in {each["mountPath"] for each in made["volumeMounts"]}
    assert "ConfigMap" not in objects(VALUES["kubeadm"])


def test_the_plain_manifests_are_the_chart() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "scripts/manifests.py"], capture_output=True, text=True, check=True
    )
    assert made.stdout == MANIFESTS.read_text()
    kinds = [each["kind"] for each in yaml.safe_load_all(MANIFESTS.read_text())]
    assert kinds == ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet"]


# --- the Containerfile


def test_the_image_is_made_of_files_that_are_there() -> None:
    text = (ROOT / "deploy/Containerfile").read_text()
    ignored = (ROOT / ".containerignore").read_text().splitlines()
    copied = re.findall(r"^COPY --chown=builder (.+) \S+$", text, re.MULTILINE)
    assert copied
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored or f"!{name}/**" in ignored
    assert text.index("USER builder") < text.index("build --wheel"), "compilers don't run as root"


# --- the systemd unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_unit_is_good_and_hardened() -> None:
    unit = ROOT / "deploy/ebpfproxy.service"
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    complaints = [line for line in verify.stderr.splitlines() if "not executable" not in line]
    assert [line for line in complaints if unit.name in line] == []
    security: list[str | Path] = ["systemd-analyze", "security", "--offline=true", "--no-pager", unit]
    said = subprocess.run(security, capture_output=True, text=True, check=True).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert exposure, said
    # What is left is what it is for: the network and BPF. 9.6 is a unit without a word.
    assert float(exposure[1]) <= 3.0, said
