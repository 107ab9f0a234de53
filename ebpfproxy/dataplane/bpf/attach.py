"""Attaches the programs: links to a cgroup, links or filters to devices, all kept by pins across restarts."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from ebpfproxy import netlink
from ebpfproxy.errors import DataplaneError, KernelError, UnsupportedError
from ebpfproxy.libbpf import TCX_EGRESS, TCX_INGRESS, Link, Program
from ebpfproxy.libbpf.probes import has_tcx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

log = logging.getLogger(__name__)

#: Programs of the cgroup: what is lost without them, and the kernel that brought their hook.
CGROUP_PROGRAMS = {
    "sock_connect4": ("connect() to IPv4 VIPs", "4.17"),
    "sock_connect6": ("connect() to IPv6 VIPs", "4.17"),
    "sock_sendmsg4": ("unconnected UDP to IPv4 VIPs", "4.18"),
    "sock_sendmsg6": ("unconnected UDP to IPv6 VIPs", "4.18"),
    "sock_recvmsg4": ("the VIP as source of unconnected UDP replies, IPv4", "5.2"),
    "sock_recvmsg6": ("the VIP as source of unconnected UDP replies, IPv6", "5.2"),
    "sock_peername4": ("the VIP in getpeername(), IPv4", "5.8"),
    "sock_peername6": ("the VIP in getpeername(), IPv6", "5.8"),
    "sock_postbind4": ("keeping IPv4 NodePorts from being bound", "4.17"),
    "sock_postbind6": ("keeping IPv6 NodePorts from being bound", "4.17"),
    "sock_release": ("immediate clean-up after closed sockets", "5.9"),
}
#: Attached only while a Service has backends ejected that fail.
WATCH_PROGRAM = "sock_watch"
#: Without these there is no load balancing for local sockets at all.
REQUIRED = ("sock_connect4", "sock_connect6")
#: Programs of a device: tcx attach type, clsact parent.
DEVICE_PROGRAMS = {
    "tc_ingress": (TCX_INGRESS, netlink.INGRESS),
    "tc_egress": (TCX_EGRESS, netlink.EGRESS),
}
# asm-generic/socket.h; Python has no name for it. Linux 5.14.
SO_NETNS_COOKIE = 71
#: Values that no namespace's number has: the programs ask for the initial one's; nobody's.
INITIAL_NETNS, NO_NETNS = 0, 2**64 - 1
#: Our filters' names start so: cleanup knows them by it.
FILTER_PREFIX = "ebpfproxy_"
#: Directory beside the links' pins: which devices had no clsact qdisc before us.
QDISC_MARKS = "clsact"


def netns_cookie() -> int:
    """Return how the programs know this network namespace.

    The kernel's number of it. Before Linux 5.14 that can't be asked for: ``INITIAL_NETNS``, or, if this is
    another one, ``NO_NETNS``.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return int(struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])
        except OSError:
            return INITIAL_NETNS if is_in_initial_netns() else NO_NETNS


def is_in_initial_netns() -> bool:
    """Return whether this thread is in the network namespace of process 1, as far as it may know."""
    try:
        return Path("/proc/1/ns/net").samefile("/proc/thread-self/ns/net")
    except OSError:
        return False


def pin_name(program: str, device: str) -> str:
    """Return the file name of a device link's pin; a bpffs refuses dots, which VLAN devices have."""
    return f"{program}@{device.replace('%', '%25').replace('.', '%2E')}"


