"""Follows one kind of objects: a list, then a watch, and again from where it broke off.

- The first list takes what the server has at hand (``resourceVersion=0``), so that many nodes that start at
  once cost it little. Every later one asks for the present, in pages.
- A list is told when all of it is there, as one batch: what is not in it any more is deleted by it.
- A watch that ends, breaks, or says nothing for long is taken up again at the version of its last event or
  bookmark. Only when the server no longer knows that version (410) is everything listed again.
- Whatever fails is tried again after a wait that doubles and that chance makes longer or shorter.

Source: "Kubernetes API Concepts", and client-go's reflector for its numbers.
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Protocol

from ebpfproxy import log
from ebpfproxy.errors import ApiError, SourceError
from ebpfproxy.source.kubernetes import wire
from ebpfproxy.source.kubernetes.lean import Shares
from ebpfproxy.store import Delete, Set

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ebpfproxy.kubeapi.client import Client, Stream
    from ebpfproxy.model.objects import Object, ObjectKey
    from ebpfproxy.source.kubernetes.wire import Item, Resource
    from ebpfproxy.store import Event

_log = log.get(__name__)

PAGE = 500
_WATCH_S = 300.0  # the server ends a watch after this, up to twice as much
_SILENCE_S = 180.0  # a server that sends bookmarks sends one every minute
_FIRST_WAIT_S = 0.2
_MAX_WAIT_S = 30.0
_GOOD_S = 5.0  # a watch that lasted so long was good: what fails after it is the first failure again


class Listener(Protocol):
    """Is told what a reflector finds; called in the reflector's thread."""

    def take(self, reflector: Reflector, events: tuple[Event, ...], *, is_list: bool) -> None:
        """Take over what changed; ``is_list``: this was all that there is."""

    def report(self, reflector: Reflector) -> None:
        """Note that ``problems``, ``failure`` or ``lost_at`` of the reflector changed."""


