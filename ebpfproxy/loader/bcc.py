"""The second loader: BCC compiles the flattened sources on this node.

BCC runs in a process of its own, which pins the programs for us to pick up: LLVM's memory goes away with
it, its chatter on standard error is ours to keep or to show, and its aborts don't take the agent along.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpfproxy.errors import LoadError
from ebpfproxy.libbpf import STAMP, Object, Program, ffi, lib
from ebpfproxy.libbpf.objects import log_tail
from ebpfproxy.loader import Loaded, check_stamp, kept, object_config, pins

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from ebpfproxy.libbpf import ProgramDefinition
    from ebpfproxy.loader import LoadOptions

# Where Debian and Ubuntu put the package python3-bpfcc; a virtual environment does not look there.
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")
# Compiling takes a second; a loaded node gets two minutes.
TIMEOUT_S = 120


class BccLoader:
    """Loads *.bcc.c files."""

    name = "bcc"

    def usable(self) -> str | None:
        """Return why this machine can't use it, None if it can."""
        if find_bcc() is None:
            return "BCC is not installed: `apt-get install python3-bpfcc` (PyPI's bcc is something else)"
        return headers_problem(os.environ)

    def load(self, options: LoadOptions, meanwhile: Callable[[], object] = lambda: None) -> Loaded:
        """Make or take over the pinned maps, compile and load the programs, which leaves no time to fill."""
        with ExitStack() as undo:
            objects = [undo.enter_context(Object(path)) for path in options.object_files()]
            for each in objects:
                object_config(each)  # checks the stamp
            staged = pins.stage(options.object_files(), options.maps_dir, options.sizes)
            failed = undo.enter_context(ExitStack())
            failed.callback(staged.close)
            wanted = {source_of(each.path): list(each.programs.values()) for each in objects}
            for text in wanted:
                check_stamp(text, text_stamp(text))
            cflags = [
                f'-DPIN_DIR="{staged.directory}"',
                f"-DCONFIG_INIT={config_initialiser(options.config)}",
            ]
            parts = [self.name, *cflags, *(text.read_text() for text in wanted)]
            programs = kept.take_or_load(
                options.programs_dir,
                kept.identity(map(str.encode, parts), staged.maps),
                list(chain.from_iterable(wanted.values())),
                lambda: compile_all(wanted, cflags, staged.directory / "programs"),
            )
            for program in programs.values():
                failed.callback(program.close)
            staged.commit()
            failed.pop_all()
        return Loaded(staged.maps, programs, self.name, staged)


def source_of(path: Path) -> Path:
    """Return the flattened text of an object file."""
    return path.with_name(path.name.replace(".bpf.o", ".bcc.c"))


def compile_all(
    wanted: Mapping[Path, list[ProgramDefinition]], cflags: list[str], pinned: Path
) -> dict[str, Program]:
    """Compile texts and return the programs that are wanted of each; ``pinned`` is used meanwhile."""
    found: dict[str, Program] = {}
    with ExitStack() as undo:
        for text, definitions in wanted.items():
            pinned.mkdir()
            compile_and_pin(text, cflags, definitions, pinned)
            for each in definitions:
                found[each.name] = Program.open(pinned / each.name, each)
                undo.callback(found[each.name].close)
            shutil.rmtree(pinned)
        undo.pop_all()
    return found


def find_bcc() -> Path | None:
    """Return the folder of BCC's Python package, None if it is not installed."""
    spec = importlib.util.find_spec("bcc")
    folders = [Path(each) for each in (spec and spec.submodule_search_locations) or ()]
    folders.append(SYSTEM_PACKAGES / "bcc")
    # PyPI's unrelated package of the same name has no libbcc.
    return next((each for each in folders if (each / "libbcc.py").is_file()), None)


def headers_problem(environ: os._Environ[str] | dict[str, str], system: Path = Path("/")) -> str | None:
    """Return why BCC finds no kernel headers, None if it does.

    Args:
        environ: BCC_KERNEL_SOURCE in it names a folder of headers.
        system: the root folder.
    """
    release = os.uname().release
    way_out = (
        f"install linux-headers-{release}, or set BCC_KERNEL_SOURCE to a folder with the headers of a near "
        "version (scripts/bcc-headers makes one)"
    )
    folder = environ.get("BCC_KERNEL_SOURCE")
    if folder:
        whole = (Path(folder) / "include/linux/kconfig.h").is_file()
        return None if whole else f"BCC_KERNEL_SOURCE={folder} holds no kernel headers: {way_out}"
    modules = system / "lib/modules" / release
    for each in (modules / "build", modules / "source"):
        if (each / "include/linux/kconfig.h").is_file():
            return None
    if (system / "sys/kernel/kheaders.tar.xz").is_file():
        return None
    return f"there are no kernel headers for {release}: {way_out}"


def text_stamp(path: Path) -> str:
    """Return the stamp in the first line of a flattened text."""
    if not path.is_file():
        raise LoadError(f"open BPF source {path}: no such file; run `make build`")
    with path.open() as file:
        first = re.fullmatch(r"/\* stamp: (.*) \*/\n", file.readline())
    return first[1] if first else "none"


def config_initialiser(config: Any) -> str:
    """Return the C initialiser of struct config.

    Args:
        config: values by field name.
    """
    checked = ffi.new("struct config *", {**config, "abi": lib.ABI_VERSION})  # names and ranges
    fields = "".join(f".{name}={getattr(checked, name)}ULL," for name in (*config, "abi"))
    return f'{{{fields}.stamp="{STAMP}"}}'


def compile_and_pin(text: Path, cflags: list[str], programs: list[ProgramDefinition], pinned: Path) -> None:
    """Let BCC compile ``text`` in another process and pin its programs by name in ``pinned``."""
    environ = dict(os.environ)
    package = str(Path(__file__).resolve().parents[2])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environ.get("PYTHONPATH"))))
    request = {
        "text": str(text),
        "cflags": cflags,
        "programs": [(each.name, each.type, each.attach_type) for each in programs],
        "pinned": str(pinned),
    }
    try:
        result = subprocess.run(
            [sys.executable, "-c", "from ebpfproxy.loader.bcc import child; child()"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environ,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"compile {text.name}: BCC took more than {TIMEOUT_S} s") from error
    if result.returncode == 0:
        return
    what = result.stdout.strip() or f"compile {text.name}: BCC ended with status {result.returncode}"
    raise LoadError(f"{what}\n{log_tail(result.stderr)}")


def child() -> None:
    """Compile, load and pin as a request on standard input says: what runs in BCC's own process."""
    request = json.load(sys.stdin)
    text = Path(request["text"])
    bcc = import_bcc()
    try:
        module = bcc.BPF(text=text.read_text(), cflags=request["cflags"])
    except Exception as error:  # BCC raises bare Exception; its reasons are on standard error
        sys.exit(complain(f"compile {text.name}: {error}"))
    for name, program_type, attach_type in request["programs"]:
        try:
            function = module.load_func(name, program_type, attach_type=attach_type or -1)
        except Exception as error:
            sys.exit(complain(f"load program {name} of {text.name}: the kernel refused it: {error}"))
        Program(os.dup(function.fd)).pin(Path(request["pinned"]) / name)


def complain(what: str) -> int:
    """Say on standard output what failed and return the exit status."""
    sys.stdout.write(what)
    return 1


def import_bcc() -> ModuleType:
    """Return BCC's module, also from where a virtual environment does not look."""
    folder = find_bcc()
    assert folder is not None, "usable() said that BCC is installed"
    sys.path.append(str(folder.parent))
    import bcc

    return bcc  # type: ignore[no-any-return]
