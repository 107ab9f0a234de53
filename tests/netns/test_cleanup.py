"""``ebpfproxy cleanup`` removes all that is ours and nothing that is not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.libbpf import Link, Program, lib
from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe

from . import catalogue as known

if TYPE_CHECKING:
    from pathlib import Path

    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

# Classic BPF that accepts everything: the shortest filter that needs no compiler (tc-bpf(8)).
ACCEPT = "1,6 0 0 4294967295"


def filters(net: Topology, device: str, direction: str) -> str:
    """Return what tc says of the filters on a device (its JSON is broken for BPF in iproute2 6.1)."""
    return net.on_node_bare.run("tc", "filter", "show", "dev", device, direction).stdout


def programs_on(net: Topology, cgroup: Path) -> list[int]:
    """Return the ids of the programs attached to a cgroup."""
    text = net.on_node_bare.run("bpftool", "-j", "cgroup", "show", cgroup, check=False).stdout
    # Newer ones (Ubuntu 24.04) take the cgroup's descriptor for a device's number and list its tcx links too.
    return [each["id"] for each in json.loads(text.strip() or "[]") if "tcx" not in each["attach_type"]]


def clean(agent: Agent) -> str:
    return agent.cli("cleanup", "--bpffs", agent.net.bpffs, "--state-dir", agent.state_dir).stdout


@pytest.mark.parametrize("attach", ["tcx", "clsact"])
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_all_of_ours_goes_and_all_of_others_stays(net: Topology, attach: str, end: str) -> None:
    net.node.shell(
        f"tc qdisc add dev eth0 clsact; tc filter add dev eth0 ingress prio 7 bpf bytecode '{ACCEPT}'"
    )
    foreign_directory = net.bpffs / "foreign"
    foreign_directory.mkdir()
    foreign_program = Program(lib.glue_load_trivial(lib.BPF_PROG_TYPE_CGROUP_SKB, 0, 0))
    lib.bpf_obj_pin(foreign_program.fd, str(foreign_directory / "program").encode())
    below = net.cgroup / "below"  # its packets are dropped by the foreign program, so nothing runs there
    below.mkdir()
    foreign_link = Link.attach_cgroup(foreign_program, below, 0)  # BPF_CGROUP_INET_INGRESS
    foreign_ids = programs_on(net, below)
    assert foreign_ids == [foreign_program.id]

    agent = Agent(net, config=known.CONFIG, attach=attach)
    agent.write(service("web", known.HTTP, ips=known.WEB), *known.slices("web", net.pods[:3], known.TO_HTTP))
    with agent:
        with Probe(net.on_node) as node, Probe(net.pods[3].place) as pod:
            assert len(node.tcp(known.WEB[0], 80, 3)) == 3
            assert len(pod.tcp(known.WEB[0], 80, 3)) == 3
        assert len(programs_on(net, net.cgroup)) == 11
        if attach == "clsact":
            assert "ebpfproxy_tc_ingress" in filters(net, "eth0", "ingress")
            assert "ebpfproxy_tc_egress" in filters(net, "pod1", "egress")
        else:
            assert "ebpfproxy" not in filters(net, "eth0", "ingress")
        locked = agent.cli("cleanup", "--bpffs", net.bpffs, "--state-dir", agent.state_dir, check=False)
        assert locked.returncode == 1, "an agent is at work"
        getattr(agent, end)()
        assert "removed" in clean(agent)

        assert programs_on(net, net.cgroup) == []
        assert "ebpfproxy" not in filters(net, "eth0", "ingress")
        assert filters(net, "pod1", "egress") == ""
        assert {path.name for path in net.bpffs.iterdir()} - {"maps.debug", "progs.debug"} == {"foreign"}
        assert not agent.state_dir.exists()

        assert "bytecode" in filters(net, "eth0", "ingress"), "a filter of others"
        assert programs_on(net, below) == foreign_ids
        assert (foreign_directory / "program").exists()
        assert "nothing to remove" in clean(agent), "a second time"

        for place in (net.on_node, net.pods[3].place):
            with (
                Probe(place) as probe,
                probe.impatient(),
                pytest.raises(OSError, match=r"unreachable|timed out"),
            ):
                probe.tcp(known.WEB[0], 80)
        agent.start()
        with Probe(net.on_node) as node:
            assert len(node.tcp(known.WEB[0], 80, 3)) == 3, "and it can be started again"
    foreign_link.close()
    foreign_program.close()


def test_nothing_to_clean_is_no_error(net: Topology) -> None:
    agent = Agent(net)
    assert "nothing to remove" in clean(agent)
    agent.stop()
