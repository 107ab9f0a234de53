"""A cluster's life in every order: whatever happens on the way, the end is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpfproxy.source.kubernetes import reflector, wire
from ebpfproxy.store import Store
from rig.api_life import (
    SERVICE_STEPS,
    SLICE_STEPS,
    Fault,
    Put,
    Remove,
    Step,
    expected,
    in_turns,
    live,
    present,
    service,
    starting_model,
)
from rig.api_model import SERVICES, ApiModel

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = 1000


@pytest.fixture(autouse=True, scope="module")
def no_waits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reflector, "backoff_s", lambda _: 0.0)
        yield


@pytest.mark.timeout(900)  # ten seconds of processor time, on a machine that may be busy
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    services=st.lists(SERVICE_STEPS, max_size=25),
    slices=st.lists(SLICE_STEPS, max_size=25),
    page=st.integers(1, 4),
    turns=st.lists(st.booleans(), max_size=60),
)
def test_every_life_ends_in_the_same_state(
    services: list[Step], slices: list[Step], page: int, turns: list[bool]
) -> None:
    model = starting_model(page)
    *_, resolved = in_turns(model, services, slices, turns)
    wanted = expected(model)
    assert resolved.services == wanted.services
    assert resolved.problems == wanted.problems


# --- the same by hand, so that a failure has a name --------------------------------------------------

A, B = (service(name, 80, "", is_away=False) for name in "ab")
A2 = service("a", 81, "", is_away=False)
LIVES: dict[str, list[Step]] = {
    "nothing happens": [],
    "created, changed, deleted": [Put(A), Put(A2), Remove("a")],
    "deleted and created again": [Put(A), Remove("a"), Put(A2)],
    "deleted while away": [Put(A), Put(B), Fault("cut"), Remove("a"), Put(B)],
    "deleted while away for long": [
        Put(A),
        Put(B),
        Fault("compact"),
        Fault("end"),
        Remove("a"),
        Fault("compact"),
    ],
    "replaced while away for long": [Put(A), Fault("end"), Remove("a"), Put(A2), Fault("compact"), Put(B)],
    "gone in the middle of a list": [
        Fault("unavailable"),
        Put(A),
        Put(B),
        Fault("compact"),
        Remove("a"),
        Put(A2),
    ],
    "rubbish, then an error, then a cut": [
        Put(A),
        Fault("rubbish"),
        Put(B),
        Fault("error"),
        Remove("a"),
        Fault("cut"),
    ],
    "away from the first moment": [*[Fault("unavailable")] * 5, Put(A)],
    "leaves the selection": [Put(A), Put(service("a", 80, "", is_away=True))],
    "leaves the selection while away": [Put(A), Fault("cut"), Put(service("a", 80, "", is_away=True))],
}


@pytest.mark.parametrize("steps", LIVES.values(), ids=LIVES)
@pytest.mark.parametrize("page", [1, 500])
def test_lives(steps: list[Step], page: int) -> None:
    model = ApiModel()
    model.page_limit = page
    model.put(SERVICES, service("c", 80, "", is_away=False))
    store = Store()
    for batch in live(model, SERVICES, wire.SERVICES, steps).batches:
        for each in batch:
            store.apply(each)
    names = {key.name: obj.spec.ports[0].port for key, obj in store.take().objects.items()}  # type: ignore[union-attr]
    assert names == {key.name: obj.spec.ports[0].port for key, obj in present(model).items()}  # type: ignore[union-attr]
