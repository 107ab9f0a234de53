"""Where the API server is and how to sign in, from a kubeconfig file, a service account or flags.

Source: "Organizing Cluster Access Using kubeconfig Files" and the reference of kubeconfig (v1).
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ebpfproxy import documents
from ebpfproxy.errors import SourceError
from ebpfproxy.model.objects import without_nulls

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Pem(msgspec.Struct, frozen=True):
    """Certificates or a key: the file they are in, which may change, or themselves."""

    file: str = ""
    data: bytes = b""

    def __bool__(self) -> bool:
        """Say whether there is any."""
        return bool(self.file or self.data)


class ExecVariable(msgspec.Struct, frozen=True):
    """One variable of an exec plugin's environment."""

    name: str
    value: str = ""


class Exec(msgspec.Struct, frozen=True, rename="camel"):
    """A program that gives out credentials (client.authentication.k8s.io)."""

    api_version: str = ""
    command: str = ""
    args: tuple[str, ...] = ()
    env: tuple[ExecVariable, ...] = ()
    install_hint: str = ""
    provide_cluster_info: bool = False
    interactive_mode: str = ""
    directory: str = ""  # a command with a slash is relative to this


class Access(msgspec.Struct, frozen=True):
    """How to reach an API server.

    Attributes:
        servers: URLs of one and the same cluster; the next is tried when one does not answer.
        origin: where this was read, for people.
        proxy_url: of an HTTP proxy; "" = as the environment says.
        impersonate: headers.
    """

    servers: tuple[str, ...]
    origin: str
    authority: Pem = Pem()  # none: the system's
    is_insecure: bool = False  # the server's certificate is not looked at
    tls_server_name: str = ""
    proxy_url: str = ""
    uses_compression: bool = True
    token: str = ""
    token_file: str = ""
    certificate: Pem = Pem()
    key: Pem = Pem()
    username: str = ""
    password: str = ""
    exec: Exec | None = None
    impersonate: tuple[tuple[str, str], ...] = ()


class Flags(msgspec.Struct, frozen=True):
    """What the command line and the configuration file say about the API server."""

    kubeconfig: Path | None = None
    master: str = ""
    servers: tuple[str, ...] = ()  # --kube-api-server

    def __bool__(self) -> bool:
        """Say whether they ask for an API server at all."""
        return bool(self.kubeconfig or self.master or self.servers)


