"""The world around the agent changes or misbehaves: devices, manifests, full maps, foreign programs."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import endpoint_slice, service
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import NODE_IPS
from rig.wait import eventually

from . import catalogue as known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.topology import Pod, Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture
def agent(net: Topology) -> Iterator[Agent]:
    """Not started yet, with one Service."""
    made = Agent(net, config=known.CONFIG)
    write(made, *net.pods[:3])
    yield made
    made.stop()


def write(agent: Agent, *pods: Pod, file: str = "objects.json") -> None:
    agent.write(
        service("web", known.HTTP | {"nodePort": 30080}, ips=known.WEB, type="NodePort"),
        *known.slices("web", pods, known.TO_HTTP),
        file=file,
    )


def names(probe: Probe, address: str, port: int = 80, timeout_s: float = 3) -> set[str]:
    """Return who answers nine requests; nobody when one of them fails."""
    try:
        with probe.impatient(timeout_s):
            return set(probe.tcp(address, port, 9))
    except OSError:
        return set()


def is_served_by(probe: Probe, address: str, port: int, expected: set[str]) -> bool:
    return names(probe, address, port) == expected


ALL = {"pod1", "pod2", "pod3"}


# --- devices


@pytest.mark.parametrize("attach", ["tcx", "clsact"])
def test_new_device_is_served(net: Topology, attach: str) -> None:
    agent = Agent(net, config=known.CONFIG, attach=attach)
    write(agent, *net.pods[:3])
    with agent:
        late = net.add_pod("late")
        with Probe(late.place) as probe:
            for vip in known.WEB:
                eventually(partial(is_served_by, probe, vip, 80, ALL), "the new pod's device to be served")


def test_device_that_comes_again_is_served_again(net: Topology, agent: Agent) -> None:
    with agent:
        net.node.shell("ip link del eth0")
        net.connect_outside()
        with Probe(net.from_outside) as probe:
            eventually(lambda: names(probe, NODE_IPS[0], 30080) == ALL, "the new uplink to be served")


def test_new_address_of_the_node_serves_node_ports(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.from_outside) as probe:
        net.node.shell("ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8::2/64 dev eth0 nodad")
        for address in ("192.0.2.2", "2001:db8::2"):
            eventually(partial(is_served_by, probe, address, 30080, ALL), "a NodePort at the new address")
        net.node.shell("ip addr del 192.0.2.2/24 dev eth0")
        assert names(probe, NODE_IPS[0], 30080) == ALL


def test_only_named_devices_are_served(net: Topology) -> None:
    agent = Agent(net, config=known.CONFIG, arguments=["--devices", "eth0"])
    write(agent, *net.pods[:3])
    with agent, Probe(net.from_outside) as outside, Probe(net.pods[3].place) as pod:
        assert names(outside, NODE_IPS[0], 30080) == ALL
        assert names(pod, known.WEB[0], timeout_s=0.3) == set(), "its device was not named"


# --- manifests


def test_half_written_manifest_changes_nothing(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.on_node) as probe:
        whole = (agent.manifests / "objects.json").read_text()
        with (agent.manifests / "objects.json").open("w") as file:
            file.write(whole[: len(whole) // 2])
            file.flush()
            eventually(lambda: "objects.json" in agent.output(), "the agent to say which file is broken")
            assert names(probe, known.WEB[0]) == ALL, "the last good version stays"
            file.write(whole[len(whole) // 2 :].replace("10.244.0.13", "10.244.0.12"))
        eventually(lambda: names(probe, known.WEB[0]) == {"pod1", "pod2"}, "the whole file to be read")


def test_wrong_object_does_no_harm_to_others(net: Topology, agent: Agent) -> None:
    bad = service("bad", {"port": 99999}, ips=["10.96.0.99"])
    agent.write(
        bad, service("good", {"port": 81, "targetPort": 8081}, ips=known.NODE_PORT[:1]), file="more.json"
    )
    agent.write(endpoint_slice("good", [net.pods[0].v4], 8081), file="slice.yaml")
    with agent, Probe(net.on_node) as probe:
        assert names(probe, known.NODE_PORT[0], 81) == {"pod1"}
        assert names(probe, known.WEB[0]) == ALL
        output = agent.output()
        assert "more.json" in output
        assert "spec.ports[0].port" in output


def test_agent_restarts_on_a_half_written_manifest(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.on_node) as probe:
        copies = agent.state_dir / "last-good"
        # Not the hidden file that becomes the copy.
        eventually(lambda: any(copies.glob("[!.]*")), "the last good copy")
        agent.kill()
        text = (agent.manifests / "objects.json").read_text()
        (agent.manifests / "objects.json").write_text(text[:100])
        agent.start()
        eventually(lambda: "objects.json" in agent.output(), "the agent to say which file is broken")
        assert names(probe, known.WEB[0]) == ALL, "the last good copy is used"


def test_deleted_manifest_removes_its_services(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.on_node) as probe:
        (agent.manifests / "objects.json").unlink()
        eventually(lambda: not names(probe, known.WEB[0]), "the Service to be gone")
        eventually(lambda: agent.rows("services") == [], "no Service in the maps")


def test_changes_are_followed_one_after_the_other(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.on_node) as probe:
        for count in (1, 3, 2, 3, 1):
            write(agent, *net.pods[:count])
            expected = {pod.name for pod in net.pods[:count]}
            eventually(partial(is_served_by, probe, known.WEB[0], 80, expected), f"{count} backends")


def test_allocated_addresses_survive_a_restart(net: Topology, agent: Agent) -> None:
    def chosen() -> dict[str, list[str]]:
        return {
            row["name"]: row["frontends"] for row in agent.rows("services", "given") if row["family"] == 4
        }

    agent.write(
        service("given", known.HTTP, type="NodePort"),
        *known.slices("given", net.pods[:1], known.TO_HTTP),
        file="given.json",
    )
    with agent:
        before = chosen()
        cluster_ip, node_port = before["default/given:http"]
        assert cluster_ip.startswith("10.96.")
        assert 30000 <= int(node_port.removeprefix("*:")) <= 32767
        with Probe(net.on_node) as probe:
            assert names(probe, cluster_ip.partition(":")[0]) == {"pod1"}
        agent.write(service("earlier", known.HTTP, type="NodePort"), file="a-new-one.json")
        agent.restart()
        assert chosen() == before


def test_sighup_reads_the_configuration_again(net: Topology, agent: Agent) -> None:
    with agent:
        assert {row["scheduler"] for row in agent.rows("services")} == {"rr"}
        assert agent.config_file
        agent.config_file.write_text(agent.config_file.read_text().replace('"rr"', '"maglev"'))
        agent.reload()
        eventually(
            lambda: {row["scheduler"] for row in agent.rows("services")} == {"maglev"}, "the new scheduler"
        )
        agent.config_file.write_text("mode: [")
        agent.reload()
        assert {row["scheduler"] for row in agent.rows("services")} == {"maglev"}, (
            "a broken file changes nothing"
        )
        assert "config.yaml" in agent.output()


def test_once_ends_after_the_first_sync(net: Topology) -> None:
    agent = Agent(net, config=known.CONFIG, arguments=["--once"])
    write(agent, *net.pods[:3])
    with Probe(net.on_node) as probe:
        agent.start(wait=False)
        assert agent.process.wait() == 0, agent.output()
        assert names(probe, known.WEB[0]) == ALL
    agent.stop()


# --- limits


def test_full_map_is_named_and_what_works_goes_on(net: Topology) -> None:
    config = known.CONFIG | {"ebpfproxy": {**known.CONFIG["ebpfproxy"], "mapSizes": {"services": 40}}}
    agent = Agent(net, config=config)
    write(agent, *net.pods[:3])
    with agent, Probe(net.on_node) as probe:
        assert names(probe, known.WEB[0]) == ALL
        agent.write(*(service(f"many-{n}", 80, ips=[f"10.96.1.{n}"]) for n in range(1, 60)), file="many.json")
        eventually(lambda: "services" in str(agent.status()["problems"]), "status to name the full map")
        problems = str(agent.status()["problems"])
        assert "40" in problems, "the limit"
        assert "mapSizes" in problems or "map-size" in problems, "the setting"
        assert names(probe, known.WEB[0]) == ALL, "what was programmed goes on working"
        (agent.manifests / "many.json").unlink()
        eventually(lambda: not agent.status()["problems"], "the problem to be over")
        agent.write(service("after", 80, ips=["10.96.2.1"]), file="after.json")
        eventually(lambda: "after" in json.dumps(agent.rows("services")), "new Services to work again")


# --- others


def test_processes_outside_the_cgroup_are_left_alone(net: Topology, agent: Agent) -> None:
    with agent, Probe(net.on_node_bare) as bare, Probe(net.on_node) as inside:
        assert names(inside, known.WEB[0]) == ALL
        with pytest.raises(OSError, match="unreachable"):
            bare.tcp(known.WEB[0], 80)
        assert agent.status()["verdicts"]["new"] == 9, "the nine of the one inside"


def test_services_of_two_agents_do_not_mix(nothing_left: None) -> None:
    """Two nodes in one kernel: each with its own cgroup, bpffs and namespace."""
    from rig.topology import Topology

    with Topology(pod_count=1) as one, Topology(pod_count=1) as two:
        agents = [Agent(net, config=known.CONFIG) for net in (one, two)]
        for agent, net in zip(agents, (one, two), strict=True):
            agent.write(
                service("web", known.HTTP, ips=known.WEB),
                *known.slices("web", net.pods, known.TO_HTTP),
            )
        with (
            name_servers([("first", one.pods[0].place)], 8080),
            name_servers([("second", two.pods[0].place)], 8080),
            agents[0],
            agents[1],
            Probe(one.on_node) as first,
            Probe(two.on_node) as second,
        ):
            assert set(first.tcp(known.WEB[0], 80, 3)) == {"first"}
            assert set(second.tcp(known.WEB[0], 80, 3)) == {"second"}


def test_local_traffic_is_known_by_the_devices_it_comes_through(net: Topology) -> None:
    """Mode InterfaceNamePrefix: pods behind such devices are inside, those that come later, too."""
    local = {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "pod"}}
    agent = Agent(net, config=known.CONFIG | local)
    # No endpoint is on this node: traffic from outside is dropped, that of pods goes anywhere.
    agent.write(
        service("far", known.HTTP, ips=known.WEB, externalIPs=known.EXTERNAL, externalTrafficPolicy="Local"),
        *known.slices("far", net.pods[:1], known.TO_HTTP, nodes=["node-2"]),
    )
    with agent, Probe(net.pods[3].place) as inside, Probe(net.from_outside) as outside:
        for address in known.EXTERNAL:
            assert names(inside, address) == {"pod1"}
            assert names(outside, address, timeout_s=1) == set()
        with Probe(net.add_pod().place) as late:
            for address in known.EXTERNAL:
                eventually(partial(is_served_by, late, address, 80, {"pod1"}), "the new pod to be inside")
