"""Mode ``bpf``: whether this machine can run it, what it is made from, and its end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ebpfproxy import files, host
from ebpfproxy.dataplane.modes import Made, Site
from ebpfproxy.errors import ConfigError, EbpfproxyError

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from ebpfproxy.config import Config
    from ebpfproxy.dataplane.bpf.dataplane import BpfOptions
    from ebpfproxy.metrics import Reading

log = logging.getLogger(__name__)

PINS = "ebpfproxy"  # our directory in the BPF file system


def usable() -> str | None:
    """Return why this machine can't run it, None if it can."""
    from ebpfproxy.dataplane.bpf import features
    from ebpfproxy.loader.bcc import BccLoader
    from ebpfproxy.loader.libbpf import LibbpfLoader

    reasons = {each.name: each.usable() for each in (LibbpfLoader(), BccLoader())}
    if all(reasons.values()):
        return "; ".join(f"loader {name}: {reason}" for name, reason in reasons.items())
    return features.usable()


def make(settings: Config, site: Site, stack: ExitStack) -> Made:
    """Make the dataplane, and hold the lock of its pins."""
    from ebpfproxy.dataplane.bpf.dataplane import BpfDataplane

    cgroup = site.cgroup or host.find_cgroup2()
    bpffs = site.bpffs or _bpffs()
    stack.callback(lock_pins(bpffs).close)
    return Made(BpfDataplane(_options(settings, cgroup, bpffs)), site._replace(cgroup=cgroup, bpffs=bpffs))


def reading(site: Site) -> Reading:
    """Return what the programs count; called from another thread."""
    from ebpfproxy.dataplane.bpf.reading import read

    assert site.bpffs
    return read(site.bpffs)


def cleanup(site: Site) -> list[str]:
    """Remove pinned links and maps, and our filters on this network namespace's devices."""
    from ebpfproxy.dataplane.bpf.cleanup import cleanup as remove

    bpffs = site.bpffs or host.find_bpffs() or host.BPFFS
    if not (bpffs / PINS).is_dir():
        return []
    lock = files.Lock(bpffs / PINS, "directory of pinned maps")
    try:
        return remove(bpffs)
    finally:
        lock.close()


def _options(settings: Config, cgroup: Path, bpffs: Path) -> BpfOptions:
    from ebpfproxy.dataplane.bpf.dataplane import SNAT_PORTS, BpfOptions
    from ebpfproxy.dataplane.bpf.gc import Timeouts

    names = ("udp_idle_s", "udp_s", "udp_stream_s", "tcp_established_s", "tcp_close_wait_s")
    timeouts = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    return BpfOptions(
        bpffs=bpffs,
        cgroup=cgroup,
        devices=settings.devices,
        loader=settings.loader,
        sizes=settings.map_sizes,
        node_ports=settings.service_node_port_range,
        timeouts=Timeouts(**timeouts),
        snat_ports=settings.snat_ports or SNAT_PORTS,
        xdp_mode=settings.xdp_mode,
        xdp_devices=settings.xdp_devices,
        use_tcx={"tcx": True, "clsact": False}.get(settings.device_attachment),
    )


def _bpffs() -> Path:
    """Return where the BPF file system is; mount it where it belongs if it is nowhere."""
    found = host.find_bpffs()
    if found is None:
        host.mount_bpffs()
        log.info("mounted a bpf file system at %s: there was none", host.BPFFS)
    return found or host.BPFFS


def lock_pins(bpffs: Path) -> files.Lock:
    """Hold the lock of the pins below ``bpffs``.

    Raises:
        LockedError: another agent has it.
        ConfigError: it is in no BPF file system.
        EbpfproxyError: it can't be written to.
    """
    if bpffs.is_dir() and not host.is_bpffs(bpffs):
        raise ConfigError(
            f"use {bpffs} for pinned maps: it is in no bpf file system; mount one "
            f"(mount -t bpf bpf {bpffs}), or leave --bpffs out to use the one at /sys/fs/bpf"
        )
    try:
        pins = bpffs / PINS
        pins.mkdir(mode=0o700, exist_ok=True)
        return files.Lock(pins, "directory of pinned maps")
    except OSError as error:
        raise EbpfproxyError(f"use the bpf file system at {bpffs}: {error.strerror}") from error
