"""Runs a source in a thread of its own, fills a store from it, and starts it anew when it dies."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from ebpfproxy import log
from ebpfproxy.errors import EbpfproxyError
from ebpfproxy.runner import Limits
from ebpfproxy.source import Reported, Source, SourceEvent
from ebpfproxy.store import Reach, Store, Synced

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebpfproxy.alarm import Alarm

_log = log.get(__name__)

_RETRIES = Limits(first_retry_s=1.0, max_retry_s=30.0)
_CLOSE_S = 10.0  # how long a source may take to end


class Feed:
    """Belongs to one thread, which calls everything here; the source's thread only hands over.

    A source that was started anew fills a store of its own. That one takes the place of the old store when
    it is complete, so nothing is lost or left over.

    Args:
        make: makes a source; may raise SourceError.
        alarm: rung when there is something for ``update``.

    Raises:
        SourceError: the first source can't be made.
    """

    def __init__(self, make: Callable[[], Source], alarm: Alarm) -> None:
        self.store = Store()  # of the last source that was complete; not ready before the first one was
        self.is_new = True  # the store is another one than before; whoever reads it sets this to False
        self.synced = 0  # how often a source said that it told everything
        self.failures = 0  # in a row, since a source was complete
        self._death = ""  # why the last source stopped, until the next one is complete
        self._reported: tuple[str, ...] = ()
        self.reach: Reach | None = None  # None: the source does not tell
        self._make = make
        self._alarm = alarm
        self._restart_at: float | None = None
        self._start(make())

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the source, and with what it reads."""
        return (self._death, *self._reported) if self._death else self._reported

    def update(self, now: float) -> bool:
        """Take over what came, start a dead source anew; return whether anything changed."""
        is_changed = False
        if self._restart_at is not None and now >= self._restart_at:
            self._restart_at = None
            try:
                self._start(self._make())
            except Exception as error:
                self._note_death(error, now)
                is_changed = True
        while self._inbox:
            batch = self._inbox.popleft()
            is_changed = True
            if isinstance(batch, BaseException):
                self._note_death(batch, now)
                continue
            for event in batch:
                self._apply(event)
        return is_changed

    def due(self) -> float:
        """Return when ``update`` has something to do even if the alarm does not ring."""
        return float("inf") if self._restart_at is None else self._restart_at

    def reread(self) -> None:
        """Read everything again, at once even if the source is dead; ``synced`` grows when it is done."""
        if self._restart_at is None:
            self._source.reread()
        else:
            self._restart_at = float("-inf")

    def close(self) -> None:
        """End the source."""
        self._restart_at = None
        self._source.close()
        self._thread.join(_CLOSE_S)

    def _start(self, source: Source) -> None:
        self._source = source
        self._filling, self._reported = Store(), ()
        # A new one for each source: what an earlier one still hands over goes nowhere.
        self._inbox: deque[tuple[SourceEvent, ...] | BaseException] = deque()
        self._thread = threading.Thread(
            target=self._run, args=(source, self._inbox), name="source", daemon=True
        )
        self._thread.start()

    def _run(self, source: Source, inbox: deque[tuple[SourceEvent, ...] | BaseException]) -> None:
        try:
            for batch in source.batches():
                inbox.append(batch)
                self._alarm.ring()
        except Exception as error:
            if not isinstance(error, EbpfproxyError):
                _log.exception("the source died")
            inbox.append(error)
            self._alarm.ring()

    def _apply(self, event: SourceEvent) -> None:
        if isinstance(event, Reported):
            self._reported = event.problems
            return
        if isinstance(event, Reach):
            self.reach = event
            return
        self._filling.apply(event)
        if isinstance(event, Synced):
            self.synced += 1
            self.failures = 0
            self._death = ""
            if self.store is not self._filling:
                self.store, self.is_new = self._filling, True

    def _note_death(self, error: BaseException, now: float) -> None:
        self.failures += 1
        self._restart_at = now + _RETRIES.retry_s(self.failures)
        self._death = f"the source stopped and is started again, its last objects stay: {error}"
