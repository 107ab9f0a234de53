"""Runs one command: from the arguments to the exit status."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ebpfproxy.cli import parser
from ebpfproxy.cli.exit_codes import ExitCode, NothingError
from ebpfproxy.errors import ConfigError, EbpfproxyError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in ``arguments`` (default: the process's own) and return its exit status."""
    parsed = parser.build().parse_args(arguments)
    try:
        result: int = parsed.run(parsed)
        sys.stdout.flush()
        return result
    except BrokenPipeError:
        # The reader of a pipe has seen enough; the interpreter must not fail once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except NothingError as error:
        return _fail(error, ExitCode.NOTHING)
    except ConfigError as error:
        return _fail(error, ExitCode.USAGE)
    except EbpfproxyError as error:
        return _fail(error, ExitCode.FAILED)
    except PermissionError as error:
        return _fail(f"{error}: run it as root", ExitCode.FAILED)


def _fail(message: object, code: ExitCode) -> ExitCode:
    print(f"ebpfproxy: {message}", file=sys.stderr)
    return code
