"""A real API server and its store: Debian's kubernetes 1.20.2 built with Debian's Go 1.19, and Debian's etcd.

Built once, some ten minutes of processor time, and kept. apt runs with sources, lists and a cache of its own,
and nothing is installed: packages are unpacked into the folder where the build happens.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

DEBIAN = "http://deb.debian.org/debian"
SUITE = "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("etcd-server", "golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev")
TOOLS = {
    "apt-get": "apt",
    "dpkg": "dpkg",
    "dpkg-source": "dpkg-dev",
    "openssl": "openssl",
    "patch": "patch",
}
DOWNLOAD_TIMEOUT_S = 600
BUILD_TIMEOUT_S = 3600
DISK_BYTES = 4 << 30  # while it is built

TREE = "k8s.io/kubernetes"
OPENAPI_TAG = re.compile(rb"\+k8s:openapi-gen=")


class UnavailableError(Exception):
    """There is no API server here; the message says why."""


class Binaries(NamedTuple):
    """What a cluster is run with."""

    apiserver: Path
    etcd: Path


def cache_directory() -> Path:
    """Return where what was built is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebpfproxy" / "kube"


def binaries() -> Binaries:
    """Return the binaries, built unless they are in the cache.

    Raises:
        UnavailableError: they can't be built here.
    """
    directory = cache_directory() / "1.20.2"
    found = Binaries(directory / "kube-apiserver", directory / "etcd")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two may want the same
        if not directory.exists():
            _check()
            with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
                work = Path(temporary)
                _download(work)
                _build(work)
                (work / "result").rename(directory)
    return found


def _check() -> None:
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            raise UnavailableError(f"there is no {tool} here: apt-get install {package}")
    machine = os.uname().machine
    if machine != "x86_64":
        raise UnavailableError(f"the build is for x86_64, this machine is {machine}")
    if not KEYRING.exists():
        raise UnavailableError(f"there is no {KEYRING} here: apt-get install debian-archive-keyring")
    if shutil.disk_usage(cache_directory()).free < DISK_BYTES:
        raise UnavailableError(f"the build needs {DISK_BYTES >> 30} GB in {cache_directory()}")


def _download(work: Path) -> None:
    """Unpack the tools into ``work/root`` and the sources into a GOPATH tree below ``work``."""
    sources = work / "sources.list"
    where = f"[signed-by={KEYRING}] {DEBIAN} {SUITE} main\n"
    sources.write_text(f"deb {where}deb-src {where}")
    for directory in ("state/lists/partial", "cache/archives/partial", "packages"):
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
    packages = work / "packages"
    _run(["apt-get", *options, "--quiet=2", "--error-on=any", "update"], packages)
    _run(["apt-get", *options, "--quiet=2", "download", *PACKAGES], packages)
    _run(["apt-get", *options, "--quiet=2", "--download-only", "source", "kubernetes"], packages)
    for package in packages.glob("*.deb"):
        _run(["dpkg", "--extract", package, work / "root"], packages)
    tree = work / "gopath/src" / TREE
    tree.parent.mkdir(parents=True)
    (source,) = packages.glob("kubernetes_*.dsc")
    _run(["dpkg-source", "--no-check", "--quiet", "--extract", source, tree], packages)


def _build(work: Path) -> None:
    """Put the binaries into ``work/result``."""
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
    _run([*compile_, generator, "./vendor/k8s.io/kube-openapi/cmd/openapi-gen"], tree, environment)
    # The one generated file that the source archive leaves out.
    generate = {
        "--go-header-file": "vendor/k8s.io/code-generator/hack/boilerplate.go.txt",
        "--output-file-base": "zz_generated.openapi",
        "--input-dirs": ",".join(f"{TREE}/{each}" for each in _openapi_packages(tree)),
        "--output-package": f"{TREE}/pkg/generated/openapi",
        "--report-filename": work / "violations",
        "--output-base": work / "gopath/src",
    }
    _run([generator, *(f"{flag}={value}" for flag, value in generate.items())], tree, environment)
    result = work / "result"
    result.mkdir()
    _run([*compile_, result / "kube-apiserver", "./cmd/kube-apiserver"], tree, environment)
    shutil.copy2(work / "root/usr/bin/etcd", result)
    result.chmod(0o755)


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


def _run(command: list[str | Path], directory: Path, environment: dict[str, str] | None = None) -> None:
    name = Path(command[0]).name
    timeout_s = BUILD_TIMEOUT_S if environment else DOWNLOAD_TIMEOUT_S
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
        raise UnavailableError(f"{name}: not done after {timeout_s} s") from error
    if result.returncode:
        raise UnavailableError(f"{name} failed: {result.stderr.strip()[-2000:]}")
