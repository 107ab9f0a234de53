"""Distribution kernels, downloaded and unpacked once; nothing is installed."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

from rig.packages import DEBIAN_SECURITY, UBUNTU, Archive, UnavailableError, cache_directory, kept, need

__all__ = ["KERNELS", "Kernel", "UnavailableError", "fetch", "uncompressed"]

TOOLS = {
    "apt-get": "apt",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "dpkg": "dpkg",
    "qemu-system-x86_64": "qemu-system-x86",
    "zstd": "zstd",
}


class Source(NamedTuple):
    """Where a kernel comes from."""

    uri: str
    suite: str
    package: str  # depends on the current build


KERNELS = {
    "5.10": Source(DEBIAN_SECURITY, "bullseye-security", "linux-image-amd64"),
    "6.1": Source(DEBIAN_SECURITY, "bookworm-security", "linux-image-amd64"),
    "6.8": Source(UBUNTU, "noble-updates", "linux-image-virtual"),
    "6.12": Source(DEBIAN_SECURITY, "bookworm-security", "linux-image-6.12-amd64"),
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


def fetch(name: str) -> Kernel:
    """Return a kernel of ``KERNELS``, downloaded unless it is in the cache.

    Raises:
        UnavailableError: this machine can't get it, or can't run it.
    """
    need(TOOLS)
    directory = kept(cache_directory("vm") / name, lambda work: _make(KERNELS[name], work))
    modules = next((directory / "lib/modules").iterdir())
    return Kernel(modules.name, directory / "vmlinux", modules)


def _make(source: Source, work: Path) -> Path:
    """Unpack a kernel below ``work`` and return where it is."""
    archive = Archive(source.uri, source.suite, work)
    needed = archive.needed_by(source.package)
    packages = sorted({line for line in needed if re.match(r"linux-(image|modules)-\d+\.\d+\.\d", line)})
    if not packages:
        raise UnavailableError(f"{source.suite} has no build of {source.package}")
    into = work / "kernel"
    archive.unpack(packages, into)
    if not (into / "lib").exists():  # merged /usr
        (into / "lib").symlink_to("usr/lib")
    (image,) = (into / "boot").glob("vmlinuz-*")
    (into / "vmlinux").write_bytes(payload(image.read_bytes()))
    (modules,) = (into / "lib/modules").iterdir()
    subprocess.run(["depmod", "--basedir", into, modules.name], check=True)
    return into


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
