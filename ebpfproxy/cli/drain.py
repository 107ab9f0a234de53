"""``ebpfproxy drain``: the way back to whatever serves in our place."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

from ebpfproxy import config, log
from ebpfproxy.cli.exit_codes import ExitCode
from ebpfproxy.dataplane.modes import Site
from ebpfproxy.drain import drain

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> ExitCode:
    """Drain; exit status 1 if connections are left at the end."""
    log.setup("text")
    settings = config.load(arguments.config)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    left = drain(
        Site(arguments.state_dir, arguments.cgroup, arguments.bpffs),
        settings,
        timeout_s=arguments.timeout,
        stay=arguments.stay,
        is_over=ended.wait,
    )
    print(
        f"{left} connections still go through ebpfproxy"
        if left
        else "nothing goes through ebpfproxy any more"
    )
    return ExitCode.FAILED if left else ExitCode.OK
