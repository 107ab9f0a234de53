"""A control plane of one API server and one etcd, with an authority of its own, and an administrator."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from rig.certificates import Authority
from rig.kernel import enter
from rig.names import temporary_directory
from rig.process import HERE
from rig.wait import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from kube.build import Binaries
    from rig.process import Place, Process

START_S = 120
ETCD_PORT, ETCD_PEER_PORT, PORT = 2379, 2380, 6443
SERVICE_RANGE = "10.96.0.0/16,fd00:96::/112"


class RefusedError(Exception):
    """The API server did not do it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


def connect(place: Place, address: tuple[str, int]) -> socket.socket:
    """Return a connection that a process in ``place`` would get: a socket stays in its namespace."""

    def make() -> socket.socket:
        if place.netns is not None:
            enter(place.netns)
        return socket.create_connection(address, timeout=30)

    with ThreadPoolExecutor(1) as thread:  # one of its own, as it does not come back from there
        return thread.submit(make).result()


class Cluster:
    """Runs in a network namespace, in which the ports are free.

    Args:
        binaries: what to run.
        place: where.
        address: where in it the API server is; clients from elsewhere come to it.
    """

    def __init__(self, binaries: Binaries, place: Place = HERE, address: str = "127.0.0.1") -> None:
        self._binaries, self._place, self.address = binaries, place, address
        self.authority = Authority()
        self.directory = temporary_directory("cluster")
        self._server = self.authority.issue(
            "kube-apiserver", f"IP:{address}", "IP:127.0.0.1", "DNS:kubernetes"
        )
        self._admin = self.authority.issue("admin", organization="system:masters")
        self._etcd: Process | None = None
        self._apiserver: Process | None = None
        self.log = ""

    @property
    def url(self) -> str:
        return f"https://{self.address}:{PORT}"

    def start(self) -> Self:
        """Start what does not run, and wait until it is ready."""
        if self._etcd is None:
            self._etcd = self._place.start(
                self._binaries.etcd,
                *("--data-dir", self.directory / "etcd", "--unsafe-no-fsync"),
                *("--listen-client-urls", f"http://127.0.0.1:{ETCD_PORT}"),
                *("--advertise-client-urls", f"http://127.0.0.1:{ETCD_PORT}"),
                *("--listen-peer-urls", f"http://127.0.0.1:{ETCD_PEER_PORT}"),
            )
        if self._apiserver is None:
            flags: dict[str, str | Path] = {
                "--etcd-servers": f"http://127.0.0.1:{ETCD_PORT}",
                "--bind-address": self.address,
                "--advertise-address": self.address,
                "--secure-port": str(PORT),
                "--insecure-port": "0",
                "--endpoint-reconciler-type": "none",
                "--tls-cert-file": self._server.certificate,
                "--tls-private-key-file": self._server.key,
                "--client-ca-file": self.authority.certificate,
                "--authorization-mode": "RBAC",
                "--service-account-issuer": "https://kubernetes.default.svc",
                "--service-account-key-file": self.authority.certificate,
                "--service-account-signing-key-file": self.authority.key,
                "--service-cluster-ip-range": SERVICE_RANGE,
                "--feature-gates": "IPv6DualStack=true",
                "--cert-dir": self.directory,
            }
            self._apiserver = self._place.start(
                self._binaries.apiserver, *(f"{flag}={value}" for flag, value in flags.items())
            )
            eventually(self._is_ready, "the API server to be ready", timeout_s=START_S, every_s=0.2)
        return self

    def _is_ready(self) -> bool:
        assert self._apiserver
        if self._apiserver.poll() is not None:
            msg = f"the API server ended:\n{self._apiserver.output()[-4000:]}"
            raise RuntimeError(msg)
        try:
            self.request("GET", "/readyz")
            self.request("GET", "/api/v1/namespaces/default")
        except (OSError, http.client.HTTPException, RefusedError):
            return False
        return True

    def kill_apiserver(self) -> None:
        """SIGKILL; its store goes on."""
        assert self._apiserver
        self._apiserver.kill()
        self._apiserver.stop()
        self._apiserver = None

    def stop(self) -> None:
        """End everything and remove its files."""
        for process in (self._apiserver, self._etcd):
            if process is not None:
                process.stop()
        self.authority.close()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- the administrator

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API server as an administrator, from its own namespace; return its answer's JSON."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(self._admin.certificate, self._admin.key)
        connection = http.client.HTTPSConnection(self.address, PORT, context=context, timeout=30)
        try:
            raw = connect(self._place, (self.address, PORT))
            connection.sock = context.wrap_socket(raw, server_hostname=self.address)
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise RefusedError(response.status, data.decode(errors="replace"))
        return json.loads(data) if data.startswith(b"{") else data
