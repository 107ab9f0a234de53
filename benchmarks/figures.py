"""Samples, and numbers from them."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ebpfproxy.dataplane import Dataplane
    from ebpfproxy.model.services import DesiredState


def timed_sync(dataplane: Dataplane, state: DesiredState) -> tuple[float, float]:
    """Return the milliseconds of one sync, by the clock, and of processors in this process and its tools."""
    clock, before = time.monotonic(), os.times()
    dataplane.sync(state)
    after = os.times()
    used_s = sum(b - a for a, b in zip(before[:4], after[:4], strict=True))
    return (time.monotonic() - clock) * 1000, used_s * 1000


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return the smallest sample that ``percent`` of all do not exceed (nearest rank)."""
    ordered = sorted(samples)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(rank, 1) - 1]


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, low, high
