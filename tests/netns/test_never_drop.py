"""Nothing fails while things change: endpoints, the agent's death, its end, its upgrade."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.probe import Load, Probe, more
from rig.process import HERE
from rig.topology import NODE_IPS

from . import catalogue as known
from .dataplanes import MODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Pod, Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"pod1", "pod2", "pod3"}


class Busy:
    """An agent with one Service under every kind of load."""

    def __init__(self, net: Topology, agent: Agent, loads: list[Load]) -> None:
        self.net, self.agent, self.loads = net, agent, loads

    def set_backends(self, *pods: Pod) -> None:
        """Change the endpoints and wait until the maps say so."""
        write(self.agent, *pods)
        for family in (0, 1):
            for port in ("http", "udp"):
                self.agent.wait_backends(f"default/web:{port}", {pod.ips[family] for pod in pods})

    def goes_on(self) -> list[set[str]]:
        """Wait for a good number of requests of each load; return who answers each."""
        return [set(answers) for answers in more(self.loads, 40)]


def write(agent: Agent, *pods: Pod) -> None:
    agent.write(
        service(
            "web",
            known.HTTP | {"nodePort": 30080},
            known.UDP | {"nodePort": 30080},
            ips=known.WEB,
            type="NodePort",
        ),
        *known.slices("web", pods, known.TO_HTTP, known.TO_UDP),
    )


WAYS = [("bpf", "tcx"), ("bpf", "clsact"), *((mode, "auto") for mode in MODES if mode != "bpf")]


@pytest.fixture(params=WAYS, ids="-".join)
def busy(net: Topology, request: pytest.FixtureRequest) -> Iterator[Busy]:
    mode, attach = request.param
    agent = Agent(net, mode=mode, config=known.CONFIG, attach=attach)
    write(agent, *net.pods[:3])
    with ExitStack() as stack:
        stack.enter_context(agent)
        node = stack.enter_context(Probe(net.on_node))
        pod = stack.enter_context(Probe(net.pods[3].place))
        outside = stack.enter_context(Probe(net.from_outside))
        loads = [
            stack.enter_context(probe.load(address, port, mode=mode, workers=workers, pause_s=0.005))
            for probe, address, port, mode, workers in [
                (node, known.WEB[0], 80, "new", 2),
                (node, known.WEB[1], 80, "new", 1),
                (node, known.WEB[0], 80, "keep", 2),
                (node, known.WEB[0], 80, "udp", 1),
                (node, known.WEB[1], 80, "udp-keep", 1),
                (pod, known.WEB[0], 80, "new", 1),
                (pod, known.WEB[1], 80, "keep", 1),
                (pod, known.WEB[0], 80, "udp-keep", 1),
                (outside, NODE_IPS[0], 30080, "new", 2),
                (outside, NODE_IPS[1], 30080, "keep", 1),
                (outside, NODE_IPS[1], 30080, "udp", 1),
            ]
        ]
        yield Busy(net, agent, loads)
        # The loads' ends assert that no request failed.


def test_endpoints_change_under_load(busy: Busy) -> None:
    first, second, third = busy.net.pods[:3]
    for pods in [(first, second), (second, third), (third,), (first, second, third), (second,)]:
        busy.set_backends(*pods)
        busy.goes_on()
    # New connections follow; kept TCP connections stay where they are.
    by_mode = dict(zip(["new4", "new6", "keep", "udp", "udp-keep"], busy.goes_on(), strict=False))
    assert by_mode["new4"] == by_mode["new6"] == by_mode["udp"] == by_mode["udp-keep"] == {"pod2"}


def test_sigkill_and_restart_under_load(busy: Busy) -> None:
    ids = backend_ids(busy.agent)
    for _ in range(2):
        busy.agent.kill()
        busy.goes_on()
        busy.agent.start()
        busy.goes_on()
    assert backend_ids(busy.agent) == ids


def test_sigkill_in_the_middle_of_changes(busy: Busy) -> None:
    pods = busy.net.pods[:3]
    ids = backend_ids(busy.agent)
    for number in range(4):
        write(busy.agent, *pods[: 1 + number % 3])
        busy.agent.kill()  # anywhere between the event and the last write
        busy.agent.start()
    busy.set_backends(*pods)
    busy.goes_on()
    assert {row for row in backend_ids(busy.agent) if row[1] == pods[0].v4} == {
        row for row in ids if row[1] == pods[0].v4
    }, "the endpoint that was always there has the id it had"


def test_endpoint_changes_while_no_agent_runs_are_made_up_for(busy: Busy) -> None:
    first, second, _ = busy.net.pods[:3]
    busy.agent.kill()
    write(busy.agent, first, second)
    busy.agent.start()
    busy.agent.wait_backends("default/web:http", {first.v4, second.v4})
    busy.goes_on()


def test_sigterm_leaves_the_dataplane(busy: Busy) -> None:
    busy.agent.terminate()
    assert busy.goes_on()[0] == NAMES
    busy.agent.start()
    busy.goes_on()


@pytest.mark.usefixtures("bcc_headers")
def test_upgrade_under_load(busy: Busy) -> None:
    """Another build of the programs takes the place of the running one, and back."""
    if busy.agent.mode != "bpf":
        pytest.skip("there are no programs")
    ids = backend_ids(busy.agent)
    for loader in ("bcc", "libbpf"):
        busy.agent.terminate()
        busy.agent.start(loader=loader)
        busy.goes_on()
    assert backend_ids(busy.agent) == ids


OTHER_VERSION = "0.1.999"


@pytest.fixture(scope="module")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build this tree as another version, and return what makes a command run with it."""
    tree = tmp_path_factory.mktemp("version") / "tree"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.so", "objects", "tests", "docs", "build")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    module = tree / "ebpfproxy/__init__.py"
    module.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{OTHER_VERSION}"', module.read_text()))
    HERE.run("make", "-s", "-C", tree / "bpf", f"OUT={tree}/ebpfproxy/objects", f"PYTHON={sys.executable}")
    build = f'cd "{tree}" && "{sys.executable}" setup.py --quiet build_ext --inplace'
    HERE.run("sh", "-c", build, timeout_s=120)
    return ["env", "-C", "/", f"PYTHONPATH={tree}"]


def test_rolling_update(busy: Busy, other_version: list[str]) -> None:
    """A DaemonSet's rolling update on one node, killed at its worst, and the way back: nobody notices."""
    ids, ours = backend_ids(busy.agent), busy.agent.status()["version"]
    for end in ("terminate", "kill"):
        getattr(busy.agent, end)()
        busy.goes_on()
        busy.agent.prefix = other_version
        busy.agent.start()
        assert busy.agent.status()["version"] == OTHER_VERSION != ours
        busy.goes_on()
        getattr(busy.agent, end)()
        busy.agent.prefix = []
        busy.agent.start()
        assert busy.agent.status()["version"] == ours
        busy.goes_on()
    assert backend_ids(busy.agent) == ids


def backend_ids(agent: Agent) -> set[tuple[str, str, int]]:
    if agent.mode != "bpf":
        return set()
    return {(row["service"], row["address"], row["id"]) for row in agent.rows("backends")}
