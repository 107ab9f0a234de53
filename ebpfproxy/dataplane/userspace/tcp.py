"""The TCP side of a listener: accept, find a backend that answers, and let the two talk."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebpfproxy.dataplane.userspace.hub import Hub
    from ebpfproxy.dataplane.userspace.protocol import Target

#: How long a backend has to answer, one silence after the other: as kube-proxy's userspace mode up to 2 s,
#: then on, since one whose queue is full is silent too. After the last one the client is reset. A backend
#: that refuses costs no time and is not tried again.
ANSWER_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Errors of accept() for want of room.
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_BATCH = 64  # accepted in one go, so that those who are connected get their turn
_PAUSE_S = 0.1  # until there may be descriptors again
_SHORTAGES_MAX = 100  # such pauses for one client
_RESET = struct.pack("ii", 1, 0)  # close() sends RST, socket(7)


class TcpAcceptor:
    """Accepts what arrives on one listening socket.

    Args:
        hub: what all listeners share.
        key: of the listener.
        sock: listens, non-blocking.
    """

    def __init__(self, hub: Hub, key: str, sock: socket.socket) -> None:
        self.sock = sock
        self._hub, self._key = hub, key
        self._tasks: set[asyncio.Task[None]] = set()
        hub.loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Accept no more; connections go on."""
        self.hand_over()
        self.sock.close()

    def hand_over(self) -> None:
        """Accept no more, and leave the socket open for another process."""
        self._hub.loop.remove_reader(self.sock)
        self._key = ""

    def follow(self) -> None:
        """Connections stay where they are, whichever backends there are now."""

    def expire(self, now: float) -> None:
        """The hub looks after connections."""

    @property
    def open_flows(self) -> int:
        """Return 0: connections are the hub's."""
        return 0

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                # The backend's socket first: else clients with the last descriptors wait for one more each.
                backend = socket.socket(self.sock.family, socket.SOCK_STREAM)
                try:
                    client, address = self.sock.accept()
                except BaseException:
                    backend.close()
                    raise
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in NO_ROOM:
                    self._pause()
                    return
                continue  # the client has gone already
            client.setblocking(False)
            task = self._hub.loop.create_task(self._serve(self._key, client, backend, address[:2]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _pause(self) -> None:
        """Wait for descriptors; clients wait in the kernel's queue meanwhile."""
        self._hub.tally.limits += 1
        self._hub.loop.remove_reader(self.sock)
        self._hub.loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._key:
            self._hub.loop.add_reader(self.sock, self._accept)

    async def _serve(
        self, key: str, client: socket.socket, first: socket.socket, address: tuple[str, int]
    ) -> None:
        tally = self._hub.tally
        tally.connections += 1
        tally.connecting += 1
        try:
            found = await self._connect(key, first, address)
        finally:
            tally.connecting -= 1
        if found is None:
            tally.failures += 1
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        backend, target = found
        with contextlib.suppress(OSError):  # reset meanwhile: the pump finds out
            for sock in (client, backend):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._hub.join(client, backend, self._hub.opened(key, address[0], target), target)

    async def _connect(
        self, key: str, first: socket.socket, client: tuple[str, int]
    ) -> tuple[socket.socket, Target] | None:
        """Return a socket that is connected to a backend, and which one; None: nobody answers."""
        sock: socket.socket | None = first
        waiting = collections.deque(self._hub.order(key, client))
        silences = shortages = 0
        while waiting and silences < len(ANSWER_S):
            target = waiting.popleft()
            ready, sock = sock, None
            # Nobody else to ask: then the kernel's own repeated SYNs do, and no connection is begun twice.
            timeout_s = ANSWER_S[silences] if waiting else sum(ANSWER_S[silences:])
            try:
                return await self._dial(target, timeout_s, ready), target
            except TimeoutError:
                silences = silences + 1 if waiting else len(ANSWER_S)
                waiting.append(target)  # it may just be slow: the others first
            except OSError as error:
                if error.errno in NO_ROOM and shortages < _SHORTAGES_MAX:
                    shortages += 1
                    self._hub.tally.limits += 1
                    waiting.appendleft(target)
                    await asyncio.sleep(_PAUSE_S)
                    continue
            self._hub.tally.retries += bool(waiting)
        if sock is not None:
            sock.close()
        return None

    async def _dial(self, target: Target, timeout_s: float, ready: socket.socket | None) -> socket.socket:
        family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
        sock = ready or socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(timeout_s):
                await self._hub.loop.sock_connect(sock, target[:2])
        except BaseException:
            sock.close()
            raise
        return sock
