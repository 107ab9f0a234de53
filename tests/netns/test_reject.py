"""What real clients see of a connection that nobody serves: refused at once, by packets that it made."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest
from scapy.layers.inet import (
    ICMP,
    IP,
    TCP,
    UDP,
    IPerror,
    IPOption_NOP,
    IPOption_RR,
    in4_pseudoheader,
)
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    IPerror6,
    IPv6,
    IPv6ExtHdrDestOpt,
    PadN,
    in6_pseudoheader,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet, Raw, raw
from scapy.utils import checksum

from ebpfproxy.dataplane.capabilities import limit
from rig.agent import Agent
from rig.objects import service
from rig.probe import Probe
from rig.servers import name_servers
from rig.topology import GATEWAYS, NODE_IPS, OUTSIDE_IPS, Topology, offloads

from . import catalogue as known
from .dataplanes import MODES, skip_limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.probe import RemoteSocket
    from rig.process import Place

pytestmark = [pytest.mark.root, pytest.mark.netns]

FAMILIES = (socket.AF_INET, socket.AF_INET6)
FEATURES = ("tx", "tso", "gso", "gro")
SCTP_PORT = {"port": 132, "protocol": "SCTP", "name": "sctp"}
#: A SYN is sent again after 1 s (RFC 6298 2.1): what is refused earlier was refused at once.
AT_ONCE_S = 0.9


class Setup(NamedTuple):
    """How the programs are attached, and who leaves checksums to the device."""

    attach: str
    clients: str
    node: str
    mode: str = "bpf"

    def __str__(self) -> str:
        how = self.attach if self.mode == "bpf" else self.mode
        return f"{how}, offloads {self.clients} at clients, {self.node} at the node"


SETUPS = [
    Setup("tcx", "on", "on"),
    # A client's unfinished checksum comes in, the answer's checksum is verified.
    Setup("tcx", "on", "off"),
    Setup("tcx", "off", "off"),
    Setup("clsact", "on", "on"),
    Setup("clsact", "on", "off"),
    *(Setup("auto", "on", "on", mode) for mode in MODES if mode != "bpf"),
]


class Node(NamedTuple):
    setup: Setup
    net: Topology
    agent: Agent
    probes: dict[str, Probe]


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def node(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[Node]:
    setup: Setup = request.param
    with ExitStack() as stack:
        net = stack.enter_context(Topology(pod_count=2))
        server, client = net.pods
        for place in (client.place, net.from_outside):
            offloads(place, "eth0", setup.clients, FEATURES)
        for device in ("eth0", client.device):
            offloads(net.on_node_bare, device, setup.node, FEATURES)
        agent = Agent(net, mode=setup.mode, config=known.CONFIG, attach=setup.attach)
        agent.write(
            service("web", known.HTTP, known.UDP, ips=known.WEB, externalIPs=list(known.EXTERNAL)),
            *known.slices("web", [server], known.TO_HTTP, known.TO_UDP),
            service("empty", known.HTTP, known.UDP, SCTP_PORT, ips=known.EMPTY),
            service(
                "remote-only", known.HTTP, known.UDP, ips=known.REMOTE_ONLY, internalTrafficPolicy="Local"
            ),
            *known.slices("remote-only", [server], known.TO_HTTP, known.TO_UDP, nodes=["node-2"]),
        )
        stack.enter_context(agent)
        stack.enter_context(name_servers([("pod1", server.place)], 8080))
        places = {"outside": net.from_outside, "pod": client.place}
        yield Node(
            setup, net, agent, {name: stack.enter_context(Probe(place)) for name, place in places.items()}
        )


class Target(NamedTuple):
    what: str
    vips: tuple[str, str]
    port: int
    feature: str = "reject"


TARGETS = [
    Target("no endpoints", known.EMPTY, 80),
    Target("unused port of a cluster IP", known.WEB, 9999, "reject-unused"),
    Target("unused port of an external IP", known.EXTERNAL, 9999, "reject-unused"),
]


@pytest.fixture(
    params=[
        pytest.param((target, origin, family), id=f"{target.what}-{origin}-v{'46'[family]}")
        for target in TARGETS
        for origin in ("outside", "pod")
        for family in (0, 1)
    ]
)
def case(request: pytest.FixtureRequest, node: Node) -> tuple[Probe, str, int, int]:
    """A client, a VIP, a port, and whether it is IPv6."""
    target, origin, family = request.param
    skip_limits(node.setup.mode, target.feature)
    return node.probes[origin], target.vips[family], target.port, family


def test_tcp(case: tuple[Probe, str, int, int]) -> None:
    probe, vip, port, family = case
    with (
        probe.impatient(AT_ONCE_S),
        probe.socket(socket.SOCK_STREAM, FAMILIES[family]) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect(vip, port)


@pytest.mark.parametrize("length", [0, 1, 1400])
def test_connected_udp(case: tuple[Probe, str, int, int], length: int) -> None:
    probe, vip, port, family = case
    with (
        probe.impatient(AT_ONCE_S),
        probe.socket(socket.SOCK_DGRAM, FAMILIES[family]) as client,
    ):
        client.connect(vip, port)
        client.send(bytes(length))
        with pytest.raises(ConnectionRefusedError):
            client.recv()


def test_curl(case: tuple[Probe, str, int, int]) -> None:
    """Exit status 7: could not connect; 28 is a timeout."""
    probe, vip, port, family = case
    url = f"http://[{vip}]:{port}/" if family else f"http://{vip}:{port}/"
    assert probe.place.run("curl", "-sS", "--max-time", "5", url, check=False).returncode == 7


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize("origin", ["outside", "pod"])
def test_sctp(node: Node, origin: str, family: int) -> None:
    """Port unreachable with the packet in it; raw sockets, as the test kernel may have no SCTP."""
    skip_limits(node.setup.mode, "sctp")
    probe, vip = node.probes[origin], known.EMPTY[family]
    senders = {vip}
    if limit(node.setup.mode, "error-source"):
        senders = {NODE_IPS[family], GATEWAYS[family]}
    init = SCTPChunkInit(init_tag=7, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1)
    packet = bytes(SCTP(sport=5000, dport=132) / init)
    icmp = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)[family]
    with (
        probe.impatient(AT_ONCE_S),
        probe.socket(socket.SOCK_RAW, FAMILIES[family], proto=socket.IPPROTO_SCTP) as client,
        probe.socket(socket.SOCK_RAW, FAMILIES[family], proto=icmp) as errors,
    ):
        client.sendto(packet, vip, 0)
        while True:
            data, (sender, _) = errors.recvfrom()
            if sender in senders:  # not a neighbour's
                break
    if family:
        error, quoted = ICMPv6DestUnreach(data), IPerror6
        assert (error.type, error.code) == (1, 4)
    else:
        error, quoted = ICMP(data[20:]), IPerror
        assert (error.type, error.code) == (3, 3)
    assert error[quoted].dst == vip
    assert bytes(error[quoted].payload) == packet


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_policy_local_without_local_backend_stays_silent(
    node: Node, family: int, kind: socket.SocketKind
) -> None:
    probe = node.probes["pod"]
    vip = known.REMOTE_ONLY[family]
    with probe.impatient(0.5), pytest.raises(TimeoutError):
        probe.tcp(vip, 80) if kind is socket.SOCK_STREAM else probe.udp(vip, 80, connect=True)


def test_services_with_backends_are_not_touched(node: Node) -> None:
    assert node.probes["pod"].tcp(known.WEB[0], 80) == {"pod1": 1}


def only_bpf(node: Node) -> None:
    if node.setup.mode != "bpf":
        pytest.skip("answers that the kernel makes, not our programs")


def test_counted(node: Node) -> None:
    only_bpf(node)
    for port in (80, 9999):
        with node.probes["pod"].impatient(AT_ONCE_S), pytest.raises(ConnectionRefusedError):
            node.probes["pod"].tcp(known.EMPTY[0], port)
    counts = node.agent.status()["verdicts"]
    assert counts["reject-empty"] > 0
    assert counts["reject-unused"] > 0
    assert (counts["rewrite-failed"], counts["reject-limited"]) == (0, 0)


# --- frames: what the kernel thinks of their checksums, and VLAN tags

SOL_PACKET, PACKET_AUXDATA, PACKET_VNET_HDR = 263, 8, 15  # linux/if_packet.h
ETH_P_ALL = 3
NEEDS_CSUM = 1  # linux/virtio_net.h
VNET_HEADER = struct.Struct("<BBHHHH")  # flags, GSO type, header length, GSO size, checksum start and offset
AUXDATA = struct.Struct("=IIIHHHH")  # status, length, captured, L2 and L3 offset, TCI, TPID
HAS_TAG = 1 << 4  # TP_STATUS_VLAN_VALID
CHECKSUM_AT = {TCP: 16, UDP: 6}
EXTENSION = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])

#: Tags, outermost first, and headers between IP and L4 for IPv4 and IPv6.
FRAMES = [
    pytest.param([], IP(), IPv6(), id="plain"),
    pytest.param([], IP(options=[IPOption_RR(routers=["0.0.0.0"] * 9)]), IPv6() / EXTENSION, id="options"),
    pytest.param([(0x8100, 7)], IP(), IPv6(), id="tag"),
    pytest.param([(0x8100, 7)], IP(options=[IPOption_NOP()]), IPv6() / EXTENSION, id="tag and options"),
    pytest.param([(0x88A8, 9)], IP(), IPv6(), id="service tag"),
]  # fmt: skip


def mac(place: Place, device: str) -> str:
    """Return the MAC address of a device."""
    address: str = json.loads(place.run("ip", "-j", "link", "show", device).stdout)[0]["address"]
    return address


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
@pytest.mark.parametrize(
    "header",
    [TCP(sport=5000, dport=80, seq=8, flags="S"), UDP(sport=5000, dport=80) / Raw(b"hello")],
    ids=["tcp", "udp"],
)
@pytest.mark.parametrize(("tags", "ip4", "ip6"), FRAMES)
def test_frame(
    node: Node,
    tags: list[tuple[int, int]],
    ip4: Packet,
    ip6: Packet,
    header: Packet,
    family: int,
    is_finished: bool,
) -> None:
    """An answer's checksums are made, whatever was left to the device in the packet that it is made of."""
    only_bpf(node)
    layer, protocol = (IP, IPv6)[family], type(header)
    ether = Ether(src=mac(node.net.from_outside, "eth0"), dst=mac(node.net.on_node_bare, "eth0"))
    ip = (ip4, ip6)[family].copy()
    ip.src, ip.dst = OUTSIDE_IPS[family], known.EMPTY[family]
    l2 = ether.copy()
    for _, vlan in tags:
        l2 = l2 / Dot1Q(vlan=vlan)
    frame = Ether(raw(l2 / ip / header))
    if tags:
        frame.type = tags[0][0]
    vnet = [0, 0, 0, 0, 0, 0]
    quoted = raw(frame[layer])
    if not is_finished:
        # The sum of the pseudo header is there already, all else is the device's work.
        size = len(frame[protocol])
        pseudo = (
            in6_pseudoheader({TCP: 6, UDP: 17}[protocol], frame[IPv6], size)
            if family
            else in4_pseudoheader(frame[IP].proto, frame[IP], size)
        )
        frame[protocol].chksum = ~checksum(raw(pseudo)) & 0xFFFF
        vnet = [NEEDS_CSUM, 0, 0, 0, len(frame) - size, CHECKSUM_AT[protocol]]
    if node.setup.clients == "on":  # else the client's kernel has done it
        quoted = raw(frame[layer])
    if protocol is TCP:
        answer = reply(family) / TCP(sport=80, dport=5000, flags="RA", ack=9, window=0)
    elif family:
        answer = reply(family) / ICMPv6DestUnreach(code=4) / Raw(quoted)
    else:
        answer = reply(family, tos=0xC0) / ICMP(type=3, code=3) / Raw(quoted)
    with node.probes["outside"].socket(
        *(socket.SOCK_RAW, socket.AF_PACKET),
        bind=("eth0", ETH_P_ALL),
        options=[(SOL_PACKET, PACKET_VNET_HDR, 1), (SOL_PACKET, PACKET_AUXDATA, 1)],
    ) as link:
        link.send(VNET_HEADER.pack(*vnet) + raw(frame))
        state, got, tag = received(link, known.EMPTY[family])
    assert got == raw(Ether(src=ether.dst, dst=ether.src) / answer)
    assert tag == (tags[0] if tags else None)
    assert not state & NEEDS_CSUM


def reply(family: int, **fields: int) -> Packet:
    """Return the IP header of an answer of the empty Service to the outside client."""
    if family:
        return IPv6(src=known.EMPTY[1], dst=OUTSIDE_IPS[1], hlim=64)
    return IP(src=known.EMPTY[0], dst=OUTSIDE_IPS[0], ttl=64, id=0, flags="DF", **fields)


def received(link: RemoteSocket, sender: str) -> tuple[int, bytes, tuple[int, int] | None]:
    """Return the next frame from ``sender``: its checksum flags, itself without tag, its tag."""
    while True:
        data, ancillary = link.recvmsg()
        flags, *_ = VNET_HEADER.unpack_from(data)
        got = data[VNET_HEADER.size :]
        frame = Ether(got)
        if any(frame.haslayer(layer) and frame[layer].src == sender for layer in (IP, IPv6)):
            ((_, _, auxdata),) = ancillary
            status, _, _, _, _, tci, tpid = AUXDATA.unpack(auxdata)
            return flags, got, (tpid, tci) if status & HAS_TAG else None
