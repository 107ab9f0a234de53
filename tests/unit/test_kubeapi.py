"""The way to an API server: kubeconfig files, tokens, plugins, certificates and their rotation."""

from __future__ import annotations

import base64
import json
import socket
import stat
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ebpfproxy.errors import ApiError, SourceError
from ebpfproxy.kubeapi import access, credentials
from ebpfproxy.kubeapi.access import Access, Exec, ExecVariable, Flags, Pem
from ebpfproxy.kubeapi.client import Client
from ebpfproxy.kubeapi.credentials import Credentials
from rig.api_model import SERVICES, ApiModel, Refusal
from rig.apiserver import ApiServer, Request
from rig.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rig.certificates import Certificate

CLUSTER = {"server": "https://192.0.2.1:6443"}


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def kubeconfig(
    path: Path, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None, **others: Any
) -> Path:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "preferences": {},
                "current-context": "here",
                "contexts": [
                    {"name": "there", "context": {"cluster": "nowhere", "user": "nobody"}},
                    {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "x"}},
                ],
                "clusters": [{"name": "c", "cluster": CLUSTER if cluster is None else cluster}],
                "users": [{"name": "u", "user": user or {}}],
                **others,
            }
        )
    )
    return path


# --- where, and who ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({}, {}),
        ({"certificate-authority": "pki/ca.crt"}, {"authority": Pem(file="{here}/pki/ca.crt")}),
        ({"certificate-authority": "/etc/ca.crt"}, {"authority": Pem(file="/etc/ca.crt")}),
        ({"certificate-authority-data": b64("PEM")}, {"authority": Pem(data=b"PEM")}),
        (
            {"certificate-authority": "/ca", "certificate-authority-data": b64("P")},
            {"authority": Pem(data=b"P")},
        ),
        ({"insecure-skip-tls-verify": True}, {"is_insecure": True}),
        ({"tls-server-name": "kubernetes"}, {"tls_server_name": "kubernetes"}),
        ({"proxy-url": "http://p:3128"}, {"proxy_url": "http://p:3128"}),
        ({"disable-compression": True}, {"uses_compression": False}),
        ({"extensions": [{"name": "x"}], "fieldOfTomorrow": 1, "proxy-url": None}, {}),
    ],
)
def test_clusters(cluster: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "config", CLUSTER | cluster)
    if "authority" in expected and expected["authority"].file:
        expected["authority"] = Pem(file=expected["authority"].file.format(here=tmp_path))
    found = access.read_kubeconfig(path)
    assert found == Access((CLUSTER["server"],), f"kubeconfig {path}", **expected)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({"token": "t"}, {"token": "t"}),
        ({"tokenFile": "token"}, {"token_file": "{here}/token"}),
        (
            {"client-certificate": "/c", "client-key-data": b64("K")},
            {"certificate": Pem("/c"), "key": Pem(data=b"K")},
        ),
        ({"username": "u", "password": "p"}, {"username": "u", "password": "p"}),
        (
            {"as": "jane", "as-uid": "7", "as-groups": ["a", "b"], "as-user-extra": {"scopes": ["x"]}},
            {
                "impersonate": (
                    ("Impersonate-User", "jane"),
                    ("Impersonate-Uid", "7"),
                    ("Impersonate-Group", "a"),
                    ("Impersonate-Group", "b"),
                    ("Impersonate-Extra-scopes", "x"),
                )
            },
        ),
    ],
)
def test_users(user: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found = access.read_kubeconfig(kubeconfig(tmp_path / "config", user=user))
    for name, value in expected.items():
        assert getattr(found, name) == (value.format(here=tmp_path) if isinstance(value, str) else value)


EXEC = {"apiVersion": "client.authentication.k8s.io/v1", "command": "give"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cluster": {}}, "server of cluster c: '' is not an URL"),
        ({"cluster": {"server": "192.0.2.1:6443"}}, "is not an URL such as https://"),
        (
            {"cluster": CLUSTER | {"certificate-authority-data": "!"}},
            "certificate-authority-data: is not base64",
        ),
        ({"current-context": ""}, "current-context is not set"),
        ({"current-context": "gone"}, "current-context: there is none named 'gone'"),
        ({"current-context": "there"}, "cluster: there is none named 'nowhere'"),
        ({"users": None}, "user: there is none named 'u'"),
        ({"user": {"client-certificate": "/c"}}, "client-certificate and client-key go together"),
        ({"user": {"auth-provider": {"name": "gcp"}}}, "auth-provider was removed from Kubernetes in 1.26"),
        ({"user": {"exec": EXEC | {"command": ""}}}, "exec.command is not set"),
        ({"user": {"exec": EXEC | {"apiVersion": "x/v9"}}}, "exec.apiVersion: 'x/v9' is none of"),
        ({"user": {"exec": EXEC | {"interactiveMode": "Always"}}}, "an agent has no terminal"),
        ({"clusters": "many"}, "Expected `array`, got `str`"),
    ],
)
def test_wrong_kubeconfigs_name_the_field(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "config", **content)
    with pytest.raises(SourceError, match=message) as raised:
        access.read_kubeconfig(path)
    assert str(raised.value).startswith(f"kubeconfig {path}: ")


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "expected one document")])
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(SourceError, match=message):
        access.read_kubeconfig(tmp_path / "config")
    with pytest.raises(SourceError, match=r"read kubeconfig .*: No such file"):
        access.read_kubeconfig(tmp_path / "none")


