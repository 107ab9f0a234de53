"""The agent and a real API server (1.20: EndpointSlices are v1beta1 there), with the rights in deploy/.

Run by ``make test-kube``. The server validates, allocates and keeps what a real one does; there is no
controller, so the tests write EndpointSlices themselves, as one does for a Service without a selector.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from rig.agent import Agent
from rig.objects import endpoint_slice, service
from rig.probe import Probe
from rig.topology import NODE_IPS, NODE_NAME, POD_CIDRS
from rig.wait import eventually as soon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.cluster import Cluster
    from rig.objects import Object
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.kube, pytest.mark.timeout(600)]

eventually = partial(soon, timeout_s=60)  # two servers and an agent, on a machine that may be busy

ROOT = Path(__file__).resolve().parents[2]
SERVICES = "/api/v1/namespaces/default/services"
SLICES = "/apis/discovery.k8s.io/v1beta1/namespaces/default/endpointslices"
ACCOUNT = "/api/v1/namespaces/kube-system/serviceaccounts/ebpfproxy"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
HTTP = {"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}


def slice_of(name: str, *addresses: str) -> Object:
    made = endpoint_slice(name, addresses, {"name": "http", "port": 8080, "protocol": "TCP"})
    for each in made["endpoints"]:
        each["topology"] = {"kubernetes.io/hostname": each.pop("nodeName")}  # as v1beta1 has it
    return made | {"apiVersion": "discovery.k8s.io/v1beta1"}


class Kube:
    """What an administrator does."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def create(self, path: str, body: Object) -> Any:
        return self.cluster.request("POST", path, body)

    def change(self, path: str, name: str, **fields: Any) -> None:
        """Read, change, write back."""
        body = self.cluster.request("GET", f"{path}/{name}")
        for field, value in fields.items():
            if isinstance(value, dict):
                body[field] |= value
            else:
                body[field] = value
        self.cluster.request("PUT", f"{path}/{name}", body)

    def delete(self, path: str, name: str) -> None:
        self.cluster.request("DELETE", f"{path}/{name}")

    def serve(self, name: str, *addresses: str, **spec: Any) -> str:
        """Create a Service and its slice; return the cluster IP that the server gave it."""
        made = self.create(SERVICES, service(name, HTTP, **spec))
        self.create(SLICES, slice_of(name, *addresses))
        return str(made["spec"]["clusterIP"])


@pytest.fixture(scope="module")
def kube(cluster: Cluster) -> Kube:
    kube = Kube(cluster)
    status = {"addresses": [{"type": "InternalIP", "address": address} for address in NODE_IPS]}
    spec = {"podCIDR": POD_CIDRS[0], "podCIDRs": list(POD_CIDRS)}
    kube.create("/api/v1/nodes", {"metadata": {"name": NODE_NAME}, "spec": spec, "status": status})
    return kube


@pytest.fixture(scope="module")
def kubeconfig(kube: Kube, net: Topology) -> Path:
    """That of the service account in deploy/, with its rights."""
    paths = {
        "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
        "ClusterRole": f"{RBAC}/clusterroles",
        "ClusterRoleBinding": f"{RBAC}/clusterrolebindings",
    }
    eventually(lambda: kube.cluster.request("GET", "/api/v1/namespaces/kube-system"), "kube-system")
    for each in yaml.safe_load_all((ROOT / "deploy/kubernetes/ebpfproxy.yaml").read_text()):
        if each and each["kind"] in paths:
            kube.create(paths[each["kind"]], each)
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = kube.create(f"{ACCOUNT}/token", request)["status"]["token"]
    (net.directory / "token").write_text(token)
    authority = {"certificate-authority": str(kube.cluster.authority.certificate)}
    path = net.directory / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "it",
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
                "clusters": [{"name": "it", "cluster": {"server": kube.cluster.url, **authority}}],
                "users": [{"name": "it", "user": {"tokenFile": str(net.directory / "token")}}],
            }
        )
    )
    return path


@contextmanager
def running(net: Topology, kubeconfig: Path) -> Iterator[Agent]:
    with Agent(net, source=["--kubeconfig", kubeconfig]) as agent:
        yield agent


@pytest.fixture
def agent(net: Topology, kubeconfig: Path, kube: Kube) -> Iterator[Agent]:
    with running(net, kubeconfig) as agent:
        yield agent
        assert agent.status()["problems"] == [], agent.output()
    for path in (SERVICES, SLICES):
        for each in kube.cluster.request("GET", path)["items"]:
            if each["metadata"]["name"] != "kubernetes":
                kube.delete(path, each["metadata"]["name"])


def names(agent: Agent) -> set[str]:
    return {row["name"] for row in agent.rows("services")} - {"default/kubernetes:https"}


