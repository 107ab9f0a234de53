"""Lives of a cluster, followed into the maps of the real kernel: whatever happened, they end as they must."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ebpfproxy.dataplane.bpf import view
from ebpfproxy.dataplane.bpf.dataplane import BpfDataplane, BpfOptions
from ebpfproxy.model.services import DesiredState, NodePortAddresses
from ebpfproxy.source.kubernetes import reflector
from rig.api_life import SERVICE_STEPS, SLICE_STEPS, expected, in_turns, starting_model
from rig.kernel import enter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ebpfproxy.model.services import Service
    from rig.kernel import Netns

pytestmark = pytest.mark.root

EXAMPLES = 30
SIZES = {"conntrack": 1024, "sockets": 1024, "affinity": 1024, "slots": 65536, "backends": 4096}
SIZES |= {"backend_stats": 4096}
Shown = dict[str, tuple[set[str], set[str]]]


@pytest.fixture
def inside(netns: Netns) -> Iterator[ThreadPoolExecutor]:
    """A thread in a network namespace of its own: devices elsewhere are not touched."""
    with ThreadPoolExecutor(1, initializer=enter, initargs=(netns.path,)) as thread:
        yield thread


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "backoff_s", lambda _: 0.0)


def desired(services: tuple[Service, ...]) -> DesiredState:
    return DesiredState(services, NodePortAddresses(frozenset(), frozenset()))


def in_maps(bpffs: Path) -> Shown:
    """Return the frontends of each Service and the backends that new connections get."""
    with view.open_maps(bpffs) as maps:
        rows = {row.name: (set(row.frontends), set[str]()) for row in view.services(maps)}
        for row in view.backends(maps):
            if row.is_usable:
                rows[row.service][1].add(f"{row.address}:{row.port}")
    return rows


def wanted(services: Iterable[Service]) -> Shown:
    """Return the same of what the resolver says."""
    found: Shown = {}
    for each in services:
        if each.frontends:
            frontends = {f"{frontend.address}:{frontend.port}" for frontend in each.frontends}
            usable = {f"{backend.address}:{backend.port}" for backend in each.cluster.backends}
            found[f"{each.name.namespace}/{each.name.name}"] = (frontends, usable)
    return found


@pytest.mark.timeout(600)
def test_maps_end_as_the_cluster_does(inside: ThreadPoolExecutor, bpffs: Path, cgroup: Path) -> None:
    dataplane = BpfDataplane(BpfOptions(bpffs=bpffs, cgroup=cgroup, sizes=SIZES))
    served: list[set[str]] = []
    try:
        inside.submit(dataplane.start).result()

        # One dataplane for all: each life begins with the maps as the one before left them.
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate),
        )
        @given(
            services=st.lists(SERVICE_STEPS, max_size=25),
            slices=st.lists(SLICE_STEPS, max_size=25),
            turns=st.lists(st.booleans(), max_size=60),
        )
        def lives(services: list[Any], slices: list[Any], turns: list[bool]) -> None:
            model = starting_model(page=2)
            for resolved in in_turns(model, services, slices, turns):
                dataplane.sync(desired(resolved.services))
            ended = in_maps(bpffs)
            assert ended == wanted(expected(model).services)
            served.extend(usable for _, usable in ended.values() if usable)

        inside.submit(lives).result()
        assert served  # it was not all about nothing
    finally:
        dataplane.close()
