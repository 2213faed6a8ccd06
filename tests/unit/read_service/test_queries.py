"""What of the queries is plain computing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_service.queries import prefix_end


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
