"""Real DNS servers behind a Service, asked by dig without pause while they come and go."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest

from rig.cluster import Cluster
from rig.objects import endpoint, endpoint_slice, service
from rig.servers import dns_server
from rig.wait import eventually

from . import table
from .conftest import MODES, start_agents

if TYPE_CHECKING:
    from rig.agent import Agent
    from rig.objects import Object
    from rig.process import Process

    from .conftest import Mode

pytestmark = [pytest.mark.root, pytest.mark.netns]

PORT: Object = {"name": "dns", "port": 53, "protocol": "UDP"}
CLUSTER_IPS, LOAD_BALANCERS = ("10.96.0.53", "fd00:96::35"), ("203.0.113.53", "2001:db8:f::35")
ADDRESS = "192.0.2.80"
#: Only the client's packets meet XDP; the others' are asked for once.
ORIGINS = {"native": ("client", "node-1", "pod12", "pod12+"), "generic": ("client",), "tc": ("client",)}

#: Asks each VIP in turn from one port, so that a flow to a backend that is gone is met again at once.
#: Two tries of two seconds: a query is "lost" if the retry is lost too.
ASK = f"""
port=$1; shift
while :; do
    for vip in "$@"; do
        case $vip in *:*) any=:: ;; *) any=0.0.0.0 ;; esac
        answer=$(dig "@$vip" -b "$any#$port" web.test A +short +tries=2 +time=2 2>&1 | tail -1)
        [ "$answer" = {ADDRESS} ] && echo ok || echo "lost $answer"
    done
    sleep 0.03
done
"""


@pytest.mark.timeout(300)  # four clients' retries, on a machine that may be busy
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_query_is_lost_longer_than_one_retry(nothing_left: None, mode: Mode) -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=2, pods_per_node=2))
        pods = {name: cluster.pods[name] for name in ("pod11", "pod21")}
        servers = {
            name: stack.enter_context(dns_server(pod.place, {"web.test": (ADDRESS,)}))
            for name, pod in pods.items()
        }

        def objects(names: list[str]) -> list[Object]:
            found = [service("dns", PORT, ips=CLUSTER_IPS, type="LoadBalancer", ingress=LOAD_BALANCERS)]
            for family in (0, 1):
                endpoints = [
                    endpoint(pods[name].ips[family], node=cluster.node_of(pods[name]).node_name)
                    for name in names
                ]
                found.append(endpoint_slice("dns", endpoints, PORT))
            return [*table.node_objects(cluster), *found]

        def serves(agent: Agent, wanted: set[str]) -> bool:
            return wanted == {row["address"] for row in agent.rows("backends") if row["is_usable"]}

        def change(agents: list[Agent], names: list[str]) -> None:
            wanted = {address for name in names for address in pods[name].ips}
            for agent in agents:
                agent.write(*objects(names))
            for agent in agents:
                eventually(partial(serves, agent, wanted), f"{names} to serve")

        agents = start_agents(stack, cluster, objects(list(pods)), mode)
        clients: dict[str, Process] = {}
        for number, origin in enumerate(ORIGINS[mode.name]):
            vips = LOAD_BALANCERS if origin == "client" else CLUSTER_IPS
            clients[origin] = stack.enter_context(
                cluster.place(origin).start("sh", "-c", ASK, "ask", str(5300 + number), *vips)
            )

        def has_answers(client: Process, count: int) -> bool:
            return client.output().count("\n") >= count

        def more(count: int) -> None:
            """Wait until each client has so many more answers, of either kind."""
            before = {origin: client.output().count("\n") for origin, client in clients.items()}
            for origin, client in clients.items():
                eventually(
                    partial(has_answers, client, before[origin] + count),
                    f"{count} more answers to {origin}",
                    timeout_s=60,
                )

        more(4)
        for name, other in (("pod11", "pod21"), ("pod21", "pod11")):
            # It answers no more, and goes; what is on its way there is lost, and the retry gets through.
            servers[other].signal(signal.SIGCONT)
            servers[name].signal(signal.SIGSTOP)
            change(agents, [other])
            more(4)
        lost = {origin: client.output().count("lost") for origin, client in clients.items()}
        assert lost == dict.fromkeys(clients, 0), "\n".join(client.output() for client in clients.values())
