"""Which of a list's conditions are left to ask of the rows behind a page."""

from __future__ import annotations

import pytest

from foldline.v1.range_pb2 import WholeRange
from read_service.projections.accounts import ACCOUNT
from shared.projections.filtering import needed_behind


@pytest.mark.parametrize(
    ("key", "descending", "left"),
    [
        (50, False, ["p.balance_minor <= {}"]),
        (50, True, ["p.balance_minor >= {}"]),
        (5, False, ["p.balance_minor >= {}", "p.balance_minor <= {}"]),
        (500, True, ["p.balance_minor >= {}", "p.balance_minor <= {}"]),
    ],
)
def test_the_bound_that_the_key_meets_is_left_out(key: int, descending: bool, left: list[str]) -> None:
    """On the side where the order begins; a key outside of the range, which no token of ours holds, leaves both."""
    found = {"balance_minor": ACCOUNT.filters["balance_minor"].conditions(WholeRange(min=10, max=100)), "currency": []}
    needed = needed_behind(found, "balance_minor", key, descending=descending)
    assert [text for it in needed["balance_minor"] for text in it.sql] == left


def test_other_columns_conditions_stay() -> None:
    """They say nothing of the key."""
    found = {
        "balance_minor": ACCOUNT.filters["balance_minor"].conditions(WholeRange(min=10)),
        "currency": ACCOUNT.filters["currency"].conditions("USD"),
    }
    assert needed_behind(found, "opened_at", 50, descending=False) == found
