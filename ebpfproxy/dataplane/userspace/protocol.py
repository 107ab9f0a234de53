"""What the agent and the proxy process say to each other over a unix socket. Values and framing only.

Every message is its length in four bytes, big endian, and MessagePack. The proxy speaks first: ``Hello``
holds all that it has, so that a new agent sends differences only. Then one answer follows each request.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

import ebpfproxy

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Name of the socket in the agent's state directory.
SOCKET = "userspace.sock"

_LENGTH = struct.Struct("!I")


class Fate(enum.StrEnum):
    """What becomes of a new connection from one side, inside or outside."""

    CLUSTER = "cluster"  # to a backend of that pool
    LOCAL = "local"
    REJECT = "reject"
    DROP = "drop"


class Target(NamedTuple):
    """A backend."""

    address: str
    port: int
    weight: int = 1


class ServicePort(msgspec.Struct, frozen=True, array_like=True):
    """One port of a Service in one IP family: where connections may go."""

    protocol: str  # TCP | UDP
    family: int  # 4 | 6
    scheduler: str
    affinity_s: int  # 0 = none
    cluster: tuple[Target, ...]
    local: tuple[Target, ...]
    known: frozenset[tuple[str, int]]  # also backends that keep their flows but get no new ones


class Listener(msgspec.Struct, frozen=True, array_like=True):
    """A socket on which connections to a Service port arrive."""

    service: str  # key of its ServicePort
    address: str  # "" = any
    port: int  # 0 = a free one; the answer says which
    inside: Fate  # for clients on this node and in its pods
    outside: Fate
    ranges: tuple[str, ...] | None = None  # whose sources may enter; None = all


class Settings(msgspec.Struct, frozen=True):
    """What holds for all."""

    inside: tuple[str, ...] = ()  # prefixes that count as this node and its pods
    tcp_idle_s: float = 432_000.0  # the kernel's nf_conntrack_tcp_timeout_established
    tcp_half_closed_s: float = 3_600.0  # as kube-proxy sets nf_conntrack_tcp_timeout_close_wait
    udp_s: float = 30.0  # nf_conntrack_udp_timeout: nobody answered yet
    udp_stream_s: float = 120.0  # nf_conntrack_udp_timeout_stream


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The proxy's first word on every connection."""

    build: str
    pid: int
    settings: Settings
    services: dict[str, ServicePort]
    listeners: dict[str, Listener]
    ports: dict[str, int]


class Update(msgspec.Struct, frozen=True, tag=True):
    """What to change; deletes come last. Connections are never cut."""

    settings: Settings | None = None
    services: dict[str, ServicePort] = {}
    listeners: dict[str, Listener] = {}
    gone_services: list[str] = []
    gone_listeners: list[str] = []


class Done(msgspec.Struct, frozen=True, tag=True):
    """Answer to an update."""

    ports: dict[str, int]  # of the listeners in the update that listen
    problems: dict[str, str]  # of those that don't


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Ask for ``Counts``."""


class Counts(msgspec.Struct, frozen=True, tag=True):
    """What the proxy did since it began."""

    connections: int = 0  # TCP, accepted
    flows: int = 0  # UDP
    open_connections: int = 0
    open_flows: int = 0
    retries: int = 0  # a backend did not answer and the next one was tried
    failures: int = 0  # no backend answered
    limits: int = 0  # accepts and flows put off for want of descriptors


class HandOver(msgspec.Struct, frozen=True, tag=True):
    """Give your sockets to me, serve what you have, and end."""


class Heritage(msgspec.Struct, frozen=True, tag=True):
    """Answer to ``HandOver``; one message with descriptors follows for every ``FDS_MAX`` of ``listeners``."""

    listeners: list[str]
    affinity: dict[str, list[tuple[str, str, int, float]]]  # service: client, backend, seconds ago


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End now."""


#: SCM_MAX_FD is 253.
FDS_MAX = 250

Message = Hello | Update | Done | Ask | Counts | HandOver | Heritage | Stop

_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)


def build() -> str:
    """Return what tells one build of the proxy from another: the version, and a digest of its code."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"{ebpfproxy.__version__}-{digest.hexdigest()}"


def encode(message: Message) -> bytes:
    """Return ``message`` with its length before it."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def length(head: bytes) -> int:
    """Return the length of the body that follows ``head``, four bytes."""
    size: int = _LENGTH.unpack(head)[0]
    return size


def decode(body: bytes) -> Message:
    """Return the message in ``body``.

    Raises:
        DecodeError: of msgspec; it is another version's, or none.
    """
    message: Message = _decoder.decode(body)
    return message


def receive(connection: socket.socket) -> Message:
    """Return the next message of a blocking socket.

    Raises:
        OSError: it broke; EOFError: it was closed.
    """
    return decode(_exactly(connection, length(_exactly(connection, _LENGTH.size))))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a name for a socket's ``path`` that fits into sockaddr_un's 108 bytes, however long it is."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Return a connection to the proxy that listens at ``path``.

    Raises:
        OSError: there is none.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        with short_path(path) as name:
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection
