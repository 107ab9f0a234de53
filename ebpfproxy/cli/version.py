"""``ebpfproxy version``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ebpfproxy
from ebpfproxy.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    import argparse


def run(_: argparse.Namespace) -> ExitCode:
    """Print the version."""
    print(f"ebpfproxy {ebpfproxy.__version__}")
    return ExitCode.OK
