"""Moves bytes between the two sockets of a connection, each direction alone, without copying them.

splice(2) through a pipe leaves the data in the kernel: half as fast again as reading and writing, for large
transfers, and no slower for small ones (``benchmarks/userspace.py``). A pipe is borrowed while data are on
their way only, so an idle connection costs no more than its two sockets.

Back pressure: what the receiver does not take stays in the pipe, and nothing more is read until it is gone;
then the sender's own window closes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

#: What a pipe holds, where the kernel allows it (fs.pipe-user-pages-soft), else 64 KiB.
PIPE_BYTES = 1 << 20
#: What is read at once where no pipe can be had.
COPY_BYTES = 1 << 16
_SPLICE_FLAGS = 1 | 2  # SPLICE_F_MOVE, SPLICE_F_NONBLOCK
_RESET = struct.pack("ii", 1, 0)  # close() sends RST, socket(7)


class Pipes:
    """Pipes that nobody uses at the moment.

    Args:
        spare_max: how many are kept.
    """

    def __init__(self, spare_max: int = 64) -> None:
        self._spare: list[tuple[int, int]] = []
        self._spare_max = spare_max

    def take(self) -> tuple[int, int] | None:
        """Return an empty pipe; None if there are no descriptors left."""
        if self._spare:
            return self._spare.pop()
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return pipe

    def give(self, pipe: tuple[int, int], *, is_empty: bool) -> None:
        """Take a pipe back."""
        if is_empty and len(self._spare) < self._spare_max:
            self._spare.append(pipe)
        else:
            for end in pipe:
                os.close(end)

    def close(self) -> None:
        """Close all that are here."""
        while self._spare:
            for end in self._spare.pop():
                os.close(end)


class Connection:
    """Two sockets and what goes on between them; ends by itself.

    Args:
        loop: runs it.
        pipes: shared by all.
        client: connected, non-blocking; so is ``backend``.
        on_end: called once, when both sockets are closed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pipes: Pipes,
        client: socket.socket,
        backend: socket.socket,
        on_end: Callable[[Connection], None],
    ) -> None:
        self.loop, self.pipes = loop, pipes
        self.active = loop.time()
        self._on_end = on_end
        self._halves = (_Half(self, client, backend), _Half(self, backend, client))
        for half in self._halves:
            half.start()

    @property
    def is_half_closed(self) -> bool:
        """Whether one side has said that it sends no more."""
        return any(half.is_done for half in self._halves)

    def half_done(self) -> None:
        """End if both directions have."""
        if all(half.is_done for half in self._halves):
            self._end()

    def abort(self) -> None:
        """Reset both sides: neither may take what it has for the whole."""
        for half in self._halves:
            with contextlib.suppress(OSError):
                half.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._end()

    def _end(self) -> None:
        for half in self._halves:
            half.stop()
        for half in self._halves:
            half.source.close()
        self._on_end(self)


class _Half:
    """One direction."""

    def __init__(self, connection: Connection, source: socket.socket, sink: socket.socket) -> None:
        self._connection, self.source, self._sink = connection, source, sink
        self._pipe: tuple[int, int] | None = None
        self._held = 0  # bytes in the pipe
        self._copied = b""  # bytes that wait where there was no pipe
        self.is_done = False

    def start(self) -> None:
        self._connection.loop.add_reader(self.source, self._readable)

    def stop(self) -> None:
        self._connection.loop.remove_reader(self.source)
        self._connection.loop.remove_writer(self._sink)
        if self._pipe:
            self._connection.pipes.give(self._pipe, is_empty=not self._held)
            self._pipe = None

    def _readable(self) -> None:
        try:
            if not self._read():
                self.is_done = True
                self._connection.loop.remove_reader(self.source)
                self._shut()
                return
            if not self._write():
                self._connection.loop.remove_reader(self.source)
                self._connection.loop.add_writer(self._sink, self._writable)
        except BlockingIOError:
            return
        except OSError:
            self._connection.abort()

    def _writable(self) -> None:
        try:
            if self._write():
                self._connection.loop.remove_writer(self._sink)
                self._connection.loop.add_reader(self.source, self._readable)
        except OSError:
            self._connection.abort()

    def _read(self) -> bool:
        """Take what is there; False at the end of the stream.

        Raises:
            BlockingIOError: nothing is there.
        """
        pipes = self._connection.pipes
        pipe = pipes.take()
        if pipe is None:
            self._copied = self.source.recv(COPY_BYTES)
            self._connection.active = self._connection.loop.time()
            return bool(self._copied)
        try:
            self._held = os.splice(self.source.fileno(), pipe[1], PIPE_BYTES, flags=_SPLICE_FLAGS)
        except OSError:
            pipes.give(pipe, is_empty=True)
            raise
        if not self._held:
            pipes.give(pipe, is_empty=True)
            return False
        self._pipe = pipe
        self._connection.active = self._connection.loop.time()
        return True

    def _write(self) -> bool:
        """Pass on what is held; False if the receiver does not take all of it now."""
        try:
            while self._held:
                assert self._pipe
                self._held -= os.splice(self._pipe[0], self._sink.fileno(), self._held, flags=_SPLICE_FLAGS)
            while self._copied:
                self._copied = self._copied[self._sink.send(self._copied) :]
        except BlockingIOError:
            return False
        finally:
            self._connection.active = self._connection.loop.time()
        if self._pipe:
            self._connection.pipes.give(self._pipe, is_empty=True)
            self._pipe = None
        return True

    def _shut(self) -> None:
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:  # it has gone meanwhile
            self._connection.abort()
            return
        self._connection.half_done()
