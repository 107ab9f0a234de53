"""Logging, systemd's notifications, and what both tell."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest

from ebpfproxy import log
from ebpfproxy.systemd import Notifier

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _restore_logging() -> object:
    logger = logging.getLogger("ebpfproxy")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_json_is_one_object_a_line() -> None:
    stream = io.StringIO()
    log.setup("json", stream=stream)
    log.get("ebpfproxy.x").warning("first\nsecond %s", "line", extra={"file": "a.yaml"})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry.pop("time")
    assert entry == {
        "level": "WARNING",
        "logger": "ebpfproxy.x",
        "message": "first\nsecond line",
        "file": "a.yaml",
    }


def test_text_has_level_and_message_once_however_often_it_is_set_up() -> None:
    stream = io.StringIO()
    log.setup("text", stream=stream)
    log.setup("text", stream=stream)
    log.get("ebpfproxy.x").debug("hidden")
    log.get("ebpfproxy.x").error("seen")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("ERROR   seen")


def test_the_journal_gets_priorities_instead_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    with path.open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.setup("text", debug=True, stream=stream)
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            log.get("ebpfproxy.x").log(level, "a\nb")
    # syslog(3): debug 7, informational 6, warning 4, error 3
    assert path.read_text().splitlines() == [f"<{n}>{text}" for n in (7, 6, 4, 3) for text in ("a", "b")]


def test_each_problem_is_said_once_when_it_comes_and_once_when_it_goes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problems = log.Problems(logging.getLogger("test"))
    caplog.set_level(logging.INFO, "test")
    problems.update("source", ["a is broken", "b is broken"])
    problems.update("source", ["a is broken", "b is broken"])
    problems.update("sync", ["map full"], logging.WARNING)
    problems.update("source", ["b is broken"])
    assert problems.all() == ("b is broken", "map full")
    problems.update("source", [])
    problems.update("source", ["a is broken"])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "a is broken"),
        ("ERROR", "b is broken"),
        ("WARNING", "map full"),
        ("INFO", "no longer: a is broken"),
        ("INFO", "no longer: b is broken"),
        ("ERROR", "a is broken"),
    ]


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_hears_everything(tmp_path: Path, is_abstract: bool) -> None:
    address = f"@ebpfproxy-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address.replace("@", "\0"))
        server.settimeout(10)
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "4000000"})
        notifier.ready("2 services")
        notifier.status("2 services")  # unchanged: not sent
        notifier.status("3 services")
        notifier.ping(now=100.0)
        notifier.ping(now=100.5)  # too soon
        notifier.ping(now=101.0)
        notifier.reloading()
        notifier.stopping("bye")
        messages = [server.recv(4096).decode() for _ in range(6)]
    assert messages[:4] == ["READY=1\nSTATUS=2 services", "STATUS=3 services", "WATCHDOG=1", "WATCHDOG=1"]
    assert messages[4].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert messages[4].rpartition("=")[2].isdecimal()
    assert messages[5] == "STOPPING=1\nSTATUS=bye"
    assert notifier.watchdog_s == 4.0


def test_nobody_waits_for_a_reader_of_the_status(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(address)
        notifier = Notifier({"NOTIFY_SOCKET": address})
        for number in range(5000):  # more than a socket's queue holds
            notifier.status(f"{number}")
        assert reader.recv(100) == b"STATUS=0"
        notifier.status("late")
        reader.setblocking(False)
        told = []
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(reader.recv(100))
        assert told[-1] == b"STATUS=late"


def test_without_systemd_nothing_is_sent() -> None:
    Notifier({}).ready("fine")


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    assert Notifier({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}).watchdog_s == 0


def test_a_dead_socket_is_no_failure(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("fine")
