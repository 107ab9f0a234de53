"""The HTTP servers: health of the agent and of Services with a healthCheckNodePort, metrics, desired state.

All of them live in one background thread with an asyncio loop (pyroute2 imports asyncio anyway): a
thousand listeners need no threads, a slow client costs a timer. The agent hands over a ``Snapshot`` and goes
on; it never waits for this thread.

Source: kube-proxy's answers, as of Kubernetes 1.35. One thing is stricter: an agent whose loop stands still,
or whose very first sync goes on failing, is unhealthy, too.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ebpfproxy import log, metrics
from ebpfproxy.diff import diff
from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.model.addresses import endpoint
from ebpfproxy.model.services import DesiredState, Readiness, Service

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Iterable, Mapping

    from ebpfproxy.store import Reach

_log = log.get(__name__)

_RETRY_S = 5.0  # after a port could not be bound; kube-proxy's number
_CLIENT_S = 10.0  # a client that has not sent its request and read the answer by then is left
_HEAD_MAX = 16 * 1024  # bytes of a request's head
_CLIENTS_MAX = 200  # at once; one more, and the oldest is left
_STUCK_S = 60.0  # the agent's loop comes round every second
_CLOSE_S = 5.0  # how long the thread may take to end
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_MSGPACK = "application/msgpack"
# Go's zero time, which is what kube-proxy shows before its first sync.
_NEVER = "0001-01-01T00:00:00Z"


class Bind(NamedTuple):
    """Where to listen."""

    host: str  # "" = every address of this host, both families; a path: a unix socket, for root alone
    port: int = 0


class Site(NamedTuple):
    """What answers there."""

    kind: str  # healthz | metrics | service | state
    namespace: str = ""
    name: str = ""


class Snapshot(msgspec.Struct, frozen=True):
    """The agent at one moment."""

    healthz_at: Bind | None = None
    metrics_at: Bind | None = None
    state_at: Bind | None = None
    must_bind: bool = False  # an agent that can't bind one of the first two shall end
    hosts: tuple[str, ...] = ("",)  # where healthCheckNodePorts are
    state: DesiredState | None = None  # as it was last programmed
    reach: Reach | None = None  # of an API server; None: Services come from files
    is_node_eligible: bool = True  # not being deleted
    late_after_s: float = 60.0
    seen: float = 0.0  # when the agent's loop came round, monotonic
    waiting_since: float | None = None  # what the oldest change that is not programmed yet is from, monotonic
    facts: metrics.Facts = metrics.Facts()

    def is_healthy(self, now: float) -> bool:
        """Return whether changes reach the kernel in time; ``now`` is monotonic."""
        is_late = self.waiting_since is not None and now - self.waiting_since >= self.late_after_s
        return not is_late and now - self.seen < max(_STUCK_S, self.late_after_s)


class Response(NamedTuple):
    """An answer."""

    status: int
    body: bytes
    content_type: str = _JSON
    headers: tuple[tuple[str, str], ...] = ()


# --- pure: what to answer ----------------------------------------------------------------------------


class LocalEndpoints(NamedTuple):
    """What a healthCheckNodePort tells."""

    port: int
    ready: int


def local_endpoints(services: Iterable[Service]) -> dict[Site, LocalEndpoints]:
    """Return the Services with a healthCheckNodePort and how many endpoints they have here.

    Counted are addresses that are ready, on this node and not drained, each once however many ports it
    has. Of a dual-stack Service the family with more counts: the others are the same Pods.
    """
    addresses: dict[Site, dict[int, set[str]]] = {}
    ports: dict[Site, int] = {}
    for service in services:
        if service.health_check_node_port:
            site = Site("service", service.name.namespace, service.name.name)
            ports[site] = service.health_check_node_port
            addresses.setdefault(site, {}).setdefault(service.name.family, set()).update(
                each.address
                for each in service.backends
                if each.is_local and each.readiness is Readiness.READY and each.weight
            )
    return {
        site: LocalEndpoints(port, max(len(found) for found in addresses[site].values()))
        for site, port in ports.items()
    }


def sites(snapshot: Snapshot, local: Mapping[Site, LocalEndpoints]) -> dict[Bind, Site]:
    """Return who must listen where."""
    wanted = {Bind(host, each.port): site for site, each in local.items() for host in snapshot.hosts}
    if snapshot.metrics_at:
        wanted[snapshot.metrics_at] = Site("metrics")
    if snapshot.healthz_at:
        wanted[snapshot.healthz_at] = Site("healthz")
    if snapshot.state_at:
        wanted[snapshot.state_at] = Site("state")
    return wanted


def service_response(site: Site, count: int, *, is_healthy: bool) -> Response:
    """Return what a load balancer hears of a Service."""
    body = {
        "service": {"namespace": site.namespace, "name": site.name},
        "localEndpoints": count,
        "serviceProxyHealthy": is_healthy,
    }
    return Response(
        200 if count and is_healthy else 503,
        json.dumps(body, indent="\t").encode(),
        headers=(("X-Load-Balancing-Endpoint-Weight", str(count)),),
    )


def agent_response(snapshot: Snapshot, now: float, wall: float, *, with_node: bool) -> Response:
    """Return the answer of /healthz, and without the node that of /livez.

    Args:
        snapshot: the agent.
        now: monotonic.
        wall: Unix time.
        with_node: a node that is being deleted is unhealthy.
    """
    synced = snapshot.facts.synced
    is_healthy = snapshot.is_healthy(now)
    is_fine = is_healthy and (snapshot.is_node_eligible or not with_node)
    body: dict[str, object] = {
        # kube-proxy: "recent" while all is well, even if there was nothing to do for long.
        "lastUpdated": _rfc3339(wall if is_fine else synced),
        "currentTime": _rfc3339(wall),
    }
    if with_node:
        body["nodeEligible"] = snapshot.is_node_eligible
    body["healthy"] = is_healthy
    if synced:
        family = {"lastUpdated": _rfc3339(synced), "healthy": is_healthy}
        body["status"] = {"IPv4": family, "IPv6": family}
    if snapshot.reach is not None:  # ours: how old the state is, while the server is away
        lost_at = snapshot.reach.lost_at
        body["source"] = {
            "lastUpdated": _rfc3339(wall if lost_at is None else lost_at),
            "connected": lost_at is None,
        }
    return Response(200 if is_fine else 503, json.dumps(body, separators=(",", ":")).encode())


def _rfc3339(wall: float) -> str:
    if not wall:
        return _NEVER
    return dt.datetime.fromtimestamp(wall, dt.UTC).isoformat().replace("+00:00", "Z")


_NOT_FOUND = Response(404, b"404 page not found\n", _TEXT)
_BAD_REQUEST = Response(400, b"400 Bad Request", _TEXT)


def encode(response: Response, *, with_body: bool = True) -> bytes:
    """Return an answer as it goes over the wire; the connection ends after it."""
    from http import HTTPStatus

    headers = (
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
        *response.headers,
    )
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode() + (response.body if with_body else b"")


# --- the thread --------------------------------------------------------------------------------------


class Health:
    """The servers; started by the first ``publish``.

    Args:
        read: reads what the dataplane counts, in a thread of its own.

    Attributes:
        problems: ports that can't be bound; tried again every few seconds.
        is_fatal: one of them ought to end the agent (bindAddressHardFail).
    """

    def __init__(self, read: Callable[[], metrics.Reading] = metrics.Reading) -> None:
        self.problems: tuple[str, ...] = ()
        self.is_fatal = False
        self._read = read
        self._snapshot = Snapshot()
        self._answers: dict[tuple[str, int], int] = {}
        self._servers: dict[Bind, asyncio.Server] = {}
        self._sites: dict[Bind, Site] = {}
        self._clients: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._local: tuple[tuple[Service, ...], dict[Site, LocalEndpoints]] = ((), {})  # services -> of them
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._is_running = threading.Event()

    # --- from the agent's thread

    def publish(self, snapshot: Snapshot) -> None:
        """Answer from this snapshot from now on."""
        before, self._snapshot = self._snapshot, snapshot
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="health", daemon=True)
            self._thread.start()
        elif _listening(before) != _listening(snapshot):
            self._wake()

    def close(self) -> None:
        """End the servers."""
        self._is_closing = True
        if self._thread is not None:
            self._wake()
            self._thread.join(_CLOSE_S)

    def _wake(self) -> None:
        if self._is_running.is_set():  # else it is about to look by itself
            with contextlib.suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(self._changed.set)

    # --- in the background thread

    def _run(self) -> None:
        import asyncio

        try:
            asyncio.run(self._serve())
        except Exception as error:
            _log.exception("the health and metrics servers ended")
            self.problems = (f"the health and metrics servers ended: {error}",)

    async def _serve(self) -> None:
        import asyncio

        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._is_running.set()
        try:
            while not self._is_closing:
                await self._listen()
                try:
                    async with asyncio.timeout(_RETRY_S if self.problems else None):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                self._changed.clear()
        finally:
            self._is_running.clear()
            for bind, server in self._servers.items():
                server.close()
                if _is_path(bind):
                    Path(bind.host).unlink(missing_ok=True)

    async def _listen(self) -> None:
        """Make exactly the wanted servers listen, as far as that can be."""
        snapshot = self._snapshot
        delta = diff(self._sites, sites(snapshot, self._local_endpoints(snapshot)))
        for bind in delta.delete:
            self._sites.pop(bind)
            self._servers.pop(bind).close()
        problems = []
        is_fatal = False
        for bind, site in delta.upsert.items():
            try:
                if bind not in self._servers:
                    self._servers[bind] = await self._open(bind)
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)
                problems.append(f"listen on {_address(bind)} for {_purpose(site)}: {reason}")
                is_fatal = is_fatal or (snapshot.must_bind and site.kind in {"healthz", "metrics"})
            else:
                self._sites[bind] = site
        self.problems, self.is_fatal = tuple(problems), is_fatal

    def _local_endpoints(self, snapshot: Snapshot) -> dict[Site, LocalEndpoints]:
        """Return the Services with a healthCheckNodePort, worked out once for each state."""
        services = snapshot.state.services if snapshot.state else ()
        if self._local[0] is not services:
            self._local = services, local_endpoints(services)
        return self._local[1]

    async def _open(self, bind: Bind) -> asyncio.Server:
        import asyncio

        serve = functools.partial(self._answer, bind)
        if _is_path(bind):
            return await asyncio.start_unix_server(serve, sock=_unix_socket(bind.host), limit=_HEAD_MAX)
        return await asyncio.start_server(serve, sock=_socket(bind), limit=_HEAD_MAX)

    async def _answer(self, bind: Bind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        import asyncio

        self._clients[writer] = None
        if len(self._clients) > _CLIENTS_MAX:
            next(iter(self._clients)).transport.abort()
        writer.transport.set_write_buffer_limits(0)  # drain() waits until the kernel has all
        try:
            async with asyncio.timeout(_CLIENT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._respond(bind, head))
                await writer.drain()
                writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            self._clients.pop(writer, None)

    async def _respond(self, bind: Bind, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return encode(_BAD_REQUEST)
        path = target.partition(b"?")[0].decode("latin-1")
        response = await self._site_response(self._sites.get(bind), path)
        return encode(response, with_body=method != b"HEAD")

    async def _site_response(self, site: Site | None, path: str) -> Response:
        import asyncio

        snapshot, now = self._snapshot, time.monotonic()
        if site and site.kind == "service":
            if found := self._local_endpoints(snapshot).get(site):
                return service_response(site, found.ready, is_healthy=snapshot.is_healthy(now))
        elif site and site.kind == "healthz" and path in ("/healthz", "/livez"):
            response = agent_response(snapshot, now, time.time(), with_node=path == "/healthz")
            key = path, response.status
            self._answers[key] = self._answers.get(key, 0) + 1
            return response
        elif site and site.kind == "metrics" and path == "/metrics":
            return Response(200, await asyncio.to_thread(self._scrape), metrics.CONTENT_TYPE)
        elif site and site.kind == "metrics" and path == "/proxyMode":
            return Response(200, snapshot.facts.mode.encode(), _TEXT)
        elif site and site.kind == "metrics" and path == "/healthz":
            return Response(200, b"ok", _TEXT)
        elif site and site.kind == "state" and snapshot.state is not None:
            return Response(200, await asyncio.to_thread(msgspec.msgpack.encode, snapshot.state), _MSGPACK)
        return _NOT_FOUND

    def _scrape(self) -> bytes:
        """Return the metrics, without the dataplane's if they can't be read."""
        try:
            reading = self._read()
        except EbpfproxyError as error:
            _log.debug("metrics without those of the dataplane: %s", error)
            reading = metrics.Reading()
        snapshot = self._snapshot
        lost_at = snapshot.reach.lost_at if snapshot.reach else None
        return metrics.render(
            metrics.Scrape(snapshot.facts, snapshot.state, reading, dict(self._answers), lost_at or 0.0)
        )


def _listening(snapshot: Snapshot) -> tuple[object, ...]:
    """Return what ``sites`` is made of, to be compared by identity where it is large."""
    services = id(snapshot.state.services) if snapshot.state else 0
    return services, snapshot.hosts, snapshot.healthz_at, snapshot.metrics_at, snapshot.state_at


def _socket(bind: Bind) -> socket.socket:
    """Return a listening socket; without a host one for both families, as Go's net.Listen makes it."""
    import socket

    if bind.host:
        family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
        return socket.create_server(bind, family=family, backlog=128)
    if socket.has_dualstack_ipv6():
        return socket.create_server(bind, family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
    return socket.create_server(bind, backlog=128)


def _is_path(bind: Bind) -> bool:
    return bind.host.startswith("/")


def _unix_socket(path: str) -> socket.socket:
    """Return a socket that only root can connect to; one that an agent left which was killed makes room."""
    import socket

    Path(path).unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(path)
        Path(path).chmod(0o600)  # nobody can connect before it listens
    except OSError:
        made.close()
        raise
    return made


def _address(bind: Bind) -> str:
    if _is_path(bind):
        return bind.host
    return endpoint(bind.host or "*", bind.port)


def _purpose(site: Site) -> str:
    if site.kind == "service":
        return f"the healthCheckNodePort of {site.namespace}/{site.name}"
    purposes = {"healthz": "health checks (healthzBindAddress)", "metrics": "metrics (metricsBindAddress)"}
    return purposes.get(site.kind, "ebpfproxy explain")
