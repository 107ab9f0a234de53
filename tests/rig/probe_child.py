"""The far side of probe.py: owns sockets in its namespace and cgroup, and does with them what it is told.

Reads pickled (verb, arguments) from standard input, writes pickled (result, error) to standard output.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 5.0  # of every call on a new socket; probe.py has the same
REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def new_socket(
    family: int,
    kind: int,
    bind: tuple[str, int] | None = None,
    options: Sequence[tuple[int, int, Any]] = (),
    proto: int = 0,
) -> socket.socket:
    made = socket.socket(family, kind, proto)
    made.settimeout(TIMEOUT_S)
    for option in options:
        made.setsockopt(*option)
    if bind:
        made.bind(bind)
    return made


def http_ask(connection: socket.socket) -> str:
    """Send one request on an open connection and return the body."""
    connection.sendall(REQUEST)
    received = b""
    while not received.partition(b"\r\n\r\n")[2].endswith(b"\n"):
        data = connection.recv(4096)
        if not data:
            msg = "the server closed the connection"
            raise ConnectionError(msg)
        received += data
    return received.split(b"\r\n\r\n", 1)[1].decode().strip()


def tcp_ask(address: str, port: int, bind: tuple[str, int] | None = None) -> str:
    """Connect, ask once, close."""
    with new_socket(family_of(address), socket.SOCK_STREAM, bind) as connection:
        connection.connect((address, port))
        return http_ask(connection)


def udp_ask(address: str, port: int, *, connect: bool, bind: tuple[str, int] | None = None) -> str:
    """Send one datagram from a new socket and return the answer, which must come from ``address``."""
    with new_socket(family_of(address), socket.SOCK_DGRAM, bind) as asker:
        if connect:
            asker.connect((address, port))
            asker.send(b"?")
        else:
            asker.sendto(b"?", (address, port))
        data, sender = asker.recvfrom(4096)
    if sender[:2] != (address, port):
        msg = f"the answer came from {sender}"
        raise ConnectionError(msg)
    return data.decode().rsplit(" ", 1)[0]


class Load:
    """Threads that ask without end and note what fails.

    Modes: "new" a connection for every request, "keep" one connection for all, "udp" a new socket for
    every datagram, "udp-keep" one unconnected socket for all.
    """

    def __init__(self, mode: str, address: str, port: int, workers: int, pause_s: float) -> None:
        self.mode, self.address, self.port, self.pause_s = mode, address, port, pause_s
        self.answers: dict[str, int] = {}
        self.failures: list[str] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def work(self) -> None:
        requests = 0
        while not self.ended.is_set():
            try:
                with contextlib.ExitStack() as stack:
                    for answer in self.asks(stack):
                        requests += 1
                        with self.lock:
                            self.answers[answer] = self.answers.get(answer, 0) + 1
                        if self.ended.wait(self.pause_s):
                            return
            except OSError as error:
                with self.lock:
                    self.failures.append(f"{time.monotonic():.3f} after {requests} requests: {error!r}")
                self.ended.wait(0.05)

    def asks(self, stack: contextlib.ExitStack) -> Any:
        if self.mode == "new":
            yield tcp_ask(self.address, self.port)
        elif self.mode == "udp":
            yield udp_ask(self.address, self.port, connect=False)
        elif self.mode == "keep":
            kept = stack.enter_context(new_socket(family_of(self.address), socket.SOCK_STREAM))
            kept.connect((self.address, self.port))
            while True:
                yield http_ask(kept)
        elif self.mode == "udp-keep":
            kept = stack.enter_context(new_socket(family_of(self.address), socket.SOCK_DGRAM))
            while True:
                kept.sendto(b"?", (self.address, self.port))
                yield kept.recv(4096).decode().rsplit(" ", 1)[0]
        else:
            raise ValueError(self.mode)

    def counts(self) -> tuple[dict[str, int], list[str]]:
        with self.lock:
            return dict(self.answers), list(self.failures)

    def stop(self) -> tuple[dict[str, int], list[str]]:
        self.ended.set()
        for thread in self.threads:
            thread.join()
        return self.counts()


class Child:
    """The verbs."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.objects: dict[int, Any] = {}

    def keep(self, thing: object) -> int:
        number = next(self.numbers)
        self.objects[number] = thing
        return number

    def timeout(self, seconds: float) -> None:
        globals()["TIMEOUT_S"] = seconds

    def open(self, *arguments: Any) -> int:
        return self.keep(new_socket(*arguments))

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        return getattr(self.objects[number], method)(*arguments)

    def close(self, number: int) -> None:
        self.objects.pop(number).close()

    def http(self, number: int) -> str:
        return http_ask(self.objects[number])

    def tcp(self, address: str, port: int, count: int, bind: tuple[str, int] | None) -> list[str]:
        return [tcp_ask(address, port, bind) for _ in range(count)]

    def udp(
        self, address: str, port: int, count: int, connect: bool, bind: tuple[str, int] | None
    ) -> list[str]:
        return [udp_ask(address, port, connect=connect, bind=bind) for _ in range(count)]

    def load(self, *arguments: Any) -> int:
        return self.keep(Load(*arguments))


def main() -> None:
    child = Child()
    while True:
        try:
            verb, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outcome: tuple[Any, OSError | None] = (getattr(child, verb)(*arguments), None)
        except OSError as error:
            outcome = (None, error)
        pickle.dump(outcome, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