@pytest.fixture
def account(tmp_path: Path) -> Path:
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    (directory / "token").write_text("mine\n")
    (directory / "ca.crt").write_text("PEM")
    return directory


IN_CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
IN_CLUSTER_V6 = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
HERE, THERE = "https://192.0.2.7:6443", "https://192.0.2.8:6443"


@pytest.mark.parametrize(
    ("flags", "environment", "has_account", "servers", "token_file"),
    [
        (Flags(), IN_CLUSTER, True, ("https://10.96.0.1:443",), True),
        (Flags(), IN_CLUSTER_V6, True, ("https://[fd00::1]:443",), True),
        (Flags(servers=(HERE, THERE)), IN_CLUSTER, True, (HERE, THERE), True),
        (Flags(servers=(HERE,)), {}, True, (HERE,), True),
        (Flags(master=HERE), IN_CLUSTER, True, (HERE,), True),
        (Flags(master="http://127.0.0.1:8080"), {}, False, ("http://127.0.0.1:8080",), False),
        (Flags(master=HERE, servers=(THERE,)), {}, False, (THERE,), False),
    ],
)
def test_find(
    flags: Flags,
    environment: dict[str, str],
    has_account: bool,
    servers: tuple[str, ...],
    token_file: bool,
    account: Path,
    tmp_path: Path,
) -> None:
    found = access.find(flags, environment, account if has_account else tmp_path / "none")
    assert found.servers == servers
    assert found.token_file == (str(account / "token") if token_file else "")
    assert found.authority == (Pem(str(account / "ca.crt")) if token_file else Pem())


def test_a_kubeconfig_goes_before_the_service_account(account: Path, tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "config", user={"token": "t"})
    found = access.find(Flags(path), IN_CLUSTER, account)
    assert (found.servers, found.token, found.token_file) == ((CLUSTER["server"],), "t", "")
    assert access.find(Flags(path, master=HERE), IN_CLUSTER, account).servers == (HERE,)


