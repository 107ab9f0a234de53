"""Keeps the last good version of each manifest file, for a restart that finds a broken one.

A copy is a JSON List of the objects as they were written, so that it reads like any manifest. Copies are
written by a thread of their own, a little after the fact.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ebpfproxy import files, log
from ebpfproxy.documents import DocumentError
from ebpfproxy.source import manifests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ebpfproxy.model.objects import Object, ObjectKey

_log = log.get(__name__)

# Long enough that a start-up's first sync has the processor for itself, and that a burst of writes is one.
_DELAY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy to write."""

    raw: dict[ObjectKey, Any]
    keep: frozenset[ObjectKey]  # what the old copy has of these stays
    mtime_ns: int


class LastGood:
    """The copies, in one directory; named as the file and ``.json``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, _Copy | None] = {}  # None: remove
        self._lock = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def load(self, name: str) -> dict[ObjectKey, Object]:
        """Return the objects of the copy of the file ``name``; {} if there is none."""
        return self._read(name).objects

    def is_current(self, name: str, mtime_ns: int) -> bool:
        """Return whether the copy was made of a file with this time of modification."""
        try:
            return self._path(name).stat().st_mtime_ns == mtime_ns
        except OSError:
            return False

    def save(self, name: str, manifest: manifests.Manifest, mtime_ns: int) -> None:
        """Make ``manifest`` the copy; what it refuses stays as the old copy has it."""
        self._put(name, _Copy(manifest.raw, manifest.refused, mtime_ns))

    def remove(self, name: str) -> None:
        """Remove the copy of a file that is gone."""
        self._put(name, None)

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the copies of all files but ``names``."""
        wanted = {self._path(name).name for name in names}
        try:
            stale = [path for path in self._directory.iterdir() if path.name not in wanted]
        except OSError:
            return
        for path in stale:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is still to be written."""
        with self._lock:
            self._is_closing = True
            self._lock.notify()
        if self._thread:
            self._thread.join()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _read(self, name: str) -> manifests.Manifest:
        path = self._path(name)
        try:
            return manifests.read(path.name, path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, DocumentError) as error:
            _log.warning("read last good copy %s: %s", path, error)
        return manifests.Manifest({}, {}, frozenset(), ())

    def _put(self, name: str, copy: _Copy | None) -> None:
        with self._lock:
            waiting = self._pending.get(name)
            if copy and waiting:
                kept = {key: raw for key, raw in waiting.raw.items() if key in copy.keep}
                copy = _Copy(copy.raw | kept, copy.keep - kept.keys(), copy.mtime_ns)
            self._pending[name] = copy
            if not self._thread:
                self._thread = threading.Thread(target=self._run, name="last-good", daemon=True)
                self._thread.start()
            self._lock.notify()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._pending or self._is_closing)
                self._lock.wait_for(lambda: self._is_closing, timeout=_DELAY_S)
                pending, self._pending = self._pending, {}
                is_last = self._is_closing
            for name, copy in pending.items():
                try:
                    self._write(name, copy)
                except (OSError, TypeError, ValueError, RecursionError) as error:
                    _log.warning("write last good copy %s: %s", self._path(name), error)
            if is_last:
                return

    def _write(self, name: str, copy: _Copy | None) -> None:
        if copy is None:
            self._path(name).unlink(missing_ok=True)
            return
        raw = copy.raw
        if copy.keep:
            raw = raw | {key: value for key, value in self._read(name).raw.items() if key in copy.keep}
        data = msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": list(raw.values())})
        # Without fsync: after a power failure the file itself is there, and a broken copy is passed over.
        files.write_atomic(self._path(name), data, durable=False, mtime_ns=copy.mtime_ns)


def directory_of(state_dir: Path) -> Path:
    """Return where the copies are, below the agent's state directory."""
    return Path(os.fspath(state_dir)) / "last-good"
