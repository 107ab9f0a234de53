"""Requests to an API server: answers and streams of bytes, or one exception. The one home of urllib3.

Connections are made anew with the files' new content when a certificate is rotated; a token that the server
no longer takes is read again once. Threads may share a client.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, LocationValueError

import ebpfproxy
from ebpfproxy.errors import ApiError, SourceError
from ebpfproxy.kubeapi.credentials import Credentials
from ebpfproxy.kubeapi.status import Details, Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ebpfproxy.kubeapi.access import Access, Pem

_CONNECT_S = 5.0
_ANSWER_S = 60.0  # without a byte
_CHUNK = 1 << 18  # bytes of a stream at a time
_ERROR_MAX = 1 << 16  # bytes of an answer that is none
# A peer that is gone without a word is noticed after half a minute, as client-go does it with HTTP/2 pings.
_SOCKET_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
_FAILURES = (HTTPError, HTTPException, OSError)


class Client:
    """Speaks with one cluster's API server."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._credentials = Credentials(access)
        self._lock = threading.Lock()
        self._pools: tuple[object, urllib3.PoolManager] | None = None  # and what they were made of
        self._server = 0  # index of the one in use

    @property
    def server(self) -> str:
        """The URL of the server that is asked next."""
        return self._access.servers[self._server]

    def get(self, path: str, query: Mapping[str, str]) -> bytes:
        """Return the body of an answer.

        Raises:
            ApiError: there is none, or it is a refusal.
            SourceError: we can't say who we are.
        """
        encoding = "gzip" if self._access.uses_compression else "identity"
        response = self._request(path, query, encoding, _ANSWER_S)
        try:
            return response.read()
        except _FAILURES as error:
            raise self._unanswered(error) from error
        finally:
            response.release_conn()

    def post(self, path: str, content: bytes) -> None:
        """Have the server make the object in ``content``, which is JSON.

        Raises:
            ApiError, SourceError: as ``get``.
        """
        response = self._request(path, {}, "identity", _ANSWER_S, content)
        response.drain_conn()
        response.release_conn()

    def stream(self, path: str, query: Mapping[str, str], silence_s: float) -> Stream:
        """Return an answer that goes on; it ends with an error after ``silence_s`` without a byte.

        Raises:
            ApiError, SourceError: as ``get``.
        """
        return Stream(self._request(path, query, "identity", silence_s), f"watch {self.server}{path}")

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            if self._pools:
                self._pools[1].clear()

    def _request(
        self,
        path: str,
        query: Mapping[str, str],
        encoding: str,
        read_s: float,
        content: bytes | None = None,
    ) -> urllib3.BaseHTTPResponse:
        response = self._send(path, query, encoding, read_s, content)
        if response.status == 401:  # rotated since we read it, or revoked
            response.drain_conn()
            response.release_conn()
            self._credentials.expire()
            response = self._send(path, query, encoding, read_s, content)
        if response.status in (200, 201):
            return response
        body = b""
        with suppress(*_FAILURES):
            body = response.read(_ERROR_MAX)
        response.close()
        raise self._refused(path, response, body)

    def _send(
        self,
        path: str,
        query: Mapping[str, str],
        encoding: str,
        read_s: float,
        content: bytes | None,
    ) -> urllib3.BaseHTTPResponse:
        """Ask; with ``content`` to make something of it."""
        number = self._server
        headers = urllib3.HTTPHeaderDict(
            {
                "Accept": "application/json",
                "Accept-Encoding": encoding,
                "User-Agent": f"ebpfproxy/{ebpfproxy.__version__}",
            }
        )
        for name, value in self._credentials.headers():
            headers.add(name, value)
        if content is not None:
            headers["Content-Type"] = "application/json"
        pools = self._manager()
        url = f"{self._access.servers[number].rstrip('/')}{path}?{urlencode(query)}"
        try:
            return pools.request(
                "GET" if content is None else "POST",
                url,
                body=content,
                headers=headers,
                preload_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=_CONNECT_S, read=read_s),
            )
        except _FAILURES as error:
            failure = self._unanswered(error)
            with self._lock:
                if self._server == number:  # not when another thread has gone on already
                    self._server = (number + 1) % len(self._access.servers)
            raise failure from error

    def _unanswered(self, error: BaseException) -> ApiError:
        """Return why there is no answer; that is the same for all that is asked, and said once."""
        return ApiError(f"ask API server {self.server}: {reason_of(error)}")

    def _refused(self, path: str, response: urllib3.BaseHTTPResponse, body: bytes) -> ApiError:
        try:
            status = msgspec.json.decode(body, type=Status)
        except msgspec.DecodeError:
            status = Status(message=body[:200].decode(errors="replace").strip())
        what = f"ask API server {self.server}{path}: HTTP {response.status}"
        wait = response.headers.get("Retry-After", "")
        details = Details(int(wait)) if wait.isdecimal() else status.details
        status = msgspec.structs.replace(
            status,
            code=response.status,
            message=status.message or response.reason or "no reason given",
            details=details,
        )
        return status.error(what)

    # --- connections -----------------------------------------------------------------------------

    def _manager(self) -> urllib3.PoolManager:
        """Return the pools of connections; those made with other certificates are given up."""
        certificate, key = self._credentials.certificate()
        parts = (self._access.authority, certificate, key)
        try:
            with self._lock:
                made_of = [(each, _stamp(each)) for each in parts]
                if self._pools is None or self._pools[0] != made_of:
                    if self._pools:
                        self._pools[1].clear()
                    self._pools = (made_of, self._new_pools(certificate, key))
                return self._pools[1]
        except (OSError, ValueError, LocationValueError) as error:
            raise SourceError(
                f"use the certificates and keys of {self._access.origin}: {reason_of(error)}"
            ) from error

    def _new_pools(self, certificate: Pem, key: Pem) -> urllib3.PoolManager:
        access = self._access
        options: dict[str, Any] = {
            "maxsize": 4,
            "ssl_context": _tls_context(access, certificate, key),
            "socket_options": _SOCKET_OPTIONS,
        }
        if access.tls_server_name:
            options["server_hostname"] = access.tls_server_name
        if access.is_insecure:
            urllib3.disable_warnings(InsecureRequestWarning)  # its user has asked for it
        proxy = access.proxy_url or _proxy_of(access.servers[0])
        if proxy:
            return urllib3.ProxyManager(proxy, **options)
        return urllib3.PoolManager(**options)


