"""The way of a packet through several nodes: who sees it first, next hops, the tunnel between two nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet, Raw, raw

from ebpfproxy.libbpf import ffi, lib
from packets.node import (
    CLIENT_PORT,
    PORT,
    TC_ACT_REDIRECT,
    TC_ACT_SHOT,
    TC_ACT_UNSPEC,
    Backend,
    Family,
    Node,
    Service,
    finished,
    frame,
    number,
    struct_of,
    to_bytes,
)

#: This node's MAC address, and that of whoever is next.
HERE_MAC, THERE_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
#: Actions of XDP programs, linux/bpf.h.
XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3
MTU = 1500
OTHER_NODE = {4: "203.0.113.99", 6: "2001:db8:5::99"}
ROUTER = {4: "198.51.100.77", 6: "2001:db8:7::77"}


class Result(NamedTuple):
    """What a program did."""

    verdict: str  # "" = XDP left it to tc
    does: str  # pass | drop | send
    frame: Packet


class Driver:
    """Runs frames through one of the two programs that see them first."""

    def __init__(self, node: Node, program: str) -> None:
        self.node, self.program = node, program

    @property
    def is_xdp(self) -> bool:
        return self.program == "xdp_lb"

    def __call__(self, packet: Packet) -> Result:
        before = self.node.verdicts()
        result = self.node.loaded.programs[self.program].run(bytes(packet))
        after = self.node.verdicts()
        counted = [name for name, count in after.items() for _ in range(count - before[name])]
        assert len(counted) <= 1
        assert counted or self.is_xdp
        actions = {
            True: {XDP_PASS: "pass", XDP_DROP: "drop", XDP_TX: "send"},
            False: {TC_ACT_UNSPEC: "pass", TC_ACT_SHOT: "drop", TC_ACT_REDIRECT: "send"},
        }
        return Result("".join(counted), actions[self.is_xdp][result.retval], Ether(result.data))


def l4(proto: str, flags: str = "S") -> Packet:
    match proto:
        case "TCP":
            return TCP(sport=CLIENT_PORT, dport=PORT, flags=flags)
        case "UDP":
            return UDP(sport=CLIENT_PORT, dport=PORT)
        case _:
            return SCTP(sport=CLIENT_PORT, dport=PORT) / SCTPChunkInit(init_tag=1)


def request_to(family: Family, proto: str = "TCP", dst: str = "", flags: str = "S") -> Packet:
    """Return a packet of the client, as it leaves its last router."""
    payload = b"" if proto == "SCTP" else b"hello"
    return finished(frame(family, l4(proto, flags), family.client, dst or family.vip, payload))


def way(node: Node, backend: int, family: Family, *, mtu: int = MTU, kind: int = lib.HOP_FORWARD) -> None:
    """Let the next hop to a backend be known, out of the device that the packet came through."""
    value = struct_of("backend_hop", source=family.node)
    _known(value.hop, mtu, kind)
    node.map("backend_hops").update(number(backend), to_bytes(value))


def know_reply_hops(node: Node) -> None:
    """Let the way back to every client be known."""
    for name in ("new_flows", "conntrack"):
        for key, value in node.map(name).items():
            flow = ffi.new("struct flow *")
            ffi.memmove(flow, value, len(value))
            if ffi.from_buffer("struct flow_key *", key).dir == lib.FLOW_REPLY:
                _known(flow.hop, MTU, lib.HOP_FORWARD)
                node.map(name).update(key, to_bytes(flow))


def _known(hop: Any, mtu: int, kind: int) -> None:
    """Fill in a next hop that is known for ever, out of the device that the packet came through."""
    hop.device, hop.mtu, hop.kind, hop.until = 1, mtu, kind, 2**31 - 1
    for name, mac in (("to_mac", THERE_MAC), ("from_mac", HERE_MAC)):
        ffi.memmove(getattr(hop, name), bytes.fromhex(mac.replace(":", "")), 6)


def entry_node(node: Node, family: Family, proto: str = "TCP", **options: Any) -> Service:
    """Make the node one that has none of the backends."""
    made = node.service(
        family.vip,
        PORT,
        family.backends[:1],
        proto=proto,
        kind=lib.VIP_LOAD_BALANCER,
        flags=lib.SERVICE_DSR,
        **options,
    )
    way(node, made.backends[0], family)
    return made


def backend_node(node: Node, family: Family, proto: str = "TCP", **options: Any) -> Service:
    """Make the node the one that has the backend."""
    options = {"vip": family.vip, "port": PORT, "kind": lib.VIP_LOAD_BALANCER} | options
    flags = options.pop("flags", 0)
    local = Backend(family.backends[0], flags=lib.BACKEND_LOCAL)
    made = node.service(backends=[local], proto=proto, flags=flags | lib.SERVICE_DSR, **options)
    key = struct_of("dsr_backend_key", address=family.backends[0], service=made.id)
    node.map("dsr_backends").update(to_bytes(key), number(made.backends[0]))
    return made


def remote(node: Node, family: Family, proto: str = "TCP", **options: int) -> Service:
    """Make a Service whose one backend is on another node, and its next hop known."""
    flags = options.pop("flags", lib.SERVICE_SNAT)
    made = node.service(
        family.vip, PORT, family.backends[:1], proto=proto, kind=lib.VIP_LOAD_BALANCER, flags=flags
    )
    node.vip(family.node, lib.VIP_LOCAL | lib.VIP_SNAT)
    way(node, made.backends[0], family, **options)
    return made


def hops(packet: Packet, change: int) -> Packet:
    """Return the IP packet with another TTL."""
    copy = packet.copy()
    name = "ttl" if IP in copy else "hlim"
    setattr(copy, name, getattr(copy, name) + change)
    if IP in copy:
        copy[IP].delfieldval("chksum")
    return copy


def encapsulated(family: Family, inner: Packet, src: str = "", label: int = 0, **fields: Any) -> Packet:
    """Return an IP packet in another one, as RFC 2003 or RFC 2473 has it."""
    src = src or family.node
    inside = Raw(raw(inner))
    if family.version == 4:
        layer = IP(src=src, dst=family.backends[0], proto=4, ttl=64, id=0, flags="DF", tos=inner.tos)
    else:
        layer = IPv6(src=src, dst=family.backends[0], nh=41, hlim=64, tc=inner.tc, fl=label)
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer / inside


def arriving(family: Family, inner: Packet, **fields: Any) -> Packet:
    """Return the frame that the backend's node gets."""
    src = fields.pop("src", OTHER_NODE[family.version])
    return Ether(raw(Ether(src=THERE_MAC, dst=HERE_MAC) / encapsulated(family, inner, src, **fields)))
