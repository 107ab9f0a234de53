"""Writes events about this Node to the API server, from a thread of its own: nobody waits for it."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import events, log
from ebpfproxy.errors import ApiError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebpfproxy.events import Event
    from ebpfproxy.kubeapi.client import Client

_log = log.get(__name__)

_WAITING_MAX = 100  # more are dropped: the log has them all
_TRIES = 5
_RETRY_S = 2.0  # doubles
_CLOSE_S = 1.0


class Recorder:
    """Tells events.

    Args:
        connect: returns what speaks with the API server; called in the thread.
        node: name of the Node.
    """

    def __init__(self, connect: Callable[[], Client], node: str) -> None:
        self._connect = connect
        self._node = node
        self._instance = f"ebpfproxy-{socket.gethostname()}"
        self._limiter = events.Limiter()
        self._waiting: queue.Queue[Event] = queue.Queue(_WAITING_MAX)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Say it, unless much the same was said lately."""
        if not self._limiter.admits(event, time.monotonic()):
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            _log.debug("event not told, too many wait: %s", event.note)

    def close(self) -> None:
        """End; what still waits is lost."""
        self._is_closed.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        client: Client | None = None
        numbers = itertools.count(os.getpid() % 0x1000)
        namespaces = events.NAMESPACES
        while not self._is_closed.is_set():
            try:
                event = self._waiting.get(timeout=_CLOSE_S / 2)
            except queue.Empty:
                continue
            now, number = time.time(), next(numbers)
            for attempt in range(_TRIES):
                content = events.body(event, self._node, self._instance, now, number, namespaces[0])
                try:
                    client = client or self._connect()
                    client.post(events.path(namespaces[0]), msgspec.json.encode(content))
                    break
                except SourceError as error:
                    if isinstance(error, ApiError) and error.status == 422 and len(namespaces) > 1:
                        namespaces = namespaces[1:]
                        continue
                    if isinstance(error, ApiError) and error.status in (400, 403, 404, 409, 422):
                        _log.debug("event refused: %s", error)  # it would be again
                        break
                    if self._is_closed.wait(_RETRY_S * 2**attempt):
                        return
