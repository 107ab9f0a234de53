"""The real agent and a scripted API server on its node: TLS, a token, real traffic and the kernel's maps."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from netns.test_health import get
from rig.agent import Agent
from rig.api_model import NODES, SERVICES, SLICES, ApiModel, Refusal
from rig.apiserver import ApiServer, Request
from rig.certificates import Authority
from rig.kernel import enter
from rig.objects import endpoint_slice, service
from rig.probe import Probe
from rig.topology import NODE_IPS, NODE_NAME, POD_CIDRS
from rig.wait import eventually as soon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rig.process import Place
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

eventually = partial(soon, timeout_s=60)  # commands of the agent, on a machine that may be busy

VIP = "10.96.0.10"
PORT = 6443  # a port that was chosen by the kernel would be another one after a kill
HEALTHZ = f"http://{NODE_IPS[0]}:10256/healthz"
NAME = "default/web"


def listen_in(place: Place) -> socket.socket:
    """Return a listening socket on the loopback device of another namespace."""

    def make() -> socket.socket:
        assert place.netns
        enter(place.netns)
        return socket.create_server(("127.0.0.1", PORT))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


class Cluster:
    """An API server on the node, and the agent that follows it.

    Attributes:
        token: the server takes no other.
    """

    def __init__(self, net: Topology, authority: Authority) -> None:
        self.net = net
        self.token = "first"
        self.model = ApiModel()
        self.model.put(NODES, {"metadata": {"name": NODE_NAME}, "spec": {"podCIDRs": list(POD_CIDRS)}})
        certificate = authority.issue("api", "IP:127.0.0.1")
        self.server = ApiServer(self.model, certificate, authority, listen_in(net.on_node_bare))
        self.server.refuse = self._check
        self.token_file = net.directory / "token"
        self.token_file.write_text(self.token)
        kubeconfig = net.directory / "kubeconfig"
        port = self.server.start().port
        cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(authority.certificate)}
        kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "current-context": "it",
                    "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
                    "clusters": [{"name": "it", "cluster": cluster}],
                    "users": [{"name": "it", "user": {"tokenFile": "token"}}],
                }
            )
        )
        self.agent = Agent(net, source=["--kubeconfig", kubeconfig])

    def _check(self, request: Request) -> Refusal | None:
        good = request.headers.get("Authorization") == f"Bearer {self.token}"
        return None if good else Refusal(401, "Unauthorized")

    def serve(self, name: str, vip: str, *addresses: str) -> None:
        """Create or change a Service and its slice."""
        self.model.put(SERVICES, service(name, 80, ips=[vip]))
        self.model.put(SLICES, endpoint_slice(name, addresses, 8080))

    def services(self) -> set[str]:
        return {row["name"] for row in self.agent.rows("services")}

    def wait_services(self, *names: str) -> None:
        eventually(lambda: self.services() == set(names), f"the maps to have {names}", every_s=0.05)

    def healthz(self) -> tuple[int, Any]:
        found = get(self.net.on_node_bare, HEALTHZ)
        return (found.status, json.loads(found.body)) if found else (0, {})

    def stop(self) -> None:
        self.agent.stop()
        self.server.stop()


@pytest.fixture
def cluster(net: Topology) -> Iterator[Cluster]:
    """Not started yet; one Service with the first two pods."""
    with ExitStack() as stack:
        made = Cluster(net, stack.enter_context(Authority()))
        stack.callback(made.stop)
        made.serve("web", VIP, net.pods[0].v4, net.pods[1].v4)
        yield made


def test_a_service_s_life(cluster: Cluster, net: Topology) -> None:
    with cluster.agent as agent, Probe(net.on_node) as node:
        assert set(node.tcp(VIP, 80, 20)) == {"pod1", "pod2"}
        (path, told), *_ = eventually(lambda: cluster.server.posted, "the event of the start")
        assert path == "/apis/events.k8s.io/v1/namespaces/default/events"
        assert (told["reason"], told["type"], told["regarding"]["name"]) == ("Starting", "Normal", NODE_NAME)
        cluster.serve("web", VIP, net.pods[2].v4)
        agent.wait_backends(NAME, {net.pods[2].v4})
        assert set(node.tcp(VIP, 80, 5)) == {"pod3"}
        cluster.serve("other", "10.96.0.11", net.pods[0].v4)
        cluster.wait_services(NAME, "default/other")
        cluster.model.delete(SERVICES, "web")
        cluster.wait_services("default/other")
        said = agent.status()
        assert (said["server"], said["manifests"], said["problems"]) == (cluster.server.url, "", [])
        asked = agent.cli("env", "default", "--state-dir", agent.state_dir, check=False)
        assert (asked.returncode, "come from https://127.0.0.1" in asked.stderr) == (3, True)


def test_starts_before_the_server_and_goes_on_without_it(cluster: Cluster, net: Topology) -> None:
    cluster.server.kill()
    agent = cluster.agent.start(wait=False)
    try:
        eventually(
            lambda: "Connection refused" in str(agent.status().get("problems")), "the problem to be named"
        )
        cluster.server.start()
        agent.wait_notified("READY=1")
        with Probe(net.on_node) as node:
            assert set(node.tcp(VIP, 80, 20)) == {"pod1", "pod2"}
            eventually(lambda: cluster.healthz()[0], "health to be told")
            assert cluster.healthz()[1]["source"]["connected"] is True
            cluster.server.kill()
            eventually(lambda: not cluster.healthz()[1]["source"]["connected"], "the loss to be noticed")
            first = cluster.healthz()
            assert first[0] == 200
            eventually(lambda: cluster.healthz()[1]["currentTime"] > first[1]["currentTime"], "time to pass")
            assert cluster.healthz()[1]["source"] == first[1]["source"]  # how old the state is
            assert set(node.tcp(VIP, 80, 20)) == {"pod1", "pod2"}
            metrics = get(net.on_node_bare, "http://127.0.0.1:10249/metrics")
            assert metrics is not None
            assert "ebpfproxy_source_lost_timestamp_seconds 1.7" in metrics.body
            cluster.model.delete(SERVICES, "web")
            cluster.serve("other", "10.96.0.11", net.pods[0].v4)
            cluster.model.compact()  # what happened meanwhile can only be told by a list
            assert cluster.services() == {NAME}
            cluster.server.start()
            cluster.wait_services("default/other")
            eventually(lambda: cluster.healthz()[1]["source"]["connected"], "the server to be back")
            eventually(lambda: not agent.status()["problems"], "no problem to be left")
        agent.terminate()
    finally:
        agent.stop()


def test_an_agent_that_starts_while_the_server_is_away_deletes_nothing(
    cluster: Cluster, net: Topology
) -> None:
    cluster.serve("other", "10.96.0.11", net.pods[0].v4)
    with cluster.agent as agent, Probe(net.on_node) as node:
        cluster.wait_services(NAME, "default/other")
        agent.kill()
        cluster.model.delete(SERVICES, "other")
        # Services and slices are there, the Node is not: not everything is known.
        cluster.server.refuse = lambda request: (
            Refusal(503, "ServiceUnavailable") if request.path == NODES else cluster._check(request)
        )
        agent.start(wait=False)
        eventually(lambda: "HTTP 503" in str(agent.status().get("problems")), "the problem to be named")
        assert cluster.services() == {NAME, "default/other"}
        assert set(node.tcp(VIP, 80, 20)) == {"pod1", "pod2"}
        cluster.server.refuse = cluster._check
        agent.wait_notified("READY=1")
        cluster.wait_services(NAME)


def test_a_rotated_token(cluster: Cluster, net: Topology) -> None:
    with cluster.agent as agent:
        cluster.token_file.write_text("second")
        cluster.token = "second"
        for path in (SERVICES, SLICES, NODES):
            cluster.server.stream(path).cut()
        cluster.serve("web", VIP, net.pods[2].v4)
        agent.wait_backends(NAME, {net.pods[2].v4})
        assert agent.status()["problems"] == []


def test_nothing_is_allocated(cluster: Cluster) -> None:
    """The server is about to give it a cluster IP: that is not the agent's business."""
    pending = service("pending", {"port": 80, "name": "http"}, type="LoadBalancer")
    cluster.model.put(SERVICES, pending)
    with cluster.agent as agent:
        assert cluster.services() == {NAME}
        assert not (agent.state_dir / "allocations.json").exists()
        cluster.model.put(SERVICES, service("pending", {"port": 80, "name": "http"}, ips=["10.96.7.7"]))
        cluster.wait_services(NAME, "default/pending:http")


