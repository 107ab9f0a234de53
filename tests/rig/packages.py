"""Packages of distributions: downloaded and unpacked into a cache, once; nothing is installed.

apt runs with a sources file, lists and a cache of its own: the machine's configuration is neither read nor
changed, so a suite of another release is as near as one's own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEBIAN = "http://deb.debian.org/debian"
DEBIAN_SECURITY = "http://deb.debian.org/debian-security"
UBUNTU = "http://archive.ubuntu.com/ubuntu"
TIMEOUT_S = 600

# By the keys in them a machine trusts its own distribution; the other's come from a package of known content.
_DEBIAN_KEYS = (
    "debian-archive-keyring.gpg",
    f"{DEBIAN}/pool/main/d/debian-archive-keyring/debian-archive-keyring_2023.3+deb12u2_all.deb",
    "f699e2f88dca05212f2a452b58475f2993cb6993dfbafb1d0205a3291eb8b4b8",
)
_KEYS = {
    DEBIAN: _DEBIAN_KEYS,
    DEBIAN_SECURITY: _DEBIAN_KEYS,
    UBUNTU: (
        "ubuntu-archive-keyring.gpg",
        f"{UBUNTU}/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb",
        "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8",
    ),
}
_KEYRINGS = Path("/usr/share/keyrings")
_APT_HELPER = "/usr/lib/apt/apt-helper"


class UnavailableError(Exception):
    """Something can't be had here; the message says what and why."""


def cache_directory(name: str) -> Path:
    """Return where what was downloaded for ``name`` is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebpfproxy" / name


def need(tools: Mapping[str, str]) -> None:
    """Check that tools are here.

    Args:
        tools: each with its package.

    Raises:
        UnavailableError: one is not.
    """
    for tool, package in tools.items():
        if not shutil.which(tool):
            raise UnavailableError(f"there is no {tool} here: apt-get install {package}")


def kept(directory: Path, make: Callable[[Path], Path]) -> Path:
    """Return ``directory``, made unless it is there.

    Args:
        directory: where it is kept.
        make: returns what becomes it; gets a directory that goes afterwards.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two may want the same
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as work:
                make(Path(work)).rename(directory)
    return directory


class Archive:
    """A suite of a distribution.

    Args:
        uri: one of those above.
        suite: in it.
        work: where apt keeps its own, and where packages come to.
        has_sources: source packages are wanted, too.

    Raises:
        UnavailableError: it can't be reached.
    """

    def __init__(self, uri: str, suite: str, work: Path, *, has_sources: bool = False) -> None:
        self._work = work
        where = f"[arch=amd64 signed-by={_keyring(uri, work)}] {uri} {suite} main\n"
        sources = work / "sources.list"
        sources.write_text(f"deb {where}" + (f"deb-src {where}" if has_sources else ""))
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (work / directory).mkdir(parents=True)
        own = {
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": "-",
            "Dir::Etc::PreferencesParts": "-",
            "Dir::State": work / "state",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": work / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
        }
        self._options = [f"--option={name}={value}" for name, value in own.items()]
        self._get("--error-on=any", "update")

    def _get(self, *arguments: str) -> None:
        run(["apt-get", *self._options, "--quiet=2", *arguments], self._work)

    def needed_by(self, package: str) -> list[str]:
        """Return the names of packages that ``package`` depends on, and lines about them."""
        depends = ["depends", "--recurse", "--important", "--no-pre-depends", package]
        return run(["apt-cache", *self._options, *depends], self._work).splitlines()

    def unpack(self, packages: list[str], into: Path) -> None:
        """Download packages and unpack them."""
        self._get("download", *packages)
        for package in self._work.glob("*.deb"):
            subprocess.run(["dpkg", "--extract", package, into], check=True)

    def unpack_source(self, package: str, into: Path) -> None:
        """Download a source package and unpack it, with the distribution's changes."""
        self._get("--download-only", "source", package)
        (description,) = self._work.glob(f"{package}_*.dsc")
        into.parent.mkdir(parents=True, exist_ok=True)
        run(["dpkg-source", "--no-check", "--quiet", "--extract", description, into], self._work)


def _keyring(uri: str, work: Path) -> Path:
    """Return the keys that an archive signs with."""
    name, address, checksum = _KEYS[uri]
    if (installed := _KEYRINGS / name).exists():
        return installed
    run([_APT_HELPER, "download-file", address, "keyring.package", f"SHA256:{checksum}"], work)
    run(["dpkg", "--extract", "keyring.package", "keyring"], work)
    return work / "keyring" / installed.relative_to("/")


def run(
    command: list[str | Path],
    directory: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Return what a tool says.

    Raises:
        UnavailableError: it failed.
    """
    name = Path(command[0]).name
    try:
        result = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{name}: not done after {timeout_s:g} s") from error
    if result.returncode:
        raise UnavailableError(f"{name} failed: {result.stderr.strip()[-2000:]}")
    return result.stdout
