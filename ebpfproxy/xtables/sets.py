"""ipsets: what iptables rules look addresses and ports up in."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from ebpfproxy.errors import DataplaneError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ebpfproxy.diff import Delta

_TIMEOUT_S = 120
_MAX_ENTRIES = 65536  # of one hash, kube-proxy's number


class Kind(NamedTuple):
    """The type of a set."""

    type: str  # hash:ip,port ...
    family: int  # 4 | 6; of no meaning to ports

    def create(self, name: str) -> str:
        """Return the line that makes a set of this kind."""
        if self.type == "bitmap:port":
            return f"create {name} bitmap:port range 0-65535 -exist\n"
        return (
            f"create {name} {self.type} family {'inet6' if self.family == 6 else 'inet'} "
            f"hashsize 1024 maxelem {_MAX_ENTRIES} -exist\n"
        )


class Entry(NamedTuple):
    """One entry of a set, as ipset prints it: "10.96.0.1,tcp:80"."""

    set: str
    text: str


def is_installed() -> bool:
    """Return whether there is ipset."""
    return shutil.which("ipset") is not None


def parse(text: str, names: Collection[str]) -> dict[Entry, None]:
    """Return the entries in the output of ``ipset save`` of the sets ``names``."""
    words = (line.split() for line in text.splitlines())
    return {Entry(each[1], each[2]): None for each in words if each[:1] == ["add"] and each[1] in names}


def script(kinds: Iterable[tuple[str, Kind]], delta: Delta[Entry, None]) -> tuple[str, str]:
    """Return two inputs of ``ipset restore``: what adds, and what deletes."""
    made = "".join(kind.create(name) for name, kind in kinds)
    added = "".join(f"add {each.set} {each.text} -exist\n" for each in delta.upsert)
    deleted = "".join(f"del {each.set} {each.text} -exist\n" for each in delta.delete)
    return made + added, deleted


def names() -> set[str]:
    """Return the names of all sets in this network namespace.

    Raises:
        DataplaneError: they can't be read.
    """
    return set(_run(["list", "-n"]).split())


def save(wanted: Collection[str]) -> dict[Entry, None]:
    """Return the entries of sets.

    Raises:
        DataplaneError: they can't be read.
    """
    return parse(_run(["save"]), wanted) if names() & set(wanted) else {}


def restore(text: str) -> None:
    """Apply the input of ``ipset restore``; not all of it may have been done when it fails.

    Raises:
        DataplaneError: it failed; the message says at which line.
    """
    if text:
        _run(["restore"], text)


def destroy(wanted: Collection[str]) -> list[str]:
    """Destroy sets that are there; return their names.

    Raises:
        DataplaneError: a rule still uses one.
    """
    found = sorted(names() & set(wanted))
    for name in found:
        _run(["destroy", name])
    return found


def _run(arguments: list[str], text: str = "") -> str:
    command = ["ipset", *arguments]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise UnsupportedError("ipset is not installed (Debian package ipset)") from error
    except subprocess.TimeoutExpired as error:
        raise DataplaneError(f"ipset gave no answer in {_TIMEOUT_S} s") from error
    if done.returncode:
        raise DataplaneError(
            f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}"
        )
    return done.stdout
