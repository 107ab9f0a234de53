"""Distribution kernels, downloaded and unpacked once; nothing is installed.

apt runs with a sources file, lists and a cache of its own: the machine's configuration is neither read nor
changed, so a suite of another release is as near as one's own.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

DEBIAN = "http://deb.debian.org/debian-security"
UBUNTU = "http://archive.ubuntu.com/ubuntu"
# By the keys in them a machine trusts its own distribution; the other's come from a package of known content.
KEYRINGS = {DEBIAN: "debian-archive-keyring.gpg", UBUNTU: "ubuntu-archive-keyring.gpg"}
KEYRING_PACKAGES = {
    DEBIAN: (
        (
            "http://deb.debian.org/debian/pool/main/d/debian-archive-keyring/"
            "debian-archive-keyring_2023.3+deb12u2_all.deb"
        ),
        "f699e2f88dca05212f2a452b58475f2993cb6993dfbafb1d0205a3291eb8b4b8",
    ),
    UBUNTU: (
        "http://archive.ubuntu.com/ubuntu/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb",
        "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8",
    ),
}
KEYRING_DIRECTORY = Path("/usr/share/keyrings")
APT_HELPER = "/usr/lib/apt/apt-helper"
TOOLS = {
    "apt-get": "apt",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "dpkg": "dpkg",
    "qemu-system-x86_64": "qemu-system-x86",
    "zstd": "zstd",
}
DOWNLOAD_TIMEOUT_S = 600


class UnavailableError(Exception):
    """A kernel, or a tool to run it, can't be had here; the message says which and why."""


class Source(NamedTuple):
    """Where a kernel comes from."""

    uri: str
    suite: str
    package: str  # depends on the current build


KERNELS = {
    "5.10": Source(DEBIAN, "bullseye-security", "linux-image-amd64"),
    "6.1": Source(DEBIAN, "bookworm-security", "linux-image-amd64"),
    "6.8": Source(UBUNTU, "noble-updates", "linux-image-virtual"),
    "6.12": Source(DEBIAN, "bookworm-security", "linux-image-6.12-amd64"),
}
"""Debian 11, Debian 12, Ubuntu 24.04, Debian 12's backport, by version."""


class Kernel(NamedTuple):
    """An unpacked kernel."""

    release: str  # what uname -r says
    vmlinux: Path  # uncompressed: QEMU enters it by PVH
    modules: Path  # lib/modules/<release>

    def module_files(self, *names: str) -> list[Path]:
        """Return the files of modules and of what they need, in the order to load them.

        Built-in ones have none.
        """
        needs = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, others = line.partition(":")
            needs[_module_name(path)] = [path, *others.split()]
        ordered = [path for name in names for path in reversed(needs.get(name, []))]
        return [self.modules / path for path in dict.fromkeys(ordered)]


def cache_directory() -> Path:
    """Return where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebpfproxy" / "vm"


def fetch(name: str) -> Kernel:
    """Return a kernel of ``KERNELS``, downloaded unless it is in the cache.

    Raises:
        UnavailableError: this machine can't get it, or can't run it.
    """
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            raise UnavailableError(f"there is no {tool} here: apt-get install {package}")
    directory = cache_directory() / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two may want the same
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
                fresh = Path(temporary) / "kernel"
                _download(KERNELS[name], Path(temporary))
                _unpack(Path(temporary), fresh)
                fresh.rename(directory)
    modules = next((directory / "lib/modules").iterdir())
    return Kernel(modules.name, directory / "vmlinux", modules)


def _download(source: Source, work: Path) -> None:
    """Put the packages of a kernel into ``work``."""
    keyring = _keyring(source.uri, work)
    sources = work / "sources.list"
    sources.write_text(f"deb [arch=amd64 signed-by={keyring}] {source.uri} {source.suite} main\n")
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
    options = [f"--option={name}={value}" for name, value in own.items()]
    _run(["apt-get", *options, "--quiet=2", "--error-on=any", "update"], work)
    depends = ["depends", "--recurse", "--important", "--no-pre-depends", source.package]
    lines = _run(["apt-cache", *options, *depends], work).splitlines()
    packages = sorted({line for line in lines if re.match(r"linux-(image|modules)-\d+\.\d+\.\d", line)})
    if not packages:
        raise UnavailableError(f"{source.suite} has no build of {source.package}")
    _run(["apt-get", *options, "--quiet=2", "download", *packages], work)


def _keyring(uri: str, work: Path) -> Path:
    """Return the keys that an archive signs with."""
    installed = KEYRING_DIRECTORY / KEYRINGS[uri]
    if installed.exists():
        return installed
    address, checksum = KEYRING_PACKAGES[uri]
    _run([APT_HELPER, "download-file", address, "keyring.package", f"SHA256:{checksum}"], work)
    _run(["dpkg", "--extract", "keyring.package", "keyring"], work)
    return work / "keyring" / installed.relative_to("/")


def _run(command: list[str], directory: Path) -> str:
    try:
        result = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]}: no answer in {DOWNLOAD_TIMEOUT_S} s") from error
    if result.returncode:
        raise UnavailableError(f"{command[0]} failed: {result.stderr.strip()}")
    return result.stdout


def _unpack(packages: Path, into: Path) -> None:
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "--extract", package, into], check=True)
    if not (into / "lib").exists():  # merged /usr
        (into / "lib").symlink_to("usr/lib")
    (image,) = (into / "boot").glob("vmlinuz-*")
    (into / "vmlinux").write_bytes(payload(image.read_bytes()))
    (modules,) = (into / "lib/modules").iterdir()
    subprocess.run(["depmod", "--basedir", into, modules.name], check=True)


def payload(image: bytes) -> bytes:
    """Return the uncompressed kernel in a bzImage.

    Source: Documentation/arch/x86/boot.rst, setup_sects, payload_offset and payload_length.
    """
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    # The last four bytes are the size of what comes out.
    return uncompressed(image[start : start + length])


def uncompressed(data: bytes) -> bytes:
    """Return ``data``, uncompressed if it is xz, gzip or zstd; what follows the first stream is left out."""
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        # zstd complains about the trailing size, after everything has come out.
        result = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False)
        return result.stdout
    return data


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")