def wait_names(agent: Agent, *wanted: str) -> None:
    eventually(lambda: names(agent) == set(wanted), f"the maps to have {wanted}", every_s=0.05)


def test_a_service_s_life(agent: Agent, kube: Kube, net: Topology) -> None:
    pods = [pod.v4 for pod in net.pods]
    vip = kube.serve("web", *pods[:2])
    agent.wait_backends("default/web:http", set(pods[:2]))
    with Probe(net.on_node) as node:
        assert set(node.tcp(vip, 80, 20)) == {"pod1", "pod2"}
        kube.change(SLICES, "web-v4", endpoints=slice_of("web", pods[2])["endpoints"])
        agent.wait_backends("default/web:http", {pods[2]})
        assert set(node.tcp(vip, 80, 5)) == {"pod3"}
        kube.change(SERVICES, "web", spec={"ports": [HTTP | {"port": 8000}]})
        eventually(lambda: f"{vip}:8000" in agent.rows("services")[-1]["frontends"], "the port to change")
        assert set(node.tcp(vip, 8000, 5)) == {"pod3"}
    kube.delete(SLICES, "web-v4")
    agent.wait_backends("default/web:http", set())
    kube.delete(SERVICES, "web")
    wait_names(agent)


def test_what_the_server_gives_out(agent: Agent, kube: Kube, net: Topology) -> None:
    """Cluster IPs of both families and a NodePort are the server's; the agent serves exactly those."""
    made = kube.create(SERVICES, service("dual", HTTP, type="NodePort", ipFamilyPolicy="RequireDualStack"))
    for address in (net.pods[0].v4, net.pods[0].v6):
        kube.create(SLICES, slice_of("dual", address))
    wait_names(agent, "default/dual:http")
    agent.wait_backends("default/dual:http", {net.pods[0].v4})
    agent.wait_backends("default/dual:http", {net.pods[0].v6})
    four, six = made["spec"]["clusterIPs"]
    node_port = made["spec"]["ports"][0]["nodePort"]
    frontends = {each for row in agent.rows("services") for each in row["frontends"]}
    assert {f"{four}:80", f"[{six}]:80", f"*:{node_port}"} <= frontends
    with Probe(net.on_node) as node, Probe(net.from_outside) as outside:
        assert set(node.tcp(four, 80, 3)) == set(node.tcp(six, 80, 3)) == {"pod1"}
        assert set(outside.tcp(NODE_IPS[0], node_port, 3)) == {"pod1"}
    assert not (agent.state_dir / "allocations.json").exists()


def test_the_server_dies_and_comes_back(agent: Agent, kube: Kube, net: Topology) -> None:
    pods = [pod.v4 for pod in net.pods]
    vip = kube.serve("web", *pods[:2])
    kube.serve("other", pods[0])
    agent.wait_backends("default/web:http", set(pods[:2]))
    wait_names(agent, "default/web:http", "default/other:http")
    kube.cluster.kill_apiserver()
    eventually(lambda: "API server" in str(agent.status()["problems"]), "the loss to be named")
    with Probe(net.on_node) as node:
        assert set(node.tcp(vip, 80, 20)) == {"pod1", "pod2"}
        kube.cluster.start()
        kube.delete(SERVICES, "other")
        kube.change(SLICES, "web-v4", endpoints=slice_of("web", pods[2])["endpoints"])
        agent.wait_backends("default/web:http", {pods[2]})
        wait_names(agent, "default/web:http")
        assert set(node.tcp(vip, 80, 5)) == {"pod3"}
    eventually(lambda: not agent.status()["problems"], "no problem to be left")


def test_the_agent_is_away_meanwhile(agent: Agent, kube: Kube, net: Topology) -> None:
    pods = [pod.v4 for pod in net.pods]
    kube.serve("web", *pods[:2])
    kube.serve("other", pods[0])
    wait_names(agent, "default/web:http", "default/other:http")
    agent.kill()
    kube.delete(SERVICES, "other")
    kube.serve("late", pods[1])
    kube.change(SLICES, "web-v4", endpoints=slice_of("web", pods[2])["endpoints"])
    assert names(agent) == {"default/web:http", "default/other:http"}
    agent.start()
    wait_names(agent, "default/web:http", "default/late:http")
    agent.wait_backends("default/web:http", {pods[2]})


def test_many_pages(agent: Agent, kube: Kube, net: Topology, kubeconfig: Path) -> None:
    """More than a page of a list, and a stream of events on the way there."""
    wanted = {f"default/many-{number}:http" for number in range(520)}
    for number in range(520):
        kube.create(SERVICES, service(f"many-{number}", HTTP))
    eventually(lambda: not wanted ^ names(agent), "all of them in the maps", every_s=0.5)
    agent.restart()
    assert names(agent) == wanted


