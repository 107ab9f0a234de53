"""What the exit status says; ``ebpfproxy --help`` and docs/cli.md document it."""

from __future__ import annotations

import enum

from ebpfproxy.errors import EbpfproxyError


class ExitCode(enum.IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1  # the operation failed, or a check found something wrong
    USAGE = 2  # or a wrong configuration file
    NOTHING = 3  # nothing is programmed, no agent runs, no such Service; run --once: objects refused
    INTERRUPTED = 130  # 128 + SIGINT, as shells count


class NothingError(EbpfproxyError):
    """What a command reads is not there."""
