"""A few megabytes there and back, byte for byte, with what network cards do to large transfers."""

from __future__ import annotations

import hashlib
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rig.cluster import Cluster
from rig.objects import endpoint, endpoint_slice, service
from rig.topology import wait_listening

from .conftest import MODES, World, start_agents

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Mode

pytestmark = [pytest.mark.root, pytest.mark.netns]

SIZE = 3_000_000
NODE_PORT, PORT = 30007, 7007


class Setup(NamedTuple):
    """A mode, the MTU of every link outside, and who finishes checksums and cuts segments."""

    mode: Mode
    mtu: int
    offloads: bool

    def __str__(self) -> str:
        return f"{self.mode}-{self.mtu}-offloads {'on' if self.offloads else 'off'}"


#: An XDP program sees whole packets only where the sender's card finished them.
SETUPS = [
    Setup(mode, mtu, offloads)
    for mode in MODES
    for mtu, offloads in ((1500, False), (9000, False), (1500, True))
    if mode.name == "tc" or not offloads
]


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def world(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[World]:
    setup: Setup = request.param
    port = {"name": "echo", "port": PORT}
    with ExitStack() as stack:
        mtus = dict.fromkeys(("client", "node-1", "node-2", "pod11", "pod21"), setup.mtu)
        cluster = stack.enter_context(
            Cluster(node_count=2, pods_per_node=1, mtus=mtus, offloads=setup.offloads)
        )
        objects = []
        for number, (name, pod) in enumerate(cluster.pods.items()):
            # Says everything back, and ends when the client has ended. Blocks of PIPE_BUF: of larger ones a
            # pipe that poll(2) calls writable may take a part only, and socat waits for itself.
            echo = f"TCP6-LISTEN:{PORT},fork,reuseaddr,ipv6only=0"
            stack.enter_context(pod.place.start("socat", "-b", "4096", "-t", "10", echo, "PIPE"))
            wait_listening(pod.place, PORT)
            node = cluster.node_of(pod).node_name
            objects += [
                service(f"echo-{name}", port | {"nodePort": NODE_PORT + number}, type="NodePort"),
                *(
                    endpoint_slice(f"echo-{name}", [endpoint(address, node=node)], port)
                    for address in pod.ips
                ),
            ]
            objects[-3]["spec"] |= {"ipFamilyPolicy": "RequireDualStack"}
        agents = start_agents(stack, cluster, objects, setup.mode)
        yield World(cluster, agents, stack)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("backend", ["pod11", "pod21"])
def test_bytes_come_back(world: World, tmp_path: Path, backend: str, family: int) -> None:
    number = list(world.cluster.pods).index(backend)
    address = world.cluster.nodes[0].ips[family]
    sent = random.Random(1).randbytes(SIZE)
    (tmp_path / "sent").write_bytes(sent)
    to = f"TCP:{f'[{address}]' if family else address}:{NODE_PORT + number},connect-timeout=5"
    script = f"socat -t 10 -T 10 - {to} <{tmp_path}/sent >{tmp_path}/received"
    world.cluster.place("client").run("sh", "-e", "-c", script)
    received = (tmp_path / "received").read_bytes()
    assert len(received) == SIZE
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()


def test_nothing_was_refused_by_the_kernel(world: World) -> None:
    for agent in world.agents:
        assert agent.status()["verdicts"]["rewrite-failed"] == 0