class Reflector:
    """Keeps a listener in step with one kind of objects.

    Args:
        choices: where the objects may be; the next is tried when a server does not have the one before.
        query: selectors.
        listener: is told.

    Attributes:
        problems: what can't be used of objects, by object.
        failure: why the server can't be followed now; "" = it is.
        lost_at: Unix time since when it is not; None: it is.
    """

    def __init__(self, choices: Sequence[Resource], query: Mapping[str, str], listener: Listener) -> None:
        self.problems: dict[ObjectKey, tuple[str, ...]] = {}
        self.failure = ""
        self.lost_at: float | None = time.time()
        self._choices = choices
        self._choice = 0
        self._query = dict(query)
        self._listener = listener
        self._known: dict[ObjectKey, Object] = {}
        self._shares = Shares()
        self._version = ""  # where to watch from; "" = list first
        self._is_first = True
        self._pages = True
        self._failures = 0  # in a row
        self._stream: Stream | None = None
        self._must_list = False
        self._is_closed = False
        self._wake = threading.Event()

    # --- from any thread

    def relist(self) -> None:
        """List everything again, at once."""
        self._must_list = True
        self._interrupt()

    def close(self) -> None:
        """End ``run``."""
        self._is_closed = True
        self._interrupt()

    def _interrupt(self) -> None:
        self._wake.set()
        stream = self._stream
        if stream is not None:
            stream.shut()

    # --- the loop

    def run(self, client: Client) -> None:
        """Follow the server that ``client`` speaks with, until ``close``."""
        self._client = client
        while not self._is_closed:
            self._wake.clear()
            if self._must_list:
                self._must_list, self._version, self._choice = False, "", 0
            try:
                if not self._version:
                    self._list()
                self._watch()
            except SourceError as error:
                self._failed(error)

    @property
    def resource(self) -> Resource:
        """What is followed now."""
        return self._choices[self._choice]

    def _is_told(self) -> bool:
        """Return whether somebody wants something else than to go on."""
        return self._is_closed or self._must_list

    def _list(self) -> None:
        """Ask for everything, and tell how that differs from what was known."""
        query = self._query | ({"resourceVersion": "0"} if self._is_first else {})
        fresh: dict[ObjectKey, Object] = {}
        problems: dict[ObjectKey, tuple[str, ...]] = {}
        sets: list[Event] = []
        rest = ""
        while True:
            chunk = {"limit": str(PAGE)} if self._pages else {}
            if rest:
                chunk["continue"] = rest
                query.pop("resourceVersion", None)  # may not stand beside it
            page = wire.read_page(self._client.get(self.resource.path, query | chunk), self.resource)
            for item in page.items:
                known = self._known.get(item.key)
                obj = known if item.object is None else self._shares.lean(item.object)
                if obj is None:
                    pass  # nothing of it can be used, and there is no last good one
                elif obj == known:
                    fresh[item.key] = known
                else:
                    fresh[item.key] = obj
                    sets.append(Set(obj))
                if item.problems:
                    problems[item.key] = item.problems
            rest = page.rest
            if not rest or self._is_closed:
                break
        if self._is_closed:
            return
        deletes = [Delete(key) for key in self._known if key not in fresh]
        self._known, self._version, self._pages = fresh, page.version, True
        self._is_first = False
        self._in_step(problems)
        self._listener.take(self, (*sets, *deletes), is_list=True)
        _log.debug("listed %d %s at version %s", len(fresh), self.resource.name, page.version)

    def _watch(self) -> None:
        """Tell what changes, until the server ends it.

        Raises:
            SourceError: it did not go on, or broke.
        """
        query = self._query | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(round(_WATCH_S * (1 + random.random()))),
        }
        stream = self._client.stream(self.resource.path, query, _SILENCE_S)
        self._stream = stream
        started, is_idle = time.monotonic(), True
        try:
            if self._is_told():  # said before there was a stream to shut
                return
            self._in_step(self.problems)
            for lines in stream.lines():
                is_idle = False
                self._apply(lines)
        finally:
            self._stream = None
            stream.close()
            if time.monotonic() - started >= _GOOD_S or not is_idle:
                self._failures = 0
        if is_idle and time.monotonic() - started < 1 and not self._is_told():
            raise ApiError(f"watch {self.resource.name} at {self._client.server}: it ended at once")

    def _apply(self, lines: list[bytes]) -> None:
        """Take over the events that came together."""
        events: list[Event] = []
        told = self.problems
        try:
            for line in lines:
                if line.strip():
                    change = wire.read_event(line, self.resource)
                    if change.item is not None:
                        events += self._change(change.item, is_gone=change.type == "DELETED")
                    self._version = change.version or self._version
        finally:
            if events:
                self._listener.take(self, tuple(events), is_list=False)
            if self.problems is not told:
                self._listener.report(self)

    def _change(self, item: Item, *, is_gone: bool) -> list[Event]:
        key, obj, problems = item
        if is_gone:
            problems = ()
        if problems != self.problems.get(key, ()):
            others = {each: what for each, what in self.problems.items() if each != key}
            self.problems = others | ({key: problems} if problems else {})
        if is_gone:
            return [Delete(key)] if self._known.pop(key, None) is not None else []
        if obj is None:
            return []
        obj = self._shares.lean(obj)
        if self._known.get(key) == obj:
            return []
        self._known[key] = obj
        return [Set(obj)]

    # --- failures

    def _in_step(self, problems: dict[ObjectKey, tuple[str, ...]]) -> None:
        if self.failure or self.lost_at is not None or problems != self.problems:
            self.failure, self.lost_at, self.problems = "", None, problems
            self._listener.report(self)

    def _failed(self, error: SourceError) -> None:
        """Decide how to go on after a failure, and wait before it."""
        if self._is_told():
            return
        status, reason = (error.status, error.reason) if isinstance(error, ApiError) else (0, "")
        wait_s = 0.0
        if status == 410 or reason in ("Expired", "Gone"):
            if not self._version:  # the list itself took too long for its pages
                self._pages = False
            self._version, self._choice = "", 0  # the server may be a newer one by now
            if not self._failures:
                self._failures = 1
                _log.info("%s: everything is listed again", error)
                return
        elif status == 404:
            # This server does not have the objects there (or not yet); it may have them elsewhere.
            self._version = ""
            self._choice = (self._choice + 1) % len(self._choices)
            if self._choice:
                return
        elif _is_ahead(error) or isinstance(error, wire.WireError):
            self._version = ""
        if isinstance(error, ApiError):
            wait_s = error.retry_after_s
        self._failures += 1
        told = self.failure, self.lost_at
        if self.lost_at is None:
            self.lost_at = time.time()
        if self._failures > 1:  # once is not worth a word: a server was restarted, a connection moved
            self.failure = str(error)
        if told != (self.failure, self.lost_at):
            self._listener.report(self)
        self._wake.wait(max(wait_s, backoff_s(self._failures)))


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row; half of it is chance."""
    full = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(failures - 1, 32))
    return full * (0.5 + random.random() / 2)


def _is_ahead(error: SourceError) -> bool:
    """Say whether the server is older than what we know: its store was restored, say."""
    return isinstance(error, ApiError) and "Too large resource version" in str(error)
