"""The capabilities that deploy/ gives the agent are enough, and each is needed.

Under a real capability set: uid 0 without anything else of root's rights, as in the DaemonSet's container.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.kernel import is_since
from rig.objects import service
from rig.probe import Probe
from rig.process import HERE
from rig.topology import NODE_IPS

from . import catalogue as known

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rig.topology import Pod, Topology

pytestmark = [
    pytest.mark.root,
    pytest.mark.netns,
    pytest.mark.skipif(
        not is_since(5, 11) and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY,
        reason="before 5.11 BPF maps count as locked memory: needs ulimit -l unlimited",
    ),
]

#: values.yaml of the chart: capabilities.
ENOUGH = ("bpf", "net_admin", "perfmon")


def only(*capabilities: str) -> list[str]:
    """Return what starts a command that has these capabilities alone."""
    allowed = ",".join(["-all", *(f"+{each}" for each in capabilities)])
    return ["setpriv", f"--bounding-set={allowed}", "--inh-caps=-all", "--no-new-privs"]


def capabilities(agent: Agent) -> set[str]:
    """Return the effective capabilities of the running agent, as capsh(1) names them."""
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    number = re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    assert number
    return set(HERE.run("capsh", f"--decode={number[1]}").stdout.strip().partition("=")[2].split(","))


def write(agent: Agent, pods: Sequence[Pod]) -> None:
    agent.write(
        service("web", known.HTTP | {"nodePort": 30080}, known.UDP, ips=known.WEB, type="NodePort"),
        *known.slices("web", pods, known.TO_HTTP, known.TO_UDP),
    )


@pytest.mark.parametrize("attach", ["tcx", "clsact"])
def test_three_are_enough(net: Topology, attach: str) -> None:
    if attach == "tcx" and not is_since(6, 6):
        pytest.skip("this kernel has no tcx links")
    agent = Agent(net, config=known.CONFIG, attach=attach, prefix=only(*ENOUGH))
    write(agent, net.pods[:2])
    with (
        agent,
        Probe(net.on_node) as node,
        Probe(net.pods[3].place) as pod,
        Probe(net.from_outside) as outside,
    ):
        assert capabilities(agent) == {f"cap_{each}" for each in ENOUGH}

        def all_answer() -> None:
            for address in known.WEB:
                assert set(node.tcp(address, 80, 6)) == {"pod1", "pod2"}
                assert set(pod.tcp(address, 80, 6)) == {"pod1", "pod2"}
                assert set(node.udp(address, 80, 6)) == {"pod1", "pod2"}
            for address in NODE_IPS:
                assert set(outside.tcp(address, 30080, 6)) == {"pod1", "pod2"}

        all_answer()
        # What an older kernel lacks no right can mend.
        assert [each for each in agent.status()["problems"] if "this kernel" not in each] == []
        agent.restart()
        all_answer()
        write(agent, net.pods[1:2])
        agent.wait_backends("default/web:http", {net.pods[1].v4})
        agent.terminate()
        removed = net.on_node_bare.run(
            *only(*ENOUGH),
            *agent.program("cleanup", "--bpffs", net.bpffs, "--state-dir", agent.state_dir),
            timeout_s=180,
        ).stdout
        assert "removed" in removed
        assert not (net.bpffs / "ebpfproxy").exists()


@pytest.mark.parametrize("missing", ENOUGH)
def test_none_of_the_three_can_go(net: Topology, missing: str) -> None:
    agent = Agent(
        net,
        config=known.CONFIG,
        arguments=["--mode", "bpf"],
        prefix=only(*(each for each in ENOUGH if each != missing)),
    )
    write(agent, net.pods[:2])
    with pytest.raises(RuntimeError, match="the agent ended"):
        agent.start()
    agent.stop()
