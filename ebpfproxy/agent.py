"""The agent: source -> store -> allocate -> resolve -> dataplane, in one loop in the main thread.

Whatever goes wrong with something new, what was programmed goes on working: a failed sync is retried with
backoff, a dead source is started again, a wrong configuration file changes nothing.
"""

from __future__ import annotations

import datetime as dt
import gc
import logging
import os
import select
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

import ebpfproxy
from ebpfproxy import config, events, files, health, host, log, metrics, netlink, runner, status
from ebpfproxy.alarm import Alarm
from ebpfproxy.diff import turnover
from ebpfproxy.errors import ConfigError, EbpfproxyError, MapFullError
from ebpfproxy.model.addresses import canonical_cidr
from ebpfproxy.model.objects import Node, ObjectKey
from ebpfproxy.model.services import DesiredState, Forwarding, NodePortAddresses, Scheduler
from ebpfproxy.resolve.allocate import AllocationOptions, Allocator, GivenByServer
from ebpfproxy.resolve.resolver import ResolveOptions, Resolver, node_context
from ebpfproxy.source.feed import Feed
from ebpfproxy.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ebpfproxy.config import Config
    from ebpfproxy.dataplane import Dataplane
    from ebpfproxy.events import Event
    from ebpfproxy.model.objects import Problem
    from ebpfproxy.source import Source

_log = log.get(__name__)

STATE_DIR = Path("/var/lib/ebpfproxy")
LEDGER_FILE = "allocations.json"
LOCK_FILE = "lock"
_OOM_SCORE = Path("/proc/self/oom_score_adj")

# Exit codes of ``run``; the command line has the same.
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED = 0, 1, 2, 3

_TICK_S = 1.0
# Manifests are many small objects without cycles. With Python's default of 700 for the first number, reading
# 100,000 endpoints takes half as long again.
_GC_THRESHOLD = (100_000, 50, 100)
_NETWORK_S = 0.05  # how long changes of devices and addresses are gathered
_HEALTH_S = 1.0  # the first Service goes before: only after this health is told without one
ONCE_S = 60.0  # ``run --once`` waits so long for the source; --help says it, too
_RELOAD_S = 15.0  # a reload counts as done after this, whatever the source does


class Options(msgspec.Struct, frozen=True):
    """The flags of ``ebpfproxy run``; what is empty comes from the configuration file or is found."""

    manifests: Path | None = None  # None = an API server's objects
    kubeconfig: Path | None = None
    master: str = ""
    kube_api_server: tuple[str, ...] = ()
    config: Path | None = None
    node_name: str = ""
    mode: str = ""  # auto, or one of ebpfproxy.dataplane.modes
    loader: str = ""  # auto | libbpf | bcc
    cgroup: Path | None = None
    devices: tuple[str, ...] = ()
    xdp_mode: str = ""  # auto | native | generic | off
    xdp_devices: tuple[str, ...] = ()
    forwarding: str = ""  # one of Forwarding
    state_dir: Path = STATE_DIR
    bpffs: Path | None = None
    map_sizes: dict[str, int] = {}
    listen: tuple[str, ...] = ()
    once: bool = False
    log_format: str = ""  # text | json
    healthz_bind_address: str | None = None  # "" = off
    metrics_bind_address: str | None = None  # "" = off
    fields: dict[str, Any] = {}  # path of a configuration field, as "ipvs.scheduler" -> its value

    def apply(self, file: Config) -> Config:
        """Return the configuration with these flags over it."""
        if self.manifests is not None and (self.kubeconfig or self.master or self.kube_api_server):
            raise ConfigError(
                "Services come from a directory or from an API server, not from both: leave out --manifests, "
                "or --kubeconfig, --master and --kube-api-server"
            )
        return msgspec.structs.replace(
            file,
            mode=self.mode or file.mode,
            loader=self.loader or file.loader,
            hostname_override=self.node_name or file.hostname_override,
            kubeconfig=self.kubeconfig or file.kubeconfig,
            devices=self.devices or file.devices,
            xdp_mode=self.xdp_mode or file.xdp_mode,
            xdp_devices=self.xdp_devices or file.xdp_devices,
            forwarding=Forwarding(self.forwarding or file.forwarding),
            map_sizes=file.map_sizes | self.map_sizes,
            listen_addresses=config.parse_listen("--listen", self.listen) or file.listen_addresses,
            log_format=self.log_format or file.log_format,
            healthz_bind=file.healthz_bind
            if self.healthz_bind_address is None
            else config.parse_bind("--healthz-bind-address", self.healthz_bind_address, config.HEALTHZ_PORT),
            metrics_bind=file.metrics_bind
            if self.metrics_bind_address is None
            else config.parse_bind("--metrics-bind-address", self.metrics_bind_address, config.METRICS_PORT),
        )