class Attachments:
    """Keeps the programs attached where they belong.

    Args:
        links: directory on the bpffs for the pins of links.
        programs: by name.
        cgroup: cgroup2 directory whose processes are served.
        patterns: device names or shell globs; none = ``netlink.select_devices``'s default.
        use_tcx: attach to devices by links; False: by clsact filters; None: links where the kernel has them.
    """

    def __init__(
        self,
        links: Path,
        programs: Mapping[str, Program],
        cgroup: Path,
        patterns: Sequence[str] = (),
        use_tcx: bool | None = None,
    ) -> None:
        self._links = links
        self._programs = programs
        self._cgroup = cgroup
        self._patterns = patterns
        self._use_tcx = has_tcx() if use_tcx is None else use_tcx
        self._attached: dict[str, int] = {}  # device name -> index
        self._reported: set[str] = set()
        self._told: dict[str, int] = {}  # as _attached, but for what the log says: it forgets nothing
        self._are_filters_checked = False
        self._is_watching = False

    @property
    def devices(self) -> list[str]:
        """The names of the devices that are attached to."""
        return sorted(self._attached)

    @property
    def how(self) -> str:
        """How devices are attached to: "tcx" or "clsact"."""
        return "tcx" if self._use_tcx else "clsact"

    def attach_cgroup(self) -> list[str]:
        """Attach the socket programs.

        Returns:
            One sentence for each hook that this kernel lacks.

        Raises:
            UnsupportedError: a hook is missing without which nothing works.
        """
        self._links.mkdir(parents=True, exist_ok=True)
        missing = []
        for name, (purpose, since) in CGROUP_PROGRAMS.items():
            program = self._programs.get(name)
            try:
                if program is None:
                    raise UnsupportedError(f"program {name} could not be loaded")
                self._attach_cgroup_program(program)
            except (KernelError, UnsupportedError) as error:
                if name in REQUIRED:
                    raise
                missing.append(f"not available here: {purpose} (since Linux {since}): {error}")
        return missing

    def watch_connects(self, *, is_wanted: bool) -> None:
        """Attach, or detach, the program that learns how connects end; it costs every connect a little.

        Raises:
            KernelError: the kernel refused.
        """
        path = self._links / WATCH_PROGRAM
        if not is_wanted:
            path.unlink(missing_ok=True)
        elif not self._is_watching:
            self._attach_cgroup_program(self._programs[WATCH_PROGRAM])
        self._is_watching = is_wanted

    def attach_devices(self, present: Iterable[netlink.Device]) -> list[str]:
        """Attach to every device that is wanted and is not attached yet; forget those that are gone.

        Args:
            present: the devices that there are.

        Returns:
            One sentence for each device that failed, and only once for each.
        """
        found = netlink.select_devices(present, self._patterns)
        wanted = {device.name: device.number for device in found}
        self._detach_others(wanted)
        problems = []
        for name, index in wanted.items():
            if self._attached.get(name) == index:
                continue
            try:
                for program_name, (attach_type, parent) in DEVICE_PROGRAMS.items():
                    self._attach_device_program(program_name, name, index, attach_type, parent)
            except DataplaneError as error:
                if name not in self._reported:
                    problems.append(f"device {name} is not served: {error}")
                    self._reported.add(name)
                continue
            self._reported.discard(name)
            self._attached[name] = index
            if self._told.get(name) != index:
                self._told[name] = index
                log.info("attached to device %s by %s", name, self.how)
        if not self._are_filters_checked:
            self._remove_filters(set() if self._use_tcx else set(wanted.values()))
            self._are_filters_checked = True
        return problems

    def forget(self) -> None:
        """Check every device anew at the next ``attach_devices``."""
        self._attached.clear()

    def _attach_cgroup_program(self, program: Program) -> None:
        path = self._links / program.name
        try:
            cgroup_id = self._cgroup.stat().st_ino  # a cgroup's id is its inode number (kernfs, 64 bit)
        except OSError as error:
            raise KernelError(
                f"attach program {program.name} to cgroup {self._cgroup}: {error.strerror}; "
                "name a cgroup2 directory with --cgroup",
                error.errno or 0,
            ) from error

        def is_ours(link: Link) -> bool:
            info = link.info()
            return info.cgroup_id == cgroup_id and info.attach_type == program.attach_type

        if not swap_program(path, program, is_ours):
            pin_link(Link.attach_cgroup(program, self._cgroup), path)

    def _attach_device_program(
        self, program_name: str, device: str, index: int, attach_type: int, parent: int
    ) -> None:
        program = self._programs[program_name]
        path = self._links / pin_name(program_name, device)
        if not self._use_tcx:
            if netlink.set_filter(index, parent, program.fd, f"{FILTER_PREFIX}{program_name}"):
                self._note_qdisc(program, device)
            path.unlink(missing_ok=True)  # of a run that used links
            return

        def is_ours(link: Link) -> bool:
            info = link.info()
            return info.ifindex == index and info.attach_type == attach_type

        if not swap_program(path, program, is_ours):
            pin_link(Link.attach_tcx(program, index, attach_type), path)

    def _note_qdisc(self, program: Program, device: str) -> None:
        """Leave a mark, for whoever removes the filters, that the qdisc came with them.

        The mark is a pin: it goes with the kernel's state, as the qdisc does, and needs no file elsewhere.
        """
        mark = self._links.with_name(QDISC_MARKS) / pin_name("clsact", device)
        mark.parent.mkdir(exist_ok=True)
        mark.unlink(missing_ok=True)
        program.pin(mark)

    def _detach_others(self, wanted: Mapping[str, int]) -> None:
        """Drop the pins of devices that are gone or no longer wanted; a link dies with its last pin."""
        for name in list(self._attached):
            if name not in wanted:
                del self._attached[name]
        keep = {pin_name(program, device) for program in DEVICE_PROGRAMS for device in wanted}
        for path in self._device_pins():
            if path.name not in keep:
                path.unlink(missing_ok=True)
                log.info("detached from device: %s", path.name)

    def _device_pins(self) -> list[Path]:
        return [path for path in self._links.iterdir() if path.name.partition("@")[0] in DEVICE_PROGRAMS]

    def _remove_filters(self, keep: AbstractSet[int]) -> None:
        """Remove the filters of an earlier run from all devices but these."""
        remove_filters(self._links.with_name(QDISC_MARKS), keep)


def remove_filters(marks: Path, keep: AbstractSet[int] = frozenset()) -> list[str]:
    """Remove our filters from all devices but ``keep`` (indexes), and the qdiscs that were added for them.

    Args:
        marks: directory of the marks that ``Attachments`` left beside the links.
        keep: indexes of devices.

    Returns:
        One line for each filter.
    """
    devices = {device.number: device.name for device in netlink.devices()}
    removed = []
    for found in netlink.list_filters(FILTER_PREFIX):
        if found.device not in keep:
            netlink.remove_filter(found)
            removed.append(f"filter {found.name} on device {devices.get(found.device, found.device)}")
    for number, name in devices.items():
        mark = marks / pin_name("clsact", name)
        if number not in keep and mark.exists():
            netlink.remove_empty_clsact(number)
            mark.unlink()
    return removed


def swap_program(path: Path, program: Program, is_ours: Callable[[Link], bool]) -> bool:
    """Put ``program`` into the link pinned at ``path``; return False if there is none that fits."""
    try:
        link = Link.open(path)
    except KernelError:
        return False
    with link, contextlib.suppress(KernelError):
        if is_ours(link):
            if link.info().program_id != program.id:  # a swap waits for all processors
                link.update(program)
            return True
    return False


def pin_link(link: Link, path: Path) -> None:
    """Pin a new link at ``path``; what was pinned there goes after it, so no packet passes without."""
    with link:
        fresh = path.with_name(f"{path.name}+new")
        fresh.unlink(missing_ok=True)
        link.pin(fresh)
        fresh.replace(path)
