"""The default loader: objects compiled at build time, loaded by libbpf."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ebpfproxy.libbpf import Object
from ebpfproxy.loader import OBJECTS, Loaded, object_config, pins

if TYPE_CHECKING:
    from ebpfproxy.libbpf import Program
    from ebpfproxy.loader import LoadOptions


class LibbpfLoader:
    """Loads *.bpf.o files."""

    name = "libbpf"

    def usable(self) -> str | None:
        """Return why this machine can't use it, None if it can."""
        if any(OBJECTS.glob("*.bpf.o")):
            return None
        return f"there are no compiled programs in {OBJECTS}; run `make build`"

    def load(self, options: LoadOptions) -> Loaded:
        """Make or take over the pinned maps and load the programs."""
        programs: dict[str, Program] = {}
        with ExitStack() as undo:
            objects = [undo.enter_context(Object(path)) for path in options.object_files()]
            for each in objects:
                config = object_config(each)
                for field, value in options.config.items():
                    setattr(config, field, value)
            staged = pins.stage(options.object_files(), options.maps_dir, options.sizes)
            failed = undo.enter_context(ExitStack())
            failed.callback(staged.close)
            for each in objects:
                for name in each.maps:
                    each.reuse(name, staged.maps[name])
                each.load()
                for name in each.programs:
                    programs[name] = each.program(name)
                    failed.callback(programs[name].close)
            staged.commit()
            failed.pop_all()
        return Loaded(staged.maps, programs, self.name, staged)
