"""nftables: what a Service becomes, and that a change costs what changed."""

from __future__ import annotations

import subprocess
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
from ebpfproxy.dataplane.nftables import kernel, render
from ebpfproxy.dataplane.nftables.dataplane import unsupported
from ebpfproxy.dataplane.nftables.render import Node, Object
from ebpfproxy.dataplane.nftables.tables import Tables, transaction
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Policy,
    Protocol,
    Scheduler,
    Service,
)
from makers import cluster_ip, external_ip, load_balancer, node_port, service

NODE = Node(frozenset({"192.0.2.1"}), 0x4000)
A, B, C = (Backend(f"10.1.0.{n}", 8080) for n in (1, 2, 3))
HERE = Backend("10.1.0.4", 8080, is_local=True)
VIP = cluster_ip("10.96.0.1")


def chain(made: Service, prefix: str = "svc") -> list[str]:
    """Return the rules of a Service's only chain of that kind."""
    bodies = render.render(made, NODE).bodies
    (body,) = {body for each, body in bodies.items() if each.name.startswith(f"{prefix}-")}
    return body.split("\n")


def element(made: Service, name: str, key: str) -> str:
    return render.render(made, NODE).objects[Object(made.name.family, "element", name, key)]


TO = "meta l4proto tcp dnat ip to"

# What numgen and jhash give: nft(8). Of 3 the first takes 1 in 3, of the 2 others the second takes 1 in 2.
PICKS = [
    (Scheduler.RANDOM, [1], [f"{TO} 10.1.0.1:8080"]),
    (
        Scheduler.RANDOM,
        [1, 1, 1],
        [
            f"numgen random mod 3 < 1 {TO} 10.1.0.1:8080",
            f"numgen random mod 2 < 1 {TO} 10.1.0.2:8080",
            f"{TO} 10.1.0.3:8080",
        ],
    ),
    (
        Scheduler.WRR,
        [4, 2, 2],
        [
            f"numgen inc mod 4 < 2 {TO} 10.1.0.1:8080",
            f"numgen inc mod 2 < 1 {TO} 10.1.0.2:8080",
            f"{TO} 10.1.0.3:8080",
        ],
    ),
    (Scheduler.RR, [4, 1], [f"numgen inc mod 2 < 1 {TO} 10.1.0.1:8080", f"{TO} 10.1.0.2:8080"]),
    (
        Scheduler.SH,
        [1, 2, 1],
        [
            f"jhash ip saddr mod 4 seed 0x5eed < 1 {TO} 10.1.0.1:8080",
            f"jhash ip saddr mod 4 seed 0x5eed < 3 {TO} 10.1.0.2:8080",
            f"{TO} 10.1.0.3:8080",
        ],
    ),
    (
        Scheduler.DH,
        [1, 2],
        [f"jhash ip daddr mod 2 seed 0x5eed < 1 {TO} 10.1.0.1:8080", f"{TO} 10.1.0.2:8080"],
    ),
]


@pytest.mark.parametrize(("scheduler", "weights", "rules"), PICKS)
def test_rules_pick_a_backend(scheduler: Scheduler, weights: list[int], rules: list[str]) -> None:
    backends = [
        msgspec.structs.replace(each, weight=weight) for each, weight in zip((A, B, C), weights, strict=False)
    ]
    assert chain(service("web", backends, [VIP], scheduler=scheduler)) == rules


def test_a_map_picks_among_many() -> None:
    many = [Backend(f"10.1.1.{n}", 80, weight=2 if n == 101 else 1) for n in range(101, 118)]
    (rule,) = chain(service("web", many, [VIP], scheduler=Scheduler.WRR))
    assert rule.startswith(f"{TO} numgen inc mod 18 map {{ 0-1 : 10.1.1.101 . 80, 2 : 10.1.1.102 . 80, ")
    assert rule.endswith(", 17 : 10.1.1.117 . 80 }")


def test_maglev_table_has_a_hundred_slots_a_backend() -> None:
    (rule,) = chain(service("web", [A, B], [VIP], scheduler=Scheduler.MAGLEV))
    assert f"{TO} jhash ip saddr . ip daddr . th sport . th dport mod 251 seed 0x5eed map {{ 0" in rule
    again = chain(service("web", [B, A], [VIP], scheduler=Scheduler.MAGLEV))
    assert [rule] == again, "whatever the order in which backends were learnt"


NONE: list[Backend] = []
EXTERNAL, BALANCED, PORT = external_ip("203.0.113.1"), load_balancer("203.0.113.2"), node_port(30080)

