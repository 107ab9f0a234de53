"""What all listeners of the proxy share: settings, Service ports, who may go where, connections, counts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebpfproxy.dataplane.userspace.balance import Balancer
from ebpfproxy.dataplane.userspace.protocol import Fate, Listener, ServicePort, Settings, Target
from ebpfproxy.dataplane.userspace.pump import Connection, Pipes

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Iterable, Sequence

_LOOPBACK = ("127.0.0.0/8", "::1/128")
#: Addresses whose answer is remembered.
_KNOWN_MAX = 65536


class Prefixes:
    """A set of prefixes that is asked about the same addresses again and again."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(prefix) for prefix in prefixes]
        self._known: dict[str, bool] = {}

    def __contains__(self, address: str) -> bool:
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            parsed = ipaddress.ip_address(address.partition("%")[0])
            known = self._known[address] = any(parsed in network for network in self._networks)
        return known


@dataclass(slots=True)
class Tally:
    """Counts since the start, but for ``connecting``, which is now."""

    connections: int = 0
    flows: int = 0
    connecting: int = 0
    retries: int = 0
    failures: int = 0
    limits: int = 0


class Hub:
    """The proxy's state, but for its sockets that listen."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pipes = Pipes()
        self.tally = Tally()
        self.services: dict[str, ServicePort] = {}
        self.listeners: dict[str, Listener] = {}
        self.balancers: dict[str, Balancer] = {}
        self.connections: dict[Connection, tuple[Balancer, Target]] = {}
        self._ranges: dict[tuple[str, ...], Prefixes] = {}
        self.take(Settings())

    def take(self, settings: Settings) -> None:
        """Work with ``settings`` from now on."""
        self.settings = settings
        self._inside = Prefixes((*settings.inside, *_LOOPBACK))

    def walls(self, listener: Listener) -> list[Sequence[str]]:
        """Return what a source must be in, each, so that a listener does not drop it."""
        walls: list[Sequence[str]] = []
        if listener.ranges is not None:
            walls.append(listener.ranges)
        if listener.outside is Fate.DROP:
            is_closed = listener.inside is Fate.DROP
            walls.append(() if is_closed else (*self.settings.inside, *_LOOPBACK))
        return walls

    def order(self, key: str, client: tuple[str, int]) -> Sequence[Target]:
        """Return the backends for a new connection on a listener in the order to try; () = it may not be."""
        listener = self.listeners.get(key)
        service = self.services.get(listener.service) if listener else None
        if listener is None or service is None or not self._may_enter(listener, client[0]):
            return ()
        fate = listener.inside if client[0] in self._inside else listener.outside
        targets = {Fate.CLUSTER: service.cluster, Fate.LOCAL: service.local}.get(fate, ())
        if not targets:
            return ()
        balancer, now = self.balancers.setdefault(listener.service, Balancer()), self.loop.time()
        tried = balancer.order(targets, service.scheduler, service.affinity_s, client, key, now)
        if service.affinity_s:  # bound now: its next connection may come before this one is answered
            balancer.bind(client[0], tried[0][:2], now)
        return tried

    def opened(self, key: str, client: str, target: Target) -> Balancer:
        """Note that a client has a backend; return who is to be told of the end (``Balancer.closed``)."""
        name = self.listeners[key].service if key in self.listeners else ""
        balancer = self.balancers.setdefault(name, Balancer()) if name in self.services else Balancer()
        if name in self.services and self.services[name].affinity_s:
            balancer.bind(client, target[:2], self.loop.time())
        balancer.opened(target)
        return balancer

    def join(self, client: socket.socket, backend: socket.socket, balancer: Balancer, target: Target) -> None:
        """Let two sockets talk until they have done."""
        connection = Connection(self.loop, self.pipes, client, backend, self._leave)
        self.connections[connection] = (balancer, target)

    def _leave(self, connection: Connection) -> None:
        balancer, target = self.connections.pop(connection)
        balancer.closed(target)

    def expire(self) -> None:
        """End connections that were idle too long, and forget clients that were away too long."""
        now, settings = self.loop.time(), self.settings
        for connection in list(self.connections):
            is_half = connection.is_half_closed
            if now - connection.active > (settings.tcp_half_closed_s if is_half else settings.tcp_idle_s):
                connection.abort()
        for name in [name for name in self.balancers if name not in self.services]:
            del self.balancers[name]
        for name, balancer in self.balancers.items():
            balancer.expire(self.services[name].affinity_s, now)

    def _may_enter(self, listener: Listener, address: str) -> bool:
        if listener.ranges is None:
            return True
        return address in self._ranges.setdefault(listener.ranges, Prefixes(listener.ranges))
