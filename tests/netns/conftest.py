"""Topologies, and the agent's log in the report of a test that fails."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import Topology

from . import catalogue
from .dataplanes import MODES

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from rig.process import Place
    from rig.topology import Pod


@pytest.fixture
def net(nothing_left: None) -> Iterator[Topology]:
    """A topology of this test's own: three pods that serve their name on 8080 and 8081, and a client pod."""
    with Topology(pod_count=4) as made, name_servers(serving(made), 8080, 8081):
        yield made


def serving(net: Topology) -> list[tuple[str, Place]]:
    return [(pod.name, pod.place) for pod in net.pods[:3]]


class World:
    """A running agent with the catalogue's Services, and a client in every kind of place.

    Attributes:
        net: the topology; the fourth pod is a client by packets, the fifth by sockets.
        agent: the agent.
        probes: clients by origin: on the node, in a pod (through tc, as its process is in no cgroup of
            ours), in a pod and in the cgroup, outside.
    """

    def __init__(self, net: Topology, agent: Agent, probes: dict[str, Probe]) -> None:
        self.net, self.agent, self.probes = net, agent, probes

    @property
    def mode(self) -> str:
        return self.agent.mode

    @property
    def backends(self) -> list[Pod]:
        return self.net.pods[:3]


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """The dataplane to test."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def world(nothing_left: None, mode: str) -> Iterator[World]:
    """Everything that tests of one module can share: they change nothing."""
    with ExitStack() as stack:
        net = stack.enter_context(Topology(pod_count=5))
        stack.enter_context(name_servers([*serving(net), ("node", net.on_node_bare)], 8080, 8081))
        net.outside.shell(  # second addresses, used only where a test binds to them
            """
            ip addr add 192.0.2.101/24 dev eth0
            ip addr add 2001:db8::101/64 dev eth0 nodad preferred_lft 0
            """
        )
        agent = Agent(net, mode=mode, config=catalogue.CONFIG)
        agent.write(*catalogue.objects(net.pods[:3]))
        stack.enter_context(agent)
        places = {
            "node": net.on_node,
            "pod": net.pods[3].place,
            "pod-in-cgroup": net.in_cgroup(net.pods[4]),
            "outside": net.from_outside,
        }
        yield World(net, agent, {name: stack.enter_context(Probe(place)) for name, place in places.items()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("netns"):
        report.sections += [(f"agent, mode {agent.mode}", agent.output()) for agent in Agent.live]
    return report
