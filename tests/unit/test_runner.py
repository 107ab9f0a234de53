"""The runner decides when to sync; the tests tell it the time."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.runner import Limits, Runner

LIMITS = Limits(min_s=1.0, max_s=30.0, first_retry_s=2.0, max_retry_s=10.0)


def test_nothing_runs_before_the_first_request() -> None:
    assert Runner(LIMITS).due() == math.inf


def test_the_first_request_is_due_at_once() -> None:
    runner = Runner(LIMITS)
    runner.request()
    assert runner.wait_s(now=-5.0) == 0


def test_many_requests_are_one_run_after_the_minimum() -> None:
    runner = Runner(LIMITS)
    runner.request()
    runner.start(now=10.0)
    runner.succeed()
    for _ in range(100):
        runner.request()
    assert runner.due() == 11.0
    runner.start(now=11.0)
    runner.succeed()
    assert runner.due() == 41.0  # no request is left: the periodic run


def test_a_request_during_a_run_is_for_the_next_one() -> None:
    runner = Runner(LIMITS)
    runner.request()
    runner.start(now=10.0)
    runner.request()
    runner.succeed()
    assert runner.due() == 11.0


def test_failures_are_retried_with_growing_pauses() -> None:
    runner = Runner(LIMITS)
    runner.request()
    now, pauses = 0.0, []
    for _ in range(5):
        runner.start(now)
        runner.fail(now)
        pauses.append(runner.wait_s(now))
        now = runner.due()
    assert pauses == [2, 4, 8, 10, 10]
    runner.start(now)
    runner.succeed()
    assert (runner.failures, runner.wait_s(now)) == (0, 30)


def test_a_change_shortens_a_long_pause_but_not_below_the_first() -> None:
    runner = Runner(LIMITS)
    for _ in range(4):
        runner.start(now=100.0)
        runner.fail(now=100.5)
    assert runner.due() == 110.5
    runner.request()
    assert runner.due() == 102.5


def test_the_minimum_holds_after_a_failure_too() -> None:
    runner = Runner(Limits(min_s=5.0, max_s=30.0, first_retry_s=0.1))
    runner.start(now=0.0)
    runner.fail(now=1.0)
    assert runner.due() == 5.0


@given(
    st.lists(st.tuples(st.floats(0, 3), st.booleans(), st.booleans()), max_size=60),
    st.floats(0, 2),
    st.floats(3, 10),
)
def test_runs_keep_to_the_limits(steps: list[tuple[float, bool, bool]], min_s: float, max_s: float) -> None:
    """Whatever happens: never closer than the minimum, and never later than the longest pause allows."""
    limits = Limits(min_s=min_s, max_s=max_s, first_retry_s=0.5, max_retry_s=4.0)
    runner = Runner(limits)
    runner.start(0.0)
    runner.succeed()
    now, last = 0.0, 0.0
    for pause, is_request, is_failure in steps:
        now += pause
        if is_request:
            runner.request()
        assert runner.due() <= last + max(max_s, min_s + limits.max_retry_s)
        if runner.wait_s(now) == 0:
            assert now - last >= min_s - 1e-6
            runner.start(now)
            last = now
            if is_failure:
                runner.fail(now)
            else:
                runner.succeed()