def test_a_reload_lists_everything_again(cluster: Cluster) -> None:
    with cluster.agent as agent:
        before = sum(not each.is_watch for each in cluster.server.requests)
        agent.reload()
        assert sum(not each.is_watch for each in cluster.server.requests) >= before + 3


def test_once(cluster: Cluster) -> None:
    agent = cluster.agent
    agent.arguments.append("--once")
    agent.start(wait=False)
    assert agent.process.wait() == 0, agent.output()
    assert cluster.services() == {NAME}


def test_an_endpoint_that_must_not_be_is_left_out_and_named(cluster: Cluster, net: Topology) -> None:
    slice_ = endpoint_slice("web", ["127.0.0.1", net.pods[2].v4, "169.254.1.1"], 8080)
    cluster.model.put(SLICES, slice_)
    with cluster.agent as agent:
        agent.wait_backends(NAME, {net.pods[2].v4})
        problems = agent.status()["problems"]
        assert [each for each in problems if "loopback range" in each]
        assert [each for each in problems if "link-local range" in each]


def test_a_missing_kubeconfig_is_said(net: Topology, tmp_path: Path) -> None:
    agent = Agent(net, source=["--kubeconfig", tmp_path / "none"])
    try:
        agent.start(wait=False)
        assert agent.process.wait() == 1
        assert f"read kubeconfig {tmp_path}/none: No such file or directory" in agent.output()
    finally:
        agent.stop()
