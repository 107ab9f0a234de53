"""Sockets in another namespace and cgroup, used as if they were here."""

from __future__ import annotations

import collections
import contextlib
import pickle
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rig.process import Place

TIMEOUT_S = 5.0  # nothing in a test takes that long unless it is lost
CHILD = Path(__file__).with_name("probe_child.py")


class RemoteSocket:
    """A socket of the probe's process; errors of the system are raised here."""

    def __init__(self, probe: Probe, number: int) -> None:
        self._probe, self._number = probe, number

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._probe.call("call", self._number, method, *arguments)

    def connect(self, address: str, port: int) -> None:
        self._call("connect", (address, port))

    def bind(self, address: str, port: int) -> None:
        self._call("bind", (address, port))

    def listen(self) -> None:
        self._call("listen")

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._call("setsockopt", level, option, value)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        value: bytes = self._call("getsockopt", level, option, size)
        return value

    def settimeout(self, seconds: float) -> None:
        self._call("settimeout", seconds)

    def send(self, data: bytes) -> None:
        self._call("send", data)

    def sendto(self, data: bytes, address: str, port: int) -> None:
        self._call("sendto", data, (address, port))

    def recv(self) -> bytes:
        data: bytes = self._call("recv", 65536)
        return data

    def recvfrom(self) -> tuple[bytes, tuple[str, int]]:
        data, sender = self._call("recvfrom", 65536)
        return data, tuple(sender[:2])

    def recvmsg(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        """Return data and ancillary data."""
        data, ancillary, _, _ = self._call("recvmsg", 65536, 4096)
        return data, ancillary

    def getpeername(self) -> tuple[str, int]:
        address, port = self._call("getpeername")[:2]
        return address, port

    def getsockname(self) -> tuple[str, int]:
        address, port = self._call("getsockname")[:2]
        return address, port

    def ask(self) -> str:
        """Send one HTTP request on the open connection; return the name that answers."""
        answer: str = self._probe.call("http", self._number)
        return answer.split(" ", maxsplit=1)[0]

    def close(self) -> None:
        self._probe.call("close", self._number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.close()


class Load:
    """A running load."""

    def __init__(self, probe: Probe, number: int) -> None:
        self._probe, self._number = probe, number

    def counts(self) -> tuple[collections.Counter[str], list[str]]:
        """Return requests answered so far by name, and what failed."""
        answers, failures = self._probe.call("call", self._number, "counts")
        return _by_name(answers), failures

    def more(self, requests: int = 200) -> collections.Counter[str]:
        """Wait until so many more requests were answered; return who answered those."""
        return more([self], requests)[0]

    def stop(self) -> tuple[collections.Counter[str], list[str]]:
        answers, failures = self._probe.call("call", self._number, "stop")
        return _by_name(answers), failures


def more(loads: Sequence[Load], requests: int) -> list[collections.Counter[str]]:
    """Wait until each load got so many more answers; return who answered those, load by load."""
    before = [load.counts()[0] for load in loads]

    def enough(load: Load, earlier: collections.Counter[str]) -> collections.Counter[str] | None:
        now, failures = load.counts()
        if failures:
            msg = f"{len(failures)} requests failed: {failures[:5]}"
            raise ConnectionError(msg)
        since = now - earlier
        return since if since.total() >= requests else None

    return [
        eventually(partial(enough, load, earlier), f"{requests} more requests", timeout_s=30)
        for load, earlier in zip(loads, before, strict=True)
    ]


def _by_name(answers: dict[str, int]) -> collections.Counter[str]:
    counted: collections.Counter[str] = collections.Counter()
    for answer, count in answers.items():
        counted[answer.split(" ")[0]] += count
    return counted


class Probe:
    """A process in ``place`` that owns sockets; one call at a time."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._process = place.start(sys.executable, "-I", "-S", CHILD, pipes=True)

    def call(self, verb: str, *arguments: Any) -> Any:
        """Do one thing over there and return its result, or raise its OSError here."""
        pickle.dump((verb, arguments), self._process.stdin)
        self._process.stdin.flush()
        try:
            result, error = pickle.load(self._process.stdout)
        except EOFError:
            msg = f"the probe ended:\n{self._process.output()}"
            raise AssertionError(msg) from None
        if error:
            raise error
        return result

    @contextlib.contextmanager
    def impatient(self, timeout_s: float = 0.5) -> Iterator[None]:
        """Wait for answers that long instead of 5 s: where none is expected."""
        self.call("timeout", timeout_s)
        try:
            yield
        finally:
            self.call("timeout", TIMEOUT_S)

    def socket(
        self,
        kind: socket.SocketKind,
        family: socket.AddressFamily = socket.AF_INET,
        *,
        bind: tuple[str, int] | None = None,
        options: Sequence[tuple[int, int, int | bytes]] = (),
        proto: int = 0,
    ) -> RemoteSocket:
        """Open a socket; close it with ``with``."""
        return RemoteSocket(self, self.call("open", int(family), int(kind), bind, list(options), proto))

    def tcp(
        self, address: str, port: int, count: int = 1, bind: tuple[str, int] | None = None
    ) -> collections.Counter[str]:
        """Ask over ``count`` new connections; return how often each name answered."""
        return collections.Counter(
            answer.split(" ")[0] for answer in self.answers(address, port, count, bind)
        )

    def answers(
        self, address: str, port: int, count: int = 1, bind: tuple[str, int] | None = None
    ) -> list[str]:
        """As :meth:`tcp`; return the answers in order, each "NAME CLIENT-ADDRESS"."""
        answers: list[str] = self.call("tcp", address, port, count, bind)
        return answers

    def udp(
        self,
        address: str,
        port: int,
        count: int = 1,
        *,
        connect: bool = False,
        bind: tuple[str, int] | None = None,
    ) -> collections.Counter[str]:
        """Ask with ``count`` datagrams, each from a new socket; return how often each name answered."""
        answers = self.udp_answers(address, port, count, connect=connect, bind=bind)
        return collections.Counter(answer.split(" ")[0] for answer in answers)

    def udp_answers(
        self,
        address: str,
        port: int,
        count: int = 1,
        *,
        connect: bool = False,
        bind: tuple[str, int] | None = None,
    ) -> list[str]:
        """As :meth:`udp`; return the answers in order, each "NAME CLIENT-ADDRESS"."""
        answers: list[str] = self.call("udp", address, port, count, connect, bind)
        return answers

    @contextlib.contextmanager
    def load(
        self, address: str, port: int, *, mode: str = "new", workers: int = 4, pause_s: float = 0.002
    ) -> Iterator[Load]:
        """Ask without end while the block runs; at its end not one request may have failed."""
        load = Load(self, self.call("load", mode, address, port, workers, pause_s))
        try:
            yield load
        except BaseException:
            load.stop()
            raise
        answers, failures = load.stop()
        assert not failures, f"{len(failures)} of {answers.total()} requests failed: {failures[:5]}"
        assert answers, "no request was made"

    def stop(self) -> None:
        self._process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
