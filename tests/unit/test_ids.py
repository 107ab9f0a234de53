"""Allocation of ids and slot ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ebpfproxy.dataplane.bpf.ids import IdAllocator, SlotAllocator
from ebpfproxy.errors import MapFullError

GRACE_S = 1.0
LIMIT = 64


def test_ids_start_at_one_and_never_hand_out_zero() -> None:
    ids = IdAllocator("backends", 4)
    assert ids.allocate(3) == [1, 2, 3]


def test_an_id_is_reused_as_late_as_possible() -> None:
    ids = IdAllocator("backends", 5)
    first = ids.allocate()[0]
    ids.release(first)
    assert [ids.allocate()[0] for _ in range(4)] == [2, 3, 4, first]


def test_taken_ids_are_not_handed_out_and_new_ones_start_behind_them() -> None:
    ids = IdAllocator("backends", 6)
    ids.take(2)
    ids.take(4)
    assert ids.allocate(3) == [5, 1, 3]


def test_a_full_id_range_names_map_limit_and_setting_and_hands_out_nothing() -> None:
    ids = IdAllocator("backends", 4)
    ids.allocate(2)
    with pytest.raises(MapFullError, match=r"map backends is full: all 4 .* ebpfproxy\.mapSizes\.backends"):
        ids.allocate(2)
    assert ids.allocate(1) == [3]


def test_an_id_outside_the_map_is_refused() -> None:
    with pytest.raises(ValueError, match="outside map backends"):
        IdAllocator("backends", 4).take(4)


@given(st.lists(st.one_of(st.integers(1, 4), st.integers(-10, -1)), max_size=60))
def test_ids_are_unique_while_in_use(steps: list[int]) -> None:
    """A positive step allocates that many, a negative one releases."""
    ids = IdAllocator("backends", 20)
    used: list[int] = []
    for step in steps:
        if step < 0 and used:
            ids.release(used.pop(step % len(used)))
        elif step > 0 and len(used) + step <= 19:
            new = ids.allocate(step)
            assert not set(new) & set(used)
            assert all(0 < number < 20 for number in new)
            used += new
    assert len(ids) == len(used)


class Slots(RuleBasedStateMachine):
    """Ranges never overlap, are not reused within the grace period, and all space comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotAllocator(LIMIT, GRACE_S)
        self.now_s = 0.0
        self.used: dict[int, int] = {}
        self.resting: list[tuple[float, int, int]] = []

    def _cells(self, base: int, size: int) -> set[int]:
        return set(range(base, base + size))

    def _taken(self) -> set[int]:
        cells = [self._cells(base, size) for base, size in self.used.items()]
        cells += [self._cells(base, size) for _, base, size in self.resting]
        return set().union(*cells)

    @rule(size=st.integers(1, 20))
    def allocate(self, size: int) -> None:
        taken = self._taken()
        try:
            base = self.slots.allocate(size)
        except MapFullError:
            room = [n for n in range(LIMIT - size + 1) if not self._cells(n, size) & taken]
            assert not room, f"{size} slots fit at {room[0]}"
        else:
            assert not self._cells(base, size) & taken
            assert 0 <= base <= LIMIT - size
            self.used[base] = size

    @rule(base=st.integers(0, LIMIT - 1), size=st.integers(1, 8))
    def take(self, base: int, size: int) -> None:
        is_free = base + size <= LIMIT and not self._cells(base, size) & self._taken()
        if is_free:
            self.slots.take(base, size)
            self.used[base] = size
        else:
            with pytest.raises(ValueError, match="not free"):
                self.slots.take(base, size)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        base = data.draw(st.sampled_from(sorted(self.used)))
        self.slots.release(base, self.now_s)
        self.resting.append((self.now_s + GRACE_S, base, self.used.pop(base)))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        base = data.draw(st.sampled_from(sorted(self.used)))
        self.slots.cancel(base)
        del self.used[base]

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.slots.collect(self.now_s)
        self.resting = [rest for rest in self.resting if rest[0] > self.now_s]

    @invariant()
    def accounts(self) -> None:
        assert self.slots.used == self.used
        assert self.slots.free == LIMIT - len(self._taken())

    def teardown(self) -> None:
        for base in list(self.used):
            self.slots.release(base, self.now_s)
        self.slots.collect(self.now_s + GRACE_S)
        assert self.slots.allocate(LIMIT) == 0


TestSlots = Slots.TestCase


def test_full_slots_name_map_limit_and_setting() -> None:
    slots = SlotAllocator(8, GRACE_S)
    slots.allocate(6)
    with pytest.raises(
        MapFullError, match=r"map slots is full: no 3 entries in a row .* 8 .*mapSizes\.slots"
    ):
        slots.allocate(3)
