"""A recorded conversation, replayed through a VIP.

data/conversations.pcap is what tcpdump saw between two hosts without any balancing: curl and an HTTP server,
dig and dnsmasq, over IPv4 and IPv6, checksum offload off. So the truth about packets "as the backend must see
them" is the recording itself, with all the options, timestamps and checksums that real stacks make.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import raw
from scapy.utils import PcapReader, PcapWriter

from packets.node import V4, V6, Backend, translated

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scapy.packet import Packet

    from packets.node import Node

pytestmark = pytest.mark.root

RECORDING = Path(__file__).with_name("data") / "conversations.pcap"
#: Ports of VIPs for the ports of the recorded servers.
PORTS = {8080: 80, 5353: 53}


def write(path: Path, packets: Iterable[Packet]) -> bytes:
    """Write a pcap file; return its bytes."""
    with PcapWriter(str(path), linktype=1) as file:
        for packet in packets:
            file.write(packet)
    return path.read_bytes()


def test_replay(node: Node, tmp_path: Path) -> None:
    for family in (V4, V6):
        for proto, port in (("TCP", 8080), ("UDP", 5353)):
            backend = Backend(family.backends[0], port)
            node.service(family.vip, PORTS[port], [backend], proto=proto)
    with PcapReader(str(RECORDING)) as file:
        recording = list(file)
    assert len(recording) > 40

    expected, found, verdicts = [], [], []
    for packet in recording:
        family = V4 if IP in packet else V6
        is_request = packet[IP if IP in packet else IPv6].src == family.client
        l4 = packet[TCP if TCP in packet else UDP]
        if is_request:
            sent = Ether(translated(packet, dst=family.vip, dport=PORTS[l4.dport]))
            expected.append(packet)
            outcome = node.ingress(sent)
        else:
            expected.append(Ether(translated(packet, src=family.vip, sport=PORTS[l4.sport])))
            outcome = node.egress(packet)
        assert outcome.packet is not None
        outcome.packet.time = expected[-1].time = packet.time
        found.append(outcome.packet)
        opens = TCP not in packet or packet[TCP].flags == "S"
        verdicts.append((outcome.verdict, "REPLY" if not is_request else "NEW" if opens else "ESTABLISHED"))

    for number, (got, wanted) in enumerate(zip(found, expected, strict=True), 1):
        assert raw(got) == raw(wanted), f"packet {number}: {wanted.summary()}"
    assert write(tmp_path / "found.pcap", found) == write(tmp_path / "expected.pcap", expected)
    assert [got for got, _ in verdicts] == [wanted for _, wanted in verdicts]
