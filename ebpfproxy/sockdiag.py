"""UDP sockets of this machine's processes, and an end for those that lead to a backend that is gone.

A UDP socket that connected keeps its peer for life: nothing tells the process that the backend went, and each
datagram is lost. ``ss --kill`` ends such a socket, and so do we: the process gets ECONNABORTED and connects
anew. A pod's sockets are seen only from its own network namespace, which a thread enters for a moment.

Source: linux/sock_diag.h, linux/inet_diag.h; sock_diag(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21  # SOCK_DIAG_BY_FAMILY, SOCK_DESTROY
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_ESTABLISHED = 1 << 1  # what a connected UDP socket counts as
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_HEAD = struct.Struct("=BBBBI")  # struct inet_diag_req_v2 without id
# struct inet_diag_sockid: ports and addresses in network byte order, interface, cookie (lower half first)
_ID = struct.Struct("=2s2s16s16sIII")
_ID_AT = 4  # in struct inet_diag_msg
_SO_COOKIE = 57  # asm-generic/socket.h
_V4_MAPPED = bytes(10) + b"\xff\xff"
_TIMEOUT_S = 5


class Peer(NamedTuple):
    """Where a socket is connected to, as the BPF maps write it."""

    address: bytes  # 16; IPv4 as ::ffff:a.b.c.d
    port: bytes  # 2, network byte order


# --- namespaces


def namespaces(cgroup: Path) -> dict[tuple[int, int], Path]:
    """Return the network namespaces of a cgroup's processes and of those below it.

    Returns:
        By device and inode: the way in, through one of its processes.
    """
    found: dict[tuple[int, int], Path] = {}
    for file in [cgroup / "cgroup.procs", *cgroup.rglob("cgroup.procs")]:
        with contextlib.suppress(OSError):  # removed meanwhile; a threaded cgroup
            for pid in file.read_text().split():
                path = Path("/proc") / pid / "ns" / "net"
                with contextlib.suppress(OSError):  # ended meanwhile
                    status = path.stat()
                    found.setdefault((status.st_dev, status.st_ino), path)
    return found


def _open_in(namespace: Path) -> socket.socket:
    """Return a socket that asks about the sockets of another network namespace.

    Raises:
        OSError: it is gone, or this process may not enter it.
    """
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        try:
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # os.setns came with Python 3.12.
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            finally:
                os.close(descriptor)
            made.append(_open())
        except OSError as error:
            failed.append(error)

    # A thread of its own: where it is ends with it.
    thread = threading.Thread(target=enter, name="netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _open() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    made.settimeout(_TIMEOUT_S)
    return made


# --- what it is for


def close_udp(doomed: Mapping[int, Peer], where: Iterable[Path]) -> int:
    """End UDP sockets that are still connected to where they are said to be; return how many.

    Args:
        doomed: socket cookie -> its peer; one that is connected elsewhere by now is left alone.
        where: network namespaces to look in.

    Raises:
        KernelError: a namespace can't be entered or the kernel refuses; the others are done.
    """
    ended, failure = 0, None
    for namespace in where if doomed else ():
        try:
            with _open_in(namespace) as connection:
                for family, key in list(_doomed(connection, doomed)):
                    ended += _destroy(connection, family, key)
        except (FileNotFoundError, ProcessLookupError):
            continue  # its last process ended meanwhile
        except OSError as error:
            failure = KernelError(
                f"close UDP sockets to gone backends in {namespace}: {error.strerror}", error.errno or 0
            )
    if failure:
        raise failure
    return ended


def why_not() -> str | None:
    """Return why UDP sockets can't be ended here, None if they can; tries it on a socket of its own."""
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim,
            _open() as connection,
        ):
            victim.connect(("127.0.0.1", 9))
            cookie = int.from_bytes(victim.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
            mine = {cookie: Peer(_V4_MAPPED + bytes([127, 0, 0, 1]), (9).to_bytes(2, "big"))}
            found = list(_doomed(connection, mine))
            if not found:
                return "the kernel does not list UDP sockets (CONFIG_INET_UDP_DIAG)"
            _destroy(connection, *found[0])
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return "the kernel does not end sockets for others (CONFIG_INET_DIAG_DESTROY)"
        return f"UDP sockets can't be ended: {error.strerror}"
    return None


def _doomed(connection: socket.socket, doomed: Mapping[int, Peer]) -> Iterator[tuple[int, bytes]]:
    """Yield family and ``struct inet_diag_sockid`` of the sockets that have to go."""
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _HEAD.pack(family, socket.IPPROTO_UDP, 0, 0, _ESTABLISHED) + bytes(_ID.size)
        for message in _ask(connection, _BY_FAMILY, _DUMP, body):
            key = message[_ID_AT : _ID_AT + _ID.size]
            _, port, _, address, _, low, high = _ID.unpack(key)
            if family == socket.AF_INET:
                address = _V4_MAPPED + address[:4]
            if doomed.get(high << 32 | low) == (address, port):
                yield family, key


def _destroy(connection: socket.socket, family: int, key: bytes) -> bool:
    """End one socket; return False if it ended by itself meanwhile."""
    body = _HEAD.pack(family, socket.IPPROTO_UDP, 0, 0, _ESTABLISHED) + key
    try:
        for _ in _ask(connection, _DESTROY, _ACK, body):
            pass
    except FileNotFoundError:  # ENOENT
        return False
    return True


def _ask(connection: socket.socket, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Send a request; yield the bodies of its answer. An error of the kernel's is raised as OSError."""
    connection.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)
    while True:
        data, at = connection.recv(1 << 18), 0
        while at < len(data):
            size, answer, *_ = _HEADER.unpack_from(data, at)
            message = data[at + _HEADER.size : at + size]
            at += (size + 3) & ~3
            if answer == _DONE:
                return
            if answer == _ERROR:
                code = -struct.unpack_from("=i", message)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return
            yield message
