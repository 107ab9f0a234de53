"""A real API server and its store: Debian's kubernetes 1.20.2 built with Debian's Go 1.19, and Debian's etcd.

Built once, some ten minutes of processor time, and kept. apt runs with sources, lists and a cache of its own,
and nothing is installed: packages are unpacked into the folder where the build happens.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING, NamedTuple

from rig.packages import DEBIAN, Archive, UnavailableError, cache_directory, kept, need, run

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Binaries", "UnavailableError", "binaries"]

SUITE = "bookworm"
PACKAGES = ["etcd-server", "golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev"]
TOOLS = {
    "apt-get": "apt",
    "dpkg": "dpkg",
    "dpkg-source": "dpkg-dev",
    "openssl": "openssl",
    "patch": "patch",
}
BUILD_TIMEOUT_S = 3600
DISK_BYTES = 4 << 30  # while it is built

TREE = "k8s.io/kubernetes"
OPENAPI_TAG = re.compile(rb"\+k8s:openapi-gen=")


class Binaries(NamedTuple):
    """What a cluster is run with."""

    apiserver: Path
    etcd: Path


def binaries() -> Binaries:
    """Return the binaries, built unless they are in the cache.

    Raises:
        UnavailableError: they can't be built here.
    """
    directory = kept(cache_directory("kube") / "1.20.2", _make)
    return Binaries(directory / "kube-apiserver", directory / "etcd")


def _make(work: Path) -> Path:
    """Build below ``work`` and return where the binaries are."""
    need(TOOLS)
    machine = os.uname().machine
    if machine != "x86_64":
        raise UnavailableError(f"the build is for x86_64, this machine is {machine}")
    if shutil.disk_usage(work).free < DISK_BYTES:
        raise UnavailableError(f"the build needs {DISK_BYTES >> 30} GB in {work.parent}")
    archive = Archive(DEBIAN, SUITE, work, has_sources=True)
    archive.unpack(PACKAGES, work / "root")
    archive.unpack_source("kubernetes", work / "gopath/src" / TREE)
    return _build(work)


def _build(work: Path) -> Path:
    """Put the binaries into ``work/result``, and return that."""
    tree = work / "gopath/src" / TREE
    # The vendored version (1.0.1) panics with the maps of Go 1.18 and later.
    reflect2 = "github.com/modern-go/reflect2"
    shutil.rmtree(tree / "vendor" / reflect2)
    shutil.copytree(work / "root/usr/share/gocode/src" / reflect2, tree / "vendor" / reflect2)
    go = work / "root/usr/lib/go-1.19"
    environment = {
        **os.environ,
        "GO111MODULE": "off",  # -mod=vendor fails: vendor/modules.txt is Debian's
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
        "GOROOT": str(go),  # openapi-gen asks for it when it was built with -trimpath
        "GOPATH": str(work / "gopath"),
        "GOCACHE": str(work / "gocache"),
        "GOTMPDIR": str(work),
    }
    compile_ = ["nice", str(go / "bin/go"), "build", "-trimpath", "-ldflags=-s -w", "-o"]
    generator = work / "openapi-gen"

    def do(*command: str | Path) -> None:
        run([*command], tree, environment, BUILD_TIMEOUT_S)

    do(*compile_, generator, "./vendor/k8s.io/kube-openapi/cmd/openapi-gen")
    # The one generated file that the source archive leaves out.
    generate = {
        "--go-header-file": "vendor/k8s.io/code-generator/hack/boilerplate.go.txt",
        "--output-file-base": "zz_generated.openapi",
        "--input-dirs": ",".join(f"{TREE}/{each}" for each in _openapi_packages(tree)),
        "--output-package": f"{TREE}/pkg/generated/openapi",
        "--report-filename": work / "violations",
        "--output-base": work / "gopath/src",
    }
    do(generator, *(f"{flag}={value}" for flag, value in generate.items()))
    result = work / "result"
    result.mkdir()
    do(*compile_, result / "kube-apiserver", "./cmd/kube-apiserver")
    shutil.copy2(work / "root/usr/bin/etcd", result)
    result.chmod(0o755)
    return result


def _openapi_packages(tree: Path) -> list[str]:
    """Return the packages whose types are in the API's description."""
    roots = [tree / "cmd", tree / "pkg", tree / "plugin"]
    roots += [
        each
        for each in (tree / "vendor/k8s.io").iterdir()
        if each.name not in ("code-generator", "gengo", "kube-openapi", "sample-apiserver")
    ]
    found = {
        file.parent.relative_to(tree).as_posix()
        for root in roots
        for file in root.rglob("*.go")
        if OPENAPI_TAG.search(file.read_bytes())
    }
    return sorted(found)
