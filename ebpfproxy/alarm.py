"""Ends a poll from another thread or a signal handler."""

from __future__ import annotations

import contextlib
import os
import threading


class Alarm:
    """A file descriptor that becomes readable when somebody rings."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # So that nobody rings at a number that has become another file; a signal may interrupt its holder.
        self._lock = threading.RLock()

    def fileno(self) -> int:
        """Return what to wait for with select or poll."""
        return self._fd

    def ring(self) -> None:
        """Make it readable; nothing happens once it is closed."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def silence(self) -> None:
        """Make it unreadable until the next ring."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Release it."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1
