"""The Kubernetes source: Services, their endpoints and this Node, as an API server has them.

Each kind is followed by a thread of its own, see ``reflector``. While the server is away nothing changes:
what it said last stays, and what is not there any more is deleted by the list that follows.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from ebpfproxy import log
from ebpfproxy.source import Reported, SourceEvent
from ebpfproxy.source.kubernetes import wire
from ebpfproxy.source.kubernetes.reflector import Reflector
from ebpfproxy.store import Reach, Synced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ebpfproxy.kubeapi.client import Client
    from ebpfproxy.store import Event

_log = log.get(__name__)

# Headless Services have no VIP, and another proxy's are not ours. Source: kube-proxy's selectors.
SELECTOR = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"
_CLOSE_S = 2.0  # how long a thread may take to end


class KubernetesSource:
    """Delivers the objects of an API server.

    Args:
        connect: returns what speaks with it; called in the source's own thread, as it takes a while.
        node_name: whose Node object is wanted.
    """

    def __init__(self, connect: Callable[[], Client], node_name: str) -> None:
        self._connect = connect
        selected = {"labelSelector": SELECTOR}
        self._reflectors = (
            Reflector((wire.SERVICES,), selected, self),
            Reflector(wire.ENDPOINTS, selected, self),
            Reflector((wire.NODES,), {"fieldSelector": f"metadata.name={node_name}"}, self),
        )
        self._lock = threading.Lock()
        self._incomplete = set(self._reflectors)  # those that have not listed everything yet
        self._told: tuple[tuple[str, ...], float | None] = ((), 0.0)
        self._queue: queue.SimpleQueue[tuple[SourceEvent, ...] | BaseException | None] = queue.SimpleQueue()

    # --- the Source protocol ---------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[SourceEvent, ...]]:
        """Yield what changed; ``Synced`` follows when every kind was listed."""
        client = self._connect()
        threads = [
            threading.Thread(target=self._run, args=(each, client), name="watch", daemon=True)
            for each in self._reflectors
        ]
        for thread in threads:
            thread.start()
        try:
            while (batch := self._queue.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            self._stop()
            for thread in threads:
                thread.join(_CLOSE_S)
            client.close()

    def reread(self) -> None:
        """List everything again; ``Synced`` follows it."""
        with self._lock:
            self._incomplete = set(self._reflectors)
        for each in self._reflectors:
            each.relist()

    def close(self) -> None:
        """End ``batches``."""
        self._stop()
        self._queue.put(None)

    def _stop(self) -> None:
        for each in self._reflectors:
            each.close()

    def _run(self, reflector: Reflector, client: Client) -> None:
        try:
            reflector.run(client)
        except Exception as error:
            self._queue.put(error)

    # --- the Listener protocol, in the threads of the reflectors ---------------------------------

    def take(self, reflector: Reflector, events: tuple[Event, ...], *, is_list: bool) -> None:
        """Hand over what changed, and ``Synced`` when this list was the last that was missing."""
        with self._lock:
            is_last = is_list and self._incomplete == {reflector}
            if is_list:
                self._incomplete.discard(reflector)
            if is_last:
                events = (*events, Synced("objects"))
            if events:
                self._queue.put(events)

    def report(self, reflector: Reflector) -> None:
        """Hand over what is wrong now, and since when the server is away."""
        with self._lock:
            failures = dict.fromkeys(each.failure for each in self._reflectors if each.failure)
            problems = (
                *(f"{failure}; what was known stays, and it is tried again" for failure in failures),
                *(text for each in self._reflectors for many in each.problems.values() for text in many),
            )
            lost = [each.lost_at for each in self._reflectors if each.lost_at is not None]
            told = (problems, min(lost, default=None))
            if told != self._told:
                self._told = told
                self._queue.put((Reported(problems), Reach(told[1])))
