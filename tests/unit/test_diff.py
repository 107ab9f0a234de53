"""The one diff: applied, it makes what is wanted, and it is the smallest that does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.diff import diff

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
