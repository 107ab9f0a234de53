"""SCTP through the node, packet by packet: raw sockets at both ends, as the test kernel may have no SCTP."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkInitAck

from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.topology import NODE_IPS, OUTSIDE_IPS

from . import catalogue as known
from .dataplanes import skip_limits

if TYPE_CHECKING:
    from rig.probe import RemoteSocket
    from rig.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.netns]

IPV4_HEADER = 20
CLIENT_PORT, PORT, NODE_PORT, TARGET_PORT = 5000, 132, 30132, 8132
SERVICE_PORT = {"port": PORT, "targetPort": TARGET_PORT, "nodePort": NODE_PORT, "protocol": "SCTP"}


def received(raw: RemoteSocket, family: int) -> tuple[bytes, str]:
    """Return the next SCTP packet and who it comes from."""
    data, (sender, _) = raw.recvfrom()
    return (data if family else data[IPV4_HEADER:]), sender


@pytest.mark.parametrize("target", ["cluster IP", "NodePort"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_association_is_translated_with_its_checksum(
    net: Topology, mode: str, family: int, target: str
) -> None:
    skip_limits(mode, "sctp", *(["client-address"] if target == "NodePort" else []))
    vip, port = {"cluster IP": (known.WEB[family], PORT), "NodePort": (NODE_IPS[family], NODE_PORT)}[target]
    pod, inside_client = net.pods[0], net.pods[3]
    # One whose address is kept: a cluster IP's outside clients get the node's, as clusterCIDR is set.
    place, address = (
        (inside_client.place, inside_client.ips[family])
        if target == "cluster IP"
        else (net.from_outside, OUTSIDE_IPS[family])
    )
    agent = Agent(net, mode=mode, config=known.CONFIG)
    agent.write(
        service("sctp", SERVICE_PORT, ips=known.WEB, type="NodePort"),
        *known.slices("sctp", [pod], {"port": TARGET_PORT, "protocol": "SCTP"}),
    )
    kind = (socket.AF_INET, socket.AF_INET6)[family]
    with (
        agent,
        Probe(place) as probe,
        Probe(pod.place) as inside,
        probe.socket(socket.SOCK_RAW, kind, proto=socket.IPPROTO_SCTP) as client,
        inside.socket(socket.SOCK_RAW, kind, proto=socket.IPPROTO_SCTP) as server,
    ):
        # RFC 9260 3.3.2, 3.3.3; scapy writes the CRC32c.
        init = SCTPChunkInit(init_tag=7, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1)
        client.sendto(bytes(SCTP(sport=CLIENT_PORT, dport=port, tag=0) / init), vip, 0)
        assert received(server, family) == (
            bytes(SCTP(sport=CLIENT_PORT, dport=TARGET_PORT, tag=0) / init),
            address,
        )
        answer = SCTPChunkInitAck(init_tag=9, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1)
        server.sendto(bytes(SCTP(sport=TARGET_PORT, dport=CLIENT_PORT, tag=7) / answer), address, 0)
        assert received(client, family) == (bytes(SCTP(sport=port, dport=CLIENT_PORT, tag=7) / answer), vip)
        if mode != "bpf":
            return
        rows = agent.rows("services", "sctp")
        assert {row["protocol"] for row in rows} == {"SCTP"}
        assert sum(row["connections"] for row in rows) == 1
