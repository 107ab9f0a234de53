"""The kernel's connection tracking: its UDP flows, and an end for those that lead to a backend that is gone.

A TCP client notices that its backend is gone and connects anew. A UDP client that keeps its port goes on in
the flow that conntrack remembers, into a black hole for as long as it keeps asking.

Source: linux/netfilter/nfnetlink_conntrack.h; SERVICES.md section 7 of the project's semantics.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.errors import KernelError
from ebpfproxy.model.addresses import family as family_of
from ebpfproxy.model.services import Protocol, Readiness

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ebpfproxy.config import Config
    from ebpfproxy.model.services import DesiredState

UDP = socket.IPPROTO_UDP
_NETLINK_NETFILTER = 12
_GET, _DELETE = 0x0101, 0x0102  # subsystem conntrack, IPCTNL_MSG_CT_GET and _DELETE
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_ORIG, _REPLY, _ID, _ZONE = 1, 2, 12, 18  # CTA_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC, _IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_PROTO_NUM, _PROTO_SRC, _PROTO_DST = 1, 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_BATCH = 128  # deletions in one message: their answers fit the socket's buffer


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
    with _socket("list conntrack entries") as connection:
        body = struct.pack("=BBH", _af(number), 0, 0)
        connection.send(_HEADER.pack(_HEADER.size + len(body), _GET, _REQUEST | _DUMP, 1, 0) + body)
        while True:
            data = connection.recv(1 << 18)
            for kind, message in _messages(data):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    _raise_error(message, "list conntrack entries")
                flow = _flow(message, number, protocol)
                if flow is not None:
                    yield flow


def delete(gone: Iterable[Flow], number: int, what: str) -> int:
    """Delete flows of one family; return how many were there still.

    Raises:
        KernelError: the kernel refused.
    """
    listed, done = list(gone), 0
    if not listed:
        return 0
    head = struct.pack("=BBH", _af(number), 0, 0)
    with _socket(f"delete {what}") as connection:
        for first in range(0, len(listed), _BATCH):
            batch = listed[first : first + _BATCH]
            connection.send(
                b"".join(
                    _HEADER.pack(_HEADER.size + len(head + flow.key), _DELETE, _REQUEST | _ACK, n, 0)
                    + head
                    + flow.key
                    for n, flow in enumerate(batch, 1)
                )
            )
            left = len(batch)
            while left:
                for _, message in _messages(connection.recv(1 << 18)):
                    left -= 1
                    code = -struct.unpack_from("=i", message)[0]
                    if code not in (0, errno.ENOENT):  # ended meanwhile
                        _raise_error(message, f"delete {what}")
                    done += code == 0
    return done


def _socket(what: str) -> socket.socket:
    try:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        made.settimeout(10)
        made.bind((0, 0))
    except OSError as error:
        raise KernelError(f"{what}: {error.strerror}", error.errno or 0) from error
    return made


def _af(number: int) -> int:
    return socket.AF_INET6 if number == 6 else socket.AF_INET


def _raise_error(message: bytes, what: str) -> None:
    code = -struct.unpack_from("=i", message)[0]
    raise KernelError(f"{what}: {os.strerror(code)}", code)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        size, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + size]
        at += (size + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & 0x3FFF] = data[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


def _flow(message: bytes, number: int, protocol: int) -> Flow | None:
    found = _attributes(message[4:])
    if _ORIG not in found or _REPLY not in found:
        return None
    there = _attributes(found[_ORIG])
    proto = _attributes(there[_TUPLE_PROTO])
    if proto[_PROTO_NUM][0] != protocol:
        return None
    back = _attributes(found[_REPLY])
    back_proto = _attributes(back[_TUPLE_PROTO])
    return Flow(
        Endpoint(_address(_attributes(there[_TUPLE_IP])[_IP_DST[number]]), _port(proto[_PROTO_DST])),
        Endpoint(_address(_attributes(back[_TUPLE_IP])[_IP_SRC[number]]), _port(back_proto[_PROTO_SRC])),
        b"".join(
            _pack(kind, found[kind], is_nested=kind == _ORIG) for kind in (_ORIG, _ID, _ZONE) if kind in found
        ),
    )


def _address(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, packed)


def _port(packed: bytes) -> int:
    return int.from_bytes(packed, "big")


def _pack(kind: int, data: bytes, *, is_nested: bool) -> bytes:
    flag = 0x8000 if is_nested else 0
    return _ATTRIBUTE.pack(4 + len(data), kind | flag) + data + bytes(-len(data) % 4)
