"""The agent's side of the proxy process: find it, start it, replace an older build, talk to it."""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy.dataplane.userspace import protocol
from ebpfproxy.dataplane.userspace.protocol import Ask, Counts, Done, Hello, Stop, Update
from ebpfproxy.errors import DataplaneError

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from ebpfproxy.dataplane.userspace.protocol import Message

log = logging.getLogger(__name__)

_START_S = 30.0  # Python starts in 0.2 s; a busy machine takes its time
_ANSWER_S = 60.0  # 10,000 listeners are opened in about one second
_LOOK_S = 0.02
#: Processes that we started. They outlive us; those that do not are reaped when the next one is started.
_children: list[subprocess.Popen[bytes]] = []


class Proxy:
    """A connection to the proxy process, which is started if none of this build runs.

    Args:
        state_dir: holds the socket.
        log_format: text | json; of a process that is started.

    Raises:
        DataplaneError: it can't be started.
    """

    def __init__(self, state_dir: Path, log_format: str = "text") -> None:
        self._path = state_dir / protocol.SOCKET
        self._connection: socket.socket | None = None
        hello = self._greet()
        if hello is None or hello.build != protocol.build():
            if hello is not None:
                log.info("a new build of the proxy takes over from process %d", hello.pid)
            hello = self._start(hello.pid if hello else 0, log_format)
        self.hello = hello

    def update(self, update: Update) -> Done:
        """Change what it serves.

        Raises:
            DataplaneError: it ended, or does not answer.
        """
        answer = self._ask(update)
        if not isinstance(answer, Done):
            raise DataplaneError(f"update the userspace proxy: it answers {type(answer).__name__}")
        return answer

    def counts(self) -> Counts:
        """Return what it did so far.

        Raises:
            DataplaneError: it ended, or does not answer.
        """
        answer = self._ask(Ask())
        if not isinstance(answer, Counts):
            raise DataplaneError(f"ask the userspace proxy: it answers {type(answer).__name__}")
        return answer

    def is_alive(self) -> bool:
        """Return whether it still holds its end; it speaks only when it is asked."""
        if self._connection is None:
            return False
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        """Let go of it; it goes on."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, request: Message) -> Message:
        if self._connection is None:
            raise DataplaneError("the connection to the userspace proxy is closed")
        try:
            self._connection.sendall(protocol.encode(request))
            return protocol.receive(self._connection)
        except (OSError, EOFError, msgspec.DecodeError) as error:
            self.close()
            raise DataplaneError(
                f"ask the userspace proxy: {str(error) or 'it ended'}; it is started again"
            ) from error

    def _greet(self) -> Hello | None:
        """Connect; return its first word, None if nobody is there, or nobody who is understood."""
        self.close()
        with suppress(OSError, EOFError, msgspec.DecodeError):
            self._connection = protocol.connect(self._path, _ANSWER_S)
            hello = protocol.receive(self._connection)
            if isinstance(hello, Hello):
                return hello
        self.close()
        return None

    def _start(self, old: int, log_format: str) -> Hello:
        """Start a process of this build and wait for its word; it takes over from ``old`` by itself."""
        self.close()
        command = [sys.executable, "-m", "ebpfproxy.dataplane.userspace.proxy"]
        try:
            # Its own session: a Ctrl-C that ends the agent leaves Services working.
            process = subprocess.Popen(
                [*command, "--socket", str(self._path), "--log-format", log_format],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise DataplaneError(f"start the userspace proxy: {error.strerror}") from error
        _children[:] = [process, *(each for each in _children if each.poll() is None)]
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            hello = self._greet()
            if hello is not None and hello.pid == process.pid:
                return hello
            status = process.poll()
            if status is not None:
                raise DataplaneError(f"start the userspace proxy: it ended with status {status}")
            time.sleep(_LOOK_S)
        process.kill()
        raise DataplaneError(f"start the userspace proxy: no answer at {self._path} in {_START_S:g} s")


def counts(state_dir: Path) -> Counts | None:
    """Return what the proxy that runs did so far, None if none runs; may be called beside a ``Proxy``."""
    with suppress(OSError, EOFError, msgspec.DecodeError):
        with protocol.connect(state_dir / protocol.SOCKET, _ANSWER_S) as connection:
            protocol.receive(connection)
            connection.sendall(protocol.encode(Ask()))
            answer = protocol.receive(connection)
        if isinstance(answer, Counts):
            return answer
    return None


def stop(state_dir: Path) -> int | None:
    """End the proxy process, if one runs; return its number."""
    path = state_dir / protocol.SOCKET
    pid = None
    try:
        with protocol.connect(path, _ANSWER_S) as connection:
            hello = protocol.receive(connection)
            if isinstance(hello, Hello):
                pid = hello.pid
                connection.sendall(protocol.encode(Stop()))
                with suppress(EOFError):
                    protocol.receive(connection)
    except (OSError, EOFError, msgspec.DecodeError):
        return pid
    finally:
        path.unlink(missing_ok=True)
    return pid
