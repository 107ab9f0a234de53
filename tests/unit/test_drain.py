"""Draining: when it ends, and what it says meanwhile."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import pytest

from ebpfproxy import config, drain
from ebpfproxy.dataplane.modes import Site

if TYPE_CHECKING:
    from pathlib import Path

    from ebpfproxy.dataplane.chosen import ChosenDataplane


class Carrying:
    """Stands for a dataplane with connections that end one by one, a second each."""

    def __init__(self, connections: int) -> None:
        self.left, self.ticks = connections, 0

    def tick(self) -> None:
        self.ticks += 1


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "open_connections", lambda each: each.left)


def wait(carrying: Carrying, *, seconds: int, stay: bool = False, deadline: float | None = None) -> int:
    """Wait as drain does; a signal ends it after so many seconds."""
    passed = []

    def is_over(seconds_more: float) -> bool:
        passed.append(seconds_more)
        carrying.left = max(0, carrying.left - 1)
        return len(passed) >= seconds

    return drain._wait(cast("ChosenDataplane", carrying), deadline, is_over, stay=stay)


@pytest.mark.usefixtures("count")
@pytest.mark.parametrize(
    ("connections", "seconds", "stay", "deadline", "left", "ticks"),
    [
        (0, 9, False, None, 0, 1),
        (3, 9, False, None, 0, 4),
        (3, 9, True, None, 0, 9),
        (5, 2, False, None, 4, 2),
        (5, 9, False, 0.0, 5, 1),
    ],
    ids=["nothing", "until the last", "stays", "a signal", "too late"],
)
def test_when_it_ends(
    connections: int, seconds: int, stay: bool, deadline: float | None, left: int, ticks: int
) -> None:
    carrying = Carrying(connections)
    assert wait(carrying, seconds=seconds, stay=stay, deadline=deadline) == left
    assert carrying.ticks == ticks


@pytest.mark.usefixtures("count")
def test_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ebpfproxy"):
        wait(Carrying(2), seconds=20, stay=True)
    assert caplog.messages == [f"no new connections are taken; {count} go on" for count in (2, 0)]


def test_where_no_agent_ran(tmp_path: Path) -> None:
    site = Site(tmp_path / "none")
    left = drain.drain(site, config.Config(), timeout_s=None, stay=False, is_over=lambda _: True)
    assert left == 0
    assert not (tmp_path / "none").exists()
