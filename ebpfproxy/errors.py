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