@pytest.mark.parametrize(
    ("flags", "has_account", "message"),
    [
        (Flags(), False, "give --kubeconfig FILE, or --manifests DIR"),
        (Flags(), True, "KUBERNETES_SERVICE_HOST is not set; give --kube-api-server"),
        (Flags(master="here"), True, "--master: 'here' is not an URL"),
        (Flags(servers=("ftp://here",)), True, "--kube-api-server: 'ftp://here' is not an URL"),
    ],
)
def test_no_way_is_said(flags: Flags, has_account: bool, message: str, account: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        access.find(flags, {}, account if has_account else tmp_path / "none")


def test_in_cluster(account: Path, tmp_path: Path) -> None:
    assert access.is_in_cluster(IN_CLUSTER, account)
    assert not access.is_in_cluster({}, account)
    assert not access.is_in_cluster(IN_CLUSTER, tmp_path)


# --- credentials -------------------------------------------------------------------------------------


def bearer(found: Credentials) -> str:
    return dict(found.headers())["Authorization"]


def test_basic() -> None:
    found = Credentials(Access((), "", username="Aladdin", password="open sesame"))
    assert bearer(found) == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # RFC 7617, section 2


def test_a_token_file_is_read_again(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Credentials(Access((), "", token_file=str(account / "token")))
    assert bearer(found) == "Bearer mine"
    (account / "token").write_text("next")
    assert bearer(found) == "Bearer mine"  # it is not read at every request
    found.expire()
    assert bearer(found) == "Bearer next"
    monkeypatch.setattr(credentials, "_TOKEN_S", 0.0)
    (account / "token").write_text("third")
    assert bearer(found) == "Bearer third"
    (account / "token").unlink()
    assert bearer(found) == "Bearer third"  # a volume that is being written anew


def test_a_token_file_that_is_not_there(account: Path) -> None:
    with pytest.raises(SourceError, match=r"read token .*/none: No such file"):
        Credentials(Access((), "", token_file=str(account / "none"))).headers()
    (account / "token").write_text("")
    with pytest.raises(SourceError, match="it is empty"):
        Credentials(Access((), "", token_file=str(account / "token"))).headers()


PLUGIN = """\
#!/bin/sh
echo "$KUBERNETES_EXEC_INFO" >"$0.info"
echo x >>"$0.runs"
printf '{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1","status":%s}' "$STATUS"
"""


class Plugin:
    """A credential plugin that counts its runs."""

    def __init__(self, directory: Path, status: dict[str, Any], text: str = PLUGIN, **fields: Any) -> None:
        self.path = directory / "give"
        self.path.write_text(text)
        self.path.chmod(stat.S_IRWXU)
        status_json = ExecVariable("STATUS", json.dumps(status))
        self.exec = Exec(EXEC["apiVersion"], "./give", env=(status_json,), directory=str(directory), **fields)

    @property
    def runs(self) -> int:
        return len(Path(f"{self.path}.runs").read_text().split())

    @property
    def info(self) -> Any:
        return json.loads(Path(f"{self.path}.info").read_text())

    def credentials(self, **fields: Any) -> Credentials:
        return Credentials(Access((HERE,), "", exec=self.exec, **fields))


@pytest.mark.parametrize(
    ("until", "runs"),
    [
        ({}, 1),
        ({"expirationTimestamp": "2999-01-01T00:00:00Z"}, 1),
        ({"expirationTimestamp": "2020-01-01T00:00:00Z"}, 3),
    ],
    ids=["for-ever", "good", "over"],
)
def test_plugins_are_asked_when_their_credential_ends(
    until: dict[str, str], runs: int, tmp_path: Path
) -> None:
    plugin = Plugin(tmp_path, {"token": "given", **until})
    found = plugin.credentials()
    for _ in range(3):
        assert bearer(found) == "Bearer given"
    assert plugin.runs == runs
    found.expire()
    found.headers()
    assert plugin.runs == runs + 1
    assert plugin.info == {
        "kind": "ExecCredential",
        "apiVersion": "client.authentication.k8s.io/v1",
        "spec": {"interactive": False},
    }


def test_plugins_are_told_of_the_cluster(tmp_path: Path) -> None:
    plugin = Plugin(tmp_path, {"token": "t"}, provide_cluster_info=True)
    plugin.credentials(authority=Pem(data=b"PEM"), tls_server_name="k").headers()
    assert plugin.info["spec"]["cluster"] == {
        "server": HERE,
        "tls-server-name": "k",
        "certificate-authority-data": b64("PEM"),
    }


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("#!/bin/sh\necho no >&2; exit 3\n", {}, "exit status 3: no"),
        ("#!/bin/sh\necho hello\n", {}, "no ExecCredential"),
        (
            PLUGIN.replace("authentication.k8s.io/v1", "authentication.k8s.io/v1beta1"),
            {"token": "t"},
            "wanted",
        ),
        (PLUGIN, {}, "gave neither a token nor a certificate"),
        ("#!/nowhere\n", {}, "No such file or directory; install it by hand"),
    ],
)
def test_plugins_that_fail(text: str, status: dict[str, Any], message: str, tmp_path: Path) -> None:
    plugin = Plugin(tmp_path, status, text, install_hint="install it by hand")
    with pytest.raises(SourceError, match=message):
        plugin.credentials().headers()


