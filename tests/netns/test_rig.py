"""The rig itself: what it makes works, and nothing stays."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from rig import kernel, leaks
from rig.process import Place
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.netns]


def test_process_runs_in_its_namespace_and_cgroup(netns: kernel.Netns, cgroup: Path) -> None:
    place = netns.place(cgroup)
    links, member = place.run(
        "sh", "-c", "ip -brief link | wc -l; grep ^0:: /proc/self/cgroup"
    ).stdout.split()
    assert int(links) == 1, "only loopback"
    assert member == f"0::/{cgroup.name}"


def test_failed_command_shows_its_output() -> None:
    with pytest.raises(AssertionError, match="exit 3\nwhy"):
        Place().run("sh", "-c", "echo why; exit 3")


@pytest.mark.parametrize("make", [kernel.new_bpffs, kernel.new_cgroup, kernel.new_netns])
def test_things_are_removed_when_a_test_fails(
    make: Callable[[], AbstractContextManager[object]], nothing_left: None
) -> None:
    before = leaks.find()

    def fail() -> None:
        with make():
            assert len(leaks.find()) > len(before), "a thing that exists is found"
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert leaks.find() == before


def test_cgroup_is_removed_with_its_processes(nothing_left: None) -> None:
    with kernel.new_cgroup() as path:
        (path / "below").mkdir()
        sleeper = Place(cgroup=path / "below").start("sleep", "1000")
        eventually((path / "below" / "cgroup.procs").read_text, "the process to join")
    with sleeper:
        assert sleeper.wait() == -signal.SIGKILL
    assert not path.exists()


def test_bpffs_is_removed_with_its_pins(nothing_left: None) -> None:
    with kernel.new_bpffs() as path:
        (path / "directory" / "below").mkdir(parents=True)
    assert not path.exists()
