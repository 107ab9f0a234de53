"""Owned handles of the kernel's objects."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from ebpfproxy.libbpf._ffi import lib
from ebpfproxy.libbpf.errors import check

if TYPE_CHECKING:
    from types import TracebackType

    Path = str | os.PathLike[str]


class Closeable:
    """A context manager that closes at its end."""

    def close(self) -> None:
        """Free what is held; again is fine."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Descriptor(Closeable):
    """A file descriptor of a map, program or link."""

    kind = "object"
    name = ""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def pin(self, path: Path) -> None:
        """Keep it alive at ``path`` on a bpffs."""
        what = " ".join(filter(None, ("pin", self.kind, self.name, "at", os.fspath(path))))
        check(lib.bpf_obj_pin(self.fd, os.fsencode(path)), what)

    def close(self) -> None:
        """Close the descriptor; what is pinned or attached stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
