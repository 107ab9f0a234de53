"""Counters end to end: what clients sent and got, as netfilter's counters saw it at the pod."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rig.agent import Agent
from rig.objects import endpoint_slice, service
from rig.probe import Probe
from rig.topology import NODE_IPS
from rig.wait import eventually

from . import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

VIP, PORT, NODE_PORT = "10.96.0.41", 80, 30041
EMPTY_PORT = 30042
SERVICE = "default/web"
CLIENTS = 7
#: In the pod: what comes to its server, and what leaves it.
COUNTERS = """
add table inet seen
add chain inet seen in { type filter hook input priority 0; }
add chain inet seen out { type filter hook output priority 0; }
add rule inet seen in tcp dport 8080 counter
add rule inet seen out tcp sport 8080 counter
"""


@pytest.fixture
def agent(net: Topology) -> Iterator[Agent]:
    pod = net.pods[0]
    pod.netns.shell(f"nft -f - <<'END'\n{COUNTERS}END")
    made = Agent(net, config=catalogue.CONFIG)
    port = {"port": PORT, "targetPort": 8080, "nodePort": NODE_PORT}
    nobody = {"port": PORT, "nodePort": EMPTY_PORT}
    made.write(
        service("web", port, ips=[VIP], type="NodePort"),
        endpoint_slice("web", [pod.v4], 8080),
        service("empty", nobody, ips=["10.96.0.42"], type="NodePort"),
    )
    with made:
        yield made


def seen(net: Topology) -> list[int]:
    """Return packets and bytes to the pod's server, and from it, as netfilter counted them."""
    text = net.pods[0].place.run("nft", "-j", "list", "table", "inet", "seen").stdout
    rules = [each["rule"] for each in json.loads(text)["nftables"] if "rule" in each]
    found = {rule["chain"]: rule["expr"][-1]["counter"] for rule in rules}
    return [found[chain][what] for chain in ("in", "out") for what in ("packets", "bytes")]


def scrape(net: Topology) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the metrics by name and labels."""
    text = net.on_node_bare.run("curl", "-sS", "--fail", "http://127.0.0.1:10249/metrics").stdout
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def traffic(row: dict[str, Any]) -> list[int]:
    return [row[name] for name in ("packets", "bytes", "reply_packets", "reply_bytes")]


def test_what_came_through_is_what_is_counted(net: Topology, agent: Agent) -> None:
    with Probe(net.from_outside) as client, Probe(net.on_node) as local:
        assert client.tcp(NODE_IPS[0], NODE_PORT, CLIENTS) == {"pod1": CLIENTS}
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                client.tcp(NODE_IPS[0], EMPTY_PORT)

        def agree() -> bool:
            """The last ACK of a connection may still be on its way."""
            (row,) = agent.rows("stats", SERVICE)
            return traffic(row) == seen(net)

        eventually(agree, "the counters of netfilter")
        (row,) = agent.rows("stats", SERVICE)
        assert (row["connections"], row["refused"], row["retried"]) == (CLIENTS, 0, 0)
        assert row["packets"] >= CLIENTS * 4, "SYN, ACK, request, FIN"
        (backend,) = agent.rows("stats", SERVICE, "--backends")
        assert (backend["address"], backend["connections"]) == (net.pods[0].v4, CLIENTS)
        assert traffic(backend) == traffic(row)
        (empty,) = agent.rows("stats", "empty")
        assert (empty["connections"], empty["refused"]) == (0, 3)
        verdicts = {each["verdict"]: each for each in agent.rows("stats", "--verdicts")}
        assert verdicts["reject-empty"]["count"] == 3
        # The frames of what was let through: IP packets and 14 bytes of Ethernet each.
        ours = [verdicts[name] for name in ("new", "established")]
        assert sum(each["count"] for each in ours) == row["packets"]
        assert sum(each["bytes"] for each in ours) == row["bytes"] + 14 * row["packets"]

        # Flows add to /metrics about once a second, and when they open and close: it may lag, never lead.
        labels = {"namespace": "default", "service": "web", "port": "", "protocol": "TCP"}
        labels |= {"ip_family": "IPv4"}
        metrics = scrape(net)
        assert metrics["ebpfproxy_service_connections_total", frozenset(labels.items())] == CLIENTS
        for name, direction in itertools.product(("packets", "bytes"), ("forward", "reply")):
            of = frozenset({**labels, "direction": direction}.items())
            most = row[name if direction == "forward" else f"reply_{name}"]
            assert most / 4 <= metrics[f"ebpfproxy_service_{name}_total", of] <= most
        for verdict in ("new", "established", "reply"):
            of = frozenset({"verdict": verdict}.items())
            assert metrics["ebpfproxy_verdict_bytes_total", of] == verdicts[verdict]["bytes"]

        # A socket of the node is connected once; its packets are nobody's business.
        local.tcp(VIP, PORT, 2)
        (after,) = agent.rows("stats", SERVICE)
        assert after["connections"] == CLIENTS + 2
        assert traffic(after) == traffic(row)


def test_an_ejected_backend_is_shown(net: Topology) -> None:
    bad, *good = net.pods[:3]
    annotations = {
        "ebpfproxy.io/scheduler": "rr",
        "ebpfproxy.io/outlier-ejection": "failures=1,seconds=600",
    }
    agent = Agent(net, config=catalogue.CONFIG)
    agent.write(
        service("web", {"port": PORT}, ips=[VIP], annotations=annotations),
        endpoint_slice("web", [pod.v4 for pod in net.pods[:3]], 8080),
    )
    bad.netns.shell(
        "nft 'add table inet no; add chain inet no in { type filter hook input priority 0; }; "
        "add rule inet no in tcp dport 8080 reject with tcp reset'"
    )
    with agent, Probe(net.on_node) as client:
        for _ in range(3):
            with contextlib.suppress(ConnectionRefusedError):  # by the one that is spoilt, once
                client.tcp(VIP, PORT)
        rows = {row["address"]: row for row in agent.rows("backends", "web")}
        left_s = rows[bad.v4]["ejected_s"]
        assert 500 < left_s <= 600
        assert not rows[bad.v4]["is_usable"]
        assert {rows[pod.v4]["ejected_s"] for pod in good} == {0}
        (match,) = agent.rows("explain", f"{VIP}:{PORT}", "--from", NODE_IPS[0])["matches"]
        assert {each["backend"] for each in match["candidates"]} == {f"{pod.v4}:8080" for pod in good}
        (excluded,) = match["excluded"]
        assert excluded["backend"] == f"{bad.v4}:8080"
        assert "ejected" in excluded["reason"]
        (row,) = agent.rows("stats", "web")
        assert row["ejected"] == 1
