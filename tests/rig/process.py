"""Child processes in a network namespace and a cgroup."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Joins the cgroup $1 and the network namespace $2, then becomes the command: the process id stays, and
# unlike under `ip netns exec` /sys stays as it is. The child ends with the thread that started it.
_ENTER = """
[ -z "$1" ] || echo $$ > "$1/cgroup.procs" || exit 125
net=$2; shift 2
exec setpriv --pdeathsig KILL nsenter ${net:+--net="$net"} -- "$@"
"""

running: set[Process] = set()


@dataclass(frozen=True)
class Place:
    """Where a process runs; None = where the tests run."""

    netns: Path | None = None
    cgroup: Path | None = None

    def argv(self, command: Sequence[str | Path]) -> list[str]:
        """Return the command line that runs ``command`` here."""
        return [
            "/bin/sh",
            "-c",
            _ENTER,
            "enter",
            str(self.cgroup or ""),
            str(self.netns or ""),
            *map(str, command),
        ]

    def run(
        self,
        *command: str | Path,
        text: str | None = None,
        timeout_s: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; with ``check`` a failure raises AssertionError with its output."""
        result = subprocess.run(
            self.argv(command),
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **(env or {})},
        )
        if check and result.returncode:
            msg = f"{' '.join(map(str, command))}: exit {result.returncode}\n{result.stdout}{result.stderr}"
            raise AssertionError(msg)
        return result

    def start(
        self, *command: str | Path, env: Mapping[str, str] | None = None, pipes: bool = False
    ) -> Process:
        """Start a command that runs on; see :class:`Process`."""
        return Process(self, command, env=env, pipes=pipes)


class Process:
    """A running child. Ended by ``stop`` or at the end of the ``with``; its output is kept.

    With ``pipes`` its standard input and output are ``stdin`` and ``stdout``, and only standard error
    is kept.
    """

    def __init__(
        self,
        place: Place,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        pipes: bool = False,
    ) -> None:
        self.name = " ".join(map(str, command))
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._popen = subprocess.Popen(
            place.argv(command),
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self._log,
            stderr=self._log,
            env={**os.environ, **(env or {})},
        )
        running.add(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self._popen.stdin
        return self._popen.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._popen.stdout
        return self._popen.stdout

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._popen.poll()

    def output(self) -> str:
        """Return what was written so far."""
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            self._popen.send_signal(number)

    def wait(self, timeout_s: float = 20) -> int:
        """Return the exit status once it ended by itself."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            msg = f"{self.name} does not end; its output:\n{self.output()}"
            raise AssertionError(msg) from None

    def kill(self) -> None:
        """End it at once (SIGKILL) and wait for that."""
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def stop(self) -> None:
        """End it and let go of its output."""
        self.kill()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()
        running.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


HERE = Place()