# rows: Service, map, key, the beginning of the verdict
VERDICTS = [
    (service("a", [A], [VIP]), "cluster-ips", "10.96.0.1 . tcp . 80", "goto svc-"),
    (service("a", NONE, [VIP]), "cluster-ips", "10.96.0.1 . tcp . 80", "goto refuse"),
    (
        service("a", [A], [VIP], internal_policy=Policy.LOCAL),
        "cluster-ips",
        "10.96.0.1 . tcp . 80",
        "drop",
    ),
    (service("a", [A], [EXTERNAL]), "internal-ips", "203.0.113.1 . tcp . 80", "goto svc-"),
    (service("a", [A], [EXTERNAL]), "external-ips", "203.0.113.1 . tcp . 80", "goto ext-"),
    (service("a", [A], [PORT]), "internal-node-ports", "tcp . 30080", "goto svc-"),
    (service("a", [A], [PORT]), "external-node-ports", "tcp . 30080", "goto ext-"),
    (
        service("a", [A], [PORT], external_policy=Policy.LOCAL),
        "external-node-ports",
        "tcp . 30080",
        "drop",
    ),
    (
        service("a", [A], [PORT], external_policy=Policy.LOCAL),
        "internal-node-ports",
        "tcp . 30080",
        "goto svc-",
    ),
    (
        service("a", [HERE], [PORT], external_policy=Policy.LOCAL),
        "external-node-ports",
        "tcp . 30080",
        "goto svc-",
    ),
    (
        service("a", [A], [BALANCED], source_ranges=("10.0.0.0/8",)),
        "external-ips",
        "203.0.113.2 . tcp . 80",
        "goto fw-",
    ),
    (
        service("a", [A], [VIP], protocol=Protocol.SCTP),
        "cluster-ips",
        "10.96.0.1 . sctp . 80",
        "goto svc-",
    ),
]


@pytest.mark.parametrize(("made", "name", "key", "verdict"), VERDICTS)
def test_where_a_frontend_leads(made: Service, name: str, key: str, verdict: str) -> None:
    assert element(made, name, key).startswith(verdict)


def test_source_ranges_without_one_of_this_family_let_nobody_in() -> None:
    closed = msgspec.structs.replace(service("a", [A], [BALANCED]), has_source_ranges=True)
    assert chain(closed, "fw") == ["drop"]


def test_overlapping_source_ranges_are_one() -> None:
    ranges = ("10.0.0.0/8", "10.1.0.0/16", "192.0.2.1/32", "192.0.2.0/32")
    made = service("a", [A], [BALANCED], source_ranges=ranges)
    (text,) = [
        body for each, body in render.render(made, NODE).bodies.items() if each.name.startswith("ranges-")
    ]
    assert text.endswith("elements = { 10.0.0.0/8, 192.0.2.0/31 };")


def test_an_address_of_this_node_is_not_closed_for_all_else() -> None:
    made = render.render(service("a", [A], [external_ip("192.0.2.1")]), NODE)
    assert Object(4, "element", "vips", "192.0.2.1") not in made.objects


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_base_is_good_nft(family: int) -> None:
    kernel.run(render.base(family, 0x4000, masquerades_all=False, masquerades_outside=True), check_only=True)


def test_counting_schedulers_are_named() -> None:
    made = service("web", [A], [VIP], scheduler=Scheduler.WLC)
    (sentence,) = unsupported(DesiredState((made,)))
    assert "no open connections" in sentence
    assert "default/web" in sentence
    assert unsupported(DesiredState((service("web", [A], [VIP]),))) == []


@pytest.mark.parametrize(
    ("serves_loopback", "served"), [(True, {"127.0.0.1", "192.0.2.1"}), (False, {"192.0.2.1"})]
)
def test_node_ports_on_loopback_can_be_switched_off(serves_loopback: bool, served: set[str]) -> None:
    made = render.node_fragment(
        makers.state(serving="127.0.0.1 192.0.2.1"), (4,), serves_loopback=serves_loopback
    )
    assert {each.key for each in made.objects if each.name == "node-addresses"} == served


# --- changes ------------------------------------------------------------------------------------------------


def state(*services: Service, **more: Any) -> DesiredState:
    return makers.state(*services, serving="192.0.2.1", **more)


def step(tables: Tables, wanted: DesiredState) -> str:
    delta, bodies = tables.update(wanted)
    text = transaction(delta, bodies, tables.have)
    tables.commit(delta)
    return text


