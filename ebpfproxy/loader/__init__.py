"""Loaders: each puts the BPF programs and their pinned maps into the kernel, with the same result."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ebpfproxy.errors import ConfigError, LoadError, UnsupportedError
from ebpfproxy.libbpf import STAMP, Object, ffi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from ebpfproxy.libbpf import Map, Program
    from ebpfproxy.loader.pins import Staged

OBJECTS = Path(__file__).resolve().parents[1] / "objects"
"""Where bpf/Makefile puts compiled and flattened programs."""

LOADERS = {"libbpf": "LibbpfLoader", "bcc": "BccLoader"}
"""Class by name, which is its module's, too; imported when it is asked for. In the order of auto."""


@dataclass(frozen=True)
class LoadOptions:
    """What to load, and with which constants."""

    maps_dir: Path  # on a bpffs; made if missing
    config: Mapping[str, int] = field(default_factory=dict)  # fields of struct config; abi and stamp are ours
    sizes: Mapping[str, int] = field(default_factory=dict)  # max_entries by map name
    programs_dir: Path | None = None  # on a bpffs: programs are kept there for the next run; None: nowhere
    objects: tuple[str, ...] = ("sock_lb", "tc_lb", "xdp_lb")
    directory: Path = OBJECTS

    def object_files(self) -> list[Path]:
        """Return the compiled files."""
        return [self.directory / f"{name}.bpf.o" for name in self.objects]


@dataclass
class Loaded:
    """Programs and maps in the kernel, by name; nothing is attached yet."""

    maps: dict[str, Map]
    programs: dict[str, Program]
    loader: str
    staged: Staged

    def finish(self) -> None:
        """Complete a change of map sizes: call it once the programs are attached, before reading maps.

        Programs of an earlier run wrote to the maps of the old size until they were swapped; this adds
        what came in meanwhile. Does nothing when no size changed.
        """
        self.staged.finish()

    def close(self) -> None:
        """Close the descriptors; what is pinned or attached stays."""
        for program in self.programs.values():
            program.close()
        self.staged.close()


class Loader(Protocol):
    """Puts programs and maps into the kernel."""

    name: str

    def usable(self) -> str | None:
        """Return why this machine can't use it, None if it can."""

    def load(self, options: LoadOptions, meanwhile: Callable[[], object] = lambda: None) -> Loaded:
        """Make or take over the pinned maps and load the programs.

        What an earlier run pinned or attached is untouched if this fails.

        Args:
            options: what to load.
            meanwhile: called by this thread while others load programs; only if there is something to load.

        Raises:
            LoadError: the kernel refused a program, or a file is missing or of another version.
            LayoutError: a pinned map has another layout.
            KernelError: any other call failed.
        """


def choose(name: str) -> Loader:
    """Return a loader that this machine can use.

    Args:
        name: libbpf, bcc or auto: the first of the two that is usable.

    Raises:
        UnsupportedError: it can't be used; the message says why.
    """
    if name not in {"auto", *LOADERS}:
        raise ConfigError(f"loader {name}: there is none of this name; there are auto, {', '.join(LOADERS)}")
    reasons = []
    for each in LOADERS if name == "auto" else [name]:
        loader: Loader = getattr(import_module(f"ebpfproxy.loader.{each}"), LOADERS[each])()
        reason = loader.usable()
        if reason is None:
            return loader
        reasons.append(f"loader {each}: {reason}")
    raise UnsupportedError("; ".join(reasons))


def check_stamp(path: Path, stamp: str) -> None:
    """Raise LoadError if a file was made for another version of the agent or of abi.h."""
    if stamp != STAMP:
        raise LoadError(f"load {path}: it has stamp {stamp}, this agent {STAMP}; run `make build`")


def object_config(each: Object) -> Any:
    """Return a pointer to an object's struct config, its stamp checked."""
    config = each.constant("config", "struct config")
    check_stamp(each.path, ffi.string(ffi.cast("char *", config.stamp)).decode(errors="replace"))
    return config
