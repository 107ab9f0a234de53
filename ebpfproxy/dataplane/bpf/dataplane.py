"""The BPF dataplane: render -> diff -> apply on the pinned maps, programs attached beside it."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ebpfproxy import netlink, sockdiag
from ebpfproxy.dataplane.bpf.attach import NO_NETNS, Attachments, netns_cookie
from ebpfproxy.dataplane.bpf.epochs import HopWatch
from ebpfproxy.dataplane.bpf.features import program_features, usable
from ebpfproxy.dataplane.bpf.gc import Collector, Timeouts
from ebpfproxy.dataplane.bpf.xdp import PROGRAM, XdpAttachments
from ebpfproxy.dataplane.capabilities import named
from ebpfproxy.errors import DataplaneError, KernelError, LoadError, MapFullError, UnsupportedError
from ebpfproxy.libbpf import lib
from ebpfproxy.loader import Loaded, LoadOptions, choose
from ebpfproxy.model.services import DesiredState, Protocol, Service

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ebpfproxy.dataplane.bpf.tables import Tables

log = logging.getLogger(__name__)

#: Below NodePorts and the kernel's own ephemeral ports (net.ipv4.ip_local_port_range, 32768 to 60999), where
#: netfilter's MASQUERADE starts, too. What listens there is no matter: a flow is known by both its ends.
SNAT_PORTS = (1024, 29999)
#: All devices are checked so often even when no change was announced.
RECHECK_S = 30.0


@dataclass(frozen=True)
class BpfOptions:
    """How to run the BPF dataplane."""

    bpffs: Path  # a bpffs mount or a directory in one; all pins are below its directory "ebpfproxy"
    cgroup: Path  # a cgroup2 directory: its processes are served
    devices: Sequence[
        str
    ] = ()  # names or shell globs; none = all but loopback and ports of bridges and bonds
    loader: str = "auto"
    sizes: Mapping[str, int] = field(default_factory=dict)  # map name -> max_entries
    node_ports: tuple[int, int] = (30000, 32767)  # both inclusive
    snat_ports: tuple[int, int] = SNAT_PORTS  # both inclusive
    timeouts: Timeouts = field(default_factory=Timeouts)
    use_tcx: bool | None = None  # None: tcx links where the kernel has them, else clsact filters
    xdp_mode: str = "auto"  # one of xdp.MODES
    xdp_devices: Sequence[str] = ()  # names or shell globs; none = hardware, and where default routes lead


class BpfDataplane:
    """Makes the kernel serve a desired state through BPF programs."""

    def __init__(self, options: BpfOptions) -> None:
        self.options = options
        self.problems: list[str] = []  # what is missing on this machine, one sentence each
        self._root = options.bpffs / "ebpfproxy"
        self._loaded: Loaded | None = None
        self._attachments: Attachments | None = None
        self._xdp: XdpAttachments | None = None
        self._hops: HopWatch | None = None
        self._collector: Collector | None = None
        self._watch: netlink.Watch | None = None
        self._tables: Tables | None = None  # None: what the kernel holds has to be read
        self._rechecked_s = 0.0

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the programs, open or make the maps, and attach.

        Raises:
            DataplaneError: this machine can't run it; the message says why.
        """
        options = self.options
        self._root.mkdir(parents=True, exist_ok=True)
        features = program_features()
        if not features & lib.FEATURE_SET_RETVAL:
            self.problems.append(
                "connect() to a Service without backends fails with EPERM instead of ECONNREFUSED: "
                "this kernel lacks bpf_set_retval (Linux 5.18)"
            )
        host_netns = netns_cookie()
        if host_netns == NO_NETNS and options.node_ports[1]:
            self.problems.append(
                "NodePorts do not answer on 127.0.0.1 and ::1, and processes may bind them: this kernel does "
                "not tell network namespaces apart (SO_NETNS_COOKIE, Linux 5.14), and the agent is not in "
                "the machine's own"
            )
        load = LoadOptions(
            maps_dir=self._root / "maps",
            config={
                "node_port_min": options.node_ports[0],
                "node_port_max": options.node_ports[1],
                "host_netns": host_netns,
                "udp_idle_ns": int(options.timeouts.udp_idle_s * 1e9),
                "features": features,
                "snat_port_min": options.snat_ports[0],
                "snat_port_max": options.snat_ports[1],
            },
            sizes=options.sizes,
            programs_dir=self._root / "programs",
        )
        try:
            self._loaded = choose(options.loader).load(load, _make_ready)
        except (KernelError, LoadError) as error:
            missing = usable()  # says it better than the verifier
            if missing is None:
                raise
            raise UnsupportedError(missing) from error
        self._collector = Collector(self._loaded.maps, options.timeouts)
        self._watch = netlink.Watch()
        self._attachments = Attachments(
            self._root / "links", self._loaded.programs, options.cgroup, options.devices, options.use_tcx
        )
        self.problems += self._attachments.attach_cgroup()
        self._xdp = XdpAttachments(
            self._root / "links",
            self._loaded.programs.get(PROGRAM),
            self._loaded.maps["xdp_devices"],
            options.xdp_mode,
            options.xdp_devices,
        )
        self.problems += self._attach_devices()
        self._hops = HopWatch(self._loaded.maps["epochs"])
        self._hops.start()
        self._loaded.finish()
        self._rechecked_s = time.monotonic()

    def close(self) -> None:
        """Release handles. Programmed state stays in the kernel."""
        if self._hops is not None:
            self._hops.close()
        if self._watch is not None:
            self._watch.close()
        if self._loaded is not None:
            self._loaded.close()
        self._watch = self._loaded = self._collector = self._attachments = self._tables = None
        self._xdp = self._hops = None

    @property
    def loader(self) -> str:
        """Which loader is in use; "" before ``start``."""
        return self._loaded.loader if self._loaded else ""

    @property
    def devices(self) -> list[str]:
        """The devices that the programs are attached to, with how XDP is attached where it is."""
        by_xdp = self._xdp.devices if self._xdp else {}
        names = self._attachments.devices if self._attachments else []
        return [f"{name} (XDP {by_xdp[name]})" if name in by_xdp else name for name in names]

    # -- work ------------------------------------------------------------------------------------

    def sync(self, state: DesiredState) -> None:
        """Make exactly ``state`` work; idempotent, and the cost follows the change.

        Raises:
            MapFullError: some Services did not fit; all others are programmed.
            DataplaneError: only a part was programmed; call again.
        """
        with _no_cycles(), self._forget_on_error():
            tables = self._current_tables()
            failures = tables.update(state)
            if self._attachments is not None:
                self._attachments.watch_connects(is_wanted=tables.ejects)
            self._apply(tables)
            while failures:  # the deletes may have made room
                before = len(failures)
                failures = tables.update(state)
                self._apply(tables)
                if len(failures) >= before:
                    break
        if failures:
            raise _full_error(failures)

    def tick(self) -> None:
        """Do periodic work: free slots and ids, expire entries, attach to new devices."""
        now_s = time.monotonic()
        if self._tables is not None and self._collector is not None:
            with self._forget_on_error():
                self._collect(self._tables, self._collector, now_s)
        if self._attachments is not None and self._watch is not None:
            is_recheck = now_s - self._rechecked_s >= RECHECK_S
            if self._watch.changed() or is_recheck:
                if is_recheck:
                    self._forget_devices()
                    self._rechecked_s = now_s
                for problem in self._attach_devices():
                    log.warning(problem)

    def unsupported(self, state: DesiredState) -> list[str]:
        """Return one sentence for each thing in ``state`` that this dataplane does not do."""
        return unsupported(state)

    # -- inside ----------------------------------------------------------------------------------

    def _attach_devices(self) -> list[str]:
        """Attach to every device that is wanted; return one sentence for each that failed."""
        assert self._attachments is not None
        assert self._xdp is not None
        found = netlink.devices()
        return [*self._attachments.attach_devices(found), *self._xdp.attach(found)]

    def _forget_devices(self) -> None:
        """Check every device anew."""
        assert self._attachments is not None
        assert self._xdp is not None
        self._attachments.forget()
        self._xdp.forget()

    def _running(self) -> Loaded:
        if self._loaded is None:
            raise DataplaneError("the BPF dataplane is not started")
        return self._loaded

    def _current_tables(self) -> Tables:
        from ebpfproxy.dataplane.bpf.read import read_tables
        from ebpfproxy.dataplane.bpf.tables import Tables

        if self._tables is None:
            maps = self._running().maps
            self._tables = Tables(
                read_tables(maps), {name: found.max_entries for name, found in maps.items()}
            )
        self._tables.collect(time.monotonic())
        return self._tables

    def _apply(self, tables: Tables) -> None:
        from ebpfproxy.dataplane.bpf import plan

        if self._collector is not None and tables.has_lost_udp():
            self._collector.hurry()
        deltas = tables.delta()
        plan.apply(plan.make_plan(deltas), self._running().maps)
        tables.commit(deltas, time.monotonic())

    def _collect(self, tables: Tables, collector: Collector, now_s: float) -> None:
        tables.collect(now_s)
        unused = collector.step(tables.gone, tables.retired_vips, tables.affinity_s, now_s)
        if unused is None:
            return
        self._close_stranded(unused.stranded)
        if unused.backends or unused.vips:
            tables.release_backends(unused.backends)
            tables.release_vips(unused.vips)
            self._apply(tables)

    def _close_stranded(self, stranded: Mapping[int, sockdiag.Peer]) -> None:
        """End the connected UDP sockets whose backend is gone; their processes connect anew."""
        if not stranded:
            return
        try:
            where = sockdiag.namespaces(self.options.cgroup)
            ended = sockdiag.close_udp(stranded, where.values())
        except KernelError as error:
            log.warning("%s; their processes notice nothing until they connect anew", error)
        else:
            if ended:  # one that its process keeps is found at every pass
                log.info("closed %d UDP sockets whose backend is gone", ended)

    @contextlib.contextmanager
    def _forget_on_error(self) -> Iterator[None]:
        """Read the kernel again at the next sync when anything goes wrong here."""
        try:
            yield
        except BaseException:
            self._tables = None
            raise


