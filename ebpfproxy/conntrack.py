"""The kernel's connection tracking: its UDP flows, and an end for those that lead to a backend that is gone.

A TCP client notices that its backend is gone and connects anew. A UDP client that keeps its port goes on in
the flow that conntrack remembers, into a black hole for as long as it keeps asking.

Source: linux/netfilter/nfnetlink_conntrack.h; SERVICES.md section 7 of the project's semantics.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.model.addresses import family as family_of
from ebpfproxy.model.services import Protocol, Readiness
from ebpfproxy.netlink.wire import Message, Wire, attributes, fail, pack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ebpfproxy.config import Config
    from ebpfproxy.model.services import DesiredState

UDP = socket.IPPROTO_UDP
_NETLINK_NETFILTER = 12
_GET, _DELETE = 0x0101, 0x0102  # subsystem conntrack, IPCTNL_MSG_CT_GET and _DELETE
_ORIG, _REPLY, _ID, _ZONE = 1, 2, 12, 18  # CTA_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUM, _PROTO_SRC, _PROTO_DST = 1, 2, 3


class Endpoint(NamedTuple):
    """An address and a port."""

    address: str  # canonical; "" = every address of this node
    port: int


class Flow(NamedTuple):
    """One flow as conntrack has it."""

    to: Endpoint  # where the client sends to
    served_by: Endpoint  # who answers, behind all translation
    key: bytes  # names it to the kernel


View = dict[Endpoint, frozenset[Endpoint]]  # frontends -> who may serve them


# --- what has to go: pure -----------------------------------------------------------------------------------


def view(state: DesiredState) -> View:
    """Return the UDP frontends of a state, each with the backends that its established flows may have.

    One that terminates keeps the flows that it has.
    """
    found: View = {}
    for service in state.services:
        if service.protocol is Protocol.UDP:
            serving = frozenset(
                Endpoint(each.address, each.port)
                for each in service.backends
                if each.readiness is not Readiness.NOT_READY
            )
            for frontend in service.frontends:
                key = Endpoint(frontend.address, frontend.port)
                # NodePorts of both families have the same key.
                found[key] = found.get(key, frozenset()) | serving
    return found


def stale(
    flows: Iterable[Flow], old: Mapping[Endpoint, frozenset[Endpoint]], new: View, local: frozenset[str]
) -> list[Flow]:
    """Return the flows to frontends that changed, whose backend does not serve them any more.

    Among them are those that were let through untranslated before the first endpoint came.

    Args:
        flows: of UDP.
        old: frontends before.
        new: frontends now.
        local: this node's addresses, for NodePorts.
    """
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    gone = []
    for flow in flows:
        key = flow.to
        if key not in changed:
            if key in new or key.address not in local:
                continue
            key = Endpoint("", key.port)
        if key in changed and flow.served_by not in new.get(key, frozenset()):
            gone.append(flow)
    return gone


def settings_of(config: Config) -> dict[str, str]:
    """Return what the configuration says of the kernel's connection tracking, as settings of the kernel."""
    seconds = {
        "udp_timeout": config.udp_s,
        "udp_timeout_stream": config.udp_stream_s,
        "tcp_timeout_established": config.tcp_established_s,
        "tcp_timeout_close_wait": config.tcp_close_wait_s,
    }
    found = {name: str(round(value)) for name, value in seconds.items() if value}
    if config.conntrack_max:
        found["max"] = str(config.conntrack_max)
    if config.tcp_be_liberal:
        found["tcp_be_liberal"] = "1"
    return {f"net/netfilter/nf_conntrack_{name}": value for name, value in found.items()}


class UdpCleaner:
    """Ends the UDP flows that a change of Services leaves without backend; at a start there is no change."""

    def __init__(self) -> None:
        self._view: View | None = None

    def clean(self, state: DesiredState) -> int:
        """Follow a state that is programmed already; return how many flows were ended.

        Raises:
            KernelError: some may be left; call again.
        """
        now = view(state)
        if self._view is None or now == self._view:
            self._view = now
            return 0
        touched = {key for key in now.keys() | self._view.keys() if now.get(key) != self._view.get(key)}
        families = sorted({family_of(key.address) for key in touched if key.address} or {4, 6})
        if any(not key.address for key in touched):
            families = [4, 6]
        ended = 0
        for number in families:
            ended += delete(
                stale(flows(number, UDP), self._view, now, state.addresses.local), number, "stale UDP flows"
            )
        self._view = now
        return ended


# --- the kernel ---------------------------------------------------------------------------------------------


def flows(number: int, protocol: int) -> Iterator[Flow]:
    """Yield the flows of one IP family (4 | 6) and protocol.

    Raises:
        KernelError: the kernel does not say.
    """
    what = "list conntrack entries"
    with Wire(_NETLINK_NETFILTER, what) as wire:
        for body in wire.dump(Message(_GET, _head(number)), what):
            flow = _flow(body, number, protocol)
            if flow is not None:
                yield flow


def delete(gone: Iterable[Flow], number: int, what: str) -> int:
    """Delete flows of one family; return how many were there still.

    Raises:
        KernelError: the kernel refused.
    """
    listed = list(gone)
    if not listed:
        return 0
    with Wire(_NETLINK_NETFILTER, f"delete {what}") as wire:
        errors = wire.send([Message(_DELETE, _head(number) + flow.key) for flow in listed])
    for code in errors:
        if code not in (0, errno.ENOENT):  # ended meanwhile
            fail(code, f"delete {what}")
    return errors.count(0)


def _head(number: int) -> bytes:
    return struct.pack("=BBH", socket.AF_INET6 if number == 6 else socket.AF_INET, 0, 0)


def _flow(message: bytes, number: int, protocol: int) -> Flow | None:
    found = attributes(message[4:])
    if _ORIG not in found or _REPLY not in found:
        return None
    there = attributes(found[_ORIG])
    proto = attributes(there[_TUPLE_PROTO])
    if proto[_PROTO_NUM][0] != protocol:
        return None
    back = attributes(found[_REPLY])
    back_proto = attributes(back[_TUPLE_PROTO])
    return Flow(
        Endpoint(_address(attributes(there[_TUPLE_IP])[_IP_DST[number]]), _port(proto[_PROTO_DST])),
        Endpoint(_address(attributes(back[_TUPLE_IP])[_IP_SRC[number]]), _port(back_proto[_PROTO_SRC])),
        b"".join(
            pack(kind, found[kind], is_nested=kind == _ORIG) for kind in (_ORIG, _ID, _ZONE) if kind in found
        ),
    )


def _address(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, packed)


def _port(packed: bytes) -> int:
    return int.from_bytes(packed, "big")
