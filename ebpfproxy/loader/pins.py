"""The pinned maps: kept from run to run, resized without losing entries, refused in another layout.

Nothing that is pinned changes before the new programs are in the kernel:

1. ``stage``: maps that stay are pinned a second time in ``<maps>-new``, missing ones and ones of another
   size are made there, and the entries of the latter copied.
2. The loader loads programs that use the staged maps.
3. ``commit``: the new pins are renamed over the old ones, atomically one by one. A map of another size
   keeps its old self in ``<maps>-old``: programs that are attached still write there.
4. ``finish``, once the new programs are attached: the entries that came to the old maps since are added.

A process that dies in between leaves what the next one needs: ``<maps>-new`` is dropped, and ``<maps>-old``
is finished after its programs are attached.
"""

from __future__ import annotations

import errno
import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ebpfproxy.errors import ConfigError, KernelError, LayoutError, LoadError, UnsupportedError
from ebpfproxy.libbpf import Map, Object, lib
from ebpfproxy.libbpf.maps import ARRAYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from ebpfproxy.libbpf import MapDefinition


#: What the programs remember from one packet to the next in these is not missed: another layout is a new map.
DISPOSABLE = frozenset({"scratch", "rejects", "backend_hops"})


class Staged:
    """The maps that new programs will use. Aborts at the end of a ``with`` block unless committed.

    Attributes:
        directory: where each map is pinned under its name until ``commit``.
        maps: by name, open.
    """

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.directory = pins.with_name(f"{pins.name}-new")
        self.old = pins.with_name(f"{pins.name}-old")
        self.maps: dict[str, Map] = {}
        self._fresh: set[str] = set()
        self._committed = False

    def commit(self) -> None:
        """Put the staged pins in place of the old ones."""
        for name in sorted(self._fresh):
            if (self.pins / name).exists():
                self._keep_old(name)
            (self.directory / name).replace(self.pins / name)
        shutil.rmtree(self.directory)
        self._committed = True

    def finish(self) -> None:
        """Add what the programs that were attached before wrote to maps of the old sizes meanwhile.

        Call it once the new programs are attached and before the maps are read. Entries are added where
        the new map has none. Arrays are not touched again: what the old programs counted in the few
        milliseconds between the copy and the swap is lost.
        """
        for name in entries(self.old):
            with Map.open(self.old / name) as old:
                new = self.maps.get(name)
                if new and new.type not in ARRAYS:
                    add_missing(old, new)
            (self.old / name).unlink()
        if self.old.exists():
            self.old.rmdir()

    def close(self) -> None:
        """Close the maps; without ``commit`` drop all that was staged."""
        for each in self.maps.values():
            each.close()
        if not self._committed:
            shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, name: str, each: Map, *, fresh: bool) -> None:
        """Pin a map among the staged and own it."""
        self.maps[name] = each
        try:
            each.pin(self.directory / name)
        except KernelError as error:
            if error.errno == errno.EPERM:  # bpf_obj_pin's answer to any other file system
                raise UnsupportedError(
                    f"{error}; or {self.pins} is on no bpffs: `mount -t bpf bpf DIR`, or choose by --bpffs"
                ) from error
            raise
        if fresh:
            self._fresh.add(name)

    def _keep_old(self, name: str) -> None:
        self.old.mkdir(exist_ok=True)
        if (self.old / name).exists():
            # A process died between commit and finish, and now the size changes again.
            with Map.open(self.old / name) as oldest:
                if oldest.type not in ARRAYS:
                    add_missing(oldest, self.maps[name])
            (self.old / name).unlink()
        with Map.open(self.pins / name) as old:
            old.pin(self.old / name)


def stage(objects: Iterable[Path], pins: Path, sizes: Mapping[str, int]) -> Staged:
    """Return all maps of ``objects``, made, taken over or copied as needed.

    Args:
        objects: object files; they define the maps.
        pins: directory on a bpffs; made if missing.
        sizes: max_entries by map name, instead of what the object says.

    Raises:
        LayoutError: a pinned map has another layout.
        LoadError: a pinned map holds more than its new size has room for.
        ConfigError: ``sizes`` names a map that does not exist, or whose size is fixed.
    """
    staged = Staged(pins)
    with ExitStack() as undo:
        undo.callback(staged.close)
        opened = [undo.enter_context(Object(path)) for path in objects]
        wanted = definitions(opened, sizes)
        shutil.rmtree(staged.directory, ignore_errors=True)
        pins.mkdir(parents=True, exist_ok=True)
        staged.directory.mkdir()
        for each in opened:
            _stage_object(each, wanted, staged)
        undo.pop_all()
        for each in opened:
            each.close()
    return staged