def test_a_changed_service_alone_is_written() -> None:
    tables = Tables({}, (4, 6), 0x4000)
    others = [service(f"s{n}", [A], [cluster_ip(f"10.96.1.{n}")]) for n in range(9)]
    step(tables, state(service("web", [A], [VIP]), *others))
    text = step(tables, state(service("web", [A, B], [VIP]), *others))
    assert "/s" not in text
    verbs = [line.split(" ")[:2] for line in text.splitlines()]
    assert verbs == [
        ["add", "chain"],
        ["add", "rule"],
        ["add", "rule"],
        ["delete", "element"],
        ["add", "element"],
        ["flush", "chain"],
        ["delete", "chain"],
    ]
    assert step(tables, state(service("web", [A, B], [VIP]), *others)) == ""


def test_what_two_services_share_goes_with_the_last() -> None:
    tables = Tables({}, (4, 6), 0x4000)
    one, two = (
        service(name, [HERE], [cluster_ip("10.96.0.1", port)]) for name, port in (("a", 80), ("b", 81))
    )
    step(tables, state(one, two))
    assert "delete element ip ebpfproxy vips" not in step(tables, state(one))
    text = step(tables, state())
    assert "delete element ip ebpfproxy vips { 10.96.0.1 }" in text
    assert "delete element ip ebpfproxy hairpins { 10.1.0.4 . 10.1.0.4 }" in text


def test_a_client_keeps_its_affinity_when_another_backend_comes() -> None:
    tables = Tables({}, (4, 6), 0x4000)
    step(tables, state(service("web", [A], [VIP], affinity_s=600)))
    text = step(tables, state(service("web", [A, B], [VIP], affinity_s=600)))
    assert "delete set" not in text
    assert text.count("add set") == 1


def test_a_family_that_the_kernel_lacks_is_left_out() -> None:
    tables = Tables({}, (4,), 0x4000)
    six = service("six", [Backend("fd00::1", 80)], [cluster_ip("fd00:96::1")], family=6)
    assert "ip6" not in step(tables, state(six, service("web", [A], [VIP])))


SERVICES = st.builds(
    lambda name, backends, frontend, scheduler, affinity: service(
        name, [Backend(f"10.1.0.{n}", 80, is_local=n % 2 == 0) for n in sorted(backends)], [frontend],
        scheduler=scheduler, affinity_s=affinity,
    ),
    st.sampled_from("abcd"),
    st.sets(st.integers(1, 20), max_size=18),
    st.one_of(
        st.builds(cluster_ip, st.sampled_from(["10.96.0.1", "10.96.0.2"]), st.integers(80, 82)),
        st.builds(node_port, st.integers(30000, 30003)),
        st.builds(load_balancer, st.just("203.0.113.9"), st.integers(80, 82)),
    ),
    st.sampled_from(Scheduler),
    st.sampled_from([0, 600]),
)  # fmt: skip


def distinct(services: list[Service]) -> list[Service]:
    """Return those whose name and frontend no other has, as a resolver hands them out."""
    found: dict[object, Service] = {}
    for each in services:
        found.setdefault(each.name, each)
    frontends: dict[object, Service] = {}
    for each in found.values():
        frontends.setdefault(each.frontends[0], each)
    return list(frontends.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(SERVICES, max_size=4).map(distinct), min_size=2, max_size=5))
def test_any_way_leads_to_the_same(states: list[list[Service]]) -> None:
    """Step by step, or at once: what is programmed depends on the last state alone."""
    by_steps, at_once = Tables({}, (4, 6), 0x4000), Tables({}, (4, 6), 0x4000)
    for services in states:
        step(by_steps, state(*services))
    step(at_once, state(*states[-1]))
    assert by_steps.have == at_once.have
    restarted = Tables(by_steps.have, (4, 6), 0x4000)
    assert step(restarted, state(*states[-1])) == "", "a restart changes nothing"


@pytest.mark.root
@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(SERVICES, max_size=4).map(distinct), min_size=1, max_size=3))
def test_the_kernel_takes_it_and_says_what_it_has(states: list[list[Service]]) -> None:
    """Each transaction is accepted, and what is read back is what was programmed."""
    script = [render.base(4, 0x4000, masquerades_all=False, masquerades_outside=True)]
    tables = Tables({}, (4,), 0x4000)
    script += [step(tables, state(*services)) for services in states]
    with_marks = "\n".join(f"nft -f - <<'EOF'\n{each}EOF" for each in script)
    listing = "\n".join(
        f"nft -j {options}" for options in ("list chains ip", "-t list sets ip", "-t list maps ip")
    )
    done = subprocess.run(
        ["unshare", "--net", "sh", "-e", "-c", f"{with_marks}\n{listing}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    named = {each for each in tables.have if each.kind != "element"}
    assert all(f'"name": "{each.name}"' in done.stdout for each in named)
