"""The way back: no new connection is taken any more, the ones there are go on until they end.

What serves in our place, kube-proxy for instance, is there already, or connections fail from here on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ebpfproxy import config, files, log, status
from ebpfproxy.agent import LOCK_FILE
from ebpfproxy.dataplane import chosen
from ebpfproxy.dataplane.chosen import ChosenDataplane
from ebpfproxy.model.services import DesiredState

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebpfproxy.dataplane.modes import Site

_log = log.get(__name__)

_TICK_S = 1.0
_TELL_S = 30.0
_REST = 10  # times as long as counting took: a full map is no reason to keep a core busy


def drain(
    site: Site,
    settings: config.Config,
    *,
    timeout_s: float | None,
    stay: bool,
    is_over: Callable[[float], bool],
) -> int:
    """Empty the dataplane of the agent that ran last, and wait for what it still carries.

    Args:
        site: where that agent worked; what is None is taken from its status.
        settings: its configuration.
        timeout_s: wait no longer; None: as long as it takes.
        stay: go on when nothing is left.
        is_over: waits so many seconds, and says whether to end.

    Returns:
        How many connections still go through us.

    Raises:
        LockedError: an agent is at work: end it first.
        EbpfproxyError: the dataplane can't be emptied; the message says why.
    """
    said = status.read(site.state_dir)
    if said:
        site = site._replace(
            cgroup=site.cgroup or (Path(said.cgroup) if said.cgroup else None),
            bpffs=site.bpffs or (Path(said.bpffs) if said.bpffs else None),
        )
    modes = list(chosen.read_record(site.state_dir))
    if not modes:
        _log.info("no agent ran with state directory %s: nothing to drain", site.state_dir)
        return 0
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    lock = files.Lock(site.state_dir / LOCK_FILE, "state directory")
    try:
        dataplane = ChosenDataplane(config.in_mode(settings, modes[-1]), site)
        try:
            dataplane.start()
            dataplane.sync(DesiredState(()))
            return _wait(dataplane, deadline, is_over, stay=stay)
        finally:
            dataplane.close()
    finally:
        lock.close()


def _wait(
    dataplane: ChosenDataplane, deadline: float | None, is_over: Callable[[float], bool], *, stay: bool
) -> int:
    told_at, told = float("-inf"), -1
    while True:
        dataplane.tick()
        begun = time.monotonic()
        left = open_connections(dataplane)
        now = time.monotonic()
        if now - told_at >= _TELL_S or (not left and told):
            told_at, told = now, left
            _log.info("no new connections are taken; %d go on", left)
        if (not left and not stay) or (deadline is not None and now >= deadline):
            return left
        if is_over(max(_TICK_S, _REST * (now - begun))):
            return left


def open_connections(dataplane: ChosenDataplane) -> int:
    """Return how many connections need us.

    Those of sockets on this node were translated once, when they were made, and rules leave theirs to the
    kernel's conntrack: only the flows that BPF programs translate packet by packet do.
    """
    if dataplane.mode != "bpf" or dataplane.site.bpffs is None:
        return 0
    from ebpfproxy.dataplane.bpf import view

    with view.open_maps(dataplane.site.bpffs) as maps:
        return sum(
            row.kind == "forwarded" and row.state in ("established", "closing") and row.protocol != "UDP"
            for row in view.connections(maps)
        )
