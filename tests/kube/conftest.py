"""A real control plane on the node, and a skip where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kube import build
from kube.cluster import Cluster
from rig.servers import name_servers
from rig.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def binaries() -> build.Binaries:
    try:
        return build.binaries()
    except build.UnavailableError as error:
        pytest.skip(f"no Kubernetes API server: {error}")


@pytest.fixture(scope="module")
def net(nothing_left: None) -> Iterator[Topology]:
    """A node with three pods that serve their name."""
    with (
        Topology(pod_count=3) as made,
        name_servers([(pod.name, pod.place) for pod in made.pods], 8080),
    ):
        yield made


@pytest.fixture(scope="module")
def cluster(binaries: build.Binaries, net: Topology) -> Iterator[Cluster]:
    """A control plane that runs on the node itself, as on a node of the control plane."""
    with Cluster(binaries, net.on_node_bare) as running:
        yield running