def is_in_cluster(environment: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> bool:
    """Say whether this is a pod with a service account."""
    return bool(environment.get("KUBERNETES_SERVICE_HOST")) and (account / "token").exists()


def find(flags: Flags, environment: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> Access:
    """Return how to reach the API server: the kubeconfig file's way, else the service account's.

    ``master`` and ``servers`` take the place of the address. With ``master`` alone, and no service account,
    it is spoken to without signing in, as kube-proxy does.

    Raises:
        SourceError: nothing says how, or what says it is wrong.
    """
    address = flags.servers or ((flags.master,) if flags.master else ())
    for url in address:
        _check_url("--kube-api-server" if flags.servers else "--master", url)
    if flags.kubeconfig is not None:
        access = read_kubeconfig(flags.kubeconfig)
    elif (account / "token").exists():
        access = _service_account(environment, account, has_address=bool(address))
    elif address:
        access = Access((), "flags")
    else:
        raise SourceError(
            f"find the API server: there is no service account at {account}; "
            "give --kubeconfig FILE, or --manifests DIR to go without Kubernetes"
        )
    if address:
        access = msgspec.structs.replace(access, servers=address)
    return access


def _service_account(environment: Mapping[str, str], account: Path, *, has_address: bool) -> Access:
    host, port = (
        environment.get("KUBERNETES_SERVICE_HOST", ""),
        environment.get("KUBERNETES_SERVICE_PORT", "443"),
    )
    if not host and not has_address:
        raise SourceError(
            f"find the API server: there is a service account at {account}, but KUBERNETES_SERVICE_HOST is "
            "not set; give --kube-api-server https://ADDRESS:PORT"
        )
    host = f"[{host}]" if ":" in host else host
    authority = account / "ca.crt"
    return Access(
        (f"https://{host}:{port}",) if host else (),
        f"the service account at {account}",
        authority=Pem(str(authority)) if authority.exists() else Pem(),
        token_file=str(account / "token"),
    )


# --- kubeconfig --------------------------------------------------------------------------------------


class _Cluster(msgspec.Struct, frozen=True, rename="kebab"):
    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    disable_compression: bool = False


class _User(msgspec.Struct, frozen=True, rename="kebab"):
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    username: str = ""
    password: str = ""
    as_user: str = msgspec.field(default="", name="as")
    as_uid: str = ""
    as_groups: tuple[str, ...] = ()
    as_user_extra: dict[str, tuple[str, ...]] = {}
    auth_provider: dict[str, Any] | None = None
    exec: Exec | None = None


class _Context(msgspec.Struct, frozen=True):
    cluster: str = ""
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True):
    name: str
    cluster: _Cluster = _Cluster()


class _NamedUser(msgspec.Struct, frozen=True):
    name: str
    user: _User = _User()


class _NamedContext(msgspec.Struct, frozen=True):
    name: str
    context: _Context = _Context()


class _Kubeconfig(msgspec.Struct, frozen=True, rename="kebab"):
    current_context: str = ""
    clusters: tuple[_NamedCluster, ...] = ()
    users: tuple[_NamedUser, ...] = ()
    contexts: tuple[_NamedContext, ...] = ()


def read_kubeconfig(path: Path) -> Access:
    """Return what the current context of a kubeconfig file says; relative paths start at the file.

    Raises:
        SourceError: it can't be read, or says too little or something wrong; the message names the field.
    """
    try:
        found = documents.read(path.name if path.suffix == ".json" else "kubeconfig", path.read_bytes())
        if len(found) != 1 or not isinstance(found[0], dict):
            raise SourceError("expected one document, a mapping with kind: Config")
        config = msgspec.convert(without_nulls(found[0]), _Kubeconfig)
        return _access(config, path)
    except OSError as error:
        raise SourceError(f"read kubeconfig {path}: {error.strerror}") from error
    except (SourceError, documents.DocumentError, msgspec.ValidationError) as error:
        raise SourceError(f"kubeconfig {path}: {error}") from error


def _access(config: _Kubeconfig, path: Path) -> Access:
    context = _named(config.contexts, config.current_context, "current-context").context
    cluster = _named(config.clusters, context.cluster, "cluster").cluster
    user = _named(config.users, context.user, "user").user if context.user else _User()
    _check_url(f"server of cluster {context.cluster}", cluster.server)
    if user.auth_provider is not None:
        raise SourceError(
            f"user {context.user}: auth-provider was removed from Kubernetes in 1.26: use exec, tokenFile or "
            "a client certificate"
        )
    here = path.absolute().parent
    certificate = _pem(here, user.client_certificate, user.client_certificate_data, "client-certificate-data")
    key = _pem(here, user.client_key, user.client_key_data, "client-key-data")
    if bool(certificate) != bool(key):
        raise SourceError(f"user {context.user}: client-certificate and client-key go together")
    return Access(
        (cluster.server,),
        f"kubeconfig {path}",
        authority=_pem(
            here,
            cluster.certificate_authority,
            cluster.certificate_authority_data,
            "certificate-authority-data",
        ),
        is_insecure=cluster.insecure_skip_tls_verify,
        tls_server_name=cluster.tls_server_name,
        proxy_url=cluster.proxy_url,
        uses_compression=not cluster.disable_compression,
        token=user.token,
        token_file=_path(here, user.token_file),
        certificate=certificate,
        key=key,
        username=user.username,
        password=user.password,
        exec=_checked(user.exec, here, context.user) if user.exec else None,
        impersonate=tuple(_impersonate(user)),
    )


def _named(many: tuple[Any, ...], name: str, what: str) -> Any:
    for each in many:
        if each.name == name:
            return each
    raise SourceError(f"{what}: there is none named {name!r}" if name else f"{what} is not set")


def _checked(plugin: Exec, here: Path, user: str) -> Exec:
    if not plugin.command:
        raise SourceError(f"user {user}: exec.command is not set")
    if plugin.api_version not in EXEC_VERSIONS:
        raise SourceError(
            f"user {user}: exec.apiVersion: {plugin.api_version!r} is none of {', '.join(EXEC_VERSIONS)}"
        )
    if plugin.interactive_mode == "Always":
        raise SourceError(f"user {user}: exec.interactiveMode: Always can't be: an agent has no terminal")
    return msgspec.structs.replace(plugin, directory=str(here))


EXEC_VERSIONS = tuple(f"client.authentication.k8s.io/{each}" for each in ("v1", "v1beta1"))


def _impersonate(user: _User) -> list[tuple[str, str]]:
    """Return the headers of user impersonation, in Kubernetes' names."""
    headers = [("Impersonate-User", user.as_user)] if user.as_user else []
    headers += [("Impersonate-Uid", user.as_uid)] if user.as_uid else []
    headers += [("Impersonate-Group", each) for each in user.as_groups]
    return headers + [
        (f"Impersonate-Extra-{name}", each) for name, many in user.as_user_extra.items() for each in many
    ]


def _path(here: Path, text: str) -> str:
    return os.path.join(here, text) if text else ""  # noqa: PTH118  # an absolute one stays as it is


def _pem(here: Path, file: str, data: str, field: str) -> Pem:
    """Return a file or the data beside it, which goes before it."""
    if not data:
        return Pem(_path(here, file))
    try:
        return Pem(data=base64.b64decode("".join(data.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise SourceError(f"{field}: is not base64: {error}") from error


def _check_url(what: str, url: str) -> None:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("http", "https") or not rest.strip("/"):
        raise SourceError(f"{what}: {url!r} is not an URL such as https://192.0.2.1:6443")
