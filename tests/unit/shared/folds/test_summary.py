"""Filters of lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.folds.summary import Condition, begins_with, equals, has, is_id, prefix_end


@pytest.mark.parametrize(
    ("prefix", "end"),
    [("al", "am"), ("a\U0010ffff", "b"), ("\U0010ffff", ""), ("", ""), ("\ud7ff", "\ue000"), ("z", "{")],
)
def test_the_end_of_a_prefix(prefix: str, end: str) -> None:
    """The first text behind all that begin with the prefix."""
    assert prefix_end(prefix) == end


@given(st.text(min_size=1, max_size=4), st.text(max_size=4), st.text(max_size=6))
def test_a_prefix_and_its_end_enclose_exactly_what_begins_with_it(prefix: str, rest: str, other: str) -> None:
    """In byte order, as PostgreSQL's collation C compares."""
    end = prefix_end(prefix).encode()
    for text in (prefix + rest, other):
        within = prefix.encode() <= text.encode() and (not end or text.encode() < end)
        assert within == text.startswith(prefix)


def test_an_empty_field_filters_nothing() -> None:
    """A request without a filter lists all rows."""
    for each in (equals("status", {}), equals("currency"), is_id("a", "b"), begins_with("name", str.casefold)):
        assert each.conditions("") == []


def test_a_filter_names_columns_and_never_values() -> None:
    """Values travel beside the text of the query; ids and prefixes are compared as they are stored."""

    def told(conditions: Sequence[Condition]) -> list[tuple[tuple[str, ...], Any]]:
        return [(condition.sql, condition.value) for condition in conditions]

    assert told(equals("status", {1: "active"}).conditions(1)) == [(("p.status = {}",), "active")]
    assert told(is_id("owner_id").conditions("ABC")) == [(("p.owner_id = {0}",), "abc")]
    assert told(is_id("from_id", "to_id").conditions("a'b")) == [
        (("p.from_id = {0}", "p.to_id = {0} AND p.from_id <> {0}"), "a'b")
    ]
    assert told(begins_with("name", str.casefold).conditions("Al")) == [(("p.name >= {}",), "al"), (("p.name < {}",), "am")]
    assert told(begins_with("name", str).conditions("\U0010ffff")) == [(("p.name >= {}",), "\U0010ffff")]


def test_a_condition_says_the_same_of_a_row_in_memory() -> None:
    """What a watch of a list takes is what a list shows."""

    class Row(NamedTuple):
        owner_id: str
        name: str
        left_at: int | None

    def taken(conditions: Sequence[Condition]) -> list[str]:
        rows = [Row("a", "al", None), Row("b", "al-", 0), Row("c", "am", 1), Row("a", "ak\U0010ffff", None)]
        return [row.name for row in rows if all(condition.holds(row) for condition in conditions)]

    assert taken(equals("owner_id").conditions("a")) == ["al", "ak\U0010ffff"]
    assert taken(is_id("owner_id", "name").conditions("B")) == ["al-"]
    assert taken(is_id("owner_id", "name").conditions("AM")) == ["am"]
    assert taken(has("left_at").conditions(True)) == ["al-", "am"]
    assert taken(begins_with("name", str.casefold).conditions("Al")) == ["al", "al-"]
