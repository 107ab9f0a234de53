"""IPVS: virtual servers and their destinations in this network namespace.

Writing is by operations, which are values, many of them in one system call: pyroute2 sends one at a time, and
a node with 5,000 Services has tens of thousands.

Source: linux/ip_vs.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.errors import KernelError, UnsupportedError
from ebpfproxy.model.addresses import endpoint
from ebpfproxy.netlink.wire import REQUEST, Closing, Message, Wire, attributes, fail, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

_NETLINK_GENERIC, _CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 16, 3, 1, 2
_GENERIC = struct.Struct("=BBH")  # struct genlmsghdr
PERSISTENT, HASHED, SCHED_1, SCHED_2 = 0x1, 0x2, 0x8, 0x10
MH_PORT = SCHED_2  # mh hashes the client's port too
_MASQUERADE = 0  # IP_VS_CONN_F_MASQ: address translation
_EVERY_FLAG = 0xFFFFFFFF
# IPVS_CMD_*
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST, _SET_CONFIG = 5, 6, 7, 8, 12
# IPVS_CMD_ATTR_*
_SERVICE, _DEST, _TIMEOUT_TCP = 1, 2, 4
# IPVS_SVC_ATTR_*
_AF, _PROTOCOL, _ADDRESS, _PORT, _SCHEDULER, _FLAGS, _TIMEOUT, _NETMASK = 1, 2, 3, 4, 6, 7, 8, 9
# IPVS_DEST_ATTR_*
_D_ADDRESS, _D_PORT, _D_FORWARD, _D_WEIGHT, _D_UPPER, _D_LOWER = 1, 2, 3, 4, 5, 6
_D_ACTIVE, _D_INACTIVE, _D_FAMILY = 7, 8, 11


class Server(NamedTuple):
    """Names a virtual server."""

    protocol: int  # IPPROTO_*
    address: str  # canonical
    port: int


class Settings(NamedTuple):
    """How a virtual server works."""

    scheduler: str
    flags: int = 0
    timeout_s: int = 0  # of persistence


class Destination(NamedTuple):
    """Names a destination of a virtual server."""

    server: Server
    address: str
    port: int


class Load(NamedTuple):
    """A destination's weight and connections."""

    weight: int
    connections: int  # active and inactive


class Timeouts(NamedTuple):
    """How long IPVS remembers connections, in seconds; 0 = as it is."""

    tcp_s: int = 0
    tcp_fin_s: int = 0
    udp_s: int = 0


class Operation(NamedTuple):
    """One change."""

    what: str  # in an error's words
    command: int
    body: bytes
    allowed: tuple[int, ...] = ()  # errors that mean that it is done already


# --- what to write: pure ------------------------------------------------------------------------------------


def set_server(server: Server, settings: Settings, *, is_there: bool) -> Operation:
    """Return what makes or changes a virtual server."""
    body = _key(server) + b"".join(
        (
            pack(_SCHEDULER, settings.scheduler.encode() + b"\0"),
            pack(_FLAGS, struct.pack("=II", settings.flags, _EVERY_FLAG)),
            pack(_TIMEOUT, _u32(settings.timeout_s)),
            pack(_NETMASK, _netmask(server.address)),
        )
    )
    what = f"write virtual server {_text(server)} with scheduler {settings.scheduler}"
    return Operation(what, _SET_SERVICE if is_there else _NEW_SERVICE, pack(_SERVICE, body, is_nested=True))


def remove_server(server: Server) -> Operation:
    """Return what removes a virtual server and its destinations."""
    body = pack(_SERVICE, _key(server), is_nested=True)
    return Operation(f"remove virtual server {_text(server)}", _DEL_SERVICE, body, (errno.ESRCH,))


def set_destination(destination: Destination, weight: int, *, is_there: bool) -> Operation:
    """Return what makes or changes a destination."""
    server = destination.server
    body = pack(_SERVICE, _key(server), is_nested=True) + pack(
        _DEST,
        _destination(destination)
        + pack(_D_FORWARD, _u32(_MASQUERADE))
        + pack(_D_WEIGHT, _u32(weight))
        + pack(_D_UPPER, _u32(0))
        + pack(_D_LOWER, _u32(0)),
        is_nested=True,
    )
    what = f"write destination {_text(destination)} of {_text(server)}"
    return Operation(what, _SET_DEST if is_there else _NEW_DEST, body)


def remove_destination(destination: Destination) -> Operation:
    """Return what removes a destination."""
    server = destination.server
    body = pack(_SERVICE, _key(server), is_nested=True)
    body += pack(_DEST, _destination(destination), is_nested=True)
    what = f"remove destination {_text(destination)} of {_text(server)}"
    return Operation(what, _DEL_DEST, body, (errno.ENOENT, errno.ESRCH))


def set_timeouts(timeouts: Timeouts) -> Operation:
    """Return what changes how long connections are remembered."""
    body = b"".join(pack(_TIMEOUT_TCP + number, _u32(value)) for number, value in enumerate(timeouts))
    return Operation("set the timeouts of IPVS", _SET_CONFIG, body)


