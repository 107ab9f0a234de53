"""Decides when to sync: a hundred requests are one run, a failed one is retried, quiet ends in a full one.

Pure: it holds no thread and reads no clock; every method is told the time (monotonic, in seconds).
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """How often to run."""

    min_s: float = 0.0  # at least this long from one run's start to the next one's
    max_s: float = 30.0  # a run starts this long after the last one's start at the latest
    first_retry_s: float = FIRST_RETRY_S  # after the first failure in a row; doubles with each further one
    max_retry_s: float = 10.0

    def retry_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        return min(self.max_retry_s, self.first_retry_s * 2.0 ** min(failures - 1, 32))


class Runner:
    """Says when the next run is due."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.failures = 0  # in a row
        self.requested = False
        self._started: float | None = None  # of the last run
        self._failed: float | None = None  # when the last run failed; None if it did not

    def request(self) -> None:
        """Ask for a run: something changed."""
        self.requested = True

    def due(self) -> float:
        """Return when the next run is due; -infinity: at once, infinity: not before a request."""
        if self._started is None:
            return float("-inf") if self.requested else float("inf")
        earliest = self._started + self.limits.min_s
        if self._failed is not None:
            # A change may be what mends it: it need not wait out a long backoff, and many must not hammer.
            wait_s = self.limits.first_retry_s if self.requested else self.limits.retry_s(self.failures)
            return max(earliest, self._failed + wait_s)
        return earliest if self.requested else self._started + self.limits.max_s

    def wait_s(self, now: float) -> float:
        """Return how long it is until the next run is due; 0: it is."""
        return max(0.0, self.due() - now)

    def start(self, now: float) -> None:
        """Note that a run starts; requests from here on are for the next one."""
        self.requested = False
        self._started = now

    def succeed(self) -> None:
        """Note that the run did what it should."""
        self.failures = 0
        self._failed = None

    def fail(self, now: float) -> None:
        """Note that the run failed: it is retried with backoff."""
        self.failures += 1
        self._failed = now
