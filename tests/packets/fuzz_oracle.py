"""What the programs may do with a packet, for the fuzz tests: bytes and RFCs, no code of the programs.

It learns translations from what leaves: a request that goes to a backend tells how answers have to look.
Of a flow whose first packet did not leave (no hop left, too large, for the kernel to do) it asks the maps,
and checks the answer as it would check the packet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.libbpf import lib
from packets.node import NODE_PORTS, SNAT_PORTS
from packets.wire import (
    CHECK_AT,
    ERRORS,
    ICMP,
    ICMP_SIZE,
    SCTP,
    TCP,
    UDP,
    Flow,
    Wire,
    header_residual,
    l4_residual,
    ones_sum,
    pseudo_sum,
    read,
    sctp_residual,
)

if TYPE_CHECKING:
    from collections.abc import Callable

IP_IN_IP = {4: 4, 6: 41}
ECHO_REPLY = {4: 0, 6: 129}


class Target(NamedTuple):
    """Where a frontend leads."""

    address: bytes
    port: int
    does: str  # pass | send | tunnel
    only_from: frozenset[bytes] | None = None


@dataclass
class Oracle:
    """Judges packets, one after another."""

    frontends: dict[tuple[int, bytes, int], Target | None]  # (protocol, address, port); None: no backend
    vips: set[bytes]
    nodes: set[bytes]
    tunnel_ends: set[bytes]
    recall: Callable[[Flow, int], Flow | None]  # what the maps say of a flow in one direction (enum flow_dir)
    #: An answer's flow, and what it may look like to its receiver.
    answers: dict[Flow, set[Flow]] = field(default_factory=lambda: defaultdict(set))
    shown: set[Flow] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.backends = {each.address for each in self.frontends.values() if each}

    def judge(self, program: str, frame: bytes, does: str, out: bytes) -> None:
        """Assert that this is right."""
        if out == frame:
            self.seen["unchanged"] += 1
            if does == "pass":
                return
        wire = read(frame)
        assert wire is not None, "what is no IP packet was touched"
        assert self._is_ours(program, frame, wire), "what matches no Service was touched"
        if does == "drop":
            self.seen["drop"] += 1
            return
        assert out != frame, "sent on as it was"
        kind = self._kind(program, frame, wire, does, out)
        self.seen[kind] += 1

    # ---- what may be touched ----

    def _is_ours(self, program: str, frame: bytes, wire: Wire) -> bool:
        source, destination = wire.addresses
        if program == "tc_egress":
            if wire.flow:
                return self._knows_answer(wire.flow)
            if wire.next == ICMP[wire.version]:
                return self._is_known_error(frame, wire)
            return source in self.backends and wire.offset > 0
        if destination in self.vips:
            return True
        if wire.next == IP_IN_IP[wire.version]:
            return destination in self.tunnel_ends and not wire.is_fragment
        if destination not in self.nodes:
            return False
        if wire.next == ICMP[wire.version]:
            return self._is_known_error(frame, wire)
        if wire.flow is None:
            return wire.offset > 0  # of a first fragment that was
        return (
            self._target(wire.flow) is not False
            or self._knows_answer(wire.flow)
            or NODE_PORTS[0] <= wire.flow.dport <= NODE_PORTS[1]
        )

    def _target(self, flow: Flow) -> Target | bool | None:
        return self.frontends.get((flow.proto, flow.dst, flow.dport), False)

    def _is_known_error(self, frame: bytes, wire: Wire) -> bool:
        quote = self._quote(frame, wire)
        if quote is None or quote.flow is None or quote.addresses[0] != wire.addresses[1]:
            return False
        return self._knows_answer(quote.flow.turned()) or self._knows_shown(quote.flow)

    def _knows_answer(self, flow: Flow) -> bool:
        if flow not in self.answers and (shown := self.recall(flow, lib.FLOW_REPLY)):
            self._learn(shown.turned(), flow.turned())
        return flow in self.answers

    def _is_shown_as(self, answer: Flow, shown: Flow) -> bool:
        if shown in self.answers.get(answer, ()):
            return True
        recalled = self.recall(answer, lib.FLOW_REPLY)
        if recalled == shown:
            self._learn(shown.turned(), answer.turned())
        return recalled == shown

    def _knows_shown(self, flow: Flow) -> bool:
        if flow not in self.shown and (got := self.recall(flow.turned(), lib.FLOW_FORWARD)):
            self._learn(flow.turned(), got)
        return flow in self.shown

    def _learn(self, flow: Flow, got: Flow) -> None:
        is_translated = (got.src, got.sport) != (flow.src, flow.sport)
        self._request(flow, "send" if is_translated else "pass", got)

    def _quote(self, frame: bytes, wire: Wire) -> Wire | None:
        if wire.is_fragment or len(frame) <= wire.l4 or frame[wire.l4] not in ERRORS[wire.version]:
            return None
        return read(frame, wire.l4 + ICMP_SIZE)

    # ---- what it may become ----

    def _kind(self, program: str, frame: bytes, wire: Wire, does: str, out: bytes) -> str:
        if does == "send" and self._is_tunnelled(frame, wire, out):
            return "tunnel"
        got = read(out)
        assert got is not None
        if wire.next == IP_IN_IP[wire.version]:
            assert program != "tc_egress"
            taken_out = frame[: wire.l3] + frame[wire.l4 :]
            inner = read(taken_out)
            assert inner is not None
            assert inner.addresses[1] in self.vips | self.nodes
            if inner.next == ICMP[inner.version]:
                self._error(taken_out, inner, does, out, got)
            else:
                self._translated(program, taken_out, inner, does, out, got)
            return "taken out"
        # RFC 1122 3.2.2: no error about an error.
        is_error = wire.next == ICMP[wire.version] and frame[wire.l4] in ERRORS[wire.version]
        if does == "send" and not is_error and self._is_answer(frame, wire, out, got):
            return "answer"
        if wire.next == ICMP[wire.version]:
            self._error(frame, wire, does, out, got)
            return "error"
        return self._translated(program, frame, wire, does, out, got)

    def _is_answer(self, frame: bytes, wire: Wire, out: bytes, got: Wire) -> bool:
        """To the sender: RST or ICMP error, whole and right; or an echo reply as right as the request."""
        source, destination = wire.addresses
        if got.addresses != (destination, source) or got.addresses[0] not in self.vips | self.nodes:
            return False
        if got.next == TCP:
            if not (wire.flow and got.flow == wire.flow.turned() and out[got.l4 + 13] & 4):
                return False
        elif got.next != ICMP[got.version]:
            return False
        if got.next == wire.next == ICMP[got.version] and out[got.l4] == ECHO_REPLY[got.version]:
            assert (len(out), got.end) == (len(frame), wire.end)
            assert header_residual(out, got) == header_residual(frame, wire)
            assert l4_residual(out, got) == l4_residual(frame, wire)
            return True
        assert got.end == len(out), "an answer's length"
        assert header_residual(out, got) == 0
        assert l4_residual(out, got) == 0
        return True

    def _is_tunnelled(self, frame: bytes, wire: Wire, out: bytes) -> bool:
        """The packet as it was in another one, one hop less (RFC 2003 3.1, RFC 2473)."""
        got = read(out)
        if got is None or got.next != IP_IN_IP[wire.version] or wire.next == got.next:
            return False
        assert got.addresses[0] in self.nodes
        assert got.addresses[1] in self.backends
        assert header_residual(out, got) == 0
        inner = out[:12] + frame[12 : wire.l3] + out[got.l4 :]
        assert got.end - got.l4 == wire.end - wire.l3, "lengths of outer and inner packet"
        if wire.flow:
            target = self._target(wire.flow)
            assert isinstance(target, Target)
            assert (target.does, target.address) == ("tunnel", got.addresses[1])
        self._same_but(frame, inner, wire, set())
        self._one_hop_less(frame, inner, wire)
        return True

    def _translated(self, program: str, frame: bytes, wire: Wire, does: str, out: bytes, got: Wire) -> str:
        assert (got.version, got.l3, got.l4, got.end) == (wire.version, wire.l3, wire.l4, wire.end)
        assert (got.next, got.offset) == (wire.next, wire.offset)
        self._same_but(frame, out, wire, {"addresses", "ports", "check"})
        if does == "send":
            self._one_hop_less(frame, out, wire)
        else:
            assert hops(out, wire) == hops(frame, wire)
            assert out[:12] == frame[:12]
        self._same_residuals(frame, wire, out, got)
        if wire.flow is None or got.flow is None:
            assert wire.offset > 0, "only a later fragment has no ports"
            known = self.backends | self.vips | self.nodes
            assert set(got.addresses) & known
            return "later"
        if self._is_shown_as(wire.flow, got.flow):
            return "reply"
        assert program != "tc_egress"
        self._request(wire.flow, does, got.flow)
        return "request"

    def _request(self, flow: Flow, does: str, got: Flow) -> None:
        target = self._target(flow)
        assert isinstance(target, Target), "no Service"
        assert (got.dst, got.dport) == (target.address, target.port)
        if (got.src, got.sport) != (flow.src, flow.sport) or does == "send":
            assert got.src in self.nodes
            assert got.proto == SCTP or SNAT_PORTS[0] <= got.sport <= SNAT_PORTS[1]
        if target.only_from is not None:
            assert flow.src in target.only_from
        self.answers[got.turned()].add(flow.turned())
        self.shown.add(flow.turned())

    def _error(self, frame: bytes, wire: Wire, does: str, out: bytes, got: Wire) -> None:
        """RFC 5508: outside and inside are translated alike."""
        before, after = self._quote(frame, wire), self._quote(out, got)
        assert before is not None
        assert after is not None
        assert (got.l3, got.l4, got.end) == (wire.l3, wire.l4, wire.end)
        assert before.flow is not None
        assert after.flow is not None
        assert after.addresses[0] == got.addresses[1]
        assert self._is_shown_as(before.flow.turned(), after.flow.turned()) or self._is_shown_as(
            after.flow, before.flow
        ), "an error about no flow"
        assert header_residual(out, got) == header_residual(frame, wire)
        assert l4_residual(out, got) == l4_residual(frame, wire)
        assert header_residual(out, after) == header_residual(frame, before)
        self._same_residuals(frame[: wire.end], before, out[: wire.end], after, is_quote=True)
        if does == "send":
            self._one_hop_less(frame, out, wire)
        else:
            assert hops(out, wire) == hops(frame, wire)
        masked = [mask(each, quote, wire.end) for each, quote in ((frame, before), (out, after))]
        for each in masked:
            each[wire.l4 + 2 : wire.l4 + 4] = bytes(2)
            blank_header(each, wire)
        assert masked[0] == masked[1], "more than addresses, ports and checksums changed"

    # ---- the rules of each field ----

    def _same_but(self, frame: bytes, out: bytes, wire: Wire, may: set[str]) -> None:
        assert len(out) == len(frame)
        masked = [bytearray(frame), bytearray(out)]
        for each in masked:
            if may:
                each[:] = mask(each, wire)
            blank_header(each, wire, addresses=bool(may))
        assert masked[0] == masked[1], "more than addresses, ports, checksums and hops changed"

    def _one_hop_less(self, frame: bytes, out: bytes, wire: Wire) -> None:
        assert hops(frame, wire) > 1
        assert hops(out, wire) == hops(frame, wire) - 1
        if wire.version == 4:
            assert ones_sum(out[wire.l3 : wire.l4]) == ones_sum(frame[wire.l3 : wire.l4])

    def _same_residuals(
        self, frame: bytes, wire: Wire, out: bytes, got: Wire, *, is_quote: bool = False
    ) -> None:
        assert header_residual(out, got) == header_residual(frame, wire)
        at = CHECK_AT.get(wire.next)
        if at is None or wire.offset:
            return
        if wire.next == SCTP:
            written = frame[wire.l4 + 8 : wire.l4 + 12], out[wire.l4 + 8 : wire.l4 + 12]
            if is_quote or written[0] == bytes(4):
                assert written[0] == written[1]
            elif wire.end <= len(frame) and not wire.is_fragment:
                assert sctp_residual(out, got) == sctp_residual(frame, wire)
            return
        check = frame[wire.l4 + at : wire.l4 + at + 2]
        if len(check) < 2 or (is_quote and wire.next == TCP and len(frame) < wire.l4 + 18):
            return
        if wire.next == UDP and check == bytes(2):
            assert out[wire.l4 + at : wire.l4 + at + 2] == bytes(2), "RFC 768: no checksum stays none"
            return
        span = min(max(wire.end, wire.l4 + at + 2), len(frame))
        residuals = [
            (pseudo_sum(parsed) + ones_sum(each[parsed.l4 : span])) % 0xFFFF
            for each, parsed in ((frame, wire), (out, got))
        ]
        assert residuals[0] == residuals[1], "the checksum does not follow"


def hops(frame: bytes, wire: Wire) -> int:
    """Return TTL or hop limit."""
    return frame[wire.l3 + (8 if wire.version == 4 else 7)]


def mask(frame: bytes | bytearray, wire: Wire, end: int | None = None) -> bytearray:
    """Return the frame without what translation changes up to ``end``: addresses, ports, checksums."""
    copy = bytearray(frame)
    blank_header(copy, wire, hops_too=False)
    if wire.offset == 0 and wire.next in CHECK_AT:
        copy[wire.l4 : wire.l4 + 4] = bytes(4)
        at, size = wire.l4 + CHECK_AT[wire.next], 4 if wire.next == SCTP else 2
        if at + size <= (len(copy) if end is None else end):
            copy[at : at + size] = bytes(size)
    return copy


def blank_header(frame: bytearray, wire: Wire, *, addresses: bool = True, hops_too: bool = True) -> None:
    """Clear the IP header's hops, checksum and addresses, and the MAC addresses."""
    frame[:12] = bytes(12)
    if hops_too:
        frame[wire.l3 + (8 if wire.version == 4 else 7)] = 0
    if wire.version == 4:
        frame[wire.l3 + 10 : wire.l3 + 12] = bytes(2)
        if addresses:
            frame[wire.l3 + 12 : wire.l3 + 20] = bytes(8)
    elif addresses:
        frame[wire.l3 + 8 : wire.l3 + 40] = bytes(32)
