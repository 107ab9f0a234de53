"""An API server that a test scripts: the answers of an ``ApiModel`` over HTTP, and every way to fail."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from rig.api_model import ApiModel, Refusal, bookmark
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from rig.api_model import Document
    from rig.certificates import Authority, Certificate

END_S = 10


class Request(NamedTuple):
    """What a client asked for."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]
    client_certificate: str  # common name, "" without one

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") == "true"


class ApiServer:
    """Serves a model on a loopback port of its own.

    Args:
        model: what there is.
        certificate: of the server; None = plain HTTP.
        authority: of clients' certificates.
        listening: a socket to take connections from; None: a new one on 127.0.0.1.

    Attributes:
        requests: everything that was asked.
        posted: what clients had it make, by path.
        refuse: is asked before every answer; returns a Status to give instead, or None.
        pace: bytes and pause in between, in which streams are written; None = at once.
        sends_bookmarks: whether a new watch gets one at once.
        gone_as_event: 410 comes as an event of the watch, not as the status of HTTP.
    """

    def __init__(
        self,
        model: ApiModel,
        certificate: Certificate | None = None,
        authority: Authority | None = None,
        listening: socket.socket | None = None,
    ) -> None:
        self.model = model
        self.requests: list[Request] = []
        self.posted: list[tuple[str, Document]] = []
        self.refuse: Callable[[Request], Refusal | None] = lambda _: None
        self.pace: tuple[int, float] | None = None
        self.sends_bookmarks = False
        self.gone_as_event = False
        self.certificate, self.authority = certificate, authority
        self._listening = listening
        self._streams: list[Stream] = []
        self._server: _Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Serve, at the same port as before."""
        handler: Any = type("Handler", (_Handler,), {"api": self})
        if self._listening is not None:
            server = _Server(self._listening.getsockname(), handler, bind_and_activate=False)
            server.socket.close()
            server.socket = self._listening.dup()
            server.socket.listen(64)
        else:
            server = _Server(("127.0.0.1", self.port), handler)
        self.port = server.socket.getsockname()[1]
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def kill(self) -> None:
        """End at once: every connection breaks, and the port refuses."""
        assert self._server
        server, self._server = self._server, None
        server.shutdown()
        if self._listening is not None:
            server.socket.shutdown(socket.SHUT_RD)  # refuses until somebody listens again
        server.server_close()
        server.break_connections()
        self._streams.clear()

    def stop(self) -> None:
        if self._server is not None:
            self.kill()
        if self._listening is not None:
            self._listening.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- streams

    def streams(self, path: str) -> list[Stream]:
        """Return the watches that are open."""
        return [each for each in self._streams if each.path == path and not each.is_over]

    def stream(self, path: str) -> Stream:
        """Wait for a watch, and return it."""
        found: list[Stream] = eventually(lambda: self.streams(path), f"a watch of {path}")
        return found[-1]

    def wait_requests(self, path: str, count: int, *, is_watch: bool) -> None:
        """Wait until a client has asked so often."""
        eventually(
            lambda: sum(each.path == path and each.is_watch == is_watch for each in self.requests) >= count,
            f"{count} requests of {path}",
        )


class Stream:
    """One watch that is open; a test can write to it and end it."""

    def __init__(self, path: str, handler: _Handler) -> None:
        self.path = path
        self.is_over = False
        self._handler = handler
        self._lock = threading.Lock()

    def send(self, *events: Document) -> None:
        """Send events together."""
        self.write(b"".join(json.dumps(each).encode() + b"\n" for each in events))

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        pace = self._handler.api.pace
        step = pace[0] if pace else len(data) or 1
        with self._lock:
            for start in range(0, len(data), step):
                piece = data[start : start + step]
                self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                if pace:
                    time.sleep(pace[1])

    def end(self) -> None:
        """End it as a server does whose time is up."""
        with self._lock, suppress(OSError):
            if not self.is_over:
                self.is_over = True
                self._handler.wfile.write(b"0\r\n\r\n")
        self._wake()

    def cut(self) -> None:
        """Break the connection."""
        self.is_over = True
        with suppress(OSError):
            self._handler.connection.shutdown(socket.SHUT_RDWR)
        self._wake()

    def _wake(self) -> None:
        with self._handler.api.model.changed:
            self._handler.api.model.changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for each in list(self.connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        eventually(lambda: not self.connections, "connections to end", timeout_s=END_S)

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Take up TLS with the certificate that there is now."""
        api = self.api
        if api.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(api.certificate.certificate, api.certificate.key)
            if api.authority:
                context.load_verify_locations(api.authority.certificate)
                context.verify_mode = ssl.CERT_OPTIONAL
            raw, connections = self.request, self.server.connections  # type: ignore[attr-defined]
            raw.settimeout(END_S)
            self.request = context.wrap_socket(raw, server_side=True)
            self.request.settimeout(None)
            connections.discard(raw)  # an empty shell now
            connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        super().finish()
        if isinstance(self.request, ssl.SSLSocket):
            self.server.connections.discard(self.request)  # type: ignore[attr-defined]
            self.request.close()

    def do_GET(self) -> None:
        """Answer one request."""
        url = urlsplit(self.path)
        request = Request(url.path, dict(parse_qsl(url.query)), dict(self.headers), self._client())
        self.api.requests.append(request)
        try:
            if (refusal := self.api.refuse(request)) is not None:
                raise refusal
            if request.is_watch:
                self._watch(request)
            else:
                self._send(200, self.api.model.page(request.path, request.query))
        except Refusal as refusal:
            self._send(refusal.code, refusal.status)

    def do_POST(self) -> None:
        """Take one object."""
        url = urlsplit(self.path)
        request = Request(url.path, {}, dict(self.headers), self._client())
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if (refusal := self.api.refuse(request)) is not None:
            self._send(refusal.code, refusal.status)
            return
        self.api.posted.append((url.path, content))
        self._send(201, content)

    def _client(self) -> str:
        if not isinstance(self.request, ssl.SSLSocket):
            return ""
        subject: Any = (self.request.getpeercert() or {}).get("subject", ())
        return "".join(value for part in subject for name, value in part if name == "commonName")

    def _send(self, code: int, body: Document) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, request: Request) -> None:
        api = self.api
        version = int(request.query["resourceVersion"])
        try:
            first, version = api.model.events(request.path, request.query, version)
        except Refusal as refusal:
            if not (refusal.code == 410 and api.gone_as_event):
                raise
            first = [{"type": "ERROR", "object": refusal.status}]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        stream = Stream(request.path, self)
        api._streams.append(stream)
        try:
            if first:
                stream.send(*first)
            if first and first[0]["type"] == "ERROR":
                stream.end()
            elif api.sends_bookmarks:
                stream.send(bookmark(request.path, version))
            self._follow(request, stream, version)
        finally:
            stream.is_over = True
            self.close_connection = True

    def _follow(self, request: Request, stream: Stream, version: int) -> None:
        model = self.api.model
        while not stream.is_over:
            with model.changed:
                if model.version <= version:
                    model.changed.wait(0.2)  # looks whether the client has gone
            if self._is_gone():
                return
            try:
                events, version = model.events(request.path, request.query, version, is_open=True)
            except Refusal:  # the store has gone back in time
                return
            if events:
                with suppress(OSError):
                    stream.send(*events)

    def _is_gone(self) -> bool:
        """Return whether the client has closed its end."""
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
        try:
            with socket.socket(fileno=socket.dup(self.connection.fileno())) as raw:
                return raw.recv(1, flags) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def log_message(self, *_: object) -> None:
        """Say nothing."""
