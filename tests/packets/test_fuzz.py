"""Packets that nobody would send, and those that everybody does: a million, through all three programs.

Each run prints its seed; EBPFPROXY_FUZZ_SEED repeats it, EBPFPROXY_FUZZ_PACKETS says how many packets in
all. What a program may do with a packet is fuzz_oracle.py's to say.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import random
import secrets
import socket
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit, SCTPChunkInitAck
from scapy.packet import Packet, Raw, raw

from ebpfproxy.libbpf import ffi, lib
from packets.fuzz_oracle import Oracle, Target
from packets.loading import load
from packets.node import (
    PROTOCOLS,
    TC_ACT_REDIRECT,
    TC_ACT_SHOT,
    TC_ACT_UNSPEC,
    V4,
    V6,
    Backend,
    Family,
    Node,
    finished,
    frame,
    number,
    packed,
    struct_of,
    to_bytes,
)
from packets.path import (
    OTHER_NODE,
    ROUTER,
    XDP_DROP,
    XDP_PASS,
    XDP_TX,
    arriving,
    know_reply_hops,
    way,
)
from packets.wire import Flow, mend, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebpfproxy.loader import Loaded
    from rig import kernel

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

SEED = int(os.environ.get("EBPFPROXY_FUZZ_SEED", secrets.randbits(32)))
PACKETS = int(os.environ.get("EBPFPROXY_FUZZ_PACKETS", "1000000"))
PARTS = 8
#: So that no flow is pushed out: its twin would be alone until the next packet.
SIZES = {"conntrack": 1 << 17, "new_flows": 1 << 18, "fragments": 1 << 16}
XDP_REDIRECT = 4
ACTIONS = {
    "xdp_lb": {XDP_PASS: "pass", XDP_DROP: "drop", XDP_TX: "send", XDP_REDIRECT: "send"},
    "tc_ingress": {TC_ACT_UNSPEC: "pass", TC_ACT_SHOT: "drop", TC_ACT_REDIRECT: "send"},
    "tc_egress": {TC_ACT_UNSPEC: "pass", TC_ACT_SHOT: "drop", TC_ACT_REDIRECT: "send"},
}
#: An Ethernet header and one byte: the kernel runs nothing on less.
SHORTEST = 15
SHORTEST_IP = {b"\x08\x00": 14 + 20, b"\x86\xdd": 14 + 40}
STRANGER = {4: "198.51.100.200", 6: "2001:db8:9::9"}
CLIENT_PORTS = (40000, 40001, 61005)
#: Each frontend has a backend port of its own: no two flows meet at one backend.
#: name: VIP's field, port, protocols, whose backend, how.
FRONTENDS: dict[str, tuple[str, int, tuple[str, ...], int, str]] = {
    "here": ("vip", 80, ("TCP", "UDP", "SCTP"), 0, "pass"),
    "elsewhere": ("other_vip", 80, ("TCP", "UDP", "SCTP"), 1, "send"),
    "direct": ("other_vip", 81, ("TCP", "UDP"), 2, "tunnel"),
    "direct, here": ("other_vip", 82, ("TCP", "UDP", "SCTP"), 0, "taken out"),
    "guarded": ("other_vip", 83, ("TCP", "UDP"), 0, "guarded"),
    "none": ("other_vip", 84, ("TCP", "UDP", "SCTP"), 0, "reject"),
    "none, Local": ("other_vip", 85, ("TCP", "UDP"), 0, "drop"),
    "node port": ("node", 30080, ("TCP", "UDP"), 0, "pass"),
    "node port, elsewhere": ("node", 30081, ("TCP", "UDP"), 1, "send"),
}
FLAGS = {
    "send": lib.SERVICE_SNAT,
    "tunnel": lib.SERVICE_DSR,
    "taken out": lib.SERVICE_DSR,
    "guarded": lib.SERVICE_SOURCE_RANGES,
    "drop": lib.SERVICE_DROP_EMPTY,
}


@pytest.fixture(scope="module")
def programs(host: kernel.Netns) -> Iterator[Loaded]:
    """The programs, with maps that hold every flow."""
    with load("libbpf", host, SIZES) as loaded:
        yield loaded


def address(text: str) -> bytes:
    """Return an address as packets have it."""
    whole = packed(text)
    return whole[12:] if whole.startswith(bytes(10) + b"\xff\xff") else whole


def recall(node: Node, flow: Flow, direction: int) -> Flow | None:
    """Return what the maps say that a packet becomes."""
    key = struct_of(
        "flow_key",
        src=text(flow.src),
        dst=text(flow.dst),
        sport=flow.sport,
        dport=flow.dport,
        proto=flow.proto,
        dir=direction,
    )
    for name in ("conntrack", "new_flows"):
        value = node.map(name).get(to_bytes(key))
        if value is not None:
            found = ffi.from_buffer("struct flow *", value)
            src, dst = (
                bytes(ffi.buffer(ffi.addressof(found, each)))[-len(flow.src) :] for each in ("src", "dst")
            )
            return Flow(flow.proto, src, socket.ntohs(found.sport), dst, socket.ntohs(found.dport))
    return None


def fill(node: Node) -> Oracle:
    """Write every kind of Service; return who knows them."""
    known: dict[tuple[int, bytes, int], Target | None] = {}
    backend_port = 8080
    for family in (V4, V6):
        for vip, port, protocols, which, does in FRONTENDS.values():
            for proto in protocols:
                backend_port += 1
                is_node_port = vip == "node"
                has_backend = does not in {"reject", "drop"}
                is_here = does in {"pass", "taken out", "guarded"}
                flags = lib.BACKEND_LOCAL if is_here else 0
                target = family.backends[which]
                made = node.service(
                    family.any if is_node_port else getattr(family, vip),
                    port,
                    [Backend(target, backend_port, flags=flags)] if has_backend else [],
                    proto=proto,
                    kind=lib.VIP_NODE if is_node_port else lib.VIP_LOAD_BALANCER,
                    flags=FLAGS.get(does, 0),
                )
                if has_backend and not is_here:
                    way(node, made.backends[0], family)
                if does == "taken out":
                    key = struct_of("dsr_backend_key", address=target, service=made.id)
                    node.map("dsr_backends").update(to_bytes(key), number(made.backends[0]))
                if does == "guarded":
                    node.source_range(made, f"{family.client}/{32 if family is V4 else 128}")
                only = frozenset([address(family.client)]) if does == "guarded" else None
                known[PROTOCOLS[proto], address(getattr(family, vip)), port] = (
                    Target(address(target), backend_port, does, only) if has_backend else None
                )
        for vip, kinds in (
            (family.vip, lib.VIP_LOAD_BALANCER | lib.VIP_PINGABLE),
            (family.other_vip, lib.VIP_LOAD_BALANCER),
            (family.node, lib.VIP_NODE | lib.VIP_LOCAL | lib.VIP_SNAT),
        ):
            node.vip(vip, kinds)
        node.local_source(family.pods)
    both = (V4, V6)
    return Oracle(
        known,
        vips={address(vip) for each in both for vip in (each.vip, each.other_vip)},
        nodes={address(each.node) for each in both},
        recall=functools.partial(recall, node),
        tunnel_ends={address(each.backends[0]) for each in both},
    )


class Runner:
    """Runs frames and has each judged."""

    def __init__(self, node: Node, oracle: Oracle, label: str) -> None:
        self.oracle, self.label, self.count = oracle, label, 0
        self._run = {name: node.loaded.programs[name].run for name in ACTIONS}

    def __call__(self, program: str, data: bytes) -> bytes:
        self.count += 1
        # Newer kernels make no skb of less than an IP header: XDP sees those.
        if len(data) < SHORTEST_IP.get(data[12:14], 0):
            program = "xdp_lb"
        result = self._run[program](data)
        try:
            does = ACTIONS[program][result.retval]
            self.oracle.judge(program, data, does, result.data)
        except (AssertionError, KeyError) as err:
            err.add_note(
                f"{self.label}: packet {self.count} through {program}, which returned {result.retval}\n"
                f"in:  {data.hex()}\nout: {result.data.hex()}"
            )
            raise
        return result.data


# ---- well-formed packets ----


def header(proto: str, sport: int, dport: int, flags: str = "S", chunk: Packet | None = None) -> Packet:
    if proto == "SCTP":
        return SCTP(sport=sport, dport=dport, tag=1) / (chunk or SCTPChunkInit(init_tag=1))
    return TCP(sport=sport, dport=dport, flags=flags) if proto == "TCP" else UDP(sport=sport, dport=dport)


def requests(family: Family) -> Iterator[tuple[str, Packet]]:
    """Yield openings and what follows, from everybody to every frontend and to strangers."""
    clients = (family.client, family.other_client, family.pod, family.backends[0], STRANGER[family.version])
    targets = [
        (getattr(family, vip), port, proto)
        for vip, port, protocols, _, _ in FRONTENDS.values()
        for proto in protocols
    ]
    targets += [
        (there, port, proto)
        for there, port in (
            (family.vip, 7),
            (family.node, 22),
            (family.node, 61005),
            (STRANGER[family.version], 80),
        )
        for proto in PROTOCOLS
    ]
    for there, port, proto in targets:
        for client in clients:
            for sport in CLIENT_PORTS if client == family.client else CLIENT_PORTS[:1]:
                is_whole = proto == "TCP" and client == family.client and sport == CLIENT_PORTS[0]
                for flags in ("S", "A", "PA", "FA", "R") if is_whole else ("S",):
                    chunk = SCTPChunkData(data=b"1234") if sport % 2 and proto == "SCTP" else None
                    l4 = header(proto, sport, port, flags, chunk)
                    payload = b"" if proto == "SCTP" else b"some payload"
                    yield "request", finished(frame(family, l4, client, there, payload))


def shaped(family: Family) -> Iterator[tuple[str, Packet]]:
    """Yield requests in unusual shapes: tags, extension headers, options, fragments, tunnels, echo."""
    for vip, port, protocols, _, _ in FRONTENDS.values():
        there = getattr(family, vip)
        for proto in protocols:
            whole = frame(family, header(proto, 40000, port), family.client, there, b"x" * 64)
            ip = finished(whole)[family.layer]
            outer = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
            yield "request", finished(outer / Dot1Q(vlan=5) / ip)
            yield "request", finished(outer / Dot1Q(vlan=5, type=0x8100) / Dot1Q(vlan=6) / ip)
            yield "tunnel", arriving(family, ip)
            yield "tunnel", arriving(family, arriving(family, ip)[family.layer])
            if family is V4:
                for offset, flags, l4 in (
                    (0, "MF", ip.payload),
                    (3, "MF", Raw(b"z" * 24)),
                    (5, 0, Raw(b"y" * 20)),
                ):
                    yield (
                        "request",
                        outer
                        / IP(src=ip.src, dst=ip.dst, id=port, proto=ip.proto, frag=offset, flags=flags)
                        / raw(l4),
                    )
                yield (
                    "request",
                    finished(outer / IP(src=ip.src, dst=ip.dst, options=[b"\x01\x01\x01\x00"]) / ip.payload),
                )
                continue
            for offset, more, l4 in (
                (0, 1, ip.payload),
                (3, 1, Raw(b"z" * 24)),
                (5, 0, Raw(b"y" * 20)),
                (0, 0, ip.payload),
            ):
                fragment = IPv6ExtHdrFragment(id=port, offset=offset, m=more, nh=ip.nh)
                yield "request", outer / IPv6(src=ip.src, dst=ip.dst) / fragment / raw(l4)
            chain: Packet = IPv6(src=ip.src, dst=ip.dst)
            for extension in (
                IPv6ExtHdrHopByHop,
                IPv6ExtHdrDestOpt,
                IPv6ExtHdrRouting,
                *[IPv6ExtHdrDestOpt] * 5,
            ):
                chain = chain / (extension(segleft=0) if extension is IPv6ExtHdrRouting else extension())
                yield "request", finished(outer / chain / ip.payload)
    for there in (family.vip, family.other_vip, family.node, STRANGER[family.version]):
        echo = ICMP() if family is V4 else ICMPv6EchoRequest()
        yield "request", frame(family, echo, family.client, there, b"ping")


@functools.cache
def common() -> tuple[tuple[str, bytes], ...]:
    """Return what every part begins with."""
    return tuple(
        (kind, raw(each)) for family in (V4, V6) for make in (requests, shaped) for kind, each in make(family)
    )


def errors(
    family: Family, there: str, quoted: Packet, reporters: tuple[str, ...], chosen: random.Random
) -> Iterator[Packet]:
    """Yield ICMP errors about a packet, and errors about errors."""
    kinds = (
        (ICMP(type=3, code=4, nexthopmtu=1300), ICMP(type=11), ICMP(type=12), ICMP(type=3, code=3))
        if family is V4
        else (
            ICMPv6PacketTooBig(mtu=1300),
            ICMPv6TimeExceeded(),
            ICMPv6ParamProblem(),
            ICMPv6DestUnreach(code=4),
        )
    )
    for reporter in reporters:
        kind = chosen.choice(kinds)
        for size in (28 if family is V4 else 48, 200):
            yield frame(family, kind, reporter, there, raw(quoted)[:size])
        # As if an error had caused it.
        inside = family.layer(src=there, dst=reporter) / kind / Raw(raw(quoted)[:48])
        yield frame(family, kind, reporter, there, raw(inside))


def text(packed_address: bytes) -> str:
    return str(ipaddress.ip_address(packed_address))


def l4_name(proto: int) -> str:
    return next(name for name, value in PROTOCOLS.items() if value == proto)


def answers(oracle: Oracle, chosen: random.Random) -> Iterator[tuple[str, Packet]]:
    """Yield what backends, clients and routers say about flows that are there."""
    flows = sorted(oracle.answers.items())
    for got, shown in chosen.sample(flows, min(len(flows), 40)):
        family = V4 if len(got.src) == 4 else V6
        name = l4_name(got.proto)
        seen: Flow = min(shown)
        kind = "node" if got.dst in oracle.nodes else "reply"
        for flags in ("SA", "A", "FA") if name == "TCP" else ("",):
            said = header(
                name, got.sport, got.dport, flags, SCTPChunkInitAck(init_tag=2) if got.sport % 2 else None
            )
            payload = b"" if name == "SCTP" else b"answer!"
            yield kind, finished(frame(family, said, text(got.src), text(got.dst), payload))
        # About the request as the backend's side saw it, and about the answer as the client did.
        asked = header(name, got.dport, got.sport, "A")
        asked = finished(
            frame(family, asked, text(got.dst), text(got.src), b"" if name == "SCTP" else b"x" * 99)
        )
        for each in errors(
            family, text(got.dst), asked[family.layer], (text(got.src), ROUTER[family.version]), chosen
        ):
            yield kind, each
        told = header(name, seen.sport, seen.dport, "A")
        told = finished(
            frame(family, told, text(seen.src), text(seen.dst), b"" if name == "SCTP" else b"x" * 99)
        )
        for each in errors(
            family, text(seen.src), told[family.layer], (text(seen.dst), ROUTER[family.version]), chosen
        ):
            yield "request", each


# ---- what is done to them ----


class Mutator:
    """Makes packets that nobody would send."""

    def __init__(self, chosen: random.Random) -> None:
        self._random = chosen
        self._addresses = {
            each.version: [
                address(one)
                for one in (
                    each.client, each.other_client, each.pod, each.vip, each.other_vip, each.node,
                    *each.backends, STRANGER[each.version], OTHER_NODE[each.version],
                )
            ]
            for each in (V4, V6)
        }  # fmt: skip
        self._kinds = [
            self._flip, self._flip, self._cut, self._grow, self._length, self._next, self._hops,
            self._fragment, self._address, self._port, self._insert, self._noise, self._zero_check,
            self._nest,
        ]  # fmt: skip

    def __call__(self, data: bytes) -> bytes:
        made = bytearray(data)
        for _ in range(self._random.choice((0, 1, 1, 1, 2, 3))):
            self._random.choice(self._kinds)(made)
        if self._random.random() < 0.5:
            mend(made)
        return bytes(made[:2000]).ljust(SHORTEST, b"\0")

    def _flip(self, made: bytearray) -> None:
        reach = min(len(made), self._random.choice((34, 60, 90, 2000)))
        if reach > 12:
            made[self._random.randrange(12, reach)] = self._random.randrange(256)

    def _cut(self, made: bytearray) -> None:
        del made[self._random.randrange(SHORTEST, max(len(made), SHORTEST + 1)) :]

    def _grow(self, made: bytearray) -> None:
        made += self._random.randbytes(self._random.choice((1, 6, 46, 700)))

    def _noise(self, made: bytearray) -> None:
        if self._random.random() < 0.2:
            at = self._random.choice((12, 14, 34, 54))
            made[at:] = self._random.randbytes(self._random.randrange(1, 120))

    def _at(self, made: bytearray, offset: int, value: bytes) -> None:
        if len(made) >= 14 + offset + len(value):
            made[14 + offset : 14 + offset + len(value)] = value

    def _is_v4(self, made: bytearray) -> bool:
        return len(made) > 14 and made[14] >> 4 == 4

    def _length(self, made: bytearray) -> None:
        wire = read(made)
        whole = len(made) - 14 - (0 if self._is_v4(made) else 40)
        value = self._random.choice((0, 1, 19, 20, 27, 28, 40, whole - 1, whole, whole + 1, whole + 8, 65535))
        kind = self._random.randrange(3)
        if kind == 0 and self._is_v4(made):
            made[14] = 0x40 | self._random.randrange(16)
        elif kind == 1 and wire and wire.next == 17 and len(made) >= wire.l4 + 6:
            made[wire.l4 + 4 : wire.l4 + 6] = (value & 0xFFFF).to_bytes(2, "big")
        else:
            self._at(made, 2 if self._is_v4(made) else 4, (value & 0xFFFF).to_bytes(2, "big"))

    def _next(self, made: bytearray) -> None:
        value = self._random.choice((0, 1, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 132, 135, 139, 140))
        self._at(made, 9 if self._is_v4(made) else 6, bytes([value]))

    def _hops(self, made: bytearray) -> None:
        self._at(made, 8 if self._is_v4(made) else 7, bytes([self._random.choice((0, 1, 2, 255))]))

    def _fragment(self, made: bytearray) -> None:
        field = self._random.choice((0x2000, 0x2001, 1, 2, 3, 0x4000, 0x1FFF, 0x2003))
        if self._is_v4(made):
            self._at(made, 6, field.to_bytes(2, "big"))
        elif len(made) > 54:
            self._put_extension(made, 44, bytes([made[20], 0, field & 0xFF, field >> 8, 0, 0, 0, 7]))

    def _put_extension(self, made: bytearray, kind: int, header_bytes: bytes) -> None:
        made[54:54] = header_bytes
        made[20] = kind
        size = int.from_bytes(made[18:20], "big") + len(header_bytes)
        made[18:20] = (size & 0xFFFF).to_bytes(2, "big")

    def _address(self, made: bytearray) -> None:
        is_v4 = self._is_v4(made)
        value = self._random.choice(self._addresses[4 if is_v4 else 6])
        start = (12, 16) if is_v4 else (8, 24)
        self._at(made, self._random.choice(start), value)

    def _port(self, made: bytearray) -> None:
        wire = read(made)
        if wire and len(made) >= wire.l4 + 4:
            value = self._random.choice((7, 80, 81, 82, 83, 84, 8085, 30080, 30081, 40000, 40001, 61005))
            at = wire.l4 + self._random.choice((0, 2))
            made[at : at + 2] = value.to_bytes(2, "big")

    def _zero_check(self, made: bytearray) -> None:
        wire = read(made)
        at = wire.l4 + self._random.choice((2, 6, 8, 16)) if wire else 0
        if wire and len(made) >= at + 2:
            made[at : at + 2] = self._random.choice((b"\0\0", b"\xff\xff"))

    def _insert(self, made: bytearray) -> None:
        if len(made) < 60:
            return
        if self._random.random() < 0.3:
            made[12:12] = self._random.choice((b"\x81\x00\x00\x05", b"\x88\xa8\x00\x05"))
        elif self._is_v4(made) and made[14] & 15 < 14:
            made[34:34] = self._random.choice(
                (b"\x01\x01\x01\x00", b"\x83\x03\x04\x00", self._random.randbytes(4))
            )
            made[14] += 1
            size = int.from_bytes(made[16:18], "big") + 4
            made[16:18] = (size & 0xFFFF).to_bytes(2, "big")
        elif made[14] >> 4 == 6:
            for _ in range(self._random.randrange(1, 9)):
                kind = self._random.choice((0, 43, 60, 60, 135, 139, 140))
                length = self._random.choice((0, 0, 0, 1, 255))
                body = bytes(6 + 8 * length if length < 2 else 6)
                self._put_extension(made, kind, bytes([made[20], length]) + body)

    def _nest(self, made: bytearray) -> None:
        """Quote it in an error, or tunnel it."""
        is_v4 = self._is_v4(made)
        if len(made) < 54 or made[14] >> 4 not in (4, 6):
            return
        inner, version = bytes(made[14:]), 4 if is_v4 else 6
        proto = self._random.choice((1, 4) if is_v4 else (58, 41))
        kind = self._random.choice((3, 11, 12) if is_v4 else (1, 2, 3, 4))
        body = (bytes([kind, 4, 0, 0, 0, 0, 5, 20]) if proto in (1, 58) else b"") + inner
        start, size = (12, 4) if is_v4 else (8, 16)
        source = self._random.choice(self._addresses[version])
        target = (
            inner[start : start + size]
            if body is not inner and self._random.random() < 0.7
            else (self._random.choice(self._addresses[version]))
        )
        if is_v4:
            outer = (
                bytes([0x45, 0]) + (20 + len(body)).to_bytes(2, "big") + bytes([0, 1, 0, 0, 64, proto, 0, 0])
            )
        else:
            outer = b"\x60\0\0\0" + (len(body) & 0xFFFF).to_bytes(2, "big") + bytes([proto, 64])
        made[14:] = outer + source + target + body


PROGRAMS = {
    "request": ("tc_ingress", "tc_ingress", "tc_ingress", "xdp_lb", "xdp_lb", "tc_egress"),
    "tunnel": ("tc_ingress", "xdp_lb"),
    "node": ("tc_ingress", "tc_ingress", "xdp_lb", "tc_egress"),
    "reply": ("tc_egress", "tc_egress", "tc_egress", "tc_ingress", "xdp_lb"),
}


def check_twins(node: Node) -> None:
    """Both entries of each flow, or none; one of what is encapsulated."""
    flows = node.flows()
    for key_bytes, flow in flows.items():
        if flow.flags & lib.FLOW_DSR:
            continue
        key = ffi.from_buffer("struct flow_key *", key_bytes)
        twin_key = ffi.new("struct flow_key *")
        ffi.memmove(ffi.addressof(twin_key, "src"), ffi.addressof(flow, "dst"), 16)
        ffi.memmove(ffi.addressof(twin_key, "dst"), ffi.addressof(flow, "src"), 16)
        twin_key.sport, twin_key.dport = flow.dport, flow.sport
        twin_key.proto = key.proto
        twin_key.dir = lib.FLOW_REPLY if key.dir == lib.FLOW_FORWARD else lib.FLOW_FORWARD
        twin = flows.get(to_bytes(twin_key))
        assert twin is not None, "an entry without its twin"
        # struct addr is cffi's: compared as bytes.
        got = [bytes(ffi.buffer(ffi.addressof(twin, each))) for each in ("src", "dst", "sport", "dport")]
        want = [bytes(ffi.buffer(ffi.addressof(key, each))) for each in ("dst", "src", "dport", "sport")]
        assert got == want
        assert (twin.service, twin.backend, twin.flags) == (flow.service, flow.backend, flow.flags)


@pytest.mark.parametrize("part", range(PARTS))
def test_what_matches_no_service_is_left_alone_and_the_rest_is_right(programs: Loaded, part: int) -> None:
    seed = f"{SEED}/{part}"
    print(f"EBPFPROXY_FUZZ_SEED={SEED}, part {part}")
    chosen = random.Random(seed)
    node = Node(programs)
    oracle = fill(node)
    run = Runner(node, oracle, f"EBPFPROXY_FUZZ_SEED={SEED}, part {part}")
    corpus = list(common())
    for kind, data in chosen.sample(corpus, len(corpus)):
        run("xdp_lb" if kind == "request" and chosen.random() < 0.3 else "tc_ingress", data)
    know_reply_hops(node)
    corpus += [(kind, raw(each)) for kind, each in answers(oracle, chosen)]
    mutate = Mutator(chosen)
    for _ in range(PACKETS // PARTS):
        kind, data = chosen.choice(corpus)
        if run.count % 5000 == 0:
            node.reject_from(0)
            know_reply_hops(node)
        run(chosen.choice(PROGRAMS[kind]), mutate(data))
    check_twins(node)
    print(dict(oracle.seen))
    if PACKETS >= 100_000:
        assert {
            "unchanged",
            "drop",
            "answer",
            "error",
            "tunnel",
            "taken out",
            "later",
            "reply",
            "request",
        } <= set(oracle.seen)
