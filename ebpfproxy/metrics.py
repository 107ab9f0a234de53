"""What /metrics says: kube-proxy's metrics where the thing exists here, and our own beside them.

The one home of prometheus_client, which is imported at the first scrape: that takes 50 ms. The agent's
thread only counts (``Counts``) and hands out frozen copies (``Facts``); the dataplane reads its maps into a
``Reading`` when somebody asks.

Source: names, types, labels and buckets of ``kubeproxy_*`` are those of Kubernetes' metrics reference. Since
1.33 kube-proxy syncs each IP family by itself, hence its label ip_family; here one sync serves both, so
both have the values of that sync.
"""

from __future__ import annotations

import bisect
import datetime as dt
import itertools
from collections import Counter, deque
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from ebpfproxy.model.objects import Endpoints, EndpointSlice, ObjectKey
from ebpfproxy.model.services import DesiredState, FrontendKind, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ebpfproxy.model.objects import Object

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Set by Kubernetes' endpoint controllers: when the Pod or Service that made them write changed.
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
# More changes than this between two syncs are not timed one by one.
_TRIGGERS_MAX = 10_000

FAMILIES = ("IPv4", "IPv6")  # values of the label ip_family

_SYNC_BUCKETS = tuple(0.001 * 2**n for n in range(15))
_PROGRAMMING_BUCKETS = (
    0.25,
    0.5,
    *map(float, range(1, 60)),
    *map(float, range(60, 120, 5)),
    *map(float, range(120, 301, 30)),
)


# --- counted by the agent ----------------------------------------------------------------------------


