"""Topologies, and the agent's log in the report of a test that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rig.agent import Agent
from rig.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.fixture
def net(nothing_left: None) -> Iterator[Topology]:
    """A topology of this test's own: three pods."""
    with Topology(pod_count=3) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.get_closest_marker("netns"):
        report.sections += [(f"agent {agent.loader}", agent.output()) for agent in Agent.live]
    return report
