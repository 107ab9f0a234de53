"""The compiled parts of the package: the libbpf binding (cffi) and the BPF objects (bpf/Makefile)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithObjects(build_py):
    """Compiles the BPF objects into the package before its files are collected."""

    def run(self) -> None:
        """Run bpf/Makefile; an editable build shares the tree's objects, others get their own."""
        package = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        out = package / "ebpfproxy" / "objects"
        subprocess.run(
            ["make", "-s", "-C", str(ROOT / "bpf"), f"OUT={out}", f"PYTHON={sys.executable}"], check=True
        )
        super().run()


setup(
    cffi_modules=["ebpfproxy/libbpf/_build.py:ffibuilder"],
    cmdclass={"build_py": BuildWithObjects},
    # The extension uses the limited API: one wheel serves every later Python.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
