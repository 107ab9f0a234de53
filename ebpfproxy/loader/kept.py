"""Programs kept for the next run, which takes them over if it would load the very same.

The kernel takes its time to check programs, and a restart rarely brings other ones. So they are pinned in a
directory whose name is a digest of all that goes into them: their text, their constants, and the kernel's
numbers of their maps. No map gets a number again while a program holds its first owner: nothing goes stale.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ebpfproxy.errors import KernelError
from ebpfproxy.libbpf import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from ebpfproxy.libbpf import Map, ProgramDefinition


def identity(parts: Iterable[bytes], maps: Mapping[str, Map]) -> str:
    """Return the name of all programs that are made of ``parts`` and use these maps."""
    digest = hashlib.sha256()
    for part in (*parts, repr(sorted((name, each.id) for name, each in maps.items())).encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def take_or_load(
    directory: Path | None,
    name: str,
    wanted: Iterable[ProgramDefinition],
    load: Callable[[], dict[str, Program]],
) -> dict[str, Program]:
    """Return the kept programs of this identity; else load them, and keep them instead of all others.

    Args:
        directory: on a bpffs; None: nothing is kept.
        name: their identity.
        wanted: what there must be.
        load: puts them into the kernel.
    """
    if directory is None:
        return load()
    found = _take(directory / name, wanted)
    if found is None:
        found = load()
        with ExitStack() as undo:
            for each in found.values():
                undo.callback(each.close)
            _keep(directory / name, found)
            undo.pop_all()
    return found


def _take(directory: Path, wanted: Iterable[ProgramDefinition]) -> dict[str, Program] | None:
    """Return the programs pinned in a directory, None unless all that are wanted are there."""
    found: dict[str, Program] = {}
    with ExitStack() as undo:
        for each in wanted:
            try:
                found[each.name] = Program.open(directory / each.name, each)
            except KernelError:  # there was no such run, or it died half-way; whatever else, loading says it
                return None
            undo.callback(found[each.name].close)
        undo.pop_all()
    return found


def _keep(directory: Path, programs: Mapping[str, Program]) -> None:
    """Pin the programs in a directory, and drop those of all others beside it."""
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, each in programs.items():
        each.pin(directory / name)
