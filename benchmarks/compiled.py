"""The programs in C: what they measure is the kernel, not Python."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from rig.names import temporary_directory
from rig.process import HERE

if TYPE_CHECKING:
    from collections.abc import Iterator

COMPILERS = ("clang-18", "clang-16", "clang", "gcc")
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


@contextlib.contextmanager
def compiled(name: str) -> Iterator[Path]:
    """Compile ``name``.c of this folder."""
    directory = temporary_directory(name)
    try:
        compiler = next(each for each in COMPILERS if _has(each))
        binary = directory / name
        HERE.run(compiler, *FLAGS, "-o", binary, Path(__file__).with_name(f"{name}.c"))
        yield binary
    finally:
        HERE.run("rm", "-rf", directory)


def _has(program: str) -> bool:
    return HERE.run("sh", "-c", 'command -v "$0"', program, check=False).returncode == 0
