"""A run that is ended in the middle leaves nothing; a killed one is swept up by the next."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from rig import leaks
from rig.process import HERE
from rig.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.netns]

# Makes one of everything, says so, and waits to be ended.
INNER = """
import time
import pytest
from rig.topology import Topology

@pytest.mark.netns
def test_waits(nothing_left, capsys):
    with Topology(pod_count=1) as net, net.on_node.start("sleep", "1000"):
        with capsys.disabled():
            print("MADE", flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_of_an_ended_run(how: signal.Signals, tmp_path: Path, nothing_left: None) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "conftest.py").write_text((root / "conftest.py").read_text())
    (tmp_path / "test_inner.py").write_text(INNER)
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    with HERE.start(*command, env={"PYTHONPATH": str(root)}) as run:
        eventually(lambda: "MADE" in run.output(), "the inner test to make things")
        prefix = f"ebp-{run.pid}-"
        assert len(leaks.find(prefix)) > 4, "namespaces, a cgroup, a mount and directories"
        run.signal(how)
        run.wait()
    if how == signal.SIGKILL:
        leaks.sweep()  # another run that starts just now may have done it already
    assert not leaks.find(prefix)
