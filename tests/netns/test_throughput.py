"""iperf3 through VIPs: large segments, with and without offloads. What is tested is that all data arrives."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from rig.agent import Agent
from rig.objects import service
from rig.servers import iperf3_server
from rig.topology import NODE_IPS, Topology, offloads

from . import catalogue as known

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.netns]

FEATURES = ("tx", "tso", "gso", "gro")
PORTS = (
    {"name": "tcp", "port": 5201, "nodePort": 30201},
    {"name": "udp", "port": 5201, "nodePort": 30201, "protocol": "UDP"},
)
TARGETS = {"cluster IP": (known.WEB, 5201), "NodePort": (NODE_IPS, 30201)}


@pytest.fixture(scope="module", params=["on", "off"], ids=lambda state: f"offloads-{state}")
def net(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[Topology]:
    with ExitStack() as stack:
        made = stack.enter_context(Topology(pod_count=2))
        server, client = made.pods
        for place, devices in [
            (server.place, ["eth0"]),
            (client.place, ["eth0"]),
            (made.from_outside, ["eth0"]),
            (made.on_node_bare, ["eth0", server.device, client.device]),
        ]:
            for device in devices:
                offloads(place, device, request.param, FEATURES)
        stack.enter_context(iperf3_server(server.place))
        agent = Agent(made, config=known.CONFIG)
        agent.write(
            service("iperf3", *PORTS, ips=known.WEB, type="NodePort"),
            *known.slices("iperf3", [server], *PORTS),
        )
        stack.enter_context(agent)
        yield made


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("transport", ["tcp", "tcp-reverse", "udp"])
@pytest.mark.parametrize(
    ("origin", "target"),
    [("node", "cluster IP"), ("pod", "cluster IP"), ("outside", "NodePort")],
)
def test_all_data_arrives(net: Topology, origin: str, target: str, transport: str, family: int) -> None:
    place = {"node": net.on_node, "pod": net.pods[1].place, "outside": net.from_outside}[origin]
    vips, port = TARGETS[target]
    options = {
        "tcp": ["--bytes", "8M"],
        "tcp-reverse": ["--bytes", "8M", "--reverse"],
        # So few that all fit into the receiver's buffer, however late it is given a processor.
        "udp": ["--udp", "--bytes", "60K", "--bitrate", "20M", "--length", "1200"],
    }[transport]
    report = json.loads(place.run("iperf3", "-c", vips[family], "-p", str(port), "--json", *options).stdout)
    if transport == "udp":
        assert report["end"]["sum"]["packets"] >= 50
        assert report["end"]["sum"]["lost_packets"] == 0
    else:
        # The sender stops once it has sent all; what is on its way then is not counted any more.
        assert report["end"]["sum_sent"]["bytes"] >= 8 * 1024 * 1024
        assert report["end"]["sum_received"]["bytes"] >= 1024 * 1024
