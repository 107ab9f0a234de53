"""sessionAffinity: ClientIP."""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.topology import NODE_IPS
from rig.wait import eventually

from . import catalogue as known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

LONG_S, SHORT_S = 600, 1


@pytest.fixture
def agent(net: Topology, mode: str) -> Iterator[Agent]:
    made = Agent(net, mode=mode, config=known.CONFIG)
    both = (known.TO_HTTP, known.TO_UDP)
    for name, ips, timeout_s, node_port in [
        ("sticky", known.WEB, LONG_S, 30080),
        ("short", known.NODE_PORT, SHORT_S, 30081),
    ]:
        made.write(
            service(
                *(name, known.HTTP | {"nodePort": node_port}, known.UDP | {"nodePort": node_port}),
                ips=ips,
                type="NodePort",
                sessionAffinity="ClientIP",
                sessionAffinityConfig={"clientIP": {"timeoutSeconds": timeout_s}},
            ),
            *known.slices(name, net.pods[:3], *both),
            file=f"{name}.json",
        )
    with made:
        yield made


ORIGINS = ["node", "pod", "outside"]


def probe_at(net: Topology, origin: str) -> Probe:
    return Probe({"node": net.on_node, "pod": net.pods[3].place, "outside": net.from_outside}[origin])


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_one_client_one_backend_through_every_vip(
    net: Topology, agent: Agent, origin: str, family: int
) -> None:
    with probe_at(net, origin) as probe:
        answers = probe.tcp(known.WEB[family], 80, 10) + probe.tcp(NODE_IPS[family], 30080, 10)
        assert len(answers) == 1, answers
        # Another port of the Service is another affinity, but it is one as well.
        assert len(probe.udp(known.WEB[family], 80, 10)) == 1


def test_other_clients_have_other_backends(net: Topology, agent: Agent) -> None:
    net.outside.shell("for n in 101 102 103 104 105; do ip addr add 192.0.2.$n/24 dev eth0; done")
    with Probe(net.from_outside) as probe:
        chosen = {}
        for number in (100, 101, 102, 103, 104, 105):
            client = (f"192.0.2.{number}", 0)
            first = probe.tcp(known.WEB[0], 80, 3, bind=client)
            assert len(first) == 1
            chosen[client] = first
        assert len({next(iter(names)) for names in chosen.values()}) == 3, "round robin over the clients"
        for client, first in chosen.items():
            assert set(probe.tcp(known.WEB[0], 80, 2, bind=client)) == set(first)


@pytest.mark.parametrize("origin", ORIGINS)
def test_affinity_ends_with_its_timeout(net: Topology, agent: Agent, origin: str) -> None:
    with probe_at(net, origin) as probe:
        (first,) = probe.tcp(known.NODE_PORT[0], 80)
        time.sleep(SHORT_S + 0.1)  # silence is what ends it; a longer one does no harm
        (second,) = probe.tcp(known.NODE_PORT[0], 80)
        assert second != first, "round robin went on"


@pytest.mark.parametrize("origin", ORIGINS)
def test_affinity_to_a_backend_that_goes_ends_at_once(net: Topology, agent: Agent, origin: str) -> None:
    with probe_at(net, origin) as probe:
        (first,) = probe.tcp(known.WEB[0], 80, 5)
        others = [pod for pod in net.pods[:3] if pod.name != first]
        text = (agent.manifests / "sticky.json").read_text()
        gone = next(pod for pod in net.pods if pod.name == first)
        for family in (0, 1):
            text = text.replace(f'"{gone.ips[family]}"', f'"{others[0].ips[family]}"')
        agent.write_text("sticky.json", text)
        (second,) = eventually(
            lambda: probe.tcp(known.WEB[0], 80) - collections.Counter([first]), "another backend"
        )
        assert second in {pod.name for pod in others}
        assert set(probe.tcp(known.WEB[0], 80, 5)) == {second}


def test_affinity_survives_the_agent(net: Topology, agent: Agent) -> None:
    with Probe(net.from_outside) as probe:
        (first,) = probe.tcp(known.WEB[0], 80, 3)
        agent.kill()
        assert set(probe.tcp(known.WEB[0], 80, 5)) == {first}
        agent.start()
        assert set(probe.tcp(known.WEB[0], 80, 5)) == {first}