# What a reload can't change: the dataplane is built with it.
_FIXED = {
    "mode": "mode",
    "loader": "ebpfproxy.loader",
    "device_attachment": "ebpfproxy.deviceAttachment",
    "xdp_mode": "ebpfproxy.xdpMode",
    "xdp_devices": "ebpfproxy.xdpDevices",
    "snat_ports": "ebpfproxy.snatPorts",
    "hostname_override": "hostnameOverride",
    "kubeconfig": "clientConnection.kubeconfig",
    "local_devices": "detectLocal",
    "oom_score_adj": "oomScoreAdj",
    "devices": "ebpfproxy.devices",
    "map_sizes": "ebpfproxy.mapSizes",
    "listen_addresses": "ebpfproxy.userspace.listenAddresses",
    "service_node_port_range": "ebpfproxy.serviceNodePortRange",
    "service_cluster_ip_ranges": "ebpfproxy.serviceClusterIPRange",
    "load_balancer_pools": "ebpfproxy.loadBalancerPools",
    "udp_idle_s": "ebpfproxy.udpIdle",
    "udp_s": "conntrack.udpTimeout",
    "udp_stream_s": "conntrack.udpStreamTimeout",
    "tcp_established_s": "conntrack.tcpEstablishedTimeout",
    "tcp_close_wait_s": "conntrack.tcpCloseWaitTimeout",
    "tcp_be_liberal": "conntrack.tcpBeLiberal",
    "iptables_variant": "ebpfproxy.iptablesVariant",
    "localhost_node_ports": "iptables.localhostNodePorts",
    "masquerade_bit": "iptables.masqueradeBit",
}


class Network(Protocol):
    """What the agent needs to know of this host's devices and addresses."""

    def fileno(self) -> int:
        """Return what becomes readable when something changed."""

    def changed(self) -> bool:
        """Return whether something changed since the last call."""

    def addresses(self) -> Sequence[netlink.Address]:
        """Return the addresses of this host."""

    def prefixes_behind(self, patterns: Sequence[str]) -> frozenset[str]:
        """Return the prefixes that are reached through devices with one of these names."""


class HostNetwork(netlink.Watch):
    """The network that this process is in."""

    def addresses(self) -> Sequence[netlink.Address]:
        """Return the addresses of this host."""
        return netlink.addresses()

    def prefixes_behind(self, patterns: Sequence[str]) -> frozenset[str]:
        """Return the prefixes that are reached through devices with one of these names."""
        return netlink.prefixes_behind(patterns)


class Place(NamedTuple):
    """Where an agent works; for the status file."""

    manifests: str  # "" = an API server's objects
    state_dir: Path
    server: str = ""


