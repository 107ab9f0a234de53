"""Health of Services and of the agent, and metrics, asked with curl as load balancers and Prometheus do."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from netns import catalogue as known
from rig.agent import Agent
from rig.objects import endpoint, endpoint_slice, service
from rig.probe import Probe
from rig.topology import NODE_IPS, NODE_NAME
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.process import Place
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

CHECK = 30900  # a healthCheckNodePort
HEALTHZ = f"http://{NODE_IPS[0]}:10256/healthz"
LIVEZ = f"http://{NODE_IPS[0]}:10256/livez"
METRICS = "http://127.0.0.1:10249"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def get(place: Place, url: str) -> Answer | None:
    """Return what curl gets; None: nobody answers."""
    result = place.run("curl", "-sS", "-i", "-g", "--max-time", "5", url, check=False)
    if result.returncode:
        return None
    head, _, body = result.stdout.partition("\n\n")
    first, *lines = head.splitlines()
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), headers, body)


def status(place: Place, url: str) -> int:
    """Return the status code, 0 if nobody answers."""
    found = get(place, url)
    return found.status if found else 0


def is_status(place: Place, url: str, code: int) -> bool:
    return status(place, url) == code


def local_service(name: str = "web", port: int = CHECK) -> dict[str, Any]:
    return service(
        name,
        {"name": "http", "port": 80},
        {"name": "more", "port": 81},
        ips=known.WEB,
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=port,
    )


def slices(*endpoints: Any) -> list[dict[str, Any]]:
    ports = ({"name": "http", "port": 8080}, {"name": "more", "port": 8081})
    return [endpoint_slice("web", endpoints, *ports)]


@pytest.fixture
def agent(net: Topology) -> Iterator[Agent]:
    """Not started yet, with one Service that has two endpoints here."""
    made = Agent(net, config=known.CONFIG)
    made.write(local_service(), *slices(net.pods[0].v4, net.pods[1].v4))
    yield made
    made.stop()


# --- Services


def test_health_check_node_port(net: Topology, agent: Agent) -> None:
    """Each answer as kube-proxy gives it, on every address of the node."""
    pods = [pod.v4 for pod in net.pods]
    with agent:
        for address in (NODE_IPS[0], f"[{NODE_IPS[1]}]"):
            url = f"http://{address}:{CHECK}/"
            eventually(partial(is_status, net.from_outside, url, 200), f"{url} to answer")
            found = get(net.from_outside, url)
            assert found
            assert json.loads(found.body) == {
                "service": {"namespace": "default", "name": "web"},
                "localEndpoints": 2,
                "serviceProxyHealthy": True,
            }
            assert found.headers["Content-Type"] == "application/json"
            assert found.headers["X-Content-Type-Options"] == "nosniff"
            assert found.headers["X-Load-Balancing-Endpoint-Weight"] == "2"

        url = f"http://{NODE_IPS[0]}:{CHECK}/any/path"
        agent.write(local_service(), *slices(pods[0], endpoint(pods[1], node="elsewhere")))
        eventually(lambda: '"localEndpoints": 1' in str(get(net.from_outside, url)), "one endpoint here")
        agent.write(
            local_service(), *slices(endpoint(pods[0], ready=False), endpoint(pods[1], node="elsewhere"))
        )
        eventually(partial(is_status, net.from_outside, url, 503), "no endpoint here")
        found = get(net.from_outside, url)
        assert found
        assert json.loads(found.body)["serviceProxyHealthy"] is True
        assert found.headers["X-Load-Balancing-Endpoint-Weight"] == "0"


def test_health_check_servers_come_and_go(net: Topology, agent: Agent) -> None:
    old, new = (f"http://{NODE_IPS[0]}:{port}/" for port in (CHECK, CHECK + 1))
    with agent:
        eventually(partial(is_status, net.from_outside, old, 200), "the first port")
        agent.write(local_service(port=CHECK + 1), *slices(net.pods[0].v4))
        eventually(partial(is_status, net.from_outside, new, 200), "the second port")
        eventually(partial(is_status, net.from_outside, old, 0), "the first port to be closed")
        agent.write(local_service() | {"metadata": {"name": "other", "namespace": "default"}})
        eventually(partial(is_status, net.from_outside, old, 503), "another Service at the first port")
        assert "other" in str(get(net.from_outside, old))
        agent.write()
        eventually(partial(is_status, net.from_outside, old, 0), "no port without Services")


def test_health_checks_keep_to_the_node_port_addresses(net: Topology) -> None:
    agent = Agent(net, config=known.CONFIG | {"nodePortAddresses": ["192.0.2.0/24"]})
    agent.write(local_service(), *slices(net.pods[0].v4))
    with agent:
        url = f"http://{NODE_IPS[0]}:{CHECK}/"
        eventually(partial(is_status, net.from_outside, url, 200), "the address that is named")
        assert status(net.from_outside, f"http://[{NODE_IPS[1]}]:{CHECK}/") == 0
        assert status(net.on_node_bare, f"http://127.0.0.1:{CHECK}/") == 0
        net.node.shell("ip addr add 192.0.2.2/24 dev eth0")
        eventually(partial(is_status, net.from_outside, f"http://192.0.2.2:{CHECK}/", 200), "a new address")
    agent.stop()


# --- the agent


def node(**fields: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE_NAME, **fields.pop("metadata", {})},
        **fields,
    }


@pytest.mark.parametrize(
    "leaving",
    [
        {"metadata": {"deletionTimestamp": "2030-01-01T00:00:00Z"}},
        {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}},
    ],
    ids=["deleted", "tainted"],
)
def test_healthz_while_the_node_goes_away(net: Topology, agent: Agent, leaving: dict[str, Any]) -> None:
    agent.write(node(), file="node.json")
    with agent:
        eventually(partial(is_status, net.from_outside, HEALTHZ, 200), "the agent to be healthy")
        found = get(net.from_outside, HEALTHZ)
        assert found
        body = json.loads(found.body)
        assert body.keys() == {"lastUpdated", "currentTime", "nodeEligible", "healthy", "status"}
        assert (body["nodeEligible"], body["healthy"]) == (True, True)
        agent.write(node(**leaving), file="node.json")
        eventually(partial(is_status, net.from_outside, HEALTHZ, 503), "new connections to go elsewhere")
        assert '"nodeEligible":false' in str(get(net.from_outside, HEALTHZ))
        assert status(net.from_outside, LIVEZ) == 200, "the agent itself is well"
        assert status(net.from_outside, f"http://{NODE_IPS[0]}:{CHECK}/") == 200, "as with kube-proxy"


def test_a_taken_port_is_a_problem_and_tried_again(net: Topology, agent: Agent) -> None:
    taken = net.on_node_bare.start("socat", "TCP-LISTEN:10256,fork", "SYSTEM:true")
    with taken:
        eventually(lambda: net.on_node_bare.run("ss", "-Hltn", "sport = :10256").stdout, "the other listener")
        agent.start()
        eventually(lambda: "10256" in str(agent.status()["problems"]), "status to name the port")
        assert "Address already in use" in str(agent.status()["problems"])
        with Probe(net.on_node) as probe:
            assert probe.tcp(known.WEB[0], 80, 1), "Services work meanwhile"
    eventually(partial(is_status, net.from_outside, HEALTHZ, 200), "the port to be tried again")
    eventually(lambda: not agent.status()["problems"], "the problem to be over")


def test_bind_address_hard_fail(net: Topology) -> None:
    agent = Agent(net, config=known.CONFIG | {"bindAddressHardFail": True})
    with net.on_node_bare.start("socat", "TCP-LISTEN:10249,bind=127.0.0.1,fork", "SYSTEM:true"):
        eventually(lambda: net.on_node_bare.run("ss", "-Hltn", "sport = :10249").stdout, "the other listener")
        agent.start(wait=False)
        assert agent.process.wait() == 1
    assert "bindAddressHardFail" in agent.output()
    agent.stop()


def test_empty_addresses_switch_the_servers_off(net: Topology) -> None:
    flags = ["--healthz-bind-address", "", "--metrics-bind-address", ""]
    agent = Agent(net, config=known.CONFIG, arguments=flags)
    agent.write(local_service(), *slices(net.pods[0].v4))
    with agent:
        url = f"http://{NODE_IPS[0]}:{CHECK}/"
        eventually(partial(is_status, net.from_outside, url, 200), "the Service's own health check")
        assert status(net.from_outside, HEALTHZ) == 0
        assert status(net.on_node_bare, f"{METRICS}/metrics") == 0
    agent.stop()


def test_slow_clients_keep_nobody_waiting(net: Topology, agent: Agent) -> None:
    with agent, ExitStack() as stack:
        eventually(partial(is_status, net.from_outside, HEALTHZ, 200), "the agent to be healthy")
        for _ in range(5):
            pod = net.pods[3].place
            stack.enter_context(pod.start("socat", "-u", "EXEC:sleep 60", f"TCP:{NODE_IPS[0]}:10256"))
        eventually(
            lambda: net.on_node_bare.run("ss", "-Htn", "sport = :10256").stdout.count("ESTAB") == 5,
            "clients that say nothing",
        )
        assert status(net.from_outside, HEALTHZ) == 200


# --- metrics


def samples(place: Place) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the metrics, read by another parser than wrote them."""
    found = get(place, f"{METRICS}/metrics")
    assert found
    assert found.status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(found.body)
        for sample in family.samples
    }


