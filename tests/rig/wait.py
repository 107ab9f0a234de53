"""Waiting for a condition instead of for a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def eventually(
    check: Callable[[], T | None], what: str, *, timeout_s: float = 15.0, every_s: float = 0.01
) -> T:
    """Return the first truthy result of ``check``.

    Args:
        check: called again and again; an ``AssertionError`` of its own counts as "not yet".
        what: says in the failure what was waited for.
        timeout_s: generous on purpose: it only ends a test that fails.
        every_s: pause between two calls.

    Raises:
        AssertionError: the time is over; carries the last result.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            result = check()
            if result:
                return result
            last = result
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            msg = f"waited {timeout_s:g} s in vain for: {what}; last: {last!r}"
            raise AssertionError(msg)
        time.sleep(every_s)
