"""One connection through the proxy's pump, in a process of its own: how fast, by splice and by copying.

Usage: python -m benchmarks.copying splice|copy|transports asyncio|uvloop transfer|questions MEBIBYTES|COUNT

Prints JSON: seconds, and seconds of processor time that the relaying process used, which depend less on what
else the machine does. ``transports`` is what one would write with asyncio's Protocol; nothing else uses it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import cast

from ebpfproxy.dataplane.userspace.pump import Connection, Pipes


class NoPipes(Pipes):
    """Makes the pump copy."""

    def take(self) -> None:
        """Return nothing, as where there are no descriptors left."""
        return


class Relay(asyncio.Protocol):
    """Writes to its peer what it gets."""

    peer: Relay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass on."""
        self.peer.transport.write(data)

    def pause_writing(self) -> None:
        """Stop the sender."""
        self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the sender go on."""
        self.peer.transport.resume_reading()

    def eof_received(self) -> bool:
        """Pass on the end of one direction."""
        self.peer.transport.write_eof()
        return True


def serve(listener: socket.socket) -> None:
    """Answer connections: the first byte says whether to swallow or to echo."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    """Swallow all until the end, or send back each piece."""
    buffer = bytearray(1 << 20)
    if connection.recv(1) == b"S":
        while connection.recv_into(buffer):
            pass
        connection.close()
        return
    while data := connection.recv(100):
        connection.sendall(data)


async def relay(kind: str, listener: socket.socket, backend: tuple[str, int]) -> None:
    """Accept and pass on for ever."""
    loop = asyncio.get_running_loop()
    pipes = Pipes() if kind == "splice" else NoPipes()
    kept: list[object] = []
    while True:
        client, _ = await loop.sock_accept(listener)
        server = socket.socket()
        server.setblocking(False)
        await loop.sock_connect(server, backend)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kind != "transports":
            kept.append(Connection(loop, pipes, client, server, lambda _: None))
            continue
        here, there = Relay(), Relay()
        here.peer, there.peer = there, here
        await loop.connect_accepted_socket(lambda made=there: made, server)  # type: ignore[misc]
        await loop.connect_accepted_socket(lambda made=here: made, client)  # type: ignore[misc]


def bound() -> socket.socket:
    """Return a listening socket."""
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen()
    return made


def transfer(address: tuple[str, int], size: int) -> None:
    """Send ``size`` MiB and wait until the other side has them."""
    block = bytes(1 << 20)
    with socket.create_connection(address) as client:
        client.sendall(b"S")
        for _ in range(size):
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)


def questions(address: tuple[str, int], count: int) -> None:
    """Ask ``count`` times and wait for each answer."""
    with socket.create_connection(address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"E")
        for _ in range(count):
            client.sendall(bytes(64))
            client.recv(100)


def main(kind: str, loop: str, what: str, size: int) -> None:
    """Make the two other processes, and be the client."""
    backend, front = bound(), bound()
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            if number == 0:
                serve(backend)
            front.setblocking(False)
            if loop == "uvloop":
                asyncio.set_event_loop_policy(importlib.import_module("uvloop").EventLoopPolicy())
            asyncio.run(relay(kind, front, backend.getsockname()))
        children.append(child)
    begin = time.perf_counter()
    try:
        (transfer if what == "transfer" else questions)(front.getsockname(), size)
        took_s = time.perf_counter() - begin
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        used = [os.wait4(child, 0)[2] for child in children][1]
    print(json.dumps({"s": took_s, "cpu_s": used.ru_utime + used.ru_stime}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