class Stream:
    """An answer that goes on: lines, as they come."""

    def __init__(self, response: urllib3.BaseHTTPResponse, what: str) -> None:
        self._response = response
        self._what = what
        self._is_closed = False

    def lines(self) -> Iterator[list[bytes]]:
        """Yield complete lines; those that came together come together. It ends when the server ends it.

        Raises:
            ApiError: it broke off.
        """
        rest = b""
        try:
            while data := self._response.read1(_CHUNK):
                *lines, rest = (rest + data).split(b"\n")
                if lines:
                    yield lines
        except (*_FAILURES, ValueError) as error:  # ValueError: closed by another thread
            if not self._is_closed:
                raise ApiError(f"{self._what}: {reason_of(error)}") from error
        if rest and not self._is_closed:
            raise ApiError(f"{self._what}: it ended in the middle of an object")

    def shut(self) -> None:
        """End ``lines``, from any thread."""
        self._is_closed = True
        with suppress(*_FAILURES, ValueError, RuntimeError, AttributeError):
            self._response.shutdown()

    def close(self) -> None:
        """Close the connection; for the thread that reads."""
        with suppress(*_FAILURES, ValueError):
            self._response.close()


def reason_of(error: BaseException) -> str:
    """Return why a request failed, in few words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"its certificate is not good: {seen.verify_message}"
        if isinstance(seen, socket.gaierror) or (isinstance(seen, OSError) and seen.strerror):
            name = f" {seen.filename}" if seen.filename else ""
            return f"{seen.strerror}{name}"
        if isinstance(seen, TimeoutError):
            return "timed out"
        seen = seen.__cause__ or seen.__context__ or getattr(seen, "reason", None)
        if not isinstance(seen, BaseException):
            break
    return str(error)


def _stamp(pem: Pem) -> tuple[int, int, int] | None:
    """Return what changes when a file is rotated."""
    if not pem.file:
        return None
    status = os.stat(pem.file)  # noqa: PTH116  # text in, follows the links that rotation turns
    return status.st_ino, status.st_size, status.st_mtime_ns


def _tls_context(access: Access, certificate: Pem, key: Pem) -> ssl.SSLContext:
    authority = access.authority
    context = ssl.create_default_context(
        cafile=authority.file or None, cadata=authority.data.decode("ascii") if authority.data else None
    )
    # Python 3.13 made this its default; the CAs of many clusters lack what it asks for (RFC 5280 4.2.1.1).
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if access.is_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate:
        with ExitStack() as stack:
            context.load_cert_chain(*(stack.enter_context(_as_file(each)) for each in (certificate, key)))
    return context


@contextmanager
def _as_file(pem: Pem) -> Iterator[str]:
    """Give a name to data that OpenSSL only reads from files: one in memory, no secret touches a disk."""
    if pem.file:
        yield pem.file
        return
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem.data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _proxy_of(server: str) -> str:
    """Return the HTTP proxy that the environment names for a server, "" for none."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return ""
    from urllib.request import getproxies_environment, proxy_bypass

    url = urllib3.util.parse_url(server)
    if proxy_bypass(url.netloc or ""):
        return ""
    return getproxies_environment().get(url.scheme or "", "")
