"""Loads the programs for packet tests, with maps of a chosen size."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebpfproxy.dataplane.bpf.attach import INITIAL_NETNS
from ebpfproxy.libbpf import lib
from ebpfproxy.loader import Loaded, LoadOptions, bcc, choose
from packets.node import NODE_PORTS, SECOND_NS, SNAT_PORTS, UDP_IDLE_S
from rig import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]

#: Small: arrays are cleared and read whole.
SIZES = {
    "slots": 65536,
    "backends": 4096,
    "backend_stats": 4096,
    "service_stats": 1024,
    "backend_hops": 4096,
    "backend_health": 4096,
    "conntrack": 8192,
    "new_flows": 8192,
    "affinity": 8192,
    "fragments": 1024,
    "sockets": 8192,
}


COOKIE = (
    "import socket; print(int.from_bytes(socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8), 'little'))"
)
"""Prints the cookie of its network namespace (SO_NETNS_COOKIE, Linux 5.14); Python has no name for it."""


CONFIG = {
    "node_port_min": NODE_PORTS[0],
    "node_port_max": NODE_PORTS[1],
    "udp_idle_ns": UDP_IDLE_S * SECOND_NS,
    "snat_port_min": SNAT_PORTS[0],
    "snat_port_max": SNAT_PORTS[1],
    "features": (lib.FEATURE_SET_RETVAL if kernel.is_since(5, 18) else 0)
    | (lib.FEATURE_COARSE_CLOCK if kernel.is_since(5, 11) else 0),
}

#: A compiler on an emulated processor of a busy machine takes minutes.
COMPILE_S = 1500


@contextmanager
def load(loader: str, host: kernel.Netns, sizes: Mapping[str, int]) -> Iterator[Loaded]:
    """Load the programs by one loader; ``sizes`` beside SIZES."""
    with pytest.MonkeyPatch.context() as patch, kernel.new_bpffs() as bpffs:
        patch.setattr(bcc, "TIMEOUT_S", COMPILE_S)
        if loader == "bcc" and bcc.headers_problem(os.environ):
            script = [ROOT / "scripts/bcc-headers"]
            made = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
            patch.setenv("BCC_KERNEL_SOURCE", made.stdout.strip())
        known = kernel.is_since(5, 14)
        cookie = int(host.place().run(sys.executable, "-c", COOKIE).stdout) if known else INITIAL_NETNS
        options = LoadOptions(
            maps_dir=bpffs / "maps", config={**CONFIG, "host_netns": cookie}, sizes={**SIZES, **sizes}
        )
        loaded = choose(loader).load(options)
        try:
            yield loaded
        finally:
            loaded.close()
