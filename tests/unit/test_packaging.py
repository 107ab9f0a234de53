"""The wheel: what is in it, and that it works where only it and its dependencies are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import ebpfproxy

ROOT = Path(__file__).resolve().parents[2]
# What git ignores, and what no build reads.
NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info", "objects", "*.so", "tests", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution, as an uploaded release would be, without a network."""
    directory = tmp_path_factory.mktemp("wheel")
    source, out = directory / "source", directory / "dist"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build: list[str | Path] = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        out,
        source,
    ]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new virtual environment that shares nothing but our dependencies."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--quiet",
            "--python",
            python,
            "install",
            "--no-index",
            "--no-deps",
            wheel,
        ],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    # A .pth file in a folder that a .pth file names is not read: the editable install here stays out of it.
    (site,) = (directory / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_carries_sources_objects_and_the_extension(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.name for path in (ROOT / "bpf").glob("*.bpf.c")} | {
        path.name for path in (ROOT / "bpf/lib").glob("*.h")
    }
    programs = {path.name.removesuffix(".bpf.c") for path in (ROOT / "bpf").glob("*.bpf.c")}
    compiled = {f"{name}.bpf.o" for name in programs} | {f"{name}.bcc.c" for name in programs}
    assert {"sock_lb", "tc_lb"} <= programs
    assert not {f"ebpfproxy/objects/{name}" for name in sources | compiled} - names
    assert [name for name in names if re.fullmatch(r"ebpfproxy/libbpf/_ffi\.abi3\.so", name)]
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licences == {"Apache-2.0.txt", "BSD-2-Clause.txt", "GPL-2.0-only.txt"}
    assert "ebpfproxy/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "bpf/"))]


def test_one_wheel_serves_every_python_from_3_11(wheel: Path) -> None:
    assert "-cp311-abi3-linux_" in wheel.name


def test_version_and_dependencies_of_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert f"\nVersion: {ebpfproxy.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)\n" in metadata
    # PyPI's package of that name is not the BPF Compiler Collection.
    assert not re.search(r"^Requires-Dist: bcc\b", metadata, re.MULTILINE)


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = python.with_name("ebpfproxy")
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.environ["PATH"]},
    )


def test_installed_wheel_runs(python: Path) -> None:
    assert run(python, "--version").stdout == f"ebpfproxy {ebpfproxy.__version__}\n"
    where: list[str | Path] = [python, "-c", "import ebpfproxy.libbpf as b; print(b.__file__)"]
    file = subprocess.run(where, capture_output=True, text=True, check=True, cwd="/").stdout
    assert file.startswith(str(python.parents[1])), "the package of the wheel, not the one of this tree"


@pytest.mark.root
def test_installed_wheel_can_load_its_objects(python: Path) -> None:
    """``check`` looks for the objects, compares their stamp with the extension's and asks the kernel."""
    result = run(python, "check")
    assert re.search(r"^libbpf +yes", result.stdout, re.MULTILINE), result.stdout + result.stderr
    assert re.search(r"^bpf +yes", result.stdout, re.MULTILINE)


def test_constraints_pin_every_dependency() -> None:
    """``make build`` installs the tested versions: each of ours is pinned to exactly one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["build-system"]["requires"]) + list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[<>=\[ ]", each)[0].lower().replace("_", "-") for each in wanted} - {"ebpfproxy"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert not names - pinned
