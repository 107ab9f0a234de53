"""Tells systemd how the service is: the sd_notify protocol.

Source: sd_notify(3), systemd.service(5) Type=notify-reload, sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from ebpfproxy import log

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = log.get(__name__)


class Notifier:
    """Sends state to systemd; does nothing where systemd did not ask for it."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # abstract namespace, unix(7)
            self._address = "\0" + self._address[1:]
        self.watchdog_s = _watchdog_s(environ)
        self._status = ""
        self._next_ping = 0.0

    def ready(self, status: str) -> None:
        """Say that start-up or a reload is complete."""
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Say that a reload starts; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """Say that the service goes down on purpose."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """Show one line in ``systemctl status``; sent only when it changes.

        Whoever reads slowly gets a later one: no Service waits for that.
        """
        if text != self._status and self._send(f"STATUS={text}", flags=socket.MSG_DONTWAIT):
            self._status = text

    def ping(self, now: float) -> None:
        """Keep the watchdog quiet; call it at least every ``watchdog_s / 2``."""
        if self.watchdog_s and now >= self._next_ping:
            # Half the time is what sd_watchdog_enabled(3) recommends; a quarter leaves room for a slow sync.
            self._next_ping = now + self.watchdog_s / 4
            self._send("WATCHDOG=1")

    def _send(self, message: str, flags: int = 0) -> bool:
        """Return whether it is on its way, or nobody wants it."""
        if not self._address:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(message.encode(), flags, self._address)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.warning("notify systemd at %s: %s", self._address, error)
            self._address = ""
        return True


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """Return the watchdog's time limit for this process, 0 when there is none."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() else 0.0