# --- connections -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    with Authority() as made:
        yield made


@pytest.fixture(scope="module")
def own(authority: Authority) -> Certificate:
    return authority.issue("api", "IP:127.0.0.1", "DNS:kubernetes")


@pytest.fixture
def server(authority: Authority, own: Certificate) -> Iterator[ApiServer]:
    with ApiServer(ApiModel(), own, authority) as running:
        yield running


@contextmanager
def listening() -> Iterator[tuple[socket.socket, int]]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made, made.getsockname()[1]


def serve_once(server: socket.socket, answer: bytes) -> threading.Thread:
    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def ask(client: Client) -> Any:
    try:
        return json.loads(client.get(SERVICES, {"limit": "5"}))
    finally:
        client.close()


def test_tls(server: ApiServer, authority: Authority) -> None:
    for trusted in (Pem(str(authority.certificate)), Pem(data=authority.certificate.read_bytes())):
        assert ask(Client(Access((server.url,), "", authority=trusted)))["kind"] == "ServiceList"


def test_another_name_of_the_server(server: ApiServer, authority: Authority) -> None:
    trusted = Pem(str(authority.certificate))
    url = server.url.replace("127.0.0.1", "localhost")
    assert ask(Client(Access((url,), "", authority=trusted, tls_server_name="kubernetes")))
    with pytest.raises(ApiError, match="its certificate is not good: Hostname mismatch"):
        ask(Client(Access((url,), "", authority=trusted)))


def test_a_certificate_of_nobody_we_trust(server: ApiServer) -> None:
    with pytest.raises(ApiError, match="its certificate is not good: "):
        ask(Client(Access((server.url,), "")))
    with Authority() as other, pytest.raises(ApiError, match="its certificate is not good"):
        ask(Client(Access((server.url,), "", authority=Pem(str(other.certificate)))))
    assert ask(Client(Access((server.url,), "", is_insecure=True)))


def test_a_client_certificate_from_files_and_from_data(server: ApiServer, authority: Authority) -> None:
    mine = authority.issue("system:node:node-1", organization="system:nodes")
    files = Pem(str(mine.certificate)), Pem(str(mine.key))
    data = Pem(data=mine.certificate.read_bytes()), Pem(data=mine.key.read_bytes())
    for certificate, key in (files, data):
        trusted = Pem(str(authority.certificate))
        ask(Client(Access((server.url,), "", authority=trusted, certificate=certificate, key=key)))
        assert server.requests[-1].client_certificate == "system:node:node-1"


def test_a_certificate_of_a_plugin(server: ApiServer, authority: Authority, tmp_path: Path) -> None:
    mine = authority.issue("plugged")
    status = {"clientCertificateData": mine.certificate.read_text(), "clientKeyData": mine.key.read_text()}
    plugin = Plugin(tmp_path, status)
    ask(Client(Access((server.url,), "", authority=Pem(str(authority.certificate)), exec=plugin.exec)))
    assert server.requests[-1].client_certificate == "plugged"


def test_a_rotated_client_certificate(server: ApiServer, authority: Authority, tmp_path: Path) -> None:
    certificate, key = tmp_path / "c", tmp_path / "k"

    def install(name: str) -> None:
        made = authority.issue(name)
        for source, target in ((made.certificate, certificate), (made.key, key)):
            fresh = target.with_suffix(".new")
            fresh.write_bytes(source.read_bytes())
            fresh.replace(target)

    install("first")
    client = Client(
        Access(
            (server.url,),
            "",
            authority=Pem(str(authority.certificate)),
            certificate=Pem(str(certificate)),
            key=Pem(str(key)),
        )
    )
    client.get(SERVICES, {})
    install("second")
    client.get(SERVICES, {})
    client.close()
    assert [each.client_certificate for each in server.requests] == ["first", "second"]