def definitions(objects: Iterable[Object], sizes: Mapping[str, int]) -> dict[str, MapDefinition]:
    """Return the definitions of all maps, with the sizes asked for."""
    found: dict[str, MapDefinition] = {}
    for each in objects:
        for name, definition in each.maps.items():
            if found.setdefault(name, definition) != definition:
                raise LoadError(f"BPF object {each.path} defines map {name} unlike others; run `make build`")
    for name, size in sizes.items():
        if name not in found:
            every = ", ".join(sorted(found))
            raise ConfigError(f"ebpfproxy.mapSizes.{name}: there is no such map; there are {every}")
        if found[name].type == lib.BPF_MAP_TYPE_PERCPU_ARRAY and size != found[name].max_entries:
            raise ConfigError(f"ebpfproxy.mapSizes.{name}: the size of this map is fixed, leave it out")
        if not 0 < size < 1 << 32:
            raise ConfigError(f"ebpfproxy.mapSizes.{name} is {size}: a map has 1 to 2^32 - 1 entries")
        found[name] = found[name]._replace(max_entries=size)
    return found


def entries(directory: Path) -> list[str]:
    """Return the names in a directory, none if it does not exist."""
    return sorted(each.name for each in directory.iterdir()) if directory.exists() else []


def _stage_object(each: Object, wanted: Mapping[str, MapDefinition], staged: Staged) -> None:
    """Stage those maps of an object that no earlier object had."""
    olds: dict[str, Map] = {}
    with ExitStack() as stack:
        missing = []
        for name in each.maps:
            each.set_max_entries(name, wanted[name].max_entries)
            if name not in staged.maps and (staged.pins / name).exists():
                old = Map.open(staged.pins / name)
                stack.callback(old.close)
                if name in DISPOSABLE and not is_alike(old, wanted[name]):
                    missing.append(name)
                    continue
                check_layout(old, wanted[name], staged.pins / name)
                if old.max_entries == wanted[name].max_entries:
                    staged.add(name, Map.open(staged.pins / name), fresh=False)
                else:
                    check_room(old, wanted[name].max_entries)
                    olds[name] = old
            if name in staged.maps:
                each.reuse(name, staged.maps[name])
            else:
                missing.append(name)
        if not missing:
            return
        each.load(programs=False)
        for name in missing:
            new = each.map(name)
            staged.add(name, new, fresh=True)
            if name in olds:
                copy(olds[name], new)


def is_alike(have: Map, need: MapDefinition) -> bool:
    """Return whether a pinned map has the layout that is needed, whatever its size."""
    return have.definition._replace(name="", max_entries=0) == need._replace(name="", max_entries=0)


def check_layout(have: Map, need: MapDefinition, path: Path) -> None:
    """Raise LayoutError unless a pinned map differs in its size at most."""

    def text(each: MapDefinition) -> str:
        return (
            f"type {each.type}, key {each.key_size} bytes, value {each.value_size} bytes, "
            f"flags {each.flags:#x}"
        )

    if not is_alike(have, need):
        raise LayoutError(
            f"pinned map {path} has {text(have.definition)}; this version needs {text(need)}. Run the "
            "version that made it, or remove it with `ebpfproxy cleanup`: connections through Services break"
        )


def check_room(old: Map, max_entries: int) -> None:
    """Raise LoadError if a map of another size can't hold what ``old`` holds."""
    if max_entries > old.max_entries:
        return
    if old.type not in ARRAYS:
        needed = old.count()
    elif old.flags & lib.BPF_F_MMAPABLE:
        needed = -(-len(bytes(old.mmap()).rstrip(b"\0")) // old.stride)
    else:
        needed = 1 + max((n for n, (_, value) in enumerate(old.items()) if any(value)), default=-1)
    if needed > max_entries:
        raise LoadError(
            f"shrink map {old.name} from {old.max_entries} to {max_entries} entries: {needed} are in use; "
            f"set ebpfproxy.mapSizes.{old.name} to at least {needed}"
        )


def copy(old: Map, new: Map) -> None:
    """Copy all entries that fit; ``check_room`` said that all do."""
    if old.type not in ARRAYS:
        new.update_batch(dict(old.items()))
    elif old.flags & lib.BPF_F_MMAPABLE:
        size = min(old.max_entries, new.max_entries) * old.stride
        new.mmap()[:size] = old.mmap()[:size]
    else:
        new.update_batch(dict(old.items()[: new.max_entries]))


def add_missing(old: Map, new: Map) -> None:
    """Add the entries of ``old`` whose keys ``new`` lacks."""
    have = {key for key, _ in new.items()}
    for key, value in _missing(old, have):
        try:
            new.update(key, value, lib.BPF_NOEXIST)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise


def _missing(old: Map, have: set[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return ((key, value) for key, value in old.items() if key not in have)
