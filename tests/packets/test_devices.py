"""Devices that hand over packets without an Ethernet header: real forwarding through a tun device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, raw

from packets.node import V4, V6, Backend

if TYPE_CHECKING:
    from packets.node import Family, Node
    from rig.kernel import Netns

pytestmark = pytest.mark.root

CHILD = Path(__file__).with_name("tun_child.py")
ROOT = Path(__file__).resolve().parents[2]

#: Clients whose address stands where Ethernet has its type and says IPv4, or IPv6: bytes 12 and 13.
CLIENTS = [
    pytest.param(V4, "192.0.2.7", id="IPv4"),
    pytest.param(V4, "8.0.2.7", id="IPv4 source like an Ethernet type"),
    pytest.param(V6, "2001:db8:1::7", id="IPv6"),
    pytest.param(V6, "2001:db8:86dd::7", id="IPv6 source like an Ethernet type"),
]


@pytest.mark.parametrize(("family", "client"), CLIENTS)
def test_no_ethernet_header(node: Node, netns: Netns, bpffs: Path, family: Family, client: str) -> None:
    backend = family.backends[0]
    node.service(family.vip, 53, [Backend(backend, 5353)], proto="UDP")
    for name in ("tc_ingress", "tc_egress"):
        node.loaded.programs[name].pin(bpffs / name)

    def packet(src: str, sport: int, dst: str, dport: int, hops: int) -> Packet:
        fields = {"ttl": hops, "id": 7} if family is V4 else {"hlim": hops}
        return family.layer(src=src, dst=dst, **fields) / UDP(sport=sport, dport=dport) / b"payload!"

    steps = [
        (packet(client, 4000, family.vip, 53, 64), packet(client, 4000, backend, 5353, 63)),
        (packet(backend, 5353, client, 4000, 64), packet(family.vip, 53, client, 4000, 63)),
    ]
    before = node.verdicts()
    bits = 32 if family is V4 else 128
    result = netns.place().run(
        sys.executable,
        CHILD,
        bpffs / "tc_ingress",
        bpffs / "tc_egress",
        f"{backend}/{bits}",
        f"{client}/{bits}",
        text="".join(f"{raw(sent).hex()}\n" for sent, _ in steps),
        env={"PYTHONPATH": str(ROOT)},
        timeout_s=300,  # an emulated processor takes a minute to import it the first time
    )
    layer = IP if family is V4 else IPv6
    arrived = [raw(layer(bytes.fromhex(line))) for line in result.stdout.splitlines()]
    assert arrived == [raw(wanted) for _, wanted in steps]
    after = node.verdicts()
    assert {name: after[name] - before[name] for name in ("NEW", "REPLY")} == {"NEW": 1, "REPLY": 1}