def test_a_rotated_authority(own: Certificate, authority: Authority, tmp_path: Path) -> None:
    trusted = tmp_path / "ca.crt"
    trusted.write_bytes(authority.certificate.read_bytes())
    with ApiServer(ApiModel(), own, authority) as server, Authority() as other:
        client = Client(Access((server.url,), "", authority=Pem(str(trusted))))
        client.get(SERVICES, {})
        server.kill()
        server.certificate = other.issue("api", "IP:127.0.0.1")
        server.start()
        with pytest.raises(ApiError):
            client.get(SERVICES, {})
        trusted.write_bytes(other.certificate.read_bytes())
        client.get(SERVICES, {})
        client.close()


def test_certificates_that_are_none(server: ApiServer, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    for pem in (Pem(str(rubbish)), Pem(data=b"rubbish"), Pem(str(tmp_path / "none"))):
        with pytest.raises(SourceError, match="use the certificates and keys of the file"):
            ask(Client(Access((server.url,), "the file", authority=pem)))
        with pytest.raises(SourceError, match="use the certificates and keys of the file"):
            ask(Client(Access((server.url,), "the file", certificate=pem, key=pem)))


def test_a_token_that_the_server_no_longer_takes_is_read_again(account: Path) -> None:
    good = "mine"

    def check(request: Request) -> Refusal | None:
        return (
            None if request.headers.get("Authorization") == f"Bearer {good}" else Refusal(401, "Unauthorized")
        )

    with ApiServer(ApiModel()) as server:
        server.refuse = check
        client = Client(Access((server.url,), "", token_file=str(account / "token")))
        client.get(SERVICES, {})
        good = "rotated"
        with pytest.raises(ApiError, match="HTTP 401: Unauthorized"):
            client.get(SERVICES, {})
        (account / "token").write_text(good)
        client.get(SERVICES, {})
        client.close()


def test_impersonation_reaches_the_server() -> None:
    with ApiServer(ApiModel()) as server:
        ask(Client(Access((server.url,), "", impersonate=(("Impersonate-User", "jane"),))))
        assert server.requests[-1].headers["Impersonate-User"] == "jane"


def test_an_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of plain HTTP answers itself here, where no such host is; it sees whom the request is for."""
    with ApiServer(ApiModel()) as proxy:
        url = "http://api.example:8080"
        ask(Client(Access((url,), "", proxy_url=proxy.url)))
        monkeypatch.setenv("http_proxy", proxy.url)
        ask(Client(Access((url,), "")))
        assert [each.headers["Host"] for each in proxy.requests] == ["api.example:8080"] * 2
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        with pytest.raises(ApiError, match="Connection refused"):
            ask(Client(Access((url,), "")))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        ask(Client(Access((proxy.url,), "")))


@pytest.mark.parametrize(
    ("body", "message", "retry_after_s"),
    [
        (b"<html>bad gateway</html>", "HTTP 502: <html>bad gateway</html>", 7),
        (b"", "HTTP 502: Bad Gateway", 7),
        (b'{"message":"later","details":{"retryAfterSeconds":3}}', "HTTP 502: later", 7),
    ],
)
def test_answers_of_somebody_in_between(body: bytes, message: str, retry_after_s: float) -> None:
    answer = b"HTTP/1.1 502 Bad Gateway\r\nRetry-After: 7\r\nConnection: close\r\n\r\n" + body
    with listening() as port:
        thread = serve_once(port[0], answer)
        with pytest.raises(ApiError, match=message) as raised:
            ask(Client(Access((f"http://127.0.0.1:{port[1]}",), "")))
        thread.join()
    assert (raised.value.status, raised.value.retry_after_s) == (502, retry_after_s)


def test_a_refusal_that_breaks_off_is_a_refusal() -> None:
    with listening() as port:
        thread = serve_once(port[0], b"HTTP/1.1 503 Busy\r\nContent-Length: 50\r\n\r\n{")
        with pytest.raises(ApiError, match="HTTP 503") as raised:
            ask(Client(Access((f"http://127.0.0.1:{port[1]}",), "")))
        thread.join()
    assert raised.value.status == 503


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    ],
)
def test_broken_answers_are_one_kind_of_error(answer: bytes) -> None:
    with listening() as port:
        thread = serve_once(port[0], answer)
        with pytest.raises(ApiError, match=r"ask API server http://127.0.0.1:\d+: "):
            ask(Client(Access((f"http://127.0.0.1:{port[1]}",), "")))
        thread.join()
