"""A cluster with an agent on every node, one for each way in which packets from outside are met."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rig.agent import Agent
from rig.cluster import Cluster
from rig.probe import Probe
from rig.servers import name_servers

from . import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rig.objects import Object


class Mode(NamedTuple):
    """How the programs meet packets on the uplink."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


MODES = [
    Mode("native", ("--xdp-mode", "native")),
    Mode("generic", ("--xdp-mode", "generic")),
    Mode("tc", ("--xdp-mode", "off")),
]


class World:
    """A cluster with running agents, and clients where they are asked for."""

    def __init__(self, cluster: Cluster, agents: list[Agent], stack: ExitStack) -> None:
        self.cluster, self.agents = cluster, agents
        self._stack = stack
        self._probes: dict[str, Probe] = {}

    def probe(self, name: str) -> Probe:
        """Return a client at that place; see :meth:`Cluster.place`."""
        if name not in self._probes:
            self._probes[name] = self._stack.enter_context(Probe(self.cluster.place(name)))
        return self._probes[name]


def start_agents(
    stack: ExitStack,
    cluster: Cluster,
    objects: Sequence[Object],
    mode: Mode,
    config: dict[str, object] | None = None,
    families: Sequence[int] = (0, 1),
) -> list[Agent]:
    """Start an agent on every node, side by side, all with the same manifests."""
    agents = []
    for node in cluster.nodes:
        agent = Agent(node, config=config or table.CONFIG, arguments=mode.arguments)
        stack.callback(agent.stop)
        agent.write(*table.node_objects(cluster, families), *objects)
        agents.append(agent.start(wait=False))
    for agent in agents:
        agent.wait_notified("READY=1")
    return agents


@pytest.fixture(scope="module", params=MODES, ids=str)
def world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    """Three nodes with the table's Services; what tests of one module can share: they change nothing."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(node_count=3, pods_per_node=2))
        stack.enter_context(name_servers([(name, pod.place) for name, pod in cluster.pods.items()], 8080))
        stack.enter_context(name_servers([("router", cluster.router.place())], 80))
        objects = [made for case in table.read() for made in case.objects(cluster)]
        agents = start_agents(stack, cluster, objects, request.param)
        yield World(cluster, agents, stack)
