"""What /metrics says: kube-proxy's metrics where the thing exists here, and our own beside them.

The one home of prometheus_client, which is imported at the first scrape: that takes 50 ms. The agent's
thread only counts (``Counts``) and hands out frozen copies (``Facts``); the dataplane reads its maps into a
``Reading`` when somebody asks.

Source: names, types and buckets of ``kubeproxy_*`` are those of Kubernetes' metrics reference. From 1.33 on
kube-proxy tells IP families apart; here one sync serves both, so only what differs has the label ip_family.
"""

from __future__ import annotations

import bisect
import datetime as dt
import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from ebpfproxy.model.services import DesiredState, FrontendKind, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ebpfproxy.model.objects import Object, ObjectKey

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Set by Kubernetes' endpoint controllers: when the Pod or Service that made them write changed.
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
# More changes than this between two syncs are not timed one by one.
_TRIGGERS_MAX = 10_000

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


class Facts(msgspec.Struct, frozen=True):
    """What the agent counted."""

    syncs: Distribution = Distribution()
    programming: Distribution = Distribution()
    synced: float = 0.0  # Unix time
    queued: float = 0.0  # Unix time
    service_changes: int = 0
    endpoint_changes: int = 0
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
        self._syncs = _Histogram(_SYNC_BUCKETS)
        self._programming = _Histogram(_PROGRAMMING_BUCKETS)
        self._changes: Counter[str] = Counter()
        self._triggers: deque[float] = deque(maxlen=_TRIGGERS_MAX)  # Unix times, not yet in the kernel

    def changed(self, keys: Iterable[ObjectKey], objects: Mapping[ObjectKey, Object]) -> None:
        """Note what the next sync is about."""
        for key in keys:
            self._changes[key.kind] += 1
            if key.kind in ("EndpointSlice", "Endpoints") and (obj := objects.get(key)) is not None:
                stamp = _unix_time(obj.metadata.annotations.get(TRIGGER_TIME, ""))
                if stamp > self._started:
                    self._triggers.append(stamp)

    def sync(self, took_s: float, now: float, *, is_done: bool) -> None:
        """Note the end of a sync at Unix time ``now``."""
        self._syncs.observe(took_s)
        if is_done:
            self.synced = now
            for stamp in self._triggers:
                self._programming.observe(max(0.0, now - stamp))
            self._triggers.clear()

    def freeze(
        self,
        *,
        problems: int,
        version: str,
        mode: str,
        loader: str,
        passed_over: tuple[tuple[str, str], ...] = (),
    ) -> Facts:
        """Return what was counted so far."""
        return Facts(
            syncs=self._syncs.freeze(),
            programming=self._programming.freeze(),
            synced=self.synced,
            queued=self.queued,
            service_changes=self._changes["Service"],
            endpoint_changes=self._changes["EndpointSlice"] + self._changes["Endpoints"],
            problems=problems,
            version=version,
            mode=mode,
            loader=loader,
            passed_over=passed_over,
        )


def _unix_time(text: str) -> float:
    """Return an RFC 3339 time as Unix time, 0 if it is none."""
    try:
        return dt.datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


# --- read from the dataplane -------------------------------------------------------------------------


class ServiceCount(NamedTuple):
    """Connections of one Service port in one family."""

    namespace: str
    service: str
    port: str
    protocol: str
    family: int  # 4 | 6
    connections: int
    refused: int


class Reading(msgspec.Struct, frozen=True):
    """What a dataplane counts in the kernel."""

    verdicts: dict[str, int] = {}
    maps: dict[str, tuple[int, int]] = {}  # name -> entries, limit
    services: list[ServiceCount] = []


# --- the answer --------------------------------------------------------------------------------------


class Scrape(msgspec.Struct, frozen=True):
    """All that one answer is made of."""

    facts: Facts = Facts()
    state: DesiredState | None = None  # as it was last programmed
    reading: Reading = Reading()
    answers: dict[tuple[str, int], int] = {}  # path, code -> how often


# A histogram, or the labels' values -> value.
Values: TypeAlias = "Distribution | Mapping[tuple[str, ...], float]"


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


_SERVICE = ("namespace", "service", "port", "protocol", "ip_family")

METRICS = (
    Metric(
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "histogram",
        "How long a sync took.",
        (),
        lambda s: s.facts.syncs,
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "gauge",
        "When the last sync succeeded, Unix time; 0 before the first one.",
        (),
        lambda s: {(): s.facts.synced},
    ),
    Metric(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "gauge",
        "When a sync was last asked for, Unix time.",
        (),
        lambda s: {(): s.facts.queued},
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
        (),
        lambda s: s.facts.programming,
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

        for name, kind, text, labels, values in METRICS:
            found = values(self._scrape)
            if isinstance(found, Distribution):
                edges = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
                totals = itertools.accumulate(found.counts)
                yield HistogramMetricFamily(name, text, [*zip(edges, totals, strict=True)], found.sum)
                continue
            made = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            family = made(name, text, labels=labels)
            for key, value in found.items():
                family.add_metric(key, value)
            yield family
