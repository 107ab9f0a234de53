"""Attaches xdp_lb to the uplinks: in the driver where it can, and swapped, not removed, at a restart.

XDP is speed alone. A device without it is served by tc_lb in every way, so nothing here is an error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ebpfproxy import netlink
from ebpfproxy.dataplane.bpf.attach import pin_link, pin_name, swap_program
from ebpfproxy.dataplane.bpf.layouts import U32
from ebpfproxy.errors import KernelError, UnsupportedError
from ebpfproxy.libbpf import XDP_GENERIC, XDP_NATIVE, Link, Map, Program, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

PROGRAM = "xdp_lb"
#: What may be asked for. auto: native where the driver can, else none: generic is no faster than tc.
MODES = ("auto", "native", "generic", "off")


class XdpAttachments:
    """Keeps ``xdp_lb`` on the uplinks.

    Args:
        links: directory on the bpffs for the pins of links.
        program: ``xdp_lb``; None: it could not be loaded.
        targets: map xdp_devices, the devices that XDP may send to.
        mode: one of ``MODES``.
        patterns: device names or shell globs; none = ``netlink.uplinks``.
    """

    def __init__(
        self, links: Path, program: Program | None, targets: Map, mode: str, patterns: Sequence[str] = ()
    ) -> None:
        self._links = links
        self._program = program
        self._targets = targets
        self._mode = mode if program is not None else "off"
        self._patterns = patterns
        self._attached: dict[str, tuple[int, str]] = {}  # device -> index, native | generic
        # As _attached, but for what the log says: it forgets nothing.
        self._told: dict[str, tuple[int, str]] = {}
        self._refused: dict[str, int] = {}  # device -> index: said once, not tried again

    @property
    def devices(self) -> dict[str, str]:
        """How each device is attached: "native" or "generic", by name."""
        return {name: how for name, (_, how) in sorted(self._attached.items())}

    def attach(self, found: Iterable[netlink.Device]) -> list[str]:
        """Attach to every uplink among ``found`` that is not attached yet; leave all others.

        Returns:
            One sentence for each device that refused, and only once for each.
        """
        found = list(found)
        wanted = {} if self._mode == "off" else self._wanted(found)
        self._detach_others(wanted)
        problems = []
        for name, index in wanted.items():
            if self._attached.get(name, (0, ""))[0] == index or self._refused.get(name) == index:
                continue
            try:
                how = self._attach_one(name, index)
            except (KernelError, UnsupportedError) as error:
                self._refused[name] = index
                if self._mode != "auto":
                    problems.append(f"XDP is off on device {name}, which tc serves: {error}")
                else:
                    log.info("no XDP on device %s, which tc serves: %s", name, error)
                continue
            self._attached[name] = index, how
            if self._told.get(name) != (index, how):
                self._told[name] = index, how
                log.info("attached to device %s by XDP, %s", name, how)
        self._write_targets(found)
        return problems

    def forget(self) -> None:
        """Check every device anew at the next ``attach``."""
        self._attached.clear()

    def _wanted(self, found: Iterable[netlink.Device]) -> Mapping[str, int]:
        chosen = netlink.select_devices(found, self._patterns) if self._patterns else netlink.uplinks(found)
        return {device.name: device.number for device in chosen if not device.is_loopback}

    def _attach_one(self, name: str, index: int) -> str:
        assert self._program is not None, "the mode is off without a program"
        path = self._links / pin_name(PROGRAM, name)
        how, flags = ("generic", XDP_GENERIC) if self._mode == "generic" else ("native", XDP_NATIVE)
        # Of a link nothing tells the mode: the pin's name does.
        pinned = path.with_name(f"{path.name}+{how}")

        def is_ours(link: Link) -> bool:
            info = link.info()
            return info.ifindex == index and info.attach_type == lib.BPF_XDP

        if not swap_program(pinned, self._program, is_ours):
            self._unpin(path.name)
            pin_link(Link.attach_xdp(self._program, index, flags), pinned)
        return how

    def _detach_others(self, wanted: Mapping[str, int]) -> None:
        """Drop the pins of devices that are gone or no longer wanted; a link dies with its last pin."""
        keep = {pin_name(PROGRAM, name) for name in wanted}
        for name in self._attached.keys() - wanted.keys():
            del self._attached[name]
        for path in self._links.iterdir():
            if path.name.startswith(f"{PROGRAM}@") and path.name.rpartition("+")[0] not in keep:
                path.unlink(missing_ok=True)
                log.info("detached from device: %s", path.name)

    def _unpin(self, prefix: str) -> None:
        for path in self._links.iterdir():
            if path.name.startswith(f"{prefix}+"):
                path.unlink(missing_ok=True)

    def _write_targets(self, found: Iterable[netlink.Device]) -> None:
        """Tell the program where it may send to.

        From a driver to a driver, both need XDP there: that is what makes the queues for it. The kernel's own
        code sends to every device.
        """
        native = {index for index, how in self._attached.values() if how == "native"}
        is_generic = bool(self._attached) and not native
        targets = {device.number for device in found if not device.is_loopback} if is_generic else native
        have = {key for key, _ in self._targets.items()}
        wanted = {U32.pack(index) for index in targets}
        self._targets.update_batch(dict.fromkeys(wanted - have, U32.pack(1)))
        self._targets.delete_batch(have - wanted)
