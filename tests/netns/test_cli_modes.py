"""What the commands that read say in modes that have no BPF maps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.dataplane import modes
from rig.agent import Agent
from rig.topology import NODE_IPS, OUTSIDE_IPS

from . import catalogue as known
from .dataplanes import MODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture(params=[mode for mode in MODES if mode != "bpf"])
def agent(net: Topology, request: pytest.FixtureRequest) -> Iterator[Agent]:
    made = Agent(net, mode=request.param, config=known.CONFIG)
    made.write(*known.objects(net.pods[:3]))
    with made:
        yield made


def test_what_to_use_instead_and_explain(agent: Agent, net: Topology) -> None:
    state = ("--state-dir", agent.state_dir)
    mode = modes.find(agent.mode)
    assert mode
    for noun in ("connections", "affinity", "stats", "maps"):
        done = agent.cli(noun, *state, check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(f"ebpfproxy: mode {agent.mode} serves here, and {noun} reads the maps")
        assert f"`{mode.services_by}`" in done.stderr
        assert f"`{mode.connections_by}`" in done.stderr
    shows = f"in mode {agent.mode}; `{mode.services_by}` shows"
    table = agent.cli("services", "web", *state)
    assert table.stdout.splitlines()[1].split() == [
        "default/web:http", "ClusterIP", "TCP", f"{known.WEB[0]}:80", "3/3", "-", "-",
    ]  # fmt: skip
    assert shows in table.stderr
    assert shows in agent.cli("backends", *state).stderr
    rows = json.loads(agent.cli("backends", "web:http", *state, "-o", "json").stdout)
    assert {(row["address"], row["is_usable"], row["connections"]) for row in rows} == {
        (address, True, None) for pod in net.pods[:3] for address in (pod.v4, pod.v6)
    }
    absent = agent.cli("backends", "absent", *state, check=False)
    assert (absent.returncode, "no Service absent is programmed" in absent.stderr) == (3, True)
    shown = net.on_node_bare.run("sh", "-c", mode.services_by).stdout
    assert known.WEB[0] in shown, "what is named shows the Services"

    target = (f"{NODE_IPS[0]}:30017", "--from", OUTSIDE_IPS[0])
    found = json.loads(agent.cli("explain", *target, *state, "-o", "json").stdout)
    (match,) = found["matches"]
    assert (match["service"], match["policy"]) == ("default/local-external:http", "Local")
    assert [each["backend"] for each in match["candidates"]] == [f"{pod.v4}:8080" for pod in net.pods[:2]]
    assert [each["backend"] for each in match["excluded"]] == [f"{net.pods[2].v4}:8080"]
    assert shows in agent.cli("explain", *target, *state).stdout

    nobody = agent.cli("explain", "198.51.100.1:80", *state, check=False)
    assert (nobody.returncode, "no address of any Service" in nobody.stdout) == (3, True)
    agent.terminate()
    late = agent.cli("explain", *target, *state, check=False)
    assert (late.returncode, "ask the agent at" in late.stderr) == (3, True)
