"""Which source an agent has: a directory of manifests, or an API server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy.errors import ConfigError
from ebpfproxy.kubeapi import access

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ebpfproxy.kubeapi.access import Access
    from ebpfproxy.kubeapi.client import Client
    from ebpfproxy.kubeapi.recorder import Recorder
    from ebpfproxy.source import Source


class Origin(msgspec.Struct, frozen=True):
    """Where objects come from.

    Attributes:
        make: makes a source; may raise SourceError.
        manifests: the directory; "" for an API server.
        server: URL of the API server; "" for a directory.
        record: makes what writes events to the API server.
    """

    make: Callable[[], Source]
    manifests: str = ""
    server: str = ""
    record: Callable[[], Recorder] | None = None


def choose(manifests: Path | None, flags: access.Flags, node_name: str, state_dir: Path) -> Origin:
    """Return the source that was asked for; without a word the one of the cluster that this is a pod of.

    Args:
        manifests: a directory; None: an API server.
        flags: the API server's.
        node_name: whose Node object is wanted.
        state_dir: the agent's; the directory source keeps last good copies there.

    Raises:
        ConfigError: nothing was asked for, and this is no pod.
        SourceError: there is no way to the API server.
    """
    if manifests is not None:
        return Origin(lambda: _directory(manifests, state_dir), manifests=str(manifests))
    if not flags and not access.is_in_cluster(os.environ):
        raise ConfigError(
            "say where Services come from: --manifests DIR, or an API server by --kubeconfig FILE or "
            "--master URL (this is no pod with a service account)"
        )
    found = access.find(flags, os.environ)
    return Origin(
        lambda: _kubernetes(access.find(flags, os.environ), node_name),
        server=found.servers[0],
        record=lambda: _recorder(found, node_name),
    )


def _directory(manifests: Path, state_dir: Path) -> Source:
    from ebpfproxy.source.directory import DirectorySource
    from ebpfproxy.source.lastgood import directory_of

    return DirectorySource(manifests, directory_of(state_dir))


def _kubernetes(found: Access, node_name: str) -> Source:
    from ebpfproxy.source.kubernetes import KubernetesSource

    return KubernetesSource(lambda: _connect(found), node_name)


def _recorder(found: Access, node_name: str) -> Recorder:
    from ebpfproxy.kubeapi.recorder import Recorder

    return Recorder(lambda: _connect(found), node_name)


def _connect(found: Access) -> Client:
    from ebpfproxy.kubeapi.client import Client  # beside the kernel's work on the programs

    return Client(found)
