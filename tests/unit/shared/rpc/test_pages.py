"""Page tokens."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from shared.folds.errors import Invalid
from shared.rpc import pages

QUERY = ("ListPersons", "acme", "name_folded", "False", "al")


def test_a_token_goes_on_behind_its_row() -> None:
    """The sort keys come back as they were."""
    token = pages.encode(QUERY, ["alice ä", "id-1"])
    assert pages.decode(QUERY, token, (str, str)) == ["alice ä", "id-1"]


def test_the_first_page_has_no_token_and_the_last_gives_none() -> None:
    """An empty token is no token, in both directions."""
    assert pages.decode(QUERY, "", (str, str)) is None
    assert pages.cut([1, 2], 2, QUERY, lambda row: (row,)) == ([1, 2], "")
    rows, token = pages.cut([1, 2, 3], 2, QUERY, lambda row: (row,))
    assert rows == [1, 2]
    assert pages.decode(QUERY, token, (int,)) == [2]


@pytest.mark.parametrize("at", range(len(QUERY)))
def test_a_token_of_another_query_is_refused(at: int) -> None:
    """Whatever differs (list, tenant, order, direction, filter), the token is of no use."""
    other = list(QUERY)
    other[at] = "other"
    with pytest.raises(Invalid) as refusal:
        pages.decode(other, pages.encode(QUERY, ["a", "b"]), (str, str))
    assert refusal.value.reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize("token", ["x", "é", "!!", "bnVsbA", "W10", "e30", "WyIwIl0"])
def test_what_is_no_token_is_bad_input(token: str) -> None:
    """Garbage never raises anything but the refusal."""
    with pytest.raises(Invalid):
        pages.decode(QUERY, token, (str, str))


@pytest.mark.parametrize("keys", [[1, "b"], ["a"], ["a", "b", "c"], ["a", True]])
def test_keys_of_another_kind_are_refused(keys: list[str | int]) -> None:
    """A forged token with the right digest cannot put a wrong type into the query."""
    with pytest.raises(Invalid):
        pages.decode(QUERY, pages.encode(QUERY, keys), (str, str))


def test_a_moment_and_an_id_come_back_as_they_were() -> None:
    """To the microsecond; and a forged token with the right digest cannot name what no row has."""
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    assert pages.moment_of(pages.moment_key(moment)) == moment
    assert pages.uuid_of("0f1c2d3e-4a5b-4c6d-8e7f-001122334455") == "0f1c2d3e-4a5b-4c6d-8e7f-001122334455"
    for forge in (
        lambda: pages.moment_of(2**62),
        lambda: pages.moment_of(-(2**62)),
        lambda: pages.uuid_of("1"),
        lambda: pages.uuid_of(""),
    ):
        with pytest.raises(Invalid) as refusal:
            forge()
        assert refusal.value.reason == "PAGE_TOKEN_INVALID"
