"""Failover end to end: clients of a Service of which one backend is dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import endpoint_slice, service
from rig.probe import Probe
from rig.topology import NODE_IPS

from . import catalogue

if TYPE_CHECKING:
    from rig.objects import Object
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

VIP, PORT, NODE_PORT = "10.96.0.40", 80, 30040
#: A SYN is sent again after 1 s, 3 s and 7 s (RFC 6298): the second try has to do.
SECOND_TRY_S = 2.9


def objects(net: Topology, annotations: dict[str, str]) -> list[Object]:
    port = {"port": PORT, "targetPort": 8080, "nodePort": NODE_PORT}
    made = service(
        "web",
        port,
        ips=[VIP],
        annotations={"ebpfproxy.io/scheduler": "rr", **annotations},
        type="NodePort",
    )
    return [made, endpoint_slice("web", [pod.v4 for pod in net.pods[:3]], 8080)]


def spoil(net: Topology, verdict: str) -> None:
    """Let the first pod do something else with what comes to its server."""
    net.pods[0].netns.shell(
        "nft 'add table inet no; add chain inet no in { type filter hook input priority 0; }; "
        f"add rule inet no in tcp dport 8080 {verdict}'"
    )


def test_a_client_outside_does_not_notice(net: Topology) -> None:
    spoil(net, "drop")
    agent = Agent(net, config=catalogue.CONFIG)
    agent.write(*objects(net, {}))
    with agent, Probe(net.from_outside) as client, client.impatient(SECOND_TRY_S):
        answers = {client.answers(NODE_IPS[0], NODE_PORT, 1)[0].split()[0] for _ in range(6)}
        (row,) = agent.rows("stats", "web")
        assert row["connections"] == 6 + row["retried"], "each try was sent to a backend"
        assert row["retried"] >= 1
    assert answers == {"pod2", "pod3"}


def test_sockets_of_the_node_pass_over_what_failed(net: Topology) -> None:
    spoil(net, "reject with tcp reset")
    agent = Agent(net, config=catalogue.CONFIG)
    agent.write(*objects(net, {"ebpfproxy.io/outlier-ejection": "failures=2,seconds=600"}))
    with agent, Probe(net.on_node) as client:
        refused = 0
        for _ in range(12):
            try:
                client.answers(VIP, PORT, 1)
            except ConnectionRefusedError:
                refused += 1
        assert refused == 2
        assert {answer.split()[0] for answer in client.answers(VIP, PORT, 12)} == {"pod2", "pod3"}
