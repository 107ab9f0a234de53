"""The proxy process: ``python -m ebpfproxy.dataplane.userspace.proxy --socket PATH``.

It is a process of its own so that the agent may be killed, restarted and upgraded while connections go on.
The agent tells it over a unix socket what to serve. A proxy of another build takes over: it gets the sockets
that listen, so that not one connection request is lost, and the old process serves its connections until
they end.

SIGTERM: stop listening, end with the last connection. A second one: end now.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import log
from ebpfproxy.dataplane.userspace import gate, protocol, udp
from ebpfproxy.dataplane.userspace.balance import Balancer
from ebpfproxy.dataplane.userspace.hub import Hub
from ebpfproxy.dataplane.userspace.protocol import (
    Ask,
    Counts,
    Done,
    HandOver,
    Hello,
    Heritage,
    Listener,
    Stop,
    Update,
)
from ebpfproxy.dataplane.userspace.tcp import TcpAcceptor
from ebpfproxy.dataplane.userspace.udp import UdpReceiver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpfproxy.dataplane.userspace.protocol import Message, ServicePort

_log = log.get(__name__)

#: Connections that the kernel keeps until they are accepted; it allows net.core.somaxconn at most.
BACKLOG = 4096
#: Descriptors to ask for: 100,000 connections are far more than one process of Python can carry.
FDS_WANTED = 1 << 20
_EXPIRE_S = 1.0
_TAKE_OVER_S = 10.0


class Proxy:
    """Serves what it is told, until it is told to end.

    Args:
        path: of the socket on which it is told.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hub = Hub(asyncio.get_running_loop())
        self._doors: dict[str, TcpAcceptor | UdpReceiver] = {}
        self._control: socket.socket | None = None
        self._ended = asyncio.Event()
        self._must_drain = self._is_told = False
        self._heirlooms: dict[str, socket.socket] = {}  # of the process before, until they are claimed
        self._build = protocol.build()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until everything has ended."""
        loop = self._hub.loop
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        self._take_over()
        self._control = self._listen()
        self._keep(loop.create_task(self._accept(self._control)))
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXPIRE_S):
                    await self._ended.wait()
            self._expire()
        self._close_control()

    # --- the agent's side ------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with protocol.short_path(self._path) as name:
            self._path.unlink(missing_ok=True)
            control.bind(name)
        self._path.chmod(0o600)
        control.listen()
        control.setblocking(False)
        return control

    def _close_control(self) -> None:
        if self._control is not None:
            self._hub.loop.remove_reader(self._control)
            self._control.close()
            self._control = None

    async def _accept(self, control: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while self._control is control:
                connection, _ = await self._hub.loop.sock_accept(control)
                connection.setblocking(False)
                self._keep(self._hub.loop.create_task(self._converse(connection)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, connection: socket.socket) -> None:
        loop = self._hub.loop
        with connection, contextlib.suppress(OSError, EOFError):
            await loop.sock_sendall(connection, protocol.encode(self._hello()))
            while True:
                size = protocol.length(await self._exactly(connection, 4))
                request = protocol.decode(await self._exactly(connection, size))
                if isinstance(request, HandOver):
                    self._hand_over(connection)
                    return
                answer = self._answer(request)
                if answer is None:
                    self._ended.set()
                    return
                await loop.sock_sendall(connection, protocol.encode(answer))

    async def _exactly(self, connection: socket.socket, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = await self._hub.loop.sock_recv(connection, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _hello(self) -> Hello:
        hub = self._hub
        ports = {key: _port(door.sock) for key, door in self._doors.items()}
        return Hello(self._build, os.getpid(), hub.settings, hub.services, hub.listeners, ports)

    def _answer(self, request: Message) -> Message | None:
        match request:
            case Update():
                return self._update(request)
            case Ask():
                return self._counts()
            case Stop():
                return None
            case _:
                raise EOFError(f"a request was expected, not {request}")

    def _counts(self) -> Counts:
        tally = self._hub.tally
        return Counts(
            connections=tally.connections,
            flows=tally.flows,
            open_connections=len(self._hub.connections) + tally.connecting,
            open_flows=sum(door.open_flows for door in self._doors.values()),
            retries=tally.retries,
            failures=tally.failures,
            limits=tally.limits,
        )

    # --- what to serve ---------------------------------------------------------------------------

    def _update(self, update: Update) -> Done:
        hub = self._hub
        problems: dict[str, str] = {}
        if update.settings is not None:
            hub.take(update.settings)
        hub.services.update(update.services)
        for key, listener in update.listeners.items():
            problem = self._open(key, listener, hub.services[listener.service])
            if problem:
                problems[key] = problem
        if update.settings is not None:  # who is inside may have changed
            for key, door in self._doors.items():
                self._guard(door.sock, hub.listeners[key])
        for key in update.gone_listeners:
            self._shut(key)
        for name in update.gone_services:
            hub.services.pop(name, None)
        for key, door in self._doors.items():
            if hub.listeners[key].service in update.services:
                door.follow()
        while update.listeners and self._heirlooms:  # nobody wants them any more
            self._heirlooms.popitem()[1].close()
        ports = {key: _port(self._doors[key].sock) for key in update.listeners if key in self._doors}
        return Done(ports, problems)

    def _open(self, key: str, listener: Listener, service: ServicePort) -> str:
        """Make a listener as it is to be; return what went wrong."""
        old = self._hub.listeners.get(key)
        if old is not None and (old.address, old.port) != (listener.address, listener.port):
            self._shut(key)
        try:
            door = self._doors.get(key)
            if door is not None:
                sock = door.sock
            elif key in self._heirlooms:
                sock = self._heirlooms.pop(key)
            else:
                sock = _bind(listener, service)
            self._guard(sock, listener)
        except OSError as error:
            where = f"{listener.address or 'any address'} port {listener.port}"
            return f"listen on {where} for {service.protocol}: {error.strerror}"
        self._hub.listeners[key] = listener
        if door is None:
            kind = TcpAcceptor if service.protocol == "TCP" else UdpReceiver
            self._doors[key] = kind(self._hub, key, sock)
        return ""

    def _shut(self, key: str) -> None:
        door = self._doors.pop(key, None)
        if door is not None:
            door.close()
        self._hub.listeners.pop(key, None)

    def _guard(self, sock: socket.socket, listener: Listener) -> None:
        walls = self._hub.walls(listener)
        family = 6 if sock.family == socket.AF_INET6 else 4
        try:
            gate.attach(sock, gate.program(family, walls) if walls else None)
        except PermissionError:
            # Linux of 2026 wants CAP_NET_ADMIN for one on a TCP socket: then the hub refuses by a reset.
            if not self._is_told:
                self._is_told = True
                _log.warning("without CAP_NET_ADMIN those whom a Service drops are reset instead, over TCP")

    # --- the end ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Listen no more; end with the last connection."""
        if self._must_drain:
            self._ended.set()
            return
        self._must_drain = True
        self._close_control()
        for key in list(self._doors):
            self._shut(key)
        self._expire()

    def _expire(self) -> None:
        self._hub.expire()
        now = self._hub.loop.time()
        for door in self._doors.values():
            door.expire(now)
        if self._must_drain:
            counts = self._counts()
            if not counts.open_connections + counts.open_flows:
                self._ended.set()

    def _hand_over(self, connection: socket.socket) -> None:
        """Give the sockets that listen to another process; its short wait for them is worth stopping for."""
        now = self._hub.loop.time()
        affinity = {
            name: [(client, *backend, now - last) for client, (backend, last) in balancer.affinity.items()]
            for name, balancer in self._hub.balancers.items()
            if balancer.affinity
        }
        keys = list(self._doors)
        connection.setblocking(True)
        connection.settimeout(_TAKE_OVER_S)
        connection.sendall(protocol.encode(Heritage(keys, affinity)))
        for start in range(0, len(keys), protocol.FDS_MAX):
            fds = [self._doors[key].sock.fileno() for key in keys[start : start + protocol.FDS_MAX]]
            socket.send_fds(connection, [b"\0"], fds)
        for door in self._doors.values():
            door.hand_over()
        self._must_drain = True
        self._close_control()
        _log.info("another process listens; %d connections go on here", len(self._hub.connections))

    def _take_over(self) -> None:
        """Serve what the proxy that runs does, on its sockets; not if none runs, or we differ too much.

        At once, not when the agent says so: it may wait for its Services, as while the API server is away.
        """
        try:
            with protocol.connect(self._path, _TAKE_OVER_S) as connection:
                hello = protocol.receive(connection)
                assert isinstance(hello, Hello)
                connection.sendall(protocol.encode(HandOver()))
                heritage = protocol.receive(connection)
                assert isinstance(heritage, Heritage)
                sockets: list[socket.socket] = []
                while len(sockets) < len(heritage.listeners):
                    _, fds, _, _ = socket.recv_fds(connection, 1, protocol.FDS_MAX)
                    if not fds:
                        raise EOFError
                    sockets += [socket.socket(fileno=fd) for fd in fds]
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except (OSError, EOFError, msgspec.DecodeError) as error:
            _log.warning("take over from the proxy that runs: %s; its ports are opened anew", error)
            return
        for sock in sockets:
            sock.setblocking(False)
        self._inherit_affinity(heritage)
        self._heirlooms = dict(zip(heritage.listeners, sockets, strict=True))
        done = self._update(Update(hello.settings, hello.services, hello.listeners))
        for problem in done.problems.values():
            _log.warning(problem)

    def _inherit_affinity(self, heritage: Heritage) -> None:
        now = self._hub.loop.time()
        for name, clients in heritage.affinity.items():
            balancer = self._hub.balancers[name] = Balancer()
            for client, address, port, ago_s in clients:
                balancer.bind(client, (address, port), now - ago_s)


def _port(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def _bind(listener: Listener, service: ServicePort) -> socket.socket:
    """Return a socket that listens, or receives, where ``listener`` says."""
    family = socket.AF_INET6 if service.family == 6 else socket.AF_INET
    kind = socket.SOCK_STREAM if service.protocol == "TCP" else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may be in TIME_WAIT
        else:
            udp.prepare(sock)
        sock.bind((listener.address or ("::" if service.family == 6 else "0.0.0.0"), listener.port))  # noqa: S104
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def raise_limits() -> int:
    """Allow this process as many descriptors as it may have; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in ((max(hard, FDS_WANTED),) * 2, (hard, hard)):  # the first takes CAP_SYS_RESOURCE
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, wanted)
            return wanted[0]
    return soft


async def _main(path: Path) -> None:
    await Proxy(path).run()


def main(arguments: Sequence[str]) -> int:
    """Run the proxy; return the exit status."""
    parser = argparse.ArgumentParser(prog="ebpfproxy userspace proxy", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where the agent talks to it")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    log.setup(options.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the agent's terminal may go
    raise_limits()
    gc.freeze()
    asyncio.run(_main(options.socket))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