def _make_ready() -> None:
    """Import what the first sync needs, while the kernel checks the programs: it takes as long."""
    import ebpfproxy.dataplane.bpf.plan
    import ebpfproxy.dataplane.bpf.read
    import ebpfproxy.dataplane.bpf.tables  # noqa: F401

    netlink.devices()  # pyroute2


@contextlib.contextmanager
def _no_cycles() -> Iterator[None]:
    """Pause Python's cycle collector: it doubles the time of a large sync, which makes no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _full_error(failures: Sequence[tuple[Service | None, MapFullError]]) -> MapFullError:
    """Return one error for all Services that did not fit."""
    names = [str(service.name) if service else "the node's addresses" for service, _ in failures]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    reasons = "; ".join(sorted({str(error) for _, error in failures}))
    return MapFullError(f"{reasons}. Not programmed: {shown}; everything else is")


def unsupported(state: DesiredState) -> list[str]:
    """Return one sentence for each thing in ``state`` that the BPF dataplane does not do. Pure."""
    sentences = []
    sctp = [s for s in state.services if s.protocol is Protocol.SCTP]
    if sctp:
        sentences.append(
            f"SCTP works for traffic that enters this node, not for sockets on it: {named(sctp)}"
        )
    ranges = [s for s in state.services if s.has_source_ranges]
    if ranges:
        sentences.append(
            "loadBalancerSourceRanges: sockets on this node that are not bound to an address in them are "
            f"left to the real load balancer: {named(ranges)}"
        )
    return sentences
