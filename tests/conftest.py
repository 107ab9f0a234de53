"""Fixtures for every kind of test that touches the kernel."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from rig import kernel, leaks
from rig.process import HERE
from rig.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure() -> None:
    # How long an example takes says how busy the machine is.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    # A run that is told to end cleans up as one that is interrupted from the keyboard.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell starts what goes to the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_root = pytest.mark.skip(reason="needs root")
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root") or item.get_closest_marker("netns"):
                item.add_marker(needs_root)


@pytest.fixture(scope="session")
def nothing_left() -> Iterator[None]:
    """Fails the run when something the tests made in the kernel is still there at its end."""
    leaks.sweep()
    pins = leaks.pins()
    yield

    def left() -> list[str]:
        return leaks.find() + [f"pin {path}" for path in leaks.pins() - pins]

    # What was told to end needs its turn on a busy machine.
    with contextlib.suppress(AssertionError):
        eventually(lambda: not left(), "everything to be gone", every_s=0.2)
    assert not left(), "left behind:\n" + "\n".join(left())


@pytest.fixture
def bpffs(nothing_left: None) -> Iterator[Path]:
    """A bpffs mount of this test's own."""
    with kernel.new_bpffs() as path:
        yield path


@pytest.fixture
def cgroup(nothing_left: None) -> Iterator[Path]:
    """A cgroup2 directory of this test's own."""
    with kernel.new_cgroup() as path:
        yield path


@pytest.fixture
def netns(nothing_left: None) -> Iterator[kernel.Netns]:
    """A network namespace of this test's own, loopback up."""
    with kernel.new_netns() as made:
        yield made


@pytest.fixture(scope="session")
def bcc_headers() -> Iterator[None]:
    """Kernel headers for BCC, where ``scripts/test`` has not found them already."""
    with pytest.MonkeyPatch.context() as patch:
        if "BCC_KERNEL_SOURCE" not in os.environ:
            script = Path(__file__).parents[1] / "scripts" / "bcc-headers"
            patch.setenv("BCC_KERNEL_SOURCE", HERE.run(script, timeout_s=300).stdout.strip())
        yield
