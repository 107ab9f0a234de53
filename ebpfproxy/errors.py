"""The one exception tree.

Every message names the operation and the object, the limit where there is one, and the way out.
"""

from __future__ import annotations


class EbpfproxyError(Exception):
    """Base of every error that ebpfproxy raises on purpose."""


class ConfigError(EbpfproxyError):
    """The configuration file or a flag is wrong; nothing was started."""


class SourceError(EbpfproxyError):
    """A source can't deliver objects at all (the directory is missing, say)."""


class ApiError(SourceError):
    """A Kubernetes API server refused a request, or did not answer it.

    Attributes:
        status: of HTTP; 0 = there was no answer.
        reason: in the server's word ("Expired"), "" if it gave none.
        retry_after_s: how long it asks to be left alone.
    """

    def __init__(self, message: str, status: int = 0, reason: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class DataplaneError(EbpfproxyError):
    """A dataplane programmed nothing or only a part; syncing again is safe."""


class MapFullError(DataplaneError):
    """A BPF map, or an id range that mirrors one, has no room left."""


class UnsupportedError(DataplaneError):
    """The kernel or this machine lacks a feature; the message names it."""


class KernelError(DataplaneError):
    """A system call failed.

    Attributes:
        errno: the error number (positive).
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class LoadError(DataplaneError):
    """A BPF object can't be loaded: verifier refusal, wrong stamp or a missing file."""


class LayoutError(LoadError):
    """A pinned map has another layout than this version needs."""


class InvalidObject(EbpfproxyError):  # noqa: N818 - named after what the API server says: Invalid
    """An object breaks the rules of its kind; all that is wrong with it at once.

    Attributes:
        kind: as written, "" if there is none.
        namespace: "" for a kind without namespaces, or unknown.
        name: "" if there is none.
        errors: (field path, message) pairs in the API server's words.
    """

    def __init__(self, kind: str, namespace: str, name: str, errors: list[tuple[str, str]]) -> None:
        what = f'{kind or "object"} "{namespace + "/" if namespace else ""}{name}"'
        super().__init__(f"{what} is invalid: " + ", ".join(f"{path}: {why}" for path, why in errors))
        self.kind = kind
        self.namespace = namespace
        self.name = name
        self.errors = errors
