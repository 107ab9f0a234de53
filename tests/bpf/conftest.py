"""Fixtures of the tests that put small programs of their own into the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.loader.bcc import headers_problem

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).with_name("sources")


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled and flattened test programs."""
    out = tmp_path_factory.mktemp("objects")
    sources = " ".join(str(path) for path in sorted(SOURCES.glob("*.bpf.c")))
    command = [
        "make",
        "-s",
        "-C",
        str(ROOT / "bpf"),
        f"OUT={out}",
        f"SOURCES={sources}",
        f"PYTHON={sys.executable}",
    ]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="session")
def headers() -> Iterator[None]:
    """Kernel headers for BCC, as `make test` provides them."""
    with pytest.MonkeyPatch.context() as patch:
        if headers_problem(os.environ):
            made = subprocess.run(
                [ROOT / "scripts" / "bcc-headers"], check=True, capture_output=True, text=True
            )
            patch.setenv("BCC_KERNEL_SOURCE", made.stdout.strip())
        yield
