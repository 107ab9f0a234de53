"""The directory source: Kubernetes manifests in the files of one directory, watched by inotify.

Files count whose names end in .yaml, .yml or .json and don't begin with a dot; subdirectories are left out,
as the kubelet does with its static pods. Symbolic links are followed, and a swapped link (the ``..data``
of a mounted ConfigMap) makes every file be looked at.

- A file is read when a writer closes it or it is renamed into place. One that does not parse keeps its last
  good objects, a wrong object its last good version; both are reported until they are mended.
- A file that is gone takes its objects along after a short moment: an editor that moves the old version away,
  or ``rm -r`` of the whole directory, is no reason to take Services down.
- When the directory itself is gone, the last objects stay. Once it is back and has been quiet for a second
  with something in it, it counts again in full.
- What inotify can't see (network file systems, targets of links elsewhere) is found by a look every few
  seconds.
"""

from __future__ import annotations

import os
import select
import stat
import time
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import inotify_simple

from ebpfproxy import log
from ebpfproxy.alarm import Alarm
from ebpfproxy.documents import DocumentError
from ebpfproxy.errors import SourceError
from ebpfproxy.source import Reported, SourceEvent, lastgood, manifests
from ebpfproxy.store import Delete, Set, Synced

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ebpfproxy.model.objects import Object, ObjectKey

_log = log.get(__name__)

_FLAGS = inotify_simple.flags
_SELF_GONE = _FLAGS.DELETE_SELF | _FLAGS.MOVE_SELF | _FLAGS.UNMOUNT | _FLAGS.IGNORED
_GONE = _FLAGS.DELETE | _FLAGS.MOVED_FROM
_APPEARED = _FLAGS.CREATE | _FLAGS.MOVED_TO
_WRITTEN = _FLAGS.CLOSE_WRITE | _FLAGS.MOVED_TO | _FLAGS.ATTRIB
_MASK = _APPEARED | _WRITTEN | _GONE | _FLAGS.DELETE_SELF | _FLAGS.MOVE_SELF | _FLAGS.ONLYDIR

_LOOK_S = 5.0  # how often to look for what inotify can't see
_REMOVAL_S = 0.05  # how long a file must be gone before its objects are
_RETURN_S = 0.05  # how often to look for a directory that is gone
_SETTLED_S = 1.0  # how long a directory that came back must be quiet
_QUIET_S = 1.0  # a changed file without an event is read when it is this old: its writer may be at work


