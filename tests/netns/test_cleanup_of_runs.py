"""A run that is ended in the middle leaves nothing; a killed one is swept up by the next."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest

from rig import leaks
from rig.names import temporary_directory
from rig.process import HERE
from rig.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.netns]

PID_MAX_LIMIT = 4194304  # include/linux/threads.h, for 64 bits

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


def test_a_proxy_is_ended_when_its_run_is_gone_and_only_then(nothing_left: None) -> None:
    """Proxies of mode userspace outlive everything else of a run, their directory included."""
    own = temporary_directory("proxy")
    gone = own / f"ebp-{PID_MAX_LIMIT + 1}-1"  # no run ever has that number
    gone.mkdir()
    proxy = [sys.executable, "-m", "ebpfproxy.dataplane.userspace.proxy", "--socket"]
    try:
        with HERE.start(*proxy, own / "socket") as live, HERE.start(*proxy, gone / "socket") as left:
            eventually((own / "socket").exists, "the proxy of this run")
            # Another run that starts just now sweeps too.
            eventually(lambda: (gone / "socket").exists() or left.poll(), "the proxy of no run")
            shutil.rmtree(gone)
            leaks.sweep()
            assert left.wait() == -signal.SIGKILL
            assert live.poll() is None
    finally:
        shutil.rmtree(own)