def local_sources(settings: Config, node: Node | None, network: Network) -> frozenset[str]:
    """Return the prefixes whose traffic is this node's pods'.

    kube-proxy tells traffic of a bridge, or of devices with a prefix, by the device that it comes through.
    Here it is known by its source: what the node routes to those devices.

    Source: kube-proxy's detectLocalMode; without one, clusterCIDR if it is set, else the Node's pod CIDRs.
    """
    if settings.local_devices:
        return network.prefixes_behind(settings.local_devices)
    mode = settings.detect_local_mode
    pod_cidrs = node.pod_cidrs if node else ()
    if mode == "NodeCIDR" or (mode != "ClusterCIDR" and not settings.cluster_cidrs):
        return frozenset(each for each in map(canonical_cidr, pod_cidrs) if each)
    return frozenset(settings.cluster_cidrs)


def own_sources(settings: Config, node: Node | None, local: frozenset[str]) -> frozenset[str]:
    """Return the prefixes of pods that are surely on this node; a clusterCIDR holds those of others, too."""
    if settings.cluster_cidrs and not settings.local_devices and settings.detect_local_mode != "NodeCIDR":
        return frozenset(each for each in map(canonical_cidr, node.pod_cidrs if node else ()) if each)
    return local


def detects_local(settings: Config) -> bool:
    """Return whether traffic from outside the cluster is told apart because the configuration asks for it.

    Source: kube-proxy's local traffic detector; without one it masquerades nobody for coming from outside.
    """
    return bool(settings.cluster_cidrs or settings.local_devices) or settings.detect_local_mode == "NodeCIDR"


