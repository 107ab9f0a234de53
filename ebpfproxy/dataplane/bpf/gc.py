"""Clears what the programs leave behind: expired entries, references to gone backends, drifted counters.

A pass reads conntrack, new_flows, sockets and affinity once, a bounded time at each tick. What refers to a
backend that is gone is known only at its end: then the ids that nothing refers to are free. Until then the
id stays taken, and since ids are reused round robin, as late as possible, a stale entry never means another
backend by accident (the programs compare address and port as well).
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from socket import IPPROTO_SCTP, IPPROTO_UDP
from typing import TYPE_CHECKING

from ebpfproxy.dataplane.bpf.layouts import (
    AFFINITY,
    AFFINITY_KEY,
    BACKEND,
    BACKEND_HEALTH,
    BACKEND_STATS,
    FLOW,
    FLOW_KEY,
    SERVICE_STATS,
    SOCKET_FLOW,
    SOCKET_KEY,
)
from ebpfproxy.libbpf import Map, lib
from ebpfproxy.sockdiag import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

#: A pass starts so often,
PASS_S = 30.0
#: reads so many entries in one call,
CHUNK = 4096
#: and stops for this tick after so long.
BUDGET_S = 0.02

_NS = 1_000_000_000
# What is looked at in the entries of flows: there may be a million.
_KEYS = FLOW_KEY.columns("dst", "proto", "dir")
_VALUES = FLOW.columns("state", "backend", "last_seen_ns")
_FORWARD = lib.FLOW_FORWARD
_RESET = lib.FLOW_RESET
_FIN_BOTH = lib.FLOW_FIN_FORWARD | lib.FLOW_FIN_REPLY


@dataclass(frozen=True)
class Timeouts:
    """Seconds without a packet until an entry is removed.

    Defaults are the kernel's own for connection tracking (nf_conntrack-sysctl.rst); a half-closed TCP
    connection is kept as long as kube-proxy keeps it (``conntrack.tcpCloseWaitTimeout``).
    """

    tcp_established_s: float = 432000
    tcp_close_wait_s: float = 3600
    tcp_syn_s: float = 120
    tcp_time_wait_s: float = 120
    tcp_reset_s: float = 10
    udp_s: float = 30
    udp_stream_s: float = 120
    udp_idle_s: float = 120  # an unconnected UDP socket keeps its backend so long; the programs know it too
    sctp_established_s: float = 210
    sctp_closed_s: float = 10

    def of(self, proto: int, state: int, *, is_new: bool = False) -> float:
        """Return the timeout of an entry of map conntrack, or of map new_flows.

        A question and an answer make no stream yet (nf_conntrack_proto_udp.c).
        """
        is_closed = state & lib.FLOW_RESET or state & _FIN_BOTH == _FIN_BOTH
        if proto == IPPROTO_UDP:
            return self.udp_stream_s if state & lib.FLOW_REPLIED and not is_new else self.udp_s
        if proto == IPPROTO_SCTP:
            return self.sctp_closed_s if is_closed else self.sctp_established_s
        if state & lib.FLOW_RESET:
            return self.tcp_reset_s
        if is_closed:
            return self.tcp_time_wait_s
        if state & _FIN_BOTH:
            return self.tcp_close_wait_s
        return self.tcp_established_s if state & lib.FLOW_REPLIED else self.tcp_syn_s


@dataclass(frozen=True)
class Unused:
    """What nothing refers to any more, after a whole pass, and who refers to what is gone."""

    backends: set[int]
    vips: set[bytes]
    stranded: dict[int, Peer] = field(default_factory=dict)  # connected UDP sockets by cookie


@dataclass
class _Pass:
    """The knowledge of one pass."""

    gone: set[int]  # nothing found yet that refers to them
    dead: set[int]  # gone, whether referred to or not: what leads there is deleted
    vips: set[bytes]
    affinity_s: Mapping[int, int]
    work: Iterator[None]
    open: Counter[int] = field(default_factory=Counter)
    stranded: dict[int, tuple[int, Peer]] = field(default_factory=dict)  # cookie -> backend id, peer


def is_closed(state: int) -> bool:
    """Return whether a flow in this state counts no more as open."""
    return bool(state & _RESET) or state & _FIN_BOTH == _FIN_BOTH


def _delete_unchanged(target: Map, key: bytes, value: bytes) -> bool:
    """Remove an entry if it still is what was judged, and return whether that was so.

    A new flow may have taken its place since: the process may have slept in between, and clients use ports
    again. The kernel has no compare-and-delete, so the look comes right before it.
    """
    return target.get(key) == value and target.delete(key)


class _Limits(dict[tuple[int, int], int]):
    """Timeouts of the entries of one map in nanoseconds by protocol and state, filled when asked for."""

    def __init__(self, timeouts: Timeouts, *, is_new: bool) -> None:
        super().__init__()
        self._timeouts, self._is_new = timeouts, is_new

    def __missing__(self, key: tuple[int, int]) -> int:
        self[key] = limit = int(self._timeouts.of(*key, is_new=self._is_new) * _NS)
        return limit


class Collector:
    """Walks over the maps that the programs write.

    Args:
        maps: by name; conntrack, new_flows, sockets, affinity and backend_stats are used.
        timeouts: when entries expire.
        clock_ns: the programs' clock (bpf_ktime_get_ns is CLOCK_MONOTONIC).
    """

    def __init__(
        self,
        maps: Mapping[str, Map],
        timeouts: Timeouts,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._maps = maps
        self._timeouts = timeouts
        self._limits = {
            "conntrack": _Limits(timeouts, is_new=False),
            "new_flows": _Limits(timeouts, is_new=True),
        }
        self._clock_ns = clock_ns
        self._due_s = 0.0
        self._pass: _Pass | None = None
        self._drift: dict[int, int] = {}  # backend id -> what the last pass found open beyond the counter
        self._ejected_drift: dict[int, int] = {}  # service id -> the same of backends passed over

    def hurry(self) -> None:
        """Start a pass at the next step: a UDP backend is gone."""
        self._due_s = 0.0

    def step(
        self,
        gone: AbstractSet[int],
        retired_vips: AbstractSet[bytes],
        affinity_s: Callable[[], Mapping[int, int]],
        now_s: float,
    ) -> Unused | None:
        """Work for a bounded time.

        Args:
            gone: ids of backends that are gone.
            retired_vips: addresses that serve no more.
            affinity_s: returns the affinity timeout by service id; called once a pass.
            now_s: monotonic time.

        Returns:
            At the end of a pass, what nothing refers to.
        """
        if self._pass is None:
            if now_s < self._due_s:
                return None
            self._due_s = now_s + PASS_S
            self._pass = _Pass(set(gone), set(gone), set(retired_vips), affinity_s(), iter(()))
            self._pass.work = self._walk(self._pass)
        current = self._pass
        current.gone &= gone  # one that came back is not gone
        current.dead &= gone
        current.vips &= retired_vips
        end_s = time.monotonic() + BUDGET_S
        for _ in current.work:
            if time.monotonic() >= end_s:
                return None
        self._pass = None
        self._recount(current.open)
        self._recount_ejected()
        stranded = {cookie: peer for cookie, (backend, peer) in current.stranded.items() if backend in gone}
        return Unused(current.gone, current.vips, stranded)

    def _walk(self, current: _Pass) -> Iterator[None]:
        """Read every entry once, delete what is over, and strike what is in use from the pass's sets."""
        for name in ("conntrack", "new_flows"):
            for keys, values in self._maps[name].blocks(CHUNK):
                self._visit_flows(current, name, keys, values)
                yield
        for name, visit in (("sockets", self._visit_socket), ("affinity", self._visit_affinity)):
            for chunk in self._maps[name].chunks(CHUNK):
                now_ns = self._clock_ns()
                for key, value in chunk:
                    if visit(current, key, value, now_ns):
                        _delete_unchanged(self._maps[name], key, value)
                yield

    def _keep_counts(self, key: bytes, value: bytes) -> None:
        """Add what a deleted flow had counted since it last did so itself.

        The programs add without a lock that we could take: what one adds to the same number at the same
        instant may be lost.
        """
        flow = FLOW.read(value)
        if not flow.packets:
            return
        prefix = "" if FLOW_KEY.read(key).dir == lib.FLOW_FORWARD else "reply_"
        for stats, layout, number in (
            ("backend_stats", BACKEND_STATS, flow.backend),
            ("service_stats", SERVICE_STATS, flow.service),
        ):
            memory = self._maps[stats].mmap().cast("Q")
            start = number * layout.size // 8
            if start < len(memory):
                memory[start + layout.offsets[f"{prefix}packets"] // 8] += flow.packets
                memory[start + layout.offsets[f"{prefix}octets"] // 8] += flow.octets

    def _visit_flows(self, current: _Pass, name: str, keys: memoryview, values: memoryview) -> None:
        """Judge the flows of one block; one to a dead UDP backend is no reason to keep its id."""
        limits, dead, now_ns = self._limits[name], current.dead, self._clock_ns()
        over: list[int] = []
        backends: set[int] = set()
        vips: set[bytes] = set()
        is_open: list[int] = []
        entries = zip(_KEYS(keys), _VALUES(values), strict=True)
        for number, ((dst, proto, direction), (state, backend, seen_ns)) in enumerate(entries):
            if now_ns - seen_ns > limits[proto, state] or (proto == IPPROTO_UDP and backend in dead):
                over.append(number)
                continue
            backends.add(backend)
            if direction == _FORWARD:
                vips.add(dst)
                if not is_closed(state):
                    is_open.append(backend)
        current.gone -= backends
        current.vips -= vips
        current.open.update(is_open)
        for number in over:
            key = bytes(keys[number * FLOW_KEY.size : (number + 1) * FLOW_KEY.size])
            value = bytes(values[number * FLOW.size : (number + 1) * FLOW.size])
            if _delete_unchanged(self._maps[name], key, value):
                self._keep_counts(key, value)

    def _visit_socket(self, current: _Pass, key: bytes, value: bytes, now_ns: int) -> bool:
        """Return whether a sockets entry is over; those of connected sockets end with their socket."""
        socket_key, flow = SOCKET_KEY.read(key), SOCKET_FLOW.read(value)
        if socket_key.kind != lib.SOCKET_CONNECTED:
            is_idle = now_ns - flow.last_used_ns > self._timeouts.udp_idle_s * _NS
            if is_idle or (socket_key.kind == lib.SOCKET_TO_VIP and flow.backend in current.dead):
                return True
        elif socket_key.proto == IPPROTO_UDP and flow.backend in current.dead:
            current.stranded[socket_key.cookie] = flow.backend, Peer(flow.backend_addr, flow.backend_port)
        current.gone.discard(flow.backend)
        if socket_key.kind != lib.SOCKET_FROM_BACKEND:
            current.open[flow.backend] += 1
        return False

    def _visit_affinity(self, current: _Pass, key: bytes, value: bytes, now_ns: int) -> bool:
        """Return whether an affinity entry is over."""
        entry = AFFINITY.read(value)
        timeout_s = current.affinity_s.get(AFFINITY_KEY.read(key).service, 0)
        return entry.backend in current.dead or now_ns - entry.last_used_ns > timeout_s * _NS

    def _recount_ejected(self) -> None:
        """Mend the counters of backends that are passed over: what two passes in a row found wrong alike."""
        health = self._maps["backend_health"].mmap()
        untils = health.cast("Q")[:: BACKEND_HEALTH.size // 8].tolist()
        # One whose time is over stays counted until somebody asks after it.
        ejected = [number for number, until in enumerate(untils) if until]
        stats = self._maps["service_stats"].mmap().cast("q")
        stride, column = SERVICE_STATS.size // 8, SERVICE_STATS.offsets["ejected"] // 8
        if not ejected and not any(stats[column::stride]):
            self._ejected_drift = {}
            return
        backends, size = self._maps["backends"].mmap(), BACKEND.size
        found = Counter(BACKEND.read(backends[n * size : (n + 1) * size]).service for n in ejected)
        drift = {
            number: found[number] - value
            for number, value in enumerate(stats[column::stride].tolist())
            if value != found[number]
        }
        for number, error in drift.items():
            if self._ejected_drift.get(number) == error:
                stats[number * stride + column] += error
        self._ejected_drift = drift

    def _recount(self, found: Mapping[int, int]) -> None:
        """Mend the counters of open connections.

        Counters move while they are compared, so only what two passes in a row found wrong in the same
        direction is mended, and only by the smaller of the two errors.
        """
        memory = self._maps["backend_stats"].mmap().cast("q")
        stride, column = BACKEND_STATS.size // 8, BACKEND_STATS.offsets["open"] // 8
        counters = memory[column::stride].tolist()
        drift = {}
        for number in {n for n, value in enumerate(counters) if value} | found.keys():
            error = found.get(number, 0) - counters[number] if number < len(counters) else 0
            if error:
                drift[number] = error
        for number, error in drift.items():
            before = self._drift.get(number, 0)
            if before * error > 0:
                memory[number * stride + column] += min(before, error, key=abs)
        self._drift = drift
        memory.release()
