"""The default loader: objects compiled at build time, loaded by libbpf."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ebpfproxy.libbpf import Object, ffi
from ebpfproxy.loader import OBJECTS, Loaded, kept, object_config, pins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ebpfproxy.libbpf import Program
    from ebpfproxy.loader import LoadOptions


# The largest object takes as long to check as all others: those share the second thread, not its processor.
THREADS = 2


class LibbpfLoader:
    """Loads *.bpf.o files."""

    name = "libbpf"

    def usable(self) -> str | None:
        """Return why this machine can't use it, None if it can."""
        if any(OBJECTS.glob("*.bpf.o")):
            return None
        return f"there are no compiled programs in {OBJECTS}; run `make build`"

    def load(self, options: LoadOptions, meanwhile: Callable[[], object] = lambda: None) -> Loaded:
        """Make or take over the pinned maps and load the programs."""
        with ExitStack() as undo:
            objects = [undo.enter_context(Object(path)) for path in options.object_files()]
            parts = [self.name.encode()]
            for each in objects:
                config = object_config(each)
                for field, value in options.config.items():
                    setattr(config, field, value)
                parts += [each.path.read_bytes(), bytes(ffi.buffer(config))]
            staged = pins.stage(options.object_files(), options.maps_dir, options.sizes)
            failed = undo.enter_context(ExitStack())
            failed.callback(staged.close)
            for each in objects:
                for name in each.maps:
                    each.reuse(name, staged.maps[name])
            programs = kept.take_or_load(
                options.programs_dir,
                kept.identity(parts, staged.maps),
                [definition for each in objects for definition in each.programs.values()],
                lambda: load_side_by_side(objects, meanwhile),
            )
            for program in programs.values():
                failed.callback(program.close)
            staged.commit()
            failed.pop_all()
        return Loaded(staged.maps, programs, self.name, staged)


def load_side_by_side(objects: Sequence[Object], meanwhile: Callable[[], object]) -> dict[str, Program]:
    """Load objects whose maps are there, the largest first: the kernel takes its time to check programs."""
    largest_first = sorted(objects, key=lambda each: each.path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(THREADS) as threads:
        loading = threads.map(Object.load, largest_first)
        meanwhile()
        list(loading)
    return {name: each.program(name) for each in objects for name in each.programs}
