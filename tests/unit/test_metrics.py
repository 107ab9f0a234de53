"""Metrics: names, values and the text that Prometheus reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ebpfproxy import metrics
from ebpfproxy.metrics import FAMILIES, METRICS, Counts, Facts, Reading, RuleCounts, Scrape, ServiceCount
from ebpfproxy.model.objects import (
    EndpointAddress,
    Endpoints,
    EndpointSlice,
    EndpointSubset,
    ObjectKey,
    ObjectMeta,
    Service,
)
from ebpfproxy.model.services import Backend, DesiredState, Policy
from makers import cluster_ip, load_balancer, service

ROOT = Path(__file__).resolve().parents[2]
START = 1_700_000_000.0  # 2023-11-14T22:13:20Z


def samples(scrape: Scrape) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return (name, labels' values) -> value of one scrape."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.render(scrape).decode())
        for sample in family.samples
    }


def facts(counts: Counts) -> Facts:
    return counts.freeze(problems=0, version="1", mode="bpf", loader="libbpf")


def test_the_table_in_the_documents_is_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (counter|gauge|histogram) \| (.*?) ?\| (.*) \|$",
        (ROOT / "docs/metrics.md").read_text(),
        re.MULTILINE,
    )
    assert rows == [
        (each.name, each.type, ", ".join(f"`{label}`" for label in each.labels), each.help)
        for each in METRICS
    ]


def test_every_metric_is_in_the_answer_with_its_type() -> None:
    text = metrics.render(Scrape()).decode()
    for each in METRICS:
        assert f"# TYPE {each.name} {each.type}\n" in text
    assert "# TYPE process_resident_memory_bytes gauge\n" in text


def test_durations_have_kube_proxys_buckets() -> None:
    """Go's ExponentialBuckets(0.001, 2, 15), as kube-proxy's /metrics prints them."""
    counts = Counts(START)
    for took_s in (0.001, 0.0011, 0.5, 20.0):
        counts.sync(took_s, START, is_done=True)
    found = samples(Scrape(facts(counts)))
    name = "kubeproxy_sync_proxy_rules_duration_seconds"
    edges = "0.001 0.002 0.004 0.008 0.016 0.032 0.064 0.128 0.256 0.512 1.024 2.048 4.096 8.192 16.384 +Inf"
    for family in FAMILIES:
        values = [found[f"{name}_bucket", (family, edge)] for edge in edges.split()]
        assert values == [1, *[2] * 8, *[3] * 6, 4]
        assert found[f"{name}_count", (family,)] == 4
        assert found[f"{name}_sum", (family,)] == pytest.approx(20.5021)


def test_full_and_partial_syncs_are_told_apart() -> None:
    counts = Counts(START)
    counts.sync(4.0, START, is_done=True)
    for _ in range(3):
        counts.sync(0.01, START, is_done=True, is_full=False)
    found = samples(Scrape(facts(counts)))
    name = "kubeproxy_sync_{}proxy_rules_duration_seconds_count"
    assert [found[name.format(kind), ("IPv6",)] for kind in ("", "full_", "partial_")] == [4, 1, 3]


def test_a_failed_sync_is_not_the_last_one() -> None:
    counts = Counts(START)
    counts.sync(0.1, START + 5, is_done=True)
    counts.sync(0.1, START + 9, is_done=False)
    found = samples(Scrape(facts(counts)))
    assert found["kubeproxy_sync_proxy_rules_last_timestamp_seconds", ("IPv4",)] == START + 5
    assert found["kubeproxy_sync_proxy_rules_duration_seconds_count", ("IPv4",)] == 2


def test_network_programming_is_timed_from_the_first_change_to_the_sync() -> None:
    def slice_of(stamp: str) -> EndpointSlice:
        annotations = {"endpoints.kubernetes.io/last-change-trigger-time": stamp}
        meta = ObjectMeta(name="a", namespace="default", annotations=annotations)
        return EndpointSlice(meta, address_type="IPv6")

    counts = Counts(START)
    key, gone = ObjectKey("EndpointSlice", "default", "a"), ObjectKey("EndpointSlice", "default", "b")
    for stamp in ("2023-11-14T22:13:21Z", "2023-11-14T22:13:19Z", "", "yesterday"):  # one is in our time
        counts.changed([key, gone], {key: slice_of(stamp)})
    name = "kubeproxy_network_programming_duration_seconds"
    counts.sync(0.1, START + 2, is_done=False)
    assert samples(Scrape(facts(counts)))[f"{name}_count", ("IPv6",)] == 0
    counts.sync(0.1, START + 3.5, is_done=True)
    counts.sync(0.1, START + 9, is_done=True)  # nothing new: not timed again
    found = samples(Scrape(facts(counts)))
    assert (found[f"{name}_count", ("IPv6",)], found[f"{name}_sum", ("IPv6",)]) == (1, 2.5)
    assert (found[f"{name}_bucket", ("IPv6", "2")], found[f"{name}_bucket", ("IPv6", "3")]) == (0, 1)
    assert found[f"{name}_count", ("IPv4",)] == 0


def test_by_hand_endpoints_are_of_the_family_of_their_addresses() -> None:
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": "2023-11-14T22:13:21Z"}
    subsets = (EndpointSubset(addresses=(EndpointAddress(ip="fd00::1"),)),)
    counts, key = Counts(START), ObjectKey("Endpoints", "default", "a")
    counts.changed([key], {key: Endpoints(ObjectMeta(annotations=annotations), subsets)})
    counts.sync(0.1, START + 2, is_done=True)
    assert counts._programming["IPv6"].freeze().sum == 1


def test_network_programming_has_kube_proxys_buckets() -> None:
    """0.25, 0.5; 1 to 59; 60 to 115 by 5; 120 to 300 by 30, as kube-proxy merges them."""
    bounds = Counts(START)._programming["IPv4"].freeze().bounds
    assert len(bounds) == 2 + 59 + 12 + 7
    assert bounds[:4] == (0.25, 0.5, 1, 2)
    assert bounds[59:63] == (58, 59, 60, 65)
    assert bounds[-8:] == (115, 120, 150, 180, 210, 240, 270, 300)


def test_changes_are_counted_by_kind() -> None:
    counts = Counts(START)
    keys = [ObjectKey(kind, "default", "a") for kind in ("Service", "EndpointSlice", "Endpoints", "Node")]
    counts.changed(keys, {keys[0]: Service()})
    counts.changed(keys[:1], {})
    found = samples(Scrape(facts(counts)))
    assert found["kubeproxy_sync_proxy_rules_service_changes_total", ()] == 2
    assert found["kubeproxy_sync_proxy_rules_endpoint_changes_total", ()] == 2


def test_changes_are_pending_until_a_sync_is_done() -> None:
    counts = Counts(START)
    keys = [ObjectKey(kind, "default", "a") for kind in ("Service", "EndpointSlice", "Endpoints", "Node")]

    def pending(*waiting: ObjectKey) -> tuple[int, int]:
        frozen = counts.freeze(problems=0, version="", mode="", loader="", waiting=waiting)
        return frozen.services_pending, frozen.endpoints_pending

    assert pending(*keys) == (1, 2)
    counts.changed(keys, {})
    counts.sync(0.1, START, is_done=False)
    assert pending(keys[0]) == (1, 2), "an object is counted once"
    counts.sync(0.1, START, is_done=True)
    assert pending() == (0, 0)


def test_what_dataplanes_of_rules_count() -> None:
    rules = RuleCounts(
        iptables_total={("IPv4", "nat"): 12},
        restore_failures={("IPv6",): 2},
        nftables_sync_failures={("IPv4",): 1},
    )
    found = samples(Scrape(Counts(START).freeze(problems=0, version="", mode="", loader="", rules=rules)))
    assert found["kubeproxy_sync_proxy_rules_iptables_total", ("IPv4", "nat")] == 12
    assert found["kubeproxy_sync_proxy_rules_iptables_restore_failures_total", ("IPv6",)] == 2
    assert found["kubeproxy_sync_proxy_rules_nftables_sync_failures_total", ("IPv4",)] == 1


# Kubernetes' metrics reference, 1.35: everything of kube-proxy's on Linux. Labels as they are there.
PUBLISHED = """
kubeproxy_conntrack_reconciler_deleted_entries_total                counter    ip_family
kubeproxy_conntrack_reconciler_sync_duration_seconds                histogram  ip_family
kubeproxy_iptables_ct_state_invalid_dropped_packets_total           custom
kubeproxy_iptables_localhost_nodeports_accepted_packets_total       custom
kubeproxy_network_programming_duration_seconds                      histogram  ip_family
kubeproxy_proxy_healthz_total                                       counter    code
kubeproxy_proxy_livez_total                                         counter    code
kubeproxy_sync_full_proxy_rules_duration_seconds                    histogram  ip_family
kubeproxy_sync_partial_proxy_rules_duration_seconds                 histogram  ip_family
kubeproxy_sync_proxy_rules_duration_seconds                         histogram  ip_family
kubeproxy_sync_proxy_rules_endpoint_changes_pending                 gauge
kubeproxy_sync_proxy_rules_endpoint_changes_total                   counter
kubeproxy_sync_proxy_rules_iptables_last                            gauge      ip_family,table
kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total  counter    ip_family
kubeproxy_sync_proxy_rules_iptables_restore_failures_total          counter    ip_family
kubeproxy_sync_proxy_rules_iptables_total                           gauge      ip_family,table
kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds            gauge      ip_family
kubeproxy_sync_proxy_rules_last_timestamp_seconds                   gauge      ip_family
kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total          counter    ip_family
kubeproxy_sync_proxy_rules_nftables_sync_failures_total             counter    ip_family
kubeproxy_sync_proxy_rules_no_local_endpoints_total                 gauge      ip_family,traffic_policy
kubeproxy_sync_proxy_rules_service_changes_pending                  gauge
kubeproxy_sync_proxy_rules_service_changes_total                    counter
"""


def test_kube_proxys_metrics_are_here_or_named_as_missing() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    missing = set(re.findall(r"^\| `(kubeproxy_\w+)` \| not here: ", text, re.MULTILINE))
    published = {
        name: (kind, labels) for name, kind, labels in re.findall(r"(\w+) +(\w+) *(.*)\n", PUBLISHED)
    }
    ours = {each.name: (each.type, ",".join(each.labels)) for each in METRICS if "kubeproxy_" in each.name}
    assert len(published) == 23
    assert ours | {name: published[name] for name in missing} == published
    assert not ours.keys() & missing


HERE, THERE = Backend("10.0.0.1", 80, is_local=True), Backend("10.0.0.2", 80)
CLUSTER, LOCAL = Policy.CLUSTER, Policy.LOCAL


@pytest.mark.parametrize(
    ("backends", "internal", "external", "expected"),
    [
        ([THERE], LOCAL, CLUSTER, {("IPv4", "internal")}),
        ([THERE], CLUSTER, LOCAL, {("IPv4", "external")}),
        ([THERE], LOCAL, LOCAL, {("IPv4", "internal"), ("IPv4", "external")}),
        ([THERE], CLUSTER, CLUSTER, set()),
        ([HERE, THERE], LOCAL, LOCAL, set()),
        ([], LOCAL, LOCAL, set()),  # no endpoint at all is another matter
    ],
)
def test_no_local_endpoints(
    backends: list[Backend], internal: Policy, external: Policy, expected: set[Any]
) -> None:
    made = service("web", backends, [cluster_ip("10.96.0.1"), load_balancer("192.0.2.9")])
    made = msgspec.structs.replace(made, internal_policy=internal, external_policy=external)
    found = metrics.no_local_endpoints(DesiredState((made,)))
    assert {key for key, count in found.items() if count} == expected
    assert len(found) == 4


def test_what_the_dataplane_counts() -> None:
    reading = Reading(
        verdicts={"new": 7},
        verdict_bytes={"new": 420},
        maps={"conntrack": (3, 10)},
        services=[ServiceCount("default", 'w"eb', "", "TCP", 6, 5, 2, 3, 1, 10, 600, 9, 5000)],
    )
    found = samples(Scrape(reading=reading))
    labels = ("IPv6", "default", "", "TCP", 'w"eb')  # as the text has them: by the label's name
    assert found["ebpfproxy_service_connections_total", labels] == 5
    assert found["ebpfproxy_service_refused_total", labels] == 2
    assert found["ebpfproxy_service_retried_total", labels] == 3
    assert found["ebpfproxy_service_backends_ejected", labels] == 1
    ways = {way: (way, *labels) for way in ("forward", "reply")}  # "direction" is the first by name
    assert found["ebpfproxy_service_packets_total", ways["forward"]] == 10
    assert found["ebpfproxy_service_bytes_total", ways["forward"]] == 600
    assert found["ebpfproxy_service_packets_total", ways["reply"]] == 9
    assert found["ebpfproxy_service_bytes_total", ways["reply"]] == 5000
    assert found["ebpfproxy_verdicts_total", ("new",)] == 7
    assert found["ebpfproxy_verdict_bytes_total", ("new",)] == 420
    assert found["ebpfproxy_map_entries", ("conntrack",)] == 3
    assert found["ebpfproxy_map_limit", ("conntrack",)] == 10