class _Stamp(NamedTuple):
    """Tells whether a file changed."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class _File(NamedTuple):
    """What is known of one file."""

    stamp: _Stamp | None  # None: it could not be read
    objects: dict[ObjectKey, Object]
    problems: tuple[str, ...]
    ignored: Mapping[str, int] = MappingProxyType({})  # kinds that were left out


class DirectorySource:
    """Delivers the objects in the manifest files of a directory.

    Args:
        directory: must exist.
        last_good: where to keep last good copies; None: nowhere.

    Raises:
        SourceError: there is no such directory, or it can't be watched.
    """

    def __init__(self, directory: Path, last_good: Path | None = None) -> None:
        self._directory = directory
        self._last_good = lastgood.LastGood(last_good) if last_good else None
        self._files: dict[str, _File] = {}
        self._going: dict[str, float] = {}  # files that seem gone -> when to believe it
        self._problem = ""  # with the directory itself
        self._told: tuple[str, ...] = ()
        self._identity: tuple[int, int] | None = None  # of the watched directory; None: it is gone
        # The link may be turned to another directory, which is no event in this one.
        self._is_linked = directory.resolve() != directory.absolute()
        self._settled_at: float | None = None  # after the directory came back: when it counts in full again
        self._next_look = 0.0
        self._is_closed = False
        self._must_reread = False
        try:
            self._inotify = inotify_simple.INotify()
        except OSError as error:
            raise SourceError(f"watch directory {directory}: inotify: {error.strerror}") from error
        try:
            self._watch()
        except OSError as error:
            self._inotify.close()
            raise SourceError(f"watch directory {directory}: {error.strerror}") from error
        self._alarm = Alarm()
        self._poller = select.poll()
        self._poller.register(self._inotify.fd, select.POLLIN)
        self._poller.register(self._alarm, select.POLLIN)

    # --- the Source protocol ---------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[SourceEvent, ...]]:
        """Yield what changed, batch by batch; ``Synced`` ends the first one."""
        try:
            self._next_look = time.monotonic() + _LOOK_S
            names = self._list()
            if self._last_good and self._identity:
                self._last_good.keep_only(names)
            yield (*self._read_files(names), Synced("objects"), *self._report())
            while not self._is_closed:
                if batch := (*self._next(), *self._report()):
                    yield batch
        finally:
            self._inotify.close()
            self._alarm.close()
            if self._last_good:
                self._last_good.close()

    def reread(self) -> None:
        """Read everything again, changed or not; ``Synced`` follows it."""
        self._must_reread = True
        self._alarm.ring()

    def close(self) -> None:
        """End ``batches``."""
        self._is_closed = True
        self._alarm.ring()

    # --- waiting ---------------------------------------------------------------------------------

    def _next(self) -> list[SourceEvent]:
        """Wait for something to happen, and return what changed."""
        self._poller.poll(max(0.0, self._deadline() - time.monotonic()) * 1000 + 1)
        self._alarm.silence()
        if self._is_closed:
            return []
        answer: list[SourceEvent] = []
        if self._must_reread:
            self._must_reread = False
            answer.append(Synced("objects"))
        written, look = self._take_events()
        now = time.monotonic()
        if self._identity is None:
            look = self._come_back()
        elif self._is_linked:
            self._is_here()
        if self._identity is None:
            return answer
        if answer:
            written.update(self._list())
            look = True
        if look or now >= self._next_look:
            self._next_look = now + _LOOK_S
            written |= self._changed(written)
        events = self._read_files(sorted(written))
        if self._settled_at is not None:
            self._settle(now, is_busy=bool(written))
        return events + self._removals(now) + answer

    def _deadline(self) -> float:
        """Return when there is something to do even if nothing happens."""
        if self._identity is None or self._is_linked:
            return time.monotonic() + _RETURN_S
        if self._settled_at is not None:
            return min(self._next_look, self._settled_at)
        return min([self._next_look, *self._going.values()])

    def _take_events(self) -> tuple[set[str], bool]:
        """Return the files that were written, and whether all must be looked at."""
        written: set[str] = set()
        look = False
        for event in self._inotify.read(timeout=0):
            if event.mask & _FLAGS.Q_OVERFLOW:
                _log.info(
                    "directory %s changes faster than it is read: looking at all of it", self._directory
                )
                look = True
            elif event.wd != self._wd:
                continue  # of a directory that was there before
            elif event.mask & _SELF_GONE:
                self._lose()
            elif not _is_manifest(event.name):
                # ``..data`` of a ConfigMap, or any other link that our files may lead through.
                look |= bool(event.mask & _APPEARED) and (self._directory / event.name).is_symlink()
            elif event.mask & _GONE:
                self._going.setdefault(event.name, time.monotonic() + _REMOVAL_S)
            elif event.mask & _WRITTEN or self._is_complete(event.name):
                written.add(event.name)
        return written, look

    def _is_complete(self, name: str) -> bool:
        """Return whether a file that was just created is a link: those come without a later close."""
        try:
            status = (self._directory / name).lstat()
        except OSError:
            return False
        return stat.S_ISLNK(status.st_mode) or status.st_nlink > 1

    # --- the directory ---------------------------------------------------------------------------

    def _watch(self) -> None:
        """Start to watch the directory."""
        self._wd = self._inotify.add_watch(self._directory, _MASK)
        status = self._directory.stat()
        self._identity = (status.st_dev, status.st_ino)

    def _lose(self) -> None:
        """Note that the directory is gone: nothing in it counts as removed."""
        if self._identity is None:
            return
        with suppress(OSError):  # the kernel has removed it already, unless the directory was moved
            self._inotify.rm_watch(self._wd)
        self._identity = self._settled_at = None
        self._going.clear()
        self._problem = f"directory {self._directory} is gone: its last objects stay until it is back"

    def _come_back(self) -> bool:
        """Watch the directory again if it is back, and return whether it is."""
        try:
            self._watch()
        except OSError:
            return False
        self._settled_at = time.monotonic() + _SETTLED_S
        self._problem = (
            f"directory {self._directory} is back: its last objects stay until it holds manifests again"
        )
        return True

    def _settle(self, now: float, *, is_busy: bool) -> None:
        """Let the directory count in full again once it has been quiet with something in it."""
        assert self._settled_at is not None
        if is_busy:
            self._settled_at = now + _SETTLED_S
        elif now >= self._settled_at:
            names = self._list()
            if not names:
                self._settled_at = now + _SETTLED_S
                return
            self._settled_at = None
            self._problem = ""
            self._going = dict.fromkeys(self._files.keys() - set(names), now)

    def _is_here(self) -> bool:
        """Return whether the directory is still the one that is watched; if not, note that it is gone."""
        if self._identity is not None:
            try:
                status = self._directory.stat()
            except OSError:
                status = None
            if status is None or (status.st_dev, status.st_ino) != self._identity:
                self._lose()
        return self._identity is not None

    def _list(self) -> list[str]:
        """Return the names of the manifest files, sorted; [] when the directory is gone."""
        try:
            if self._is_here():
                with os.scandir(self._directory) as entries:
                    return sorted(entry.name for entry in entries if _is_manifest(entry.name))
        except OSError:
            self._lose()
        return []

    def _changed(self, written: set[str]) -> set[str]:
        """Return the files that changed without an event of their own; schedule those that are gone."""
        names = self._list()
        if self._identity is None:
            return set()
        now = time.monotonic()
        for name in self._files.keys() - set(names):
            self._going.setdefault(name, now + _REMOVAL_S)
        changed = set()
        for name in names:
            path, known = self._directory / name, self._files.get(name)
            stamp = _stamp(path)
            if stamp is None and known:  # a link that leads nowhere now
                self._going.setdefault(name, now + _REMOVAL_S)
            if stamp is None or name in written or (known and stamp == known.stamp):
                continue
            if path.is_symlink() or time.time_ns() - stamp.mtime_ns > _QUIET_S * 1e9:
                changed.add(name)
            else:
                self._next_look = min(self._next_look, now + _QUIET_S)
        return changed

    def _removals(self, now: float) -> list[SourceEvent]:
        """Return the deletions for files that have been gone long enough."""
        due = [name for name, at in self._going.items() if at <= now]
        if not due or self._settled_at is not None or not self._is_here():
            return []
        events: list[SourceEvent] = []
        for name in due:
            del self._going[name]
            if name in self._files and _stamp(self._directory / name) is None:
                events += self._forget(name)
        return events

    def _forget(self, name: str) -> list[SourceEvent]:
        """Return the deletions for a file that is gone."""
        known = self._files.pop(name)
        if self._last_good:
            self._last_good.remove(name)
        return [Delete(key, name) for key in known.objects]

    # --- files -----------------------------------------------------------------------------------

    def _read_files(self, names: list[str]) -> list[SourceEvent]:
        """Read files; return what is new or changed in them, then what is gone from them."""
        sets: list[SourceEvent] = []
        deletes: list[SourceEvent] = []
        for name in names:
            before = self._files.get(name)
            after = self._read_file(name, before)
            if after is None:
                continue
            self._files[name] = after
            self._going.pop(name, None)
            old = before.objects if before else {}
            sets += [Set(obj, name) for key, obj in after.objects.items() if old.get(key) != obj]
            deletes += [Delete(key, name) for key in old if key not in after.objects]
        return sets + deletes

    def _read_file(self, name: str, before: _File | None) -> _File | None:
        """Return what a file says now; None: it is not there."""
        path = self._directory / name
        stamp = _stamp(path)
        if stamp is None:
            return None
        try:
            manifest = manifests.read(name, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._unreadable(name, before, f"{name}: can't be read: {error.strerror}", None)
        except DocumentError as error:
            return self._unreadable(name, before, str(error), stamp)
        objects = manifest.objects
        if manifest.refused:
            last = self._last(name, before)
            objects = objects | {key: last[key] for key in manifest.refused if key in last}
        if manifest.ignored and not (before and before.ignored == manifest.ignored):
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.ignored.items()))
            _log.info("%s: left out kinds that Services are not made of: %s", name, kinds)
        if self._last_good and (before or not self._last_good.is_current(name, stamp.mtime_ns)):
            self._last_good.save(name, manifest, stamp.mtime_ns)
        return _File(stamp, objects, manifest.problems, manifest.ignored)

    def _unreadable(self, name: str, before: _File | None, problem: str, stamp: _Stamp | None) -> _File:
        last = self._last(name, before)
        stay = f"; its last {len(last)} good objects stay" if last else ""
        return _File(stamp, last, (problem + stay,))

    def _last(self, name: str, before: _File | None) -> dict[ObjectKey, Object]:
        """Return the last good objects of a file, of this run or of an earlier one."""
        if before:
            return before.objects
        return self._last_good.load(name) if self._last_good else {}

    def _report(self) -> tuple[Reported, ...]:
        """Return what is wrong, if that changed."""
        problems = tuple(problem for name in sorted(self._files) for problem in self._files[name].problems)
        if self._problem:
            problems = (self._problem, *problems)
        if problems == self._told:
            return ()
        self._told = problems
        return (Reported(problems),)


def _is_manifest(name: str) -> bool:
    return name.endswith(manifests.SUFFIXES) and not name.startswith(".")


def _stamp(path: Path) -> _Stamp | None:
    """Return the stamp of a regular file, links followed; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
