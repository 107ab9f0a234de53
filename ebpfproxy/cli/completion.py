"""``ebpfproxy completion``: the home of shtab."""

from __future__ import annotations

from typing import TYPE_CHECKING

import shtab

from ebpfproxy.cli import parser
from ebpfproxy.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> ExitCode:
    """Print the completion script of a shell."""
    print(shtab.complete(parser.build(), shell=arguments.shell))
    return ExitCode.OK
