"""The order of writes: wherever the writer stops, readers see the old or the new set, and nothing dangles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.dataplane.bpf.layouts import (
    BACKEND,
    BACKEND_STATS,
    DSR_BACKEND_KEY,
    SERVICE,
    SERVICE_KEY,
    SERVICE_NAME,
    SLOT_SIZE,
    SOURCE_RANGE_KEY,
    U32,
    VIP,
    pack_address,
    pack_prefix,
    unpack_address,
    unpack_port,
)
from ebpfproxy.dataplane.bpf.plan import Drop, Put, Write, apply, make_plan
from ebpfproxy.dataplane.bpf.read import read_tables
from ebpfproxy.dataplane.bpf.tables import SLOT_GRACE_S, Tables
from ebpfproxy.libbpf import lib
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Policy,
    Readiness,
    Scheduler,
    Service,
)
from fake_maps import LIMITS, FakeMap, expected, fake_maps, follow, single_writes
from makers import cluster_ip, load_balancer, node_port, service, state

if TYPE_CHECKING:
    from collections.abc import Iterable

backends = st.builds(
    Backend,
    address=st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4"]),
    port=st.just(8080),
    readiness=st.sampled_from(Readiness),
    is_local=st.booleans(),
    weight=st.integers(0, 3),
)


@st.composite
def services(draw: st.DrawFn, number: int) -> Service:
    every = draw(st.lists(backends, max_size=4, unique_by=lambda b: b.address))
    frontends = [cluster_ip(f"10.96.0.{number}")]
    if draw(st.booleans()):
        frontends.append(node_port(30000 + number))
    if draw(st.booleans()):
        frontends.append(load_balancer(f"192.0.2.{number}"))
    if draw(st.booleans()):
        frontends.append(load_balancer("192.0.2.100"))  # several Services may want it: the first one has it
    return service(
        f"s{number}",
        every,
        frontends,
        scheduler=draw(st.sampled_from([Scheduler.RR, Scheduler.WRR, Scheduler.SH, Scheduler.LC])),
        external_policy=draw(st.sampled_from(Policy)),
        source_ranges=draw(st.sampled_from([(), ("203.0.113.0/24",), ("198.51.100.0/24",)])),
        is_dsr=draw(st.booleans()),
    )


@st.composite
def states(draw: st.DrawFn) -> DesiredState:
    wanted = [draw(services(n)) for n in (1, 2, 3) if draw(st.booleans())]
    return state(*wanted, serving="192.0.2.1", local="127.0.0.1")


def reached(maps: dict[str, FakeMap]) -> dict[tuple[str, int, int, bool], frozenset[tuple[str, int]]]:
    result = {}
    for key, value in maps["services"].entries.items():
        found = SERVICE_KEY.read(key)
        address = (unpack_address(found.vip), unpack_port(found.port), found.proto, bool(found.scope))
        result[address] = frozenset(follow(maps, value))
    return result


def slots_of(maps: dict[str, FakeMap], value: bytes) -> bytes:
    entry = SERVICE.read(value)
    start = entry.slot_base * SLOT_SIZE
    return bytes(maps["slots"].memory[start : start + entry.slot_count * SLOT_SIZE])


def plan_for(tables: Tables, state: DesiredState) -> list[Put | Drop | Write]:
    assert tables.update(state) == []
    return make_plan(tables.delta())


def program(tables: Tables, maps: dict[str, FakeMap], state: DesiredState) -> None:
    assert tables.update(state) == []
    deltas = tables.delta()
    apply(make_plan(deltas), maps)
    tables.commit(deltas, 0.0)


def check_readers(maps: dict[str, FakeMap], allowed: Iterable[list[Service]]) -> None:
    """Every frontend leads to the set of one of the states; none is known that no state has."""
    wanted = [expected(each) for each in allowed]
    for frontend, found in reached(maps).items():
        assert found in [table[frontend] for table in wanted if frontend in table], frontend


@settings(max_examples=60, deadline=None)
@given(st.lists(states(), min_size=2, max_size=4))
def test_readers_see_the_old_or_the_new_set_after_every_single_write(history: list[DesiredState]) -> None:
    maps = fake_maps()
    tables = Tables({}, LIMITS)
    before = DesiredState(())
    held: dict[bytes, bytes] = {}  # what slow readers got from map services -> the slots they will read
    for number, wanted in enumerate(history):
        now_s = number * SLOT_GRACE_S / 10
        tables.collect(now_s)
        assert tables.update(wanted) == []
        deltas = tables.delta()
        for step in single_writes(make_plan(deltas)):
            apply([step], maps)
            check_readers(maps, [list(before.services), list(wanted.services)])
            assert all(slots_of(maps, value) == content for value, content in held.items())
        tables.commit(deltas, now_s)
        assert reached(maps) == expected(wanted.services)
        held |= {value: slots_of(maps, value) for value in maps["services"].entries.values()}
        before = wanted


@settings(max_examples=60, deadline=None)
@given(states(), states())
def test_a_source_that_may_enter_before_and_after_is_never_refused(
    old: DesiredState, new: DesiredState
) -> None:
    maps = fake_maps()
    tables = Tables({}, LIMITS)
    program(tables, maps, old)
    ranges = [
        {str(s.name): {pack_prefix(cidr) for cidr in s.source_ranges} for s in state.services}
        for state in (old, new)
    ]
    for step in single_writes(plan_for(tables, new)):
        apply([step], maps)
        names = {
            U32.unpack(k)[0]: SERVICE_NAME.read(v).text for k, v in maps["service_names"].entries.items()
        }
        keys = [SOURCE_RANGE_KEY.read(key) for key in maps["source_ranges"].entries]
        for value in maps["services"].entries.values():
            entry = SERVICE.read(value)
            if entry.flags & lib.SERVICE_SOURCE_RANGES:
                name = names[entry.id].rstrip(b"\0").decode()
                present = {(key.prefixlen - 32, key.source) for key in keys if key.service == entry.id}
                assert any(present >= each[name] for each in ranges if each.get(name))


@settings(max_examples=60, deadline=None)
@given(states(), states())
def test_an_encapsulated_packet_never_meets_another_backend_than_it_was_sent_to(
    old: DesiredState, new: DesiredState
) -> None:
    maps = fake_maps()
    tables = Tables({}, LIMITS)
    program(tables, maps, old)
    for step in single_writes(plan_for(tables, new)):
        apply([step], maps)
        for key, value in maps["dsr_backends"].entries.items():
            sent_to, number = DSR_BACKEND_KEY.read(key), U32.unpack(value)[0]
            backend = BACKEND.read(bytes(maps["backends"].memory[number * BACKEND.size :][: BACKEND.size]))
            assert (backend.address, backend.service) == (sent_to.address, sent_to.service)
    local = {(str(s.name), b.address) for s in new.services if s.is_dsr for b in s.backends if b.is_local}
    assert len(maps["dsr_backends"].entries) == len(local)


@settings(max_examples=60, deadline=None)
@given(states(), states(), st.data())
def test_a_killed_writer_is_followed_by_one_that_makes_it_right(
    old: DesiredState, new: DesiredState, data: st.DataObject
) -> None:
    maps = fake_maps()
    program(Tables({}, LIMITS), maps, old)
    writes = list(single_writes(plan_for(Tables(read_tables(maps), LIMITS), new)))
    killed_at = data.draw(st.integers(0, len(writes)))
    apply(writes[:killed_at], maps)

    tables = Tables(read_tables(maps), LIMITS)
    assert tables.update(new) == []
    deltas = tables.delta()
    for step in single_writes(make_plan(deltas)):
        apply([step], maps)
        check_readers(maps, [list(old.services), list(new.services)])
    tables.commit(deltas, 0.0)
    assert reached(maps) == expected(new.services)


@settings(max_examples=60, deadline=None)
@given(states(), states())
def test_a_restart_writes_nothing_and_keeps_every_id(old: DesiredState, new: DesiredState) -> None:
    maps = fake_maps()
    tables = Tables({}, LIMITS)
    program(tables, maps, old)
    program(tables, maps, new)
    steps = plan_for(Tables(read_tables(maps), LIMITS), new)
    # A Service that lost its only frontend to another one is in no entry of map services: its slots move.
    assert [step for step in steps if step.map != "slots"] == []


@settings(max_examples=60, deadline=None)
@given(states(), states())
def test_no_source_is_let_in_that_neither_state_lets_in(old: DesiredState, new: DesiredState) -> None:
    """A load balancer's frontend is open at most while one of the states has it open."""
    maps = fake_maps()
    tables = Tables({}, LIMITS)
    program(tables, maps, old)
    for step in single_writes(plan_for(tables, new)):
        apply([step], maps)
        for key, value in maps["services"].entries.items():
            entry, vip = SERVICE.read(value), unpack_address(SERVICE_KEY.read(key).vip)
            if entry.kind == lib.VIP_LOAD_BALANCER and not entry.flags & lib.SERVICE_SOURCE_RANGES:
                owners = [
                    s
                    for state in (old, new)
                    for s in state.services
                    if any(f.address == vip for f in s.frontends)
                ]
                assert any(not s.source_ranges for s in owners)


def test_everything_goes_when_nothing_is_wanted_and_nothing_refers_to_it() -> None:
    maps = fake_maps()
    tables = Tables({}, LIMITS)
    full = service(
        "web",
        [Backend("10.1.0.1", 80)],
        [cluster_ip("10.96.0.1"), node_port(30080)],
        source_ranges=("10.0.0.0/8",),
    )
    program(tables, maps, DesiredState((full,)))
    size = BACKEND_STATS.size
    maps["backend_stats"].memory[size : 2 * size] = b"\x07" * size
    program(tables, maps, DesiredState(()))
    assert maps["services"].entries == {}
    assert maps["source_ranges"].entries == {}
    # Established flows still need the address and the backend's record.
    assert maps["vips"].entries == {pack_address("10.96.0.1"): VIP.pack(0)}
    tables.release_vips(tables.retired_vips)
    tables.release_backends(tables.gone)
    program(tables, maps, DesiredState(()))
    assert maps["vips"].entries == maps["service_names"].entries == {}
    assert not any(maps["backends"].memory)
    assert not any(maps["backend_stats"].memory)