def test_other_proxies_are_left_alone(agent: Agent, kube: Kube, net: Topology) -> None:
    kube.serve("web", net.pods[0].v4)
    wait_names(agent, "default/web:http")
    kube.change(SERVICES, "web", metadata={"labels": {"service.kubernetes.io/service-proxy-name": "other"}})
    wait_names(agent)
    kube.change(SERVICES, "web", metadata={"labels": {}})
    wait_names(agent, "default/web:http")


def test_the_rights_are_the_least(agent: Agent, kube: Kube, kubeconfig: Path) -> None:
    """Asked of the server: SelfSubjectRulesReview's sibling for another subject."""
    user = "system:serviceaccount:kube-system:ebpfproxy"
    may = {
        ("list", "", "services"): True,
        ("watch", "", "services"): True,
        ("watch", "discovery.k8s.io", "endpointslices"): True,
        ("list", "", "nodes"): True,
        ("create", "events.k8s.io", "events"): True,
        ("get", "", "secrets"): False,
        ("list", "", "pods"): False,
        ("update", "", "services"): False,
        ("update", "", "nodes"): False,
        ("delete", "discovery.k8s.io", "endpointslices"): False,
        ("list", "", "configmaps"): False,
    }
    for (verb, group, resource), expected in may.items():
        attributes = {"verb": verb, "group": group, "resource": resource, "namespace": "default"}
        if resource == "nodes":
            del attributes["namespace"]
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": user, "groups": ["system:serviceaccounts"], "resourceAttributes": attributes},
        }
        answer = kube.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        assert answer["status"]["allowed"] is expected, (verb, resource)


def test_no_rights_are_said(kube: Kube, net: Topology, kubeconfig: Path, agent: Agent) -> None:
    kube.serve("web", net.pods[0].v4)
    wait_names(agent, "default/web:http")
    binding = f"{RBAC}/clusterrolebindings"
    body = kube.cluster.request("GET", f"{binding}/ebpfproxy")
    kube.delete(binding, "ebpfproxy")
    try:
        agent.kill()
        agent.start(wait=False)
        eventually(
            lambda: "HTTP 403: services is forbidden" in str(agent.status()["problems"]), "the refusal"
        )
        assert names(agent) == {"default/web:http"}  # as it was left
    finally:
        del body["metadata"]["resourceVersion"], body["metadata"]["uid"]
        kube.create(binding, body)
    agent.wait_notified("READY=1")
    eventually(lambda: not agent.status()["problems"], "no problem to be left")


# A pod's view: its service account's volume where every pod has it, and no flag that says anything.
IN_POD = """
mount -t tmpfs none /run
account=/run/secrets/kubernetes.io/serviceaccount
mkdir -p $account
cp "$1" $account/token; cp "$2" $account/ca.crt
shift 2
exec "$@"
"""


def test_in_a_pod(kube: Kube, net: Topology, kubeconfig: Path) -> None:
    prefix = ["unshare", "--mount", "sh", "-ec", IN_POD, "pod"]
    prefix += [str(net.directory / "token"), str(kube.cluster.authority.certificate)]
    host, _, port = kube.cluster.url.removeprefix("https://").partition(":")
    env = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    with Agent(net, source=[], prefix=prefix, env=env) as agent:
        kube.serve("web", net.pods[0].v4)
        agent.wait_backends("default/web:http", {net.pods[0].v4})
        assert agent.status()["server"] == kube.cluster.url
        kube.delete(SLICES, "web-v4")
        kube.delete(SERVICES, "web")
        wait_names(agent)


def test_events_are_at_the_node(agent: Agent, kube: Kube) -> None:
    def told() -> bool:
        found = kube.cluster.request("GET", "/apis/events.k8s.io/v1/events")["items"]
        return any(
            (each["regarding"]["kind"], each["regarding"]["name"]) == ("Node", NODE_NAME)
            and each["reportingController"] == "ebpfproxy"
            for each in found
        )

    eventually(told, "an event about the Node")


def test_a_loopback_endpoint_that_this_server_lets_pass(kube: Kube, net: Topology, kubeconfig: Path) -> None:
    """1.20 does not look at the addresses of a slice; the agent does."""
    with running(net, kubeconfig) as agent:
        kube.serve("web", net.pods[0].v4, "127.0.0.1")
        agent.wait_backends("default/web:http", {net.pods[0].v4})
        assert "may not be in the loopback range" in str(agent.status()["problems"])
        kube.delete(SLICES, "web-v4")
        kube.delete(SERVICES, "web")
        eventually(lambda: not agent.status()["problems"], "no problem to be left")
