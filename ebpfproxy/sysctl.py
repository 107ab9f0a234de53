"""Kernel settings that a dataplane changes, and their way back: what was there before is kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy import files
from ebpfproxy.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROC = Path("/proc/sys")


class Setting(msgspec.Struct, frozen=True):
    """A setting that was changed."""

    before: str
    ours: str


def read(name: str) -> str | None:
    """Return a setting, named as a path ("net/ipv4/ip_forward"); None: this kernel does not have it."""
    try:
        return (_PROC / name).read_text(encoding="ascii").strip()
    except OSError:
        return None


def write(name: str, value: str) -> None:
    """Change a setting.

    Raises:
        KernelError: the kernel refused.
    """
    try:
        (_PROC / name).write_text(value, encoding="ascii")
    except OSError as error:
        raise KernelError(
            f"set {name.replace('/', '.')} to {value}: {error.strerror}", error.errno or 0
        ) from error


class Ledger:
    """The settings that were changed, in a file so that a later run or ``cleanup`` can put them back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Setting] = _read(path)

    def set(self, wanted: Mapping[str, str]) -> list[str]:
        """Make settings so; the first value before ours is remembered.

        Returns:
            One sentence for each that could not be made so.
        """
        problems = []
        for name, value in wanted.items():
            now = read(name)
            if now == value:
                continue
            if now is None:
                problems.append(f"this kernel has no setting {name.replace('/', '.')} (to be {value})")
                continue
            known = self._found.get(name)
            before = known.before if known else now
            try:
                self._save({**self._found, name: Setting(before, value)})
                write(name, value)
            except (KernelError, OSError) as error:
                problems.append(str(error))
        return problems

    @property
    def exists(self) -> bool:
        """Whether there is something to put back, or ``mark`` was called."""
        return self._path.exists()

    def mark(self) -> None:
        """Make the file, even if there is nothing to put back: it says that its owner was here.

        Raises:
            OSError: it can't be written.
        """
        self._save(self._found)

    def restore(self) -> list[str]:
        """Put settings back that are still ours; return one line for each."""
        done = []
        for name, setting in self._found.items():
            if read(name) == setting.ours:
                write(name, setting.before)
                done.append(f"setting {name.replace('/', '.')}={setting.ours} (again {setting.before})")
        self._found = {}
        self._path.unlink(missing_ok=True)
        return done

    def _save(self, found: dict[str, Setting]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(self._path, msgspec.json.encode(found))
        self._found = found


def _read(path: Path) -> dict[str, Setting]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Setting])
    except (OSError, msgspec.DecodeError):
        return {}