class Agent:
    """Keeps a dataplane in step with a source.

    Args:
        settings: the configuration, flags applied.
        place: where it works.
        make_source: makes the source; called again when that dies.
        network: this host's addresses.
        dataplane: started before ``run``.
        notifier: systemd.
        load_settings: reads the configuration anew at a reload.
        servers: of health and metrics; None = no port is opened.
        tell: takes what an administrator must see at the Node.

    Raises:
        ConfigError: a range to allocate from is wrong.
        SourceError: there is no source.
    """

    def __init__(
        self,
        settings: Config,
        place: Place,
        make_source: Callable[[], Source],
        network: Network,
        dataplane: Dataplane,
        notifier: Notifier | None = None,
        load_settings: Callable[[], Config] | None = None,
        servers: health.Health | None = None,
        tell: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._tell = tell
        self.settings = settings
        self.node_name = host.node_name(settings.hostname_override)
        self._place = place
        self._network = network
        self._dataplane = dataplane
        self._notifier = notifier or Notifier({})
        self._load_settings = load_settings or (lambda: settings)
        self._servers = servers
        self._counts = metrics.Counts(time.time())
        self._waiting_since: float | None = None  # of the oldest change that is not programmed
        self._is_node_eligible = True
        self._alarm = Alarm()
        self._runner = runner.Runner(_limits(settings))
        self._problems = log.Problems(_log)
        self._must_stop = False
        self._must_reload = False
        self._reload_synced: int | None = None  # the reload is done when the feed has synced so often,
        self._reload_deadline = 0.0  # or it is this late
        # What it was worked out from, and this host's addresses. None: to be read.
        self._addresses: tuple[Any, NodePortAddresses] | None = None
        self._sources: tuple[Any, frozenset[str]] | None = None
        self._network_at: float | None = None  # when to look at gathered network changes
        self._saved_ledger: Any = _read_ledger(place.state_dir / LEDGER_FILE)
        self._must_compare = True  # what changed since the last resolution has to be found out
        self._forget_resolution()
        self._told: dict[str, tuple[Problem, ...]] = {}
        self._state: DesiredState | None = None  # as it was last programmed
        self._seen_state: DesiredState | None = None  # as ``_look_at_state`` saw it
        self._backends = 0  # in that
        self._is_ready = False
        self._started = _now()
        self._last_sync = ""
        self._last_sync_s = 0.0
        self._syncs = 0
        self._next_tick = 0.0
        self._health_at = time.monotonic() + _HEALTH_S
        self._written: status.Status | None = None
        self._feed = Feed(make_source, self._alarm)

    # --- from any thread, and from signal handlers -----------------------------------------------

    def stop(self) -> None:
        """End ``run``; what is programmed stays."""
        self._must_stop = True
        self._alarm.ring()

    def reload(self) -> None:
        """Read the configuration and every object anew."""
        self._must_reload = True
        self._alarm.ring()

    # --- the loop --------------------------------------------------------------------------------

    def run(self, *, once: bool = False) -> int:
        """Work until ``stop``, or for one sync; return the exit code."""
        poller = select.poll()
        poller.register(self._alarm, select.POLLIN)
        poller.register(self._network.fileno(), select.POLLIN)
        give_up_at = time.monotonic() + ONCE_S if once else float("inf")
        self._notifier.status(f"reading {self._place.manifests or self._place.server}")
        try:
            while not self._must_stop:
                self._step()
                if self._servers is not None and self._servers.is_fatal:
                    _log.error("a port can't be bound, and bindAddressHardFail is set")
                    return EXIT_FAILED
                if once and (self._runner.failures or self._feed.failures):
                    return EXIT_FAILED
                if once and self._state is not None:
                    return EXIT_REFUSED if self._problems.has("source", "allocation", "resolve") else EXIT_OK
                if time.monotonic() >= give_up_at:
                    _log.error("%s", self._why_not_once())
                    return EXIT_FAILED
                if not self._must_stop:
                    due = min(self._due(), give_up_at)
                    poller.poll(max(0.0, due - time.monotonic()) * 1000 + 1)
                self._alarm.silence()
            return EXIT_OK
        finally:
            self._notifier.stopping("stopped; Services go on working")
            self.close()
            self._write_status("stopped")

    def _why_not_once(self) -> str:
        """Return what ``run --once`` says when it has waited long enough."""
        place = self._place.manifests or self._place.server
        why = "; ".join(self._feed.problems) or "nothing is known to be wrong"
        return (
            f"read {place}: not everything was there within {ONCE_S:g} s, and --once waits no longer: {why}. "
            "Nothing was changed: see to it that it can be read, and run this again"
        )

    def close(self) -> None:
        """End what was started; ``run`` does it by itself."""
        if self._servers is not None:
            self._servers.close()
        self._feed.close()
        self._alarm.close()

    def _due(self) -> float:
        """Return when there is something to do even if nothing happens."""
        network = float("inf") if self._network_at is None else self._network_at
        sync = self._runner.due() if self._feed.store.ready() else float("inf")
        return min(self._next_tick, network, sync, self._feed.due())

    def _step(self) -> None:
        """Do everything that is due."""
        now = time.monotonic()
        if self._must_reload:
            self._must_reload = False
            self._reload(now)
        self._look_at_network(now)
        if self._feed.update(now):
            self._runner.request()
            self._report("source", self._feed.problems)
        if self._feed.store.ready():
            if self._waiting_since is None and (self._runner.requested or self._runner.failures):
                self._waiting_since, self._counts.queued = now, time.time()
            if self._runner.wait_s(time.monotonic()) == 0:
                self._sync()
                self._publish()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_S
            self._tick(now)

    # --- one sync --------------------------------------------------------------------------------

    def _sync(self) -> None:
        """Make the dataplane serve what the store says."""
        if not self._runner.requested:
            self._addresses = self._sources = None  # the periodic full run
        started = time.monotonic()
        is_full = self._must_compare or self._feed.is_new or not self._runner.requested
        self._runner.start(started)
        problem, is_done = "", True
        try:
            state = self._desired_state()
            self._dataplane.sync(state)
        except EbpfproxyError as error:
            problem, is_done = str(error), isinstance(error, MapFullError)  # the rest was programmed
        except Exception as error:
            problem, is_done = f"{type(error).__name__}: {error}", False
            if not self._problems.has("sync"):
                _log.exception("sync failed")
            self._forget_resolution()
        took_s = time.monotonic() - started
        if problem:
            self._runner.fail(time.monotonic())
            self._report("sync", [f"sync failed and is tried again: {problem}"])
        else:
            self._runner.succeed()
            self._report("sync", [])
        self._counts.sync(took_s, time.time(), is_done=is_done, is_full=is_full)
        if is_done:
            self._waiting_since = None
            self._state = state
            self._syncs += 1
            self._last_sync, self._last_sync_s = _now(), took_s
            _log.debug("synced %d services in %.1f ms", len(state.services), took_s * 1000)
            if not self._is_ready:
                self._become_ready(state, took_s)
        if self._reload_synced is not None and self._feed.synced >= self._reload_synced:
            self._end_reload()

    def _desired_state(self) -> DesiredState:
        """Return what this node must serve now."""
        store = self._feed.store
        changes = store.take()
        changed = None if self._feed.is_new or self._must_compare else changes.changed
        self._counts.changed(changes.changed, changes.objects)
        self._must_compare = True  # unless all of this comes to its end
        allocation = self._allocator.allocate(changes.objects, changed)
        for repair in allocation.repairs:
            _log.info("allocation: %s", repair)
        self._save_ledger(allocation.ledger)
        objects = allocation.objects
        resolution = self._resolver.resolve(
            objects,
            node_context(objects, self.node_name),
            ResolveOptions(
                self._scheduler(),
                self.settings.maglev_size,
                self.settings.forwarding,
                self.settings.syn_retries,
                self.settings.outlier_ejection,
            ),
            None if changed is None else allocation.changed,
        )
        self._must_compare = self._feed.is_new = False
        self._report_problems("duplicates", store.problems())
        self._report_problems("allocation", allocation.problems)
        self._report_problems("resolve", resolution.problems)
        node = objects.get(ObjectKey("Node", "", self.node_name))
        node = node if isinstance(node, Node) else None
        self._is_node_eligible = node is None or not node.is_being_deleted
        return DesiredState(
            resolution.services,
            self._node_port_addresses(node),
            local := self._local_sources(node),
            own_sources(self.settings, node, local),
            masquerades_all=self.settings.masquerade_all,
            masquerades_outside=detects_local(self.settings),
        )

    def _scheduler(self) -> Scheduler:
        """Return the scheduler of Services that name none: the configuration's, else the mode's."""
        settings = self.settings
        usual = getattr(self._dataplane, "usual_scheduler", settings.scheduler)
        return settings.scheduler if settings.is_scheduler_named else usual

    def _forget_resolution(self) -> None:
        """Start from nothing: what is remembered can't be trusted after an unexpected error."""
        if not self._place.manifests:
            self._allocator: Allocator | GivenByServer = GivenByServer(self._saved_ledger)
        else:
            self._allocator = Allocator(
                AllocationOptions(
                    self.settings.service_cluster_ip_ranges,
                    self.settings.service_node_port_range,
                    self.settings.load_balancer_pools,
                ),
                self._saved_ledger,
            )
        self._resolver = Resolver()
        self._must_compare = True

    def _save_ledger(self, ledger: Any) -> None:
        """Store what was allocated before it is programmed, so that no restart gives it to another Service.

        When that fails, Services go on and it is tried again: a full disk is no reason to stop.
        """
        if ledger is self._saved_ledger or ledger == self._saved_ledger:
            self._saved_ledger = ledger
            return
        path = self._place.state_dir / LEDGER_FILE
        try:
            files.write_atomic(path, msgspec.json.format(msgspec.json.encode(ledger), indent=1))
        except OSError as error:
            self._report(
                "ledger", [f"save allocations in {path}: {error.strerror}; a restart may change them"]
            )
            return
        self._saved_ledger = ledger
        self._report("ledger", [])

    def _local_sources(self, node: Node | None) -> frozenset[str]:
        """Return whose traffic is this node's pods'; worked out anew only when something changed."""
        key = (self.settings, node.pod_cidrs if node else ())
        if self._sources is None or self._sources[0] != key:
            self._sources = (key, local_sources(self.settings, node, self._network))
        return self._sources[1]

    def _node_port_addresses(self, node: Node | None) -> NodePortAddresses:
        """Return this host's addresses; worked out anew only when something changed."""
        selectors, primary = self.settings.node_port_addresses, node.ips if node else ()
        if bind := self.settings.bind_address:
            primary = (bind, *(each for each in primary if (":" in each) != (":" in bind)))
        key = (selectors, primary)
        if self._addresses is None or self._addresses[0] != key:
            found = netlink.node_port_addresses(self._network.addresses(), selectors, primary)
            self._addresses = (key, found)
        return self._addresses[1]

    # --- beside syncs ----------------------------------------------------------------------------

    def _look_at_network(self, now: float) -> None:
        """Gather changes of devices and addresses for a moment, then follow them."""
        if self._network.changed() and self._network_at is None:
            self._network_at = now + _NETWORK_S
        if self._network_at is not None and now >= self._network_at:
            self._network_at = None
            self._addresses = self._sources = None
            self._runner.request()
            self._next_tick = now  # the dataplane sees to new devices at once

    def _tick(self, now: float) -> None:
        """Do what is done every second."""
        self._notifier.ping(now)
        try:
            self._dataplane.tick()
        except Exception as error:
            if not isinstance(error, EbpfproxyError) and not self._problems.has("upkeep"):
                _log.exception("upkeep failed")
            self._report("upkeep", [f"upkeep failed and is tried again: {error}"])
            self._runner.request()
        else:
            self._report("upkeep", [])
        self._report("dataplane", getattr(self._dataplane, "problems", ()), logging.WARNING)
        if self._reload_synced is not None and now >= self._reload_deadline:
            self._end_reload()
        self._look_at_state()
        if self._servers is not None:
            self._report("health", self._servers.problems)
        self._write_status()
        if self._is_ready or now >= self._health_at:
            self._publish()
        if self._is_ready:
            self._notifier.status(self._summary())

    def _look_at_state(self) -> None:
        """Count backends, find what the mode does not do; the cost follows what changed since last time."""
        state, before = self._state, self._seen_state
        if state is None or state is before:
            return
        self._seen_state = state
        gone, came = turnover(before.services if before else (), state.services)
        self._backends += sum(len(each.backends) for each in came) - sum(len(each.backends) for each in gone)
        turned = msgspec.structs.replace(state, services=(*gone, *came))
        # A sentence about Services changes only with one that it is about.
        is_same = before is not None and turned == msgspec.structs.replace(before, services=turned.services)
        if not is_same or self._dataplane.unsupported(turned):
            self._report("unsupported", self._dataplane.unsupported(state), logging.WARNING)

    def _publish(self) -> None:
        """Give the servers of health and metrics the present state."""
        if self._servers is None:
            return
        settings, problems = self.settings, len(self._problems.all()) - len(self._problems.of("unsupported"))
        is_everywhere = not settings.node_port_addresses or {"0.0.0.0/0", "::/0"} <= set(
            settings.node_port_addresses
        )
        state = self._state
        self._servers.publish(
            health.Snapshot(
                healthz_at=health.Bind(*settings.healthz_bind) if settings.healthz_bind else None,
                metrics_at=health.Bind(*settings.metrics_bind) if settings.metrics_bind else None,
                state_at=health.Bind(str(self._place.state_dir / status.SOCKET)),
                must_bind=settings.must_bind,
                hosts=("",) if is_everywhere or state is None else tuple(sorted(state.addresses.serving)),
                state=state,
                reach=self._feed.reach,
                is_node_eligible=self._is_node_eligible,
                late_after_s=2 * settings.max_sync_s,  # kube-proxy's
                seen=time.monotonic(),
                waiting_since=self._waiting_since,
                facts=self._counts.freeze(
                    problems=problems,
                    version=ebpfproxy.__version__,
                    mode=getattr(self._dataplane, "mode", ""),
                    loader=getattr(self._dataplane, "loader", ""),
                    passed_over=tuple(getattr(self._dataplane, "passed_over", ())),
                    waiting=self._feed.store.pending(),
                    rules=getattr(self._dataplane, "rule_counts", None),
                ),
            )
        )

    def _become_ready(self, state: DesiredState, took_s: float) -> None:
        # What is there now mostly stays: without this, every full garbage collection walks over all of it.
        gc.freeze()
        self._is_ready = True
        self._look_at_state()
        self._write_status()
        passed_over = map(str, getattr(self._dataplane, "passed_over", ()))
        for event in events.started(ebpfproxy.__version__, getattr(self._dataplane, "mode", ""), passed_over):
            self._tell(event)
        _log.info("ready: %s, first sync in %.0f ms", self._summary(), took_s * 1000)
        self._notifier.ready(self._summary())

    def _reload(self, now: float) -> None:
        self._notifier.reloading()
        _log.info("reloading")
        try:
            settings = self._load_settings()
        except ConfigError as error:
            self._report("config", [f"{error}; the configuration stays as it was"])
        else:
            self._report("config", [])
            self._take_settings(settings)
        self._reload_synced = self._feed.synced + 1
        self._reload_deadline = now + _RELOAD_S
        self._feed.reread()
        self._addresses = self._sources = None
        self._runner.request()

    def _take_settings(self, settings: Config) -> None:
        """Change what can change while running; name the rest."""
        fixed = {name: getattr(self.settings, name) for name in _FIXED}
        later = [label for name, label in _FIXED.items() if getattr(settings, name) != fixed[name]]
        if later:
            _log.warning("changed, but in effect only after a restart: %s", ", ".join(later))
        if settings.unused != self.settings.unused:
            warn_unused(settings)
        self.settings = msgspec.structs.replace(settings, **fixed)
        self._runner.limits = _limits(settings)
        log.setup(settings.log_format, debug=settings.log_debug)

    def _end_reload(self) -> None:
        self._reload_synced = None
        self._notifier.ready(self._summary())
        _log.info("reloaded: %s", self._summary())

    # --- telling ---------------------------------------------------------------------------------

    def _report(self, group: str, texts: Sequence[str], level: int = logging.ERROR) -> None:
        before = self._problems.of(group)
        self._problems.update(group, texts, level)
        for event in events.appeared(group, before, texts):
            self._tell(event)

    def _report_problems(self, group: str, problems: tuple[Problem, ...]) -> None:
        """Report problems of objects, with the file that each came from."""
        if problems != self._told.get(group, ()):
            self._told[group] = problems
            self._report(group, [str(problem) for problem in self._feed.store.locate(problems)])

    def _summary(self) -> str:
        count = len(self._state.services) if self._state else 0
        failing = f", failing: {self._problems.of('sync')[0]}" if self._problems.has("sync") else ""
        return f"{count} service port{'' if count == 1 else 's'}{failing}"

    def _write_status(self, state: str = "") -> None:
        if not state:
            state = "failing" if self._runner.failures else "running" if self._is_ready else "starting"
        unsupported = self._problems.of("unsupported")
        site = getattr(self._dataplane, "site", None)
        now = status.Status(
            pid=os.getpid(),
            version=ebpfproxy.__version__,
            state=state,
            node=self.node_name,
            mode=getattr(self._dataplane, "mode", ""),
            passed_over=tuple(map(str, getattr(self._dataplane, "passed_over", ()))),
            manifests=self._place.manifests,
            server=self._place.server,
            cgroup=str(getattr(site, "cgroup", None) or ""),
            bpffs=str(getattr(site, "bpffs", None) or ""),
            started=self._started,
            loader=getattr(self._dataplane, "loader", ""),
            devices=tuple(getattr(self._dataplane, "devices", ())),
            last_sync=self._last_sync,
            last_sync_s=round(self._last_sync_s, 6),
            syncs=self._syncs,
            failures=self._runner.failures,
            services=len(self._state.services) if self._state else 0,
            backends=self._backends,
            problems=tuple(text for text in self._problems.all() if text not in unsupported),
            unsupported=unsupported,
            unused_settings=self.settings.unused,
        )
        if now == self._written:
            return
        try:
            status.write(self._place.state_dir, now)
        except OSError as error:
            self._report("status", [f"write {self._place.state_dir / status.FILE}: {error.strerror}"])
        else:
            self._written = now
            self._report("status", [])


def warn_unused(settings: Config) -> None:
    """Name in one warning what the configuration file sets in vain."""
    if settings.unused:
        _log.warning("the configuration sets what has no effect here: %s", ", ".join(settings.unused))


def _limits(settings: Config) -> runner.Limits:
    return runner.Limits(min_s=settings.min_sync_s, max_s=settings.max_sync_s)


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read_ledger(path: Path) -> dict[str, Any]:
    """Return what was allocated in earlier runs."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        _log.error("read allocations in %s: %s; everything is allocated anew", path, error)
        return {}


# --- the process -------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """Run the agent until a signal ends it; return the exit code.

    0: ended on request, or ``once`` and all is well; 1: failed; 2: wrong configuration or flags; 3: ``once``
    and some objects were refused (all others are programmed).
    """
    log.setup(options.log_format or "text")
    gc.set_threshold(*_GC_THRESHOLD)
    try:
        settings = _settings(options)
        log.setup(settings.log_format, debug=settings.log_debug)
        warn_unused(settings)
        if settings.oom_score_adj is not None:
            _set_oom_score(settings.oom_score_adj)
        return _run(options, settings)
    except ConfigError as error:
        _log.error("%s", error)
        return EXIT_USAGE
    except EbpfproxyError as error:
        _log.error("%s", error)
        return EXIT_FAILED


def _set_oom_score(value: int) -> None:
    """Tell the kernel how soon to end this process when memory is short; a refusal is no reason to stop."""
    try:
        _OOM_SCORE.write_text(str(value))
    except OSError as error:
        _log.warning("set oomScoreAdj to %d: %s", value, error.strerror)


def _settings(options: Options) -> Config:
    return options.apply(config.load(options.config, options.fields))


def _run(options: Options, settings: Config) -> int:
    from ebpfproxy.dataplane.chosen import ChosenDataplane
    from ebpfproxy.dataplane.modes import Site
    from ebpfproxy.kubeapi.access import Flags
    from ebpfproxy.source.choice import choose

    origin = choose(
        options.manifests,
        Flags(settings.kubeconfig, options.master, options.kube_api_server),
        host.node_name(settings.hostname_override),
        options.state_dir,
    )
    with ExitStack() as stack:
        stack.callback(_lock_state_dir(options.state_dir).close)
        dataplane = ChosenDataplane(settings, Site(options.state_dir, options.cgroup, options.bpffs))
        stack.callback(dataplane.close)
        network = HostNetwork(routes=bool(settings.local_devices))
        stack.callback(network.close)
        recorder = origin.record() if origin.record else None
        if recorder is not None:
            stack.callback(recorder.close)
        agent = Agent(
            settings,
            Place(origin.manifests, options.state_dir, origin.server),
            origin.make,
            network,
            dataplane,
            Notifier(),
            lambda: _settings(options),
            None if options.once else health.Health(dataplane.reading),
            recorder.tell if recorder is not None else lambda _: None,
        )
        _handle_signals(agent)
        try:
            dataplane.start()  # meanwhile the source reads in its own thread, too
        except BaseException:
            agent.close()
            raise
        return agent.run(once=options.once)


def _handle_signals(agent: Agent) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        signal.signal(signal.SIGHUP, lambda *_: agent.reload())


def _lock_state_dir(path: Path) -> files.Lock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return files.Lock(path / LOCK_FILE, "state directory")
    except OSError as error:
        raise EbpfproxyError(f"use state directory {path}: {error.strerror}") from error