def _key(server: Server) -> bytes:
    return b"".join(
        (
            pack(_AF, struct.pack("=H", _family(server.address))),
            pack(_PROTOCOL, struct.pack("=H", server.protocol)),
            pack(_ADDRESS, _address(server.address)),
            pack(_PORT, struct.pack("!H", server.port)),
        )
    )


def _destination(destination: Destination) -> bytes:
    return b"".join(
        (
            pack(_D_ADDRESS, _address(destination.address)),
            pack(_D_PORT, struct.pack("!H", destination.port)),
            pack(_D_FAMILY, struct.pack("=H", _family(destination.address))),
        )
    )


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _address(address: str) -> bytes:
    """Return the bytes of a union nf_inet_addr."""
    return socket.inet_pton(_family(address), address).ljust(16, b"\0")


def _netmask(address: str) -> bytes:
    """Return what makes persistence look at whole client addresses: a mask, of IPv6 a prefix length."""
    return _u32(128) if ":" in address else b"\xff" * 4


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)


def _text(server: Server | Destination) -> str:
    return endpoint(server.address, server.port)


# --- the kernel ---------------------------------------------------------------------------------------------


class Ipvs(Closing):
    """A socket to IPVS.

    Raises:
        UnsupportedError: the kernel has none.
        KernelError: it refused.
    """

    def __init__(self) -> None:
        self._wire = Wire(_NETLINK_GENERIC, "open IPVS")
        head = _GENERIC.pack(_GET_FAMILY, 1, 0)
        request = Message(_CONTROL, head + pack(_FAMILY_NAME, b"IPVS\0"))
        try:
            (answer,) = self._wire.dump(request, "open IPVS", REQUEST)
        except KernelError as error:
            self._wire.close()
            if error.errno == errno.ENOENT:
                raise UnsupportedError("this kernel has no IPVS (module ip_vs)") from error
            raise
        (self._family,) = struct.unpack("=H", attributes(answer[_GENERIC.size :])[_FAMILY_ID])

    def close(self) -> None:
        """Close it; what was made stays."""
        self._wire.close()

    def run(self, operations: Sequence[Operation]) -> None:
        """Do operations in order; those after one that fails are done all the same.

        Raises:
            KernelError: some failed; the message names the first.
        """
        errors = self._wire.send([self._message(each.command, each.body) for each in operations])
        failed = [
            (code, each.what)
            for code, each in zip(errors, operations, strict=True)
            if code and code not in each.allowed
        ]
        if failed:
            code, what = failed[0]
            fail(
                code, what if len(failed) == 1 else f"{len(failed)} changes of IPVS failed; the first: {what}"
            )

    def servers(self) -> dict[Server, Settings]:
        """Return the virtual servers; those for marks of packets are left out."""
        found = {}
        for body in self._wire.dump(self._message(_GET_SERVICE), "list virtual servers"):
            service = attributes(attributes(body[_GENERIC.size :]).get(_SERVICE, b""))
            if _ADDRESS not in service:
                continue
            flags, _ = struct.unpack("=II", service[_FLAGS])
            flags &= ~HASHED
            (timeout_s,) = struct.unpack("=I", service[_TIMEOUT])
            scheduler = service.get(_SCHEDULER, b"").rstrip(b"\0").decode()
            found[_server(service)] = Settings(scheduler, flags, timeout_s if flags & PERSISTENT else 0)
        return found

    def destinations(self, server: Server) -> dict[Destination, Load]:
        """Return the destinations of a virtual server."""
        found = {}
        request = self._message(_GET_DEST, pack(_SERVICE, _key(server), is_nested=True))
        for body in self._wire.dump(request, f"list the destinations of {_text(server)}"):
            dest = attributes(attributes(body[_GENERIC.size :]).get(_DEST, b""))
            if _D_ADDRESS not in dest:
                continue
            (family,) = (
                struct.unpack("=H", dest[_D_FAMILY]) if _D_FAMILY in dest else (_family(server.address),)
            )
            name = Destination(server, _read(family, dest[_D_ADDRESS]), int.from_bytes(dest[_D_PORT], "big"))
            weight, active, inactive = (
                struct.unpack("=I", dest[kind])[0] for kind in (_D_WEIGHT, _D_ACTIVE, _D_INACTIVE)
            )
            found[name] = Load(weight, active + inactive)
        return found

    def _message(self, command: int, body: bytes = b"") -> Message:
        return Message(self._family, _GENERIC.pack(command, 1, 0) + body)


def _server(service: dict[int, bytes]) -> Server:
    family, protocol = (struct.unpack("=H", service[kind])[0] for kind in (_AF, _PROTOCOL))
    return Server(protocol, _read(family, service[_ADDRESS]), int.from_bytes(service[_PORT], "big"))


def _read(family: int, packed: bytes) -> str:
    return socket.inet_ntop(family, packed[: 16 if family == socket.AF_INET6 else 4])
