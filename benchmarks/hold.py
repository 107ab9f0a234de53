"""Many connections at once: ``hold.py serve PORT`` and ``hold.py load ADDRESS PORT COUNT``.

The load opens them all, asks on each once all are open, and prints JSON; then it keeps them until its
standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import sys
import time

BATCH = 200


async def serve(port: int) -> None:
    """Send back what comes, for ever."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "0.0.0.0", port, backlog=4096)  # noqa: S104
    print("listening", flush=True)
    await server.serve_forever()


async def load(address: str, port: int, count: int) -> None:
    """Open ``count`` connections and use each."""
    loop = asyncio.get_running_loop()

    async def open_one() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, (address, port))
        return sock

    async def ask(sock: socket.socket) -> bool:
        await loop.sock_sendall(sock, b"?")
        return await loop.sock_recv(sock, 10) == b"?"

    begin = time.perf_counter()
    kept: list[socket.socket] = []
    while len(kept) < count:
        kept += await asyncio.gather(*(open_one() for _ in range(min(BATCH, count - len(kept)))))
    opened_s = time.perf_counter() - begin
    begin = time.perf_counter()
    answered = 0
    for start in range(0, count, BATCH):
        answered += sum(await asyncio.gather(*map(ask, kept[start : start + BATCH])))
    said = {"answered": answered, "s to open": opened_s, "s to ask all": time.perf_counter() - begin}
    print(json.dumps(said), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2])))
    else:
        asyncio.run(load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
