"""The UDP side of a listener: a flow for each client, with a socket of its own to its backend."""

from __future__ import annotations

import collections
import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebpfproxy.dataplane.userspace.balance import Balancer
    from ebpfproxy.dataplane.userspace.hub import Hub
    from ebpfproxy.dataplane.userspace.protocol import Target

#: How long the answer of a backend that is gone is waited for: as long as a resolver does (resolv.conf(5)).
LEAVING_S = 5.0
_BATCH = 64
_SIZE = 65535
_IP_PKTINFO, _IPV6_RECVPKTINFO = 8, 49  # linux/in.h, linux/in6.h; not every Python has the names
_INFO4, _INFO6 = struct.Struct("=I4s4s"), struct.Struct("=16sI")  # in_pktinfo, in6_pktinfo

Client = tuple[Any, ...]  # as recvmsg gives it


def prepare(sock: socket.socket) -> None:
    """Have each datagram say at which of our addresses it arrived: the answer must come from there."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


class UdpReceiver:
    """Receives what arrives on one socket, and keeps its flows.

    Args:
        hub: what all listeners share.
        key: of the listener.
        sock: bound, non-blocking, prepared.
    """

    def __init__(self, hub: Hub, key: str, sock: socket.socket) -> None:
        self.sock, self.hub, self.key = sock, hub, key
        self._flows: dict[tuple[Client, bytes], _Flow] = {}
        self._leaving: set[_Flow] = set()  # they pass on what is still answered, and get no more datagrams
        hub.loop.add_reader(sock, self._receive)

    def close(self) -> None:
        """End all flows."""
        self.hub.loop.remove_reader(self.sock)
        for flow in [*self._flows.values(), *self._leaving]:
            self.end(flow)
        self.sock.close()

    def hand_over(self) -> None:
        """Receive no more, and leave the socket open for another process."""
        self.hub.loop.remove_reader(self.sock)
        for flow in list(self._flows.values()):
            self._retire(flow)

    def follow(self) -> None:
        """Let go of flows to backends that are gone: the client's next datagram goes to another."""
        service = self.hub.services.get(self.hub.listeners[self.key].service)
        known = service.known if service else frozenset()
        for flow in list(self._flows.values()):
            if flow.target is None or flow.target[:2] not in known:
                self._retire(flow)

    def expire(self, now: float) -> None:
        """End flows that were idle too long."""
        settings = self.hub.settings
        for flow in list(self._flows.values()):
            if now - flow.active > (settings.udp_stream_s if flow.is_answered else settings.udp_s):
                self.end(flow)
        for flow in [flow for flow in self._leaving if now - flow.active > LEAVING_S]:
            self.end(flow)

    @property
    def open_flows(self) -> int:
        """Return how many there are."""
        return len(self._flows) + len(self._leaving)

    def _retire(self, flow: _Flow) -> None:
        """Give a flow no more datagrams; the answer to the last one may be on its way."""
        del self._flows[flow.key]
        self._leaving.add(flow)

    def end(self, flow: _Flow) -> None:
        """Close a flow."""
        self._leaving.discard(flow)
        if self._flows.get(flow.key) is flow:
            del self._flows[flow.key]
        flow.close()

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                data, ancillary, _flags, client = self.sock.recvmsg(_SIZE, 64)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error about an earlier answer
                continue
            info = ancillary[0][2] if ancillary else b""
            flow = self._flows.get((client, info))
            if flow is None:
                flow = self._flows[client, info] = _Flow(self, client, info)
                self.hub.tally.flows += 1
            if not flow.send(data):
                self.end(flow)

    def answer(self, data: bytes, client: Client, info: bytes) -> None:
        """Send a backend's answer to a client, from the address that it wrote to."""
        # A full send buffer loses the datagram, as any network may.
        with contextlib.suppress(OSError):
            self.sock.sendmsg([data], [_source(self.sock.family, info)] if info else [], 0, client)


class _Flow:
    """One client at one of our addresses. Until a backend answers, datagrams are kept for the next one."""

    def __init__(self, receiver: UdpReceiver, client: Client, info: bytes) -> None:
        self._receiver, self._client, self._info = receiver, client, info
        self._hub = receiver.hub
        self._waiting: collections.deque[Target] | None = None
        self._unanswered: collections.deque[bytes] = collections.deque(maxlen=8)
        self._sock: socket.socket | None = None
        self._balancer: Balancer | None = None
        self.target: Target | None = None
        self.is_answered = False
        self.active = self._hub.loop.time()

    @property
    def key(self) -> tuple[Client, bytes]:
        return self._client, self._info

    def send(self, data: bytes) -> bool:
        """Pass a datagram on; False if nobody takes it: then the flow is of no use."""
        self.active = self._hub.loop.time()
        if not self.is_answered:
            self._unanswered.append(data)
        if self._sock is None:
            return self._next()
        try:
            self._sock.send(data)
        except ConnectionRefusedError:  # of an earlier datagram, and this one was not sent
            if self.is_answered:
                self.is_answered, self._waiting = False, None
                self._unanswered.append(data)
            return self._refused()
        except OSError:  # no room: lost, as in any network
            pass
        return True

    def close(self) -> None:
        if self._sock is not None:
            self._hub.loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None
        if self._balancer is not None and self.target is not None:
            self._balancer.closed(self.target)
            self._balancer = None

    def _next(self) -> bool:
        """Go to the next backend with all that is unanswered; False: there is none left."""
        self.close()
        receiver = self._receiver
        if self._waiting is None:
            self._waiting = collections.deque(self._hub.order(receiver.key, self._client[:2]))
        while self._waiting:
            self.target = self._waiting.popleft()
            try:
                self._sock = self._dial(self.target)
            except OSError:
                self._hub.tally.limits += 1
                return False
            self._balancer = self._hub.opened(receiver.key, self._client[0], self.target)
            self._hub.loop.add_reader(self._sock, self._answers)
            try:
                for data in self._unanswered:
                    self._sock.send(data)
            except OSError:  # unreachable
                self.close()
                continue
            return True
        self._hub.tally.failures += 1
        return False

    def _dial(self, target: Target) -> socket.socket:
        family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(target[:2])
        except OSError:
            sock.close()
            raise
        return sock

    def _refused(self) -> bool:
        """The backend's port is closed: try the next one, unless it has answered before."""
        if self.is_answered:
            return False
        self._hub.tally.retries += bool(self._waiting)
        return self._next()

    def _answers(self) -> None:
        for _ in range(_BATCH):
            if self._sock is None:
                return
            try:
                data = self._sock.recv(_SIZE)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                if not self._refused():
                    self._receiver.end(self)
                return
            except OSError:
                continue
            if not self.is_answered:
                self.is_answered = True
                self._unanswered.clear()
            self.active = self._hub.loop.time()
            self._receiver.answer(data, self._client, self._info)


def _source(family: int, info: bytes) -> tuple[int, int, bytes]:
    """Return the ancillary data that sends from where ``info`` says that a datagram arrived."""
    if family == socket.AF_INET6:
        address, _ = _INFO6.unpack(info)
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _INFO6.pack(address, 0)
    _, _, address = _INFO4.unpack(info)
    return socket.IPPROTO_IP, _IP_PKTINFO, _INFO4.pack(0, address, bytes(4))
