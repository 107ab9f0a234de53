"""Answers its name: HTTP over TCP, and datagrams over UDP, on every port given, IPv4 and IPv6.

Usage: server_child.py NAME PORT...

The body of an answer is ``NAME CLIENT-ADDRESS``; a datagram is answered with the same, then a space and
the datagram itself. Prints one line once it listens everywhere.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import cast

ANY = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))


class Http(asyncio.Protocol):
    """One connection; any number of requests without a body."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        body = f"{self.name} {transport.get_extra_info('peername')[0]}\n".encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
        self.answer = head.encode() + body

    def data_received(self, data: bytes) -> None:
        *requests, self.pending = (self.pending + data).split(b"\r\n\r\n")
        self.transport.write(self.answer * len(requests))


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self.name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own class is not a subclass of DatagramTransport before Python 3.14.
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(f"{self.name} {addr[0]} ".encode() + data, addr)


def bound(family: socket.AddressFamily, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind((address, port))
    made.setblocking(False)
    return made


async def main(name: str, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        for family, address in ANY:
            listener = bound(family, socket.SOCK_STREAM, address, port)
            await loop.create_server(lambda: Http(name), sock=listener, backlog=1024)
            receiver = bound(family, socket.SOCK_DGRAM, address, port)
            await loop.create_datagram_endpoint(lambda: Datagrams(name), sock=receiver)
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [int(port) for port in sys.argv[2:]]))
