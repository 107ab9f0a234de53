"""Files that survive a kill at any moment, and locks that don't."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path

from ebpfproxy.errors import EbpfproxyError

# How long a lock may be held by somebody who only looks whether it is held.
_LOOKING_S = 0.2


def write_atomic(path: Path, data: bytes, *, durable: bool = True, mtime_ns: int | None = None) -> None:
    """Make ``data`` the content of ``path``: a reader sees the old content or the new, never a part.

    With ``durable`` the new content also outlives a power failure (fsync); ``mtime_ns`` is the time of
    modification that the file gets, None: now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot: directory listings, and our own directory source, leave it out.
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            if mtime_ns is not None:
                os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
            if durable:
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class LockedError(EbpfproxyError):
    """Another process holds the lock."""


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of ``path``; changes nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared, so that two who ask at once don't take each other for an agent.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class Lock:
    """Holds the advisory lock of a file or directory; the kernel lets go of it when the process ends."""

    def __init__(self, path: Path, what: str) -> None:
        """Take the lock of ``path``; a file is made where there is nothing. ``what`` is for the message.

        Raises:
            LockedError: another process holds it.
        """
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        if not self._take():
            holder = "" if path.is_dir() else os.read(self._fd, 32).decode("ascii", "replace").strip()
            os.close(self._fd)
            by = f" (process {holder})" if holder.isdecimal() else ""
            raise LockedError(
                f"{what} {path} is in use by another agent{by}: stop it, or give this one its own"
            )
        if not path.is_dir():
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())

    def _take(self) -> bool:
        """Return whether the lock is ours now. Who only looks (``is_locked``) holds it for microseconds."""
        deadline = time.monotonic() + _LOOKING_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_LOOKING_S / 10)
            else:
                return True

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._fd)