def test_metrics(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.on_node) as probe:
        eventually(partial(is_status, net.on_node_bare, f"{METRICS}/metrics", 200), "the metrics")
        assert status(net.from_outside, f"http://{NODE_IPS[0]}:10249/metrics") == 0, "for this node only"
        web = {
            "namespace": "default",
            "service": "web",
            "port": "http",
            "protocol": "TCP",
            "ip_family": "IPv4",
        }
        connections = ("ebpfproxy_service_connections_total", frozenset(web.items()))
        before = samples(net.on_node_bare)
        probe.tcp(known.WEB[0], 80, 7)
        after = samples(net.on_node_bare)
        assert after[connections] - before[connections] == 7

        def value(name: str, **labels: str) -> float:
            return after[name, frozenset(labels.items())]

        assert value("ebpfproxy_verdicts_total", verdict="new") >= 7
        entries = {row["name"]: (row["entries"], row["limit"]) for row in agent.rows("maps")}
        for name in ("services", "backends", "slots", "vips", "service_names"):
            found = value("ebpfproxy_map_entries", map=name), value("ebpfproxy_map_limit", map=name)
            assert found == entries[name]
        assert value("ebpfproxy_mode_info", mode="bpf", loader="libbpf") == 1
        assert value("ebpfproxy_problems") == 0
        assert value("kubeproxy_sync_proxy_rules_duration_seconds_count", ip_family="IPv6") >= 1
        assert value("kubeproxy_sync_proxy_rules_service_changes_total") == 1
        assert value("kubeproxy_sync_proxy_rules_endpoint_changes_total") == 1
        synced, queued = (
            f"kubeproxy_sync_proxy_rules_last_{each}timestamp_seconds" for each in ("", "queued_")
        )
        assert value(synced, ip_family="IPv4") >= value(queued, ip_family="IPv4") > 0
        mode = get(net.on_node_bare, f"{METRICS}/proxyMode")
        assert mode
        assert (mode.status, mode.body) == (200, "bpf")
        assert status(net.on_node_bare, f"{METRICS}/else") == 404
