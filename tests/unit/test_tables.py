"""What the maps hold for a desired state, and what happens when they are full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ebpfproxy.dataplane.bpf.layouts import (
    BACKEND,
    SERVICE,
    SERVICE_KEY,
    VIP,
    pack_address,
    pack_port,
    pack_prefix,
    unpack_address,
)
from ebpfproxy.dataplane.bpf.plan import apply, make_plan
from ebpfproxy.dataplane.bpf.read import read_tables
from ebpfproxy.dataplane.bpf.schedulers import slot_table
from ebpfproxy.dataplane.bpf.tables import Tables, render_service
from ebpfproxy.libbpf import ffi, lib
from ebpfproxy.model.services import (
    Backend,
    DesiredState,
    Policy,
    Protocol,
    Readiness,
    Scheduler,
)
from fake_maps import LIMITS, FakeMap, expected, fake_maps, follow
from makers import cluster_ip, load_balancer, node_port, service, state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TCP = 6
A, B, C = (Backend(f"10.1.0.{n}", 8080, is_local=n == 1) for n in (1, 2, 3))


class Kernel:
    """Tables and fake maps together."""

    def __init__(self, limits: Mapping[str, int] = LIMITS) -> None:
        self.maps: dict[str, FakeMap] = fake_maps(limits)
        self.tables = Tables({}, limits)
        self.limits = limits

    def sync(self, wanted: DesiredState) -> list[str]:
        """Program; return the errors of what did not fit."""
        failures = self.tables.update(wanted)
        deltas = self.tables.delta()
        apply(make_plan(deltas), self.maps)
        self.tables.commit(deltas, 0.0)
        return [str(error) for _, error in failures]

    def restart(self) -> None:
        self.tables = Tables(read_tables(self.maps), self.limits)

    def frontend(self, vip: str, port: int, *, is_external: bool = False) -> bytes | None:
        key = SERVICE_KEY.pack(pack_address(vip), pack_port(port), TCP, int(is_external))
        return self.maps["services"].entries.get(key)

    def kinds(self) -> dict[str, int]:
        return {
            unpack_address(key): VIP.read(value).kinds for key, value in self.maps["vips"].entries.items()
        }

    def backend_ids(self) -> dict[str, int]:
        memory = self.maps["backends"].memory
        records = enumerate(BACKEND.read_all(bytes(memory)))
        return {unpack_address(record.address): number for number, record in records if record.state}

    def reached(self, vip: str, port: int, *, is_external: bool = False) -> set[str]:
        value = self.frontend(vip, port, is_external=is_external)
        assert value is not None
        return {address for address, _ in follow(self.maps, value)}


def test_layouts_are_those_that_cffi_read_from_abi_h() -> None:
    record = ffi.new("struct backend *")
    record.address.w[3] = 0x0100000A  # 10.0.0.1, stored in network byte order
    record.address.w[2] = 0xFFFF0000
    record.port = 0x901F  # 8080
    record.proto, record.state, record.service, record.weight, record.flags = 6, 1, 7, 9, 2
    value = BACKEND.pack(pack_address("10.0.0.1"), pack_port(8080), 6, 1, 7, 9, 2)
    assert value == bytes(ffi.buffer(record))


@pytest.mark.parametrize(
    ("cidr", "bits", "address"),
    [
        ("10.0.0.0/8", 104, "10.0.0.0"),
        ("192.0.2.1/32", 128, "192.0.2.1"),
        ("0.0.0.0/0", 96, "0.0.0.0"),
        ("2001:db8::/32", 32, "2001:db8::"),
        ("::/0", 0, "::"),
    ],
)
def test_prefixes_count_from_the_start_of_the_16_bytes(cidr: str, bits: int, address: str) -> None:
    assert pack_prefix(cidr) == (bits, pack_address(address))


def test_every_frontend_is_written_for_both_scopes_and_shares_slots() -> None:
    kernel = Kernel()
    kernel.sync(state(service("web", [A, B], [cluster_ip("10.96.0.1"), node_port(30080)])))
    entries = [SERVICE.read(value) for value in kernel.maps["services"].entries.values()]
    assert len(entries) == 4
    assert len({(entry.slot_base, entry.slot_count) for entry in entries}) == 1
    assert {entry.kind for entry in entries} == {lib.VIP_CLUSTER_IP, lib.VIP_NODE}


def test_policy_local_counts_for_outside_traffic_only() -> None:
    kernel = Kernel()
    web = service(
        "web", [A, B, C], [cluster_ip("10.96.0.1"), load_balancer("192.0.2.9")], external_policy=Policy.LOCAL
    )
    kernel.sync(state(web))
    assert kernel.reached("192.0.2.9", 80, is_external=True) == {"10.1.0.1"}
    assert kernel.reached("192.0.2.9", 80) == {"10.1.0.1", "10.1.0.2", "10.1.0.3"}
    assert kernel.reached("10.96.0.1", 80, is_external=True) == {"10.1.0.1", "10.1.0.2", "10.1.0.3"}


def test_nothing_local_under_policy_local_drops_and_no_backend_at_all_rejects() -> None:
    kernel = Kernel()
    lb = load_balancer("192.0.2.9")
    kernel.sync(state(service("web", [B], [lb], external_policy=Policy.LOCAL)))
    value = kernel.frontend("192.0.2.9", 80, is_external=True)
    assert value is not None
    assert SERVICE.read(value).flags == lib.SERVICE_LOCAL | lib.SERVICE_DROP_EMPTY
    kernel.sync(state(service("web", [], [lb], external_policy=Policy.LOCAL)))
    value = kernel.frontend("192.0.2.9", 80, is_external=True)
    assert value is not None
    assert SERVICE.read(value).flags == lib.SERVICE_LOCAL


def test_kinds_of_addresses() -> None:
    kernel = Kernel()
    web = service(
        "web", [A], [cluster_ip("10.96.0.1"), load_balancer("192.0.2.1"), load_balancer("192.0.2.9")]
    )
    kernel.sync(state(web, serving="192.0.2.1 127.0.0.1", local="192.0.2.9 192.0.2.7"))
    assert kernel.kinds() == {
        "10.96.0.1": lib.VIP_CLUSTER_IP | lib.VIP_PINGABLE,
        "192.0.2.1": lib.VIP_LOAD_BALANCER | lib.VIP_PINGABLE | lib.VIP_NODE | lib.VIP_LOCAL,
        "192.0.2.9": lib.VIP_LOAD_BALANCER | lib.VIP_PINGABLE | lib.VIP_LOCAL,
        "127.0.0.1": lib.VIP_NODE | lib.VIP_LOCAL,
    }


def test_an_address_is_pingable_while_a_frontend_of_it_has_backends() -> None:
    kernel = Kernel()
    dns, web = ([cluster_ip("10.96.0.1", port)] for port in (53, 80))
    for has_dns, has_web in [(False, False), (True, False), (True, True), (False, True), (False, False)]:
        services = [
            service("dns", [A] if has_dns else [], dns),
            service("web", [B] if has_web else [], web),
        ]
        kernel.sync(state(*services))
        ping = lib.VIP_PINGABLE if has_dns or has_web else 0
        assert kernel.kinds() == {"10.96.0.1": lib.VIP_CLUSTER_IP | ping}


def test_an_address_that_serves_no_more_keeps_its_flows_until_they_are_over() -> None:
    kernel = Kernel()
    kernel.sync(state(service("web", [A], [cluster_ip("10.96.0.1")])))
    kernel.sync(state())
    assert kernel.kinds() == {"10.96.0.1": 0}
    kernel.restart()
    kernel.sync(state())
    assert kernel.kinds() == {"10.96.0.1": 0}
    assert kernel.tables.retired_vips == {pack_address("10.96.0.1")}
    kernel.tables.release_vips(kernel.tables.retired_vips)
    kernel.sync(state())
    assert kernel.kinds() == {}


def test_two_services_with_one_frontend_the_first_by_name_has_it_and_the_other_follows() -> None:
    kernel = Kernel()
    first = service("a", [A], [load_balancer("192.0.2.9")])
    second = service("b", [B], [load_balancer("192.0.2.9")])
    kernel.sync(state(second))
    kernel.sync(state(second, first))
    assert kernel.reached("192.0.2.9", 80) == {"10.1.0.1"}
    kernel.sync(state(second))
    assert kernel.reached("192.0.2.9", 80) == {"10.1.0.2"}


def test_a_backend_that_goes_is_kept_as_gone_and_gets_its_id_back() -> None:
    kernel = Kernel()
    frontends = [cluster_ip("10.96.0.1")]
    kernel.sync(state(service("web", [A, B], frontends)))
    ids = kernel.backend_ids()
    kernel.sync(state(service("web", [A], frontends)))
    assert kernel.tables.gone == {ids["10.1.0.2"]}
    assert kernel.backend_ids() == ids
    kernel.sync(state(service("web", [A, B], frontends)))
    assert kernel.tables.gone == set()
    assert kernel.backend_ids() == ids
    assert kernel.reached("10.96.0.1", 80) == {"10.1.0.1", "10.1.0.2"}


def test_ids_survive_a_restart_with_another_order_of_services() -> None:
    kernel = Kernel()
    web = service("web", [A, B], [cluster_ip("10.96.0.1")])
    dns = service("dns", [C], [cluster_ip("10.96.0.2")], protocol=Protocol.TCP)
    kernel.sync(state(web, dns))
    before = kernel.backend_ids(), dict(kernel.maps["services"].entries)
    kernel.restart()
    kernel.sync(state(dns, web))
    assert (kernel.backend_ids(), dict(kernel.maps["services"].entries)) == before


def test_a_terminating_backend_is_used_while_none_is_ready() -> None:
    kernel = Kernel()
    ending = Backend("10.1.0.1", 8080, readiness=Readiness.TERMINATING)
    kernel.sync(state(service("web", [ending, B], [cluster_ip("10.96.0.1")])))
    assert kernel.reached("10.96.0.1", 80) == {"10.1.0.2"}
    kernel.sync(state(service("web", [ending], [cluster_ip("10.96.0.1")])))
    assert kernel.reached("10.96.0.1", 80) == {"10.1.0.1"}


def test_tables_index_all_backends_although_the_pool_holds_some() -> None:
    rendered = render_service(
        service("web", [A, Backend("10.1.0.2", 8080, weight=0), C], [cluster_ip("10.96.0.1")])
    )
    assert rendered.tables == ((0, 2),)


@pytest.mark.parametrize(
    ("map_name", "limit"),
    [
        ("service_names", 3),
        ("service_stats", 3),
        ("backends", 7),
        ("backend_stats", 7),
        ("slots", 6),
        ("services", 5),
        ("vips", 2),
        ("source_ranges", 2),
    ],
)
def test_a_full_map_names_itself_and_everything_that_fits_works(map_name: str, limit: int) -> None:
    """Three equal Services, room for two of them."""
    kernel = Kernel({**LIMITS, map_name: limit})
    wanted = [
        service(f"s{n}", [A, B, C], [load_balancer(f"192.0.2.{n}")], source_ranges=(f"10.{n}.0.0/16",))
        for n in (1, 2, 3)
    ]
    errors = kernel.sync(state(*wanted))
    assert len(errors) == 1
    assert f"map {map_name} is full" in errors[0]
    assert str(limit) in errors[0]
    assert f"mapSizes.{map_name}" in errors[0]
    table = expected(wanted[:2])
    for (vip, port, _, is_external), backends in table.items():
        assert kernel.reached(vip, port, is_external=is_external) == {address for address, _ in backends}
    assert len(kernel.maps["services"].entries) == len(table)


def test_a_change_that_does_not_fit_leaves_the_old_version_working() -> None:
    kernel = Kernel({**LIMITS, "backends": 4})
    frontends = [cluster_ip("10.96.0.1")]
    kernel.sync(state(service("web", [A, B], frontends)))
    bigger = service("web", [A, B, C, Backend("10.1.0.4", 8080)], frontends)
    assert "map backends is full" in kernel.sync(state(bigger))[0]
    assert kernel.reached("10.96.0.1", 80) == {"10.1.0.1", "10.1.0.2"}
    # after a restart as well: what is programmed is known only from the kernel then
    kernel.restart()
    assert "map backends is full" in kernel.sync(state(bigger))[0]
    assert kernel.reached("10.96.0.1", 80) == {"10.1.0.1", "10.1.0.2"}
    assert kernel.sync(state()) == []
    assert kernel.maps["services"].entries == {}


def test_what_did_not_fit_is_tried_again() -> None:
    kernel = Kernel({**LIMITS, "services": 4})
    one, two, three = (service(f"s{n}", [A], [cluster_ip(f"10.96.0.{n}")]) for n in (1, 2, 3))
    assert len(kernel.sync(state(one, two, three))) == 1
    # The delete comes last in a plan, so its room is there for the next one.
    kernel.sync(state(two, three))
    assert kernel.sync(state(two, three)) == []
    assert kernel.reached("10.96.0.3", 80) == {"10.1.0.1"}


def test_an_unchanged_service_is_not_looked_at_again() -> None:
    kernel = Kernel()
    services = [service(f"s{n}", [A, B], [cluster_ip(f"10.96.{n >> 8}.{n & 255}")]) for n in range(20)]
    kernel.sync(state(*services))
    assert kernel.tables.update(state(*services)) == []
    assert not any(kernel.tables.delta().values())
    services[7] = service("s7", [A], [cluster_ip("10.96.0.7")])
    assert kernel.tables.update(state(*services)) == []
    deltas = kernel.tables.delta()
    assert {name: len(delta.upsert) for name, delta in deltas.items() if delta} == {
        "services": 2,
        "slots": 1,
        "backends": 1,
    }


def test_only_a_changed_service_gets_a_new_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Backend, ...]] = []

    def spy(scheduler: Scheduler, backends: tuple[Backend, ...], maglev_size: int) -> Sequence[int]:
        made.append(backends)
        return slot_table(scheduler, backends, maglev_size)

    monkeypatch.setattr("ebpfproxy.dataplane.bpf.schedulers.slot_table", spy)
    kernel = Kernel({**LIMITS, "slots": 1 << 16})
    stays, before, after = (
        service("stays", frontends=(cluster_ip("10.96.0.1"),), backends=(A, B), scheduler=Scheduler.MAGLEV),
        service("moves", frontends=(cluster_ip("10.96.0.2"),), backends=(A, B), scheduler=Scheduler.MAGLEV),
        service("moves", frontends=(cluster_ip("10.96.0.2"),), backends=(A, C), scheduler=Scheduler.MAGLEV),
    )
    assert kernel.sync(state(stays, before)) == []
    assert made == [(A, B), (A, B)]
    assert kernel.sync(state(stays, after)) == []
    assert made == [(A, B), (A, B), (A, C)]
