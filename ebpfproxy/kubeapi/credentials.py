"""Who we say we are: tokens that are rotated in their file, exec plugins, certificates.

Source: "Authenticating" in Kubernetes' documentation, and the reference of ExecCredential
(client.authentication.k8s.io/v1).
"""

from __future__ import annotations

import base64
import datetime as dt  # noqa: TC003  # msgspec reads the annotation
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ebpfproxy.errors import SourceError
from ebpfproxy.kubeapi.access import Pem

if TYPE_CHECKING:
    from ebpfproxy.kubeapi.access import Access, Exec

_TOKEN_S = 60.0  # how long a token file is not read again: client-go's number
_EXEC_S = 60.0  # how long a plugin may take
_EARLY_S = 10.0  # a credential is renewed so long before it ends


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    """What a plugin gave."""

    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: dt.datetime | None = None


class _ExecCredential(msgspec.Struct, frozen=True, rename="camel"):
    kind: str
    api_version: str
    status: _Status = _Status()


class Credentials:
    """Signs requests; used by several threads at once.

    Args:
        access: says how.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._token = ""
        self._token_at = float("-inf")  # when the token file was read, monotonic
        self._given: _Status | None = None  # by the plugin
        self._given_until = float("inf")  # Unix time

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers that say who we are.

        Raises:
            SourceError: a token file can't be read, or a plugin fails.
        """
        access = self._access
        headers = list(access.impersonate)
        with self._lock:
            token = access.token
            if access.token_file:
                token = self._file_token()
            elif access.exec:
                token = self._plugin().token
        if token:
            headers.append(("Authorization", f"Bearer {token}"))
        elif access.username:
            pair = base64.b64encode(f"{access.username}:{access.password}".encode()).decode()
            headers.append(("Authorization", f"Basic {pair}"))
        return headers

    def certificate(self) -> tuple[Pem, Pem]:
        """Return the client's certificate and key; none: two that are empty.

        Raises:
            SourceError: a plugin fails.
        """
        if self._access.certificate or not self._access.exec:
            return self._access.certificate, self._access.key
        with self._lock:
            given = self._plugin()
        return Pem(data=given.client_certificate_data.encode()), Pem(data=given.client_key_data.encode())

    def expire(self) -> None:
        """Get what can be had anew at the next request: the server did not accept it."""
        with self._lock:
            self._token_at = float("-inf")
            self._given = None

    def _file_token(self) -> str:
        """Return the token in the file; one that can't be read leaves the last one in use."""
        now = time.monotonic()
        if now - self._token_at >= _TOKEN_S:
            try:
                self._token = Path(self._access.token_file).read_text(encoding="utf-8").strip()
                self._token_at = now
            except (OSError, UnicodeDecodeError) as error:
                if not self._token:
                    why = error.strerror if isinstance(error, OSError) else "is no text"
                    raise SourceError(f"read token {self._access.token_file}: {why}") from error
            if not self._token:
                raise SourceError(f"read token {self._access.token_file}: it is empty")
        return self._token

    def _plugin(self) -> _Status:
        assert self._access.exec
        if self._given is None or time.time() >= self._given_until - _EARLY_S:
            given = _run_plugin(self._access.exec, self._access)
            until = given.expiration_timestamp
            self._given, self._given_until = given, until.timestamp() if until else float("inf")
        return self._given


def _run_plugin(plugin: Exec, access: Access) -> _Status:
    """Return what a plugin gives out.

    Raises:
        SourceError: it fails, or gives nothing; the message says how to install it where that is known.
    """
    command = plugin.command
    if "/" in command:
        command = os.path.join(plugin.directory, command)  # noqa: PTH118  # an absolute one stays
    try:
        environment = {
            **os.environ,
            **{each.name: each.value for each in plugin.env},
            "KUBERNETES_EXEC_INFO": json.dumps(_exec_info(plugin, access)),
        }
        result = subprocess.run(
            [command, *plugin.args],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_EXEC_S,
            check=False,
        )
    except OSError as error:
        hint = f"; {plugin.install_hint}" if plugin.install_hint else ""
        raise SourceError(f"run credential plugin {plugin.command}: {error.strerror}{hint}") from error
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"run credential plugin {plugin.command}: no answer in {_EXEC_S:.0f} s") from error
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip() or "it said nothing"
        raise SourceError(f"run credential plugin {plugin.command}: exit status {result.returncode}: {said}")
    try:
        answer = msgspec.json.decode(result.stdout, type=_ExecCredential)
    except msgspec.DecodeError as error:
        raise SourceError(f"credential plugin {plugin.command}: no ExecCredential: {error}") from error
    status = answer.status
    if answer.kind != "ExecCredential" or answer.api_version != plugin.api_version:
        raise SourceError(
            f"credential plugin {plugin.command}: gave {answer.api_version} {answer.kind}, wanted "
            f"{plugin.api_version} ExecCredential"
        )
    if not status.token and not (status.client_certificate_data and status.client_key_data):
        raise SourceError(f"credential plugin {plugin.command}: gave neither a token nor a certificate")
    return status


def _exec_info(plugin: Exec, access: Access) -> dict[str, Any]:
    """Return the ExecCredential that a plugin is told."""
    spec: dict[str, Any] = {"interactive": False}
    if plugin.provide_cluster_info:
        authority = access.authority
        data = Path(authority.file).read_bytes() if authority.file else authority.data
        cluster = {
            "server": access.servers[0],
            "tls-server-name": access.tls_server_name,
            "insecure-skip-tls-verify": access.is_insecure,
            "certificate-authority-data": base64.b64encode(data).decode(),
            "proxy-url": access.proxy_url,
        }
        spec["cluster"] = {name: value for name, value in cluster.items() if value}
    return {"kind": "ExecCredential", "apiVersion": plugin.api_version, "spec": spec}
