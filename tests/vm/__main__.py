"""``python -m vm KERNEL COMMAND...``: run a command under another kernel, with its exit status as ours."""

from __future__ import annotations

import argparse
import signal
import sys

from vm import kernels, machine


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/vm",
        description="Run a command under another kernel, as root, on this machine's files. "
        "What it writes is lost, and so is the machine.",
    )
    parser.add_argument("kernel", choices=kernels.KERNELS)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, in the present directory")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=machine.MEMORY_MIB, metavar="MIB")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("there is no command")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up
    try:
        result = machine.run(
            kernels.fetch(arguments.kernel),
            arguments.command,
            timeout_s=arguments.timeout,
            memory_mib=arguments.memory,
            echo=sys.stdout,
        )
    except (kernels.UnavailableError, machine.BootError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130
    print(f"vm: exit status {result.status} after {result.duration_s:.1f} s", file=sys.stderr)
    return result.status


if __name__ == "__main__":
    sys.exit(main())