class Distribution(msgspec.Struct, frozen=True):
    """A histogram at one moment."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)  # one for each bound, and one beyond the last
    sum: float = 0.0

    def __add__(self, other: Distribution) -> Distribution:
        """Return both together; their bounds are the same, or one of them is empty."""
        if len(self.counts) != len(other.counts):
            return max(self, other, key=lambda each: len(each.counts))
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.sum + other.sum)


class RuleCounts(msgspec.Struct, frozen=True):
    """What a dataplane made of rules counts; keys are label values, () of a metric without labels."""

    iptables_total: Mapping[tuple[str, ...], int] = {}  # ip_family, table -> rules that are ours
    iptables_last: Mapping[tuple[str, ...], int] = {}  # ip_family, table -> rules written by the last sync
    restore_failures: Mapping[tuple[str, ...], int] = {}  # ip_family -> iptables-restore failed
    nftables_sync_failures: Mapping[tuple[str, ...], int] = {}  # ip_family


class Facts(msgspec.Struct, frozen=True):
    """What the agent counted."""

    full_syncs: Distribution = Distribution()
    partial_syncs: Distribution = Distribution()
    programming: Mapping[str, Distribution] = {}  # ip_family ->
    synced: float = 0.0  # Unix time
    queued: float = 0.0  # Unix time
    service_changes: int = 0
    endpoint_changes: int = 0
    services_pending: int = 0
    endpoints_pending: int = 0
    rules: RuleCounts = RuleCounts()
    problems: int = 0
    version: str = ""
    mode: str = ""
    loader: str = ""
    passed_over: tuple[tuple[str, str], ...] = ()  # mode, reason


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def freeze(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._sum)


class Counts:
    """What happens in the agent's thread.

    Args:
        started: Unix time; older changes are not timed, as in kube-proxy.
    """

    def __init__(self, started: float) -> None:
        self.synced = 0.0  # Unix time of the last success
        self.queued = 0.0  # Unix time when a sync was last asked for
        self._started = started
        self._full_syncs, self._partial_syncs = _Histogram(_SYNC_BUCKETS), _Histogram(_SYNC_BUCKETS)
        self._programming = {family: _Histogram(_PROGRAMMING_BUCKETS) for family in FAMILIES}
        self._changes: Counter[str] = Counter()
        self._pending: set[ObjectKey] = set()  # not yet in the kernel; so are the next
        self._triggers: deque[tuple[float, str]] = deque(maxlen=_TRIGGERS_MAX)  # Unix time, family

    def changed(self, keys: Iterable[ObjectKey], objects: Mapping[ObjectKey, Object]) -> None:
        """Note what the next sync is about."""
        for key in keys:
            self._changes[key.kind] += 1
            self._pending.add(key)
            obj = objects.get(key)
            if isinstance(obj, EndpointSlice | Endpoints):
                stamp = _unix_time(obj.metadata.annotations.get(TRIGGER_TIME, ""))
                if stamp > self._started:
                    self._triggers.append((stamp, _family(obj)))

    def sync(self, took_s: float, now: float, *, is_done: bool, is_full: bool = True) -> None:
        """Note the end of a sync at Unix time ``now``; ``is_full``: everything was compared."""
        (self._full_syncs if is_full else self._partial_syncs).observe(took_s)
        if is_done:
            self.synced = now
            for stamp, family in self._triggers:
                self._programming[family].observe(max(0.0, now - stamp))
            self._triggers.clear()
            self._pending.clear()

    def freeze(
        self,
        *,
        problems: int,
        version: str,
        mode: str,
        loader: str,
        passed_over: tuple[tuple[str, str], ...] = (),
        waiting: Iterable[ObjectKey] = (),
        rules: RuleCounts | None = None,
    ) -> Facts:
        """Return what was counted so far.

        Args:
            problems: how many there are.
            version: of the agent.
            mode: of the dataplane.
            loader: of BPF programs.
            passed_over: modes that ``auto`` did not take, with the reason.
            waiting: what changed since the last sync began.
            rules: what the dataplane counts of its rules.
        """
        pending = Counter(key.kind for key in self._pending.union(waiting))
        return Facts(
            full_syncs=self._full_syncs.freeze(),
            partial_syncs=self._partial_syncs.freeze(),
            programming={family: each.freeze() for family, each in self._programming.items()},
            synced=self.synced,
            queued=self.queued,
            service_changes=self._changes["Service"],
            endpoint_changes=self._changes["EndpointSlice"] + self._changes["Endpoints"],
            services_pending=pending["Service"],
            endpoints_pending=pending["EndpointSlice"] + pending["Endpoints"],
            rules=rules or RuleCounts(),
            problems=problems,
            version=version,
            mode=mode,
            loader=loader,
            passed_over=passed_over,
        )


def _family(obj: EndpointSlice | Endpoints) -> str:
    """Return the label ip_family of endpoints; a slice of names (FQDN) counts as IPv4."""
    if isinstance(obj, EndpointSlice):
        return "IPv6" if obj.address_type == "IPv6" else "IPv4"
    addresses = [address.ip for subset in obj.subsets for address in subset.addresses]
    return "IPv6" if addresses and ":" in addresses[0] else "IPv4"


def _unix_time(text: str) -> float:
    """Return an RFC 3339 time as Unix time, 0 if it is none."""
    try:
        return dt.datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


# --- read from the dataplane -------------------------------------------------------------------------


class ServiceCount(NamedTuple):
    """What is counted of one Service port in one family."""

    namespace: str
    service: str
    port: str
    protocol: str
    family: int  # 4 | 6
    connections: int
    refused: int
    retried: int = 0
    ejected: int = 0
    packets: int = 0
    octets: int = 0
    reply_packets: int = 0
    reply_octets: int = 0


class Reading(msgspec.Struct, frozen=True):
    """What a dataplane counts in the kernel."""

    verdicts: dict[str, int] = {}
    verdict_bytes: dict[str, int] = {}
    maps: dict[str, tuple[int, int]] = {}  # name -> entries, limit
    services: list[ServiceCount] = []


# --- the answer --------------------------------------------------------------------------------------


class Scrape(msgspec.Struct, frozen=True):
    """All that one answer is made of."""

    facts: Facts = Facts()
    state: DesiredState | None = None  # as it was last programmed
    reading: Reading = Reading()
    answers: dict[tuple[str, int], int] = {}  # path, code -> how often
    source_lost_at: float = 0.0  # Unix time


# The labels' values -> value, a distribution of a histogram.
Values: TypeAlias = "Mapping[tuple[str, ...], float | Distribution]"


class Metric(NamedTuple):
    """One metric, as docs/metrics.md lists it."""

    name: str
    type: str  # counter | gauge | histogram
    help: str
    labels: tuple[str, ...]
    values: Callable[[Scrape], Values]


def no_local_endpoints(state: DesiredState | None) -> dict[tuple[str, ...], float]:
    """Return how many Service ports have endpoints, but none that their traffic policy Local allows.

    Returns:
        (ip_family, traffic_policy) -> count, zeros included.
    """
    found: dict[tuple[str, ...], float] = dict.fromkeys(
        itertools.product(("IPv4", "IPv6"), ("internal", "external")), 0
    )
    for service in state.services if state else ():
        if service.local.backends or not service.cluster.backends:
            continue
        family = f"IPv{service.name.family}"
        if service.internal_policy is Policy.LOCAL:
            found[family, "internal"] += 1
        is_outside = any(each.kind is not FrontendKind.CLUSTER_IP for each in service.frontends)
        if service.external_policy is Policy.LOCAL and is_outside:
            found[family, "external"] += 1
    return found


def _answers(path: str) -> Callable[[Scrape], Values]:
    return lambda s: {(str(code),): count for (what, code), count in s.answers.items() if what == path}


def _services(count: Callable[[ServiceCount], int]) -> Callable[[Scrape], Values]:
    return lambda s: {
        (each.namespace, each.service, each.port, each.protocol, f"IPv{each.family}"): count(each)
        for each in s.reading.services
    }


def _traffic(
    forward: Callable[[ServiceCount], int], reply: Callable[[ServiceCount], int]
) -> Callable[[Scrape], Values]:
    return lambda s: {
        (each.namespace, each.service, each.port, each.protocol, f"IPv{each.family}", direction): count(each)
        for each in s.reading.services
        for direction, count in (("forward", forward), ("reply", reply))
    }


def _both(value: Callable[[Facts], Any]) -> Callable[[Scrape], Any]:
    """Return what one sync for both families has to say of each."""
    return lambda s: {(family,): value(s.facts) for family in FAMILIES}


_FAMILY = ("ip_family",)
_SERVICE = ("namespace", "service", "port", "protocol", "ip_family")

METRICS = (
    Metric(
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "histogram",
        "How long a sync took.",
        _FAMILY,
        _both(lambda facts: facts.full_syncs + facts.partial_syncs),
    ),
    Metric(
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "histogram",
        "How long a sync took that compared everything.",
        _FAMILY,
        _both(lambda facts: facts.full_syncs),
    ),
    Metric(
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "histogram",
        "How long a sync took that knew what had changed.",
        _FAMILY,
        _both(lambda facts: facts.partial_syncs),
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "gauge",
        "When the last sync succeeded, Unix time; 0 before the first one.",
        _FAMILY,
        _both(lambda facts: facts.synced),
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "gauge",
        "When a sync was last asked for, Unix time.",
        _FAMILY,
        _both(lambda facts: facts.queued),
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "counter",
        "Changes of Services; several of one object between two syncs are one.",
        (),
        lambda s: {(): s.facts.service_changes},
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "counter",
        "Changes of EndpointSlices and Endpoints, counted as those of Services.",
        (),
        lambda s: {(): s.facts.endpoint_changes},
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_service_changes_pending",
        "gauge",
        "Changed Services that are not programmed yet.",
        (),
        lambda s: {(): s.facts.services_pending},
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "gauge",
        "Changed EndpointSlices and Endpoints that are not programmed yet.",
        (),
        lambda s: {(): s.facts.endpoints_pending},
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "gauge",
        "Service ports with traffic policy Local that have endpoints, but none on this node.",
        ("ip_family", "traffic_policy"),
        lambda s: no_local_endpoints(s.state),
    ),
    Metric(
        "kubeproxy_network_programming_duration_seconds",
        "histogram",
        f"From the change of a Pod or Service (annotation {TRIGGER_TIME}) to the end of the sync.",
        _FAMILY,
        lambda s: {(family,): each for family, each in s.facts.programming.items()},
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_iptables_total",
        "gauge",
        "Mode iptables: rules that are the agent's.",
        ("ip_family", "table"),
        lambda s: s.facts.rules.iptables_total,
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_iptables_last",
        "gauge",
        "Mode iptables: rules that the last sync wrote.",
        ("ip_family", "table"),
        lambda s: s.facts.rules.iptables_last,
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
        "counter",
        "Modes iptables and ipvs: iptables-restore refused a sync.",
        _FAMILY,
        lambda s: s.facts.rules.restore_failures,
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
        "counter",
        "Mode nftables: the kernel refused a transaction.",
        _FAMILY,
        lambda s: s.facts.rules.nftables_sync_failures,
    ),
    Metric(
        "kubeproxy_proxy_healthz_total", "counter", "Answers of /healthz.", ("code",), _answers("/healthz")
    ),
    Metric("kubeproxy_proxy_livez_total", "counter", "Answers of /livez.", ("code",), _answers("/livez")),
    Metric("ebpfproxy_build_info", "gauge", "Always 1.", ("version",), lambda s: {(s.facts.version,): 1}),
    Metric(
        "ebpfproxy_mode_info",
        "gauge",
        "Always 1.",
        ("mode", "loader"),
        lambda s: {(s.facts.mode, s.facts.loader): 1},
    ),
    Metric(
        "ebpfproxy_mode_passed_over",
        "gauge",
        "Always 1, for each mode that `--mode auto` could not use.",
        ("mode", "reason"),
        lambda s: dict.fromkeys(s.facts.passed_over, 1),
    ),
    Metric(
        "ebpfproxy_source_lost_timestamp_seconds",
        "gauge",
        "Since when the API server can't be followed, Unix time; 0 while it can.",
        (),
        lambda s: {(): s.source_lost_at},
    ),
    Metric(
        "ebpfproxy_problems",
        "gauge",
        "Problems that `ebpfproxy status` shows.",
        (),
        lambda s: {(): s.facts.problems},
    ),
    Metric(
        "ebpfproxy_verdicts_total",
        "counter",
        "What the BPF programs decided, by reason.",
        ("verdict",),
        lambda s: {(name,): count for name, count in s.reading.verdicts.items()},
    ),
    Metric(
        "ebpfproxy_verdict_bytes_total",
        "counter",
        "Bytes of the frames that were decided on, by reason; 0 of verdicts on system calls.",
        ("verdict",),
        lambda s: {(name,): count for name, count in s.reading.verdict_bytes.items()},
    ),
    Metric(
        "ebpfproxy_map_entries",
        "gauge",
        "Entries of a BPF map that are in use.",
        ("map",),
        lambda s: {(name,): used for name, (used, _) in s.reading.maps.items()},
    ),
    Metric(
        "ebpfproxy_map_limit",
        "gauge",
        "Entries that a BPF map can hold.",
        ("map",),
        lambda s: {(name,): limit for name, (_, limit) in s.reading.maps.items()},
    ),
    Metric(
        "ebpfproxy_service_connections_total",
        "counter",
        "New connections sent to a backend.",
        _SERVICE,
        _services(lambda each: each.connections),
    ),
    Metric(
        "ebpfproxy_service_refused_total",
        "counter",
        "New connections rejected or dropped.",
        _SERVICE,
        _services(lambda each: each.refused),
    ),
    Metric(
        "ebpfproxy_service_retried_total",
        "counter",
        "Openings that no backend answered and that went to another one.",
        _SERVICE,
        _services(lambda each: each.retried),
    ),
    Metric(
        "ebpfproxy_service_backends_ejected",
        "gauge",
        "Backends that are passed over now because they failed.",
        _SERVICE,
        _services(lambda each: each.ejected),
    ),
    Metric(
        "ebpfproxy_service_packets_total",
        "counter",
        "Packets translated, to backends (forward) and from them (reply); none of local sockets.",
        (*_SERVICE, "direction"),
        _traffic(lambda each: each.packets, lambda each: each.reply_packets),
    ),
    Metric(
        "ebpfproxy_service_bytes_total",
        "counter",
        "Bytes of these, as whole IP packets.",
        (*_SERVICE, "direction"),
        _traffic(lambda each: each.octets, lambda each: each.reply_octets),
    ),
)


def render(scrape: Scrape) -> bytes:
    """Return the answer in Prometheus' text format, this process' own figures (``process_*``) included."""
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Collector(scrape))  # type: ignore[arg-type] # by its shape
    return generate_latest(registry)


class _Collector:
    def __init__(self, scrape: Scrape) -> None:
        self._scrape = scrape

    def collect(self) -> Iterable[object]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        for name, kind, text, labels, values in METRICS:
            family = families[kind](name, text, labels=labels)
            for key, value in values(self._scrape).items():
                if isinstance(value, Distribution):
                    edges = [*(f"{bound:g}" for bound in value.bounds), "+Inf"]
                    totals = itertools.accumulate(value.counts)
                    family.add_metric(key, [*zip(edges, totals, strict=True)], value.sum)
                else:
                    family.add_metric(key, value)
            yield family
