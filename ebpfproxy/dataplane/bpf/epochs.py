"""Voids the programs' next hops when a route, neighbour or address changes: at once, in its own thread."""

from __future__ import annotations

import logging
import select
import threading
from typing import TYPE_CHECKING

from ebpfproxy import netlink
from ebpfproxy.alarm import Alarm

if TYPE_CHECKING:
    from ebpfproxy.libbpf import Map

log = logging.getLogger(__name__)


class HopWatch:
    """Raises ``epochs.hops`` at every change, from ``start`` to ``close``.

    Args:
        epochs: the map of this name.
    """

    def __init__(self, epochs: Map) -> None:
        self._epochs = epochs
        self._changes = netlink.RouteChanges()
        self._alarm = Alarm()
        self._thread = threading.Thread(target=self._run, name="routes", daemon=True)

    def start(self) -> None:
        """Void what was learnt before, and watch from now on."""
        self._raise()
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._alarm.ring()
            self._thread.join()
        self._changes.close()
        self._alarm.close()

    def _raise(self) -> None:
        memory = self._epochs.mmap().cast("I")
        memory[0] = (memory[0] + 1) % 2**32  # struct epoch begins with hops
        memory.release()

    def _run(self) -> None:
        poller = select.poll()
        for each in (self._changes, self._alarm):
            poller.register(each.fileno(), select.POLLIN)
        while True:
            ready = {number for number, _ in poller.poll()}
            if self._alarm.fileno() in ready:
                return
            if self._changes.changed():
                self._raise()
                log.debug("a route or neighbour changed")
