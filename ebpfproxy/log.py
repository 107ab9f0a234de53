"""Logging: standard library, one line an event, as text or JSON, and each problem said once."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable

# syslog(3) priorities; systemd reads "<N>" at the start of a line, sd-daemon(3).
_PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}


def get(name: str) -> logging.Logger:
    """Return the logger of a module (``__name__``)."""
    return logging.getLogger(name)


def setup(style: str = "text", *, debug: bool = False, stream: TextIO | None = None) -> None:
    """Send the package's log to ``stream`` (standard error) as ``text`` or ``json``; may be called again."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_json_formatter() if style == "json" else _TextFormatter(_is_journal(stream)))
    logger = logging.getLogger("ebpfproxy")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logging.captureWarnings(False)


class _TextFormatter(logging.Formatter):
    """Text for people: one line an event; the journal keeps time and priority by itself."""

    def __init__(self, is_journal: bool) -> None:
        super().__init__("%(message)s" if is_journal else "%(asctime)s %(levelname)-7s %(message)s")
        self.default_msec_format = "%s.%03d"
        self._is_journal = is_journal

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if self._is_journal:
            prefix = f"<{_PRIORITIES.get(record.levelname, 6)}>"
            return "\n".join(prefix + part for part in line.split("\n"))
        return line


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        "{asctime}{levelname}{name}{message}",
        style="{",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )


def _is_journal(stream: TextIO) -> bool:
    """Return whether ``stream`` goes straight to the journal.

    Source: systemd.exec(5), $JOURNAL_STREAM: device and inode of the connection, to compare by fstat.
    """
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


class Problems:
    """Says each problem once when it appears, and once when it is gone."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._groups: dict[str, tuple[str, ...]] = {}

    def update(self, group: str, texts: Iterable[str], level: int = logging.ERROR) -> None:
        """Make ``texts`` all the problems of ``group``."""
        new = tuple(dict.fromkeys(texts))
        old = self._groups.get(group, ())
        if new == old:
            return
        self._groups[group] = new
        for text in new:
            if text not in old:
                self._logger.log(level, "%s", text)
        for text in old:
            if text not in new:
                self._logger.info("no longer: %s", text)

    def of(self, group: str) -> tuple[str, ...]:
        """Return the present problems of a group."""
        return self._groups.get(group, ())

    def has(self, *groups: str) -> bool:
        """Return whether any of the groups has a problem."""
        return any(self._groups.get(group) for group in groups)

    def all(self) -> tuple[str, ...]:
        """Return every present problem, group by group."""
        return tuple(text for group in sorted(self._groups) for text in self._groups[group])
