"""The programs, loaded once by each loader, and a node with empty maps for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from packets.loading import load
from packets.node import V4, V6, Family, Node
from packets.path import Driver
from rig import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebpfproxy.loader import Loaded


@pytest.fixture(scope="session")
def host(nothing_left: None) -> Iterator[kernel.Netns]:
    """The node's own network namespace: nothing but loopback in it.

    Before Linux 5.14 no namespace can be told from others but the initial one.
    """
    if not kernel.is_since(5, 14):
        yield kernel.OwnNetns()
        return
    with kernel.new_netns("host") as made:
        yield made


@pytest.fixture(scope="session", params=["libbpf", "bcc"])
def programs(request: pytest.FixtureRequest, host: kernel.Netns) -> Iterator[Loaded]:
    """The programs in the kernel."""
    with load(request.param, host, {}) as loaded:
        yield loaded


@pytest.fixture
def node(programs: Loaded) -> Node:
    """A node without Services."""
    return Node(programs)


@pytest.fixture(params=[V4, V6], ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    """Both IP versions."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["tc_ingress", "xdp_lb"])
def driver(node: Node, request: pytest.FixtureRequest) -> Driver:
    """One of the two programs that see a packet first."""
    if request.param not in node.loaded.programs:
        pytest.skip("this loader has no XDP")
    return Driver(node, request.param)
