"""The one diff: applied, it makes what is wanted, and it is the smallest that does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.diff import diff, turnover

tables = st.dictionaries(st.integers(0, 9), st.integers(0, 3))


def test_names_what_to_write_and_what_to_remove() -> None:
    delta = diff({"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 4, "d": 5})
    assert delta.upsert == {"c": 4, "d": 5}
    assert delta.delete == ["a"]


@given(tables, tables)
def test_applied_makes_what_is_wanted(have: dict[int, int], want: dict[int, int]) -> None:
    delta = diff(have, want)
    result = {key: value for key, value in have.items() if key not in delta.delete} | delta.upsert
    assert result == want


@given(tables, tables)
def test_touches_only_what_differs(have: dict[int, int], want: dict[int, int]) -> None:
    delta = diff(have, want)
    assert all(have.get(key) != value for key, value in delta.upsert.items())
    assert set(delta.delete) == have.keys() - want.keys()
    assert bool(delta) == (have != want)


class Named:
    """Equal to any other of its kind: only identity tells two apart."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named)

    def __hash__(self) -> int:
        return 0


ALL = [Named(str(number)) for number in range(8)]
sequences = st.lists(st.sampled_from(ALL), unique_by=id)


@given(sequences, sequences)
def test_turnover_names_who_goes_and_who_comes(old: list[Named], new: list[Named]) -> None:
    gone, came = turnover(old, new)
    names, others = [each.name for each in old], [each.name for each in new]
    assert sorted(each.name for each in gone) == sorted(set(names) - set(others))
    assert sorted(each.name for each in came) == sorted(set(others) - set(names))


def test_turnover_keeps_the_order() -> None:
    gone, came = turnover(ALL[:4], [ALL[7], ALL[6], ALL[2]])
    assert [each.name for each in gone] == ["0", "1", "3"]
    assert [each.name for each in came] == ["7", "6"]
