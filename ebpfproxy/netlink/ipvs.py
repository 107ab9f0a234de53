"""IPVS: virtual servers and their destinations in this network namespace.

Traps of pyroute2 0.9: "update" sends the delete command, so it is "set" here; a destination's default is
direct routing, so the forwarding method is always named; the netmask of an IPv6 service is a prefix length in
the byte order of the machine, which has to be written as if it were an IPv4 address.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ebpfproxy.errors import KernelError, UnsupportedError
from ebpfproxy.model.addresses import canonical

if TYPE_CHECKING:
    from types import TracebackType

# linux/ip_vs.h
PERSISTENT, HASHED, SCHED_1, SCHED_2 = 0x1, 0x2, 0x8, 0x10
MH_PORT = SCHED_2  # mh hashes the client's port too
_MASQUERADE = 0  # IP_VS_CONN_F_MASQ: address translation
_EVERY_FLAG = 0xFFFFFFFF


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


class Ipvs:
    """A socket to IPVS.

    Raises:
        UnsupportedError: the kernel has none.
        KernelError: it refused.
    """

    def __init__(self) -> None:
        from pyroute2 import IPVS
        from pyroute2.netlink.exceptions import NetlinkError

        class Socket(IPVS):  # type: ignore[misc] # pyroute2 has no types
            def __init__(self) -> None:
                try:
                    super().__init__()
                except BaseException:
                    self.close()  # pyroute2 leaves its event loop open when the kernel has no IPVS
                    raise

        try:
            self._socket = Socket()
        except (NetlinkError, OSError) as error:
            code = getattr(error, "code", None) or getattr(error, "errno", None) or 0
            if code in (errno.ENOENT, errno.EOPNOTSUPP):
                raise UnsupportedError("this kernel has no IPVS (module ip_vs)") from error
            raise KernelError(f"open IPVS: {os.strerror(code)}", code) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; what was made stays."""
        self._socket.close()

    # -- reading -----------------------------------------------------------------------------------

    def servers(self) -> dict[Server, Settings]:
        """Return the virtual servers; those for marks of packets are left out."""
        found = {}
        for message in self._do("list virtual servers", "service", "dump"):
            service = message.get_attr("IPVS_CMD_ATTR_SERVICE")
            if service is None or service.get_attr("IPVS_SVC_ATTR_ADDR") is None:
                continue
            flags = service.get_attr("IPVS_SVC_ATTR_FLAGS")["flags"] & ~HASHED
            server = Server(
                service.get_attr("IPVS_SVC_ATTR_PROTOCOL"),
                canonical(service.get_attr("IPVS_SVC_ATTR_ADDR")),
                service.get_attr("IPVS_SVC_ATTR_PORT"),
            )
            found[server] = Settings(
                service.get_attr("IPVS_SVC_ATTR_SCHED_NAME"),
                flags,
                service.get_attr("IPVS_SVC_ATTR_TIMEOUT") if flags & PERSISTENT else 0,
            )
        return found

    def destinations(self, server: Server) -> dict[Destination, Load]:
        """Return the destinations of a virtual server."""
        found = {}
        for message in self._do(f"list the destinations of {_text(server)}", "dest", "dump", _key(server)):
            dest = message.get_attr("IPVS_CMD_ATTR_DEST")
            if dest is None:
                continue
            name = Destination(
                server, canonical(dest.get_attr("IPVS_DEST_ATTR_ADDR")), dest.get_attr("IPVS_DEST_ATTR_PORT")
            )
            found[name] = Load(
                dest.get_attr("IPVS_DEST_ATTR_WEIGHT"),
                dest.get_attr("IPVS_DEST_ATTR_ACTIVE_CONNS") + dest.get_attr("IPVS_DEST_ATTR_INACT_CONNS"),
            )
        return found

    # -- writing -----------------------------------------------------------------------------------

    def set_server(self, server: Server, settings: Settings, *, is_there: bool) -> None:
        """Make or change a virtual server."""
        self._do(
            f"write virtual server {_text(server)} with scheduler {settings.scheduler}",
            *("service", "set" if is_there else "add", _service(server, settings)),
        )

    def remove_server(self, server: Server) -> None:
        """Remove a virtual server and its destinations; it may be gone already."""
        self._do(f"remove virtual server {_text(server)}", "service", "del", _key(server), gone=errno.ESRCH)

    def set_destination(self, destination: Destination, weight: int, *, is_there: bool) -> None:
        """Make or change a destination."""
        self._do(
            f"write destination {_text(destination)} of {_text(destination.server)}",
            *("dest", "set" if is_there else "add", _key(destination.server), _dest(destination, weight)),
        )

    def remove_destination(self, destination: Destination) -> None:
        """Remove a destination; it may be gone already."""
        self._do(
            f"remove destination {_text(destination)} of {_text(destination.server)}",
            *("dest", "del", _key(destination.server), _dest(destination, 0)),
            gone=errno.ENOENT,
        )

    def set_timeouts(self, timeouts: Timeouts) -> None:
        """Change how long connections are remembered."""
        from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
        from pyroute2.netlink.exceptions import NetlinkError
        from pyroute2.netlink.generic import ipvs

        message = ipvs.ipvsmsg()
        message["cmd"], message["version"] = ipvs.IPVS_CMD_SET_CONFIG, ipvs.GENL_VERSION
        names = ("TCP", "TCP_FIN", "UDP")
        message["attrs"] = [
            (f"IPVS_CMD_ATTR_TIMEOUT_{name}", struct.pack("=I", value))
            for name, value in zip(names, timeouts, strict=True)
        ]
        try:
            self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK)
        except NetlinkError as error:
            raise KernelError(f"set the timeouts of IPVS: {os.strerror(error.code)}", error.code) from error

    def _do(self, what: str, noun: str, verb: str, *arguments: Any, gone: int | None = None) -> list[Any]:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            return list(getattr(self._socket, noun)(verb, *arguments) or ())
        except NetlinkError as error:
            if gone is not None and error.code in (gone, errno.ESRCH):
                return []
            raise KernelError(f"{what}: {os.strerror(error.code)}", error.code) from error


def _text(server: Server | Destination) -> str:
    return f"[{server.address}]:{server.port}" if ":" in server.address else f"{server.address}:{server.port}"


def _netmask(address: str) -> str:
    """Return what makes persistence look at whole client addresses."""
    return socket.inet_ntoa(struct.pack("=I", 128)) if ":" in address else "255.255.255.255"


def _key(server: Server) -> Any:
    from pyroute2 import IPVSService

    return IPVSService(addr=server.address, port=server.port, protocol=server.protocol)


def _service(server: Server, settings: Settings) -> Any:
    from pyroute2 import IPVSService

    return IPVSService(
        addr=server.address,
        port=server.port,
        protocol=server.protocol,
        sched_name=settings.scheduler,
        flags={"flags": settings.flags, "mask": _EVERY_FLAG},
        timeout=settings.timeout_s,
        netmask=_netmask(server.address),
    )


def _dest(destination: Destination, weight: int) -> Any:
    from pyroute2 import IPVSDest

    return IPVSDest(addr=destination.address, port=destination.port, weight=weight, fwd_method=_MASQUERADE)
