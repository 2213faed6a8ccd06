"""The folds of people and their totals: given a row, when an event, then the row."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bank.v1 import account_pb2, person_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections import people
from read_service.projections.people import PersonRow, PersonTotalRow

NINE = datetime(2026, 3, 4, 9, 0, 0, 123456, tzinfo=UTC)
ALICE = PersonRow("acme", "p-1", "Alice O'Wonderland", "alice o'wonderland", NINE, 0, 1, "active", None)


def envelope(version: int) -> EventEnvelope:
    """What is known about an event of acme, recorded at nine."""
    made = EventEnvelope(tenant="acme", version=version)
    made.recorded_at.FromDatetime(NINE)
    return made


def test_a_person_is_registered() -> None:
    """The first event makes the row, with no account."""
    event = person_pb2.PersonRegistered(person_id="p-1", name="Alice O'Wonderland")
    assert people.registered(None, event, envelope(1)) == ALICE


def test_a_person_takes_another_name() -> None:
    """The name, its folded form and the version change, and nothing else."""
    event = person_pb2.PersonRenamed(person_id="p-1", name="Alice COOPER")
    expected = PersonRow("acme", "p-1", "Alice COOPER", "alice cooper", NINE, 0, 2, "active", None)
    assert people.renamed(ALICE, event, envelope(2)) == expected


def test_an_account_is_counted() -> None:
    """An attached account raises the count and the version of the person's own stream."""
    event = person_pb2.AccountAttached(person_id="p-1", account_id="a-1")
    expected = PersonRow("acme", "p-1", "Alice O'Wonderland", "alice o'wonderland", NINE, 1, 2, "active", None)
    assert people.account_attached(ALICE, event, envelope(2)) == expected


def test_an_account_is_counted_no_more() -> None:
    """A detached account lowers the count; the version is that of the person's own stream."""
    event = person_pb2.AccountDetached(person_id="p-1", account_id="a-1")
    assert people.account_detached(ALICE._replace(open_account_count=2), event, envelope(4)) == PersonRow(
        "acme", "p-1", "Alice O'Wonderland", "alice o'wonderland", NINE, 1, 4, "active", None
    )
    with pytest.raises(ValueError, match="not there"):
        people.account_detached(None, event, envelope(4))


def test_a_person_is_closed() -> None:
    """With all accounts, which are closed in the same transaction and counted no more."""
    event = person_pb2.PersonClosed(person_id="p-1", account_ids=["a-1", "a-2"])
    expected = PersonRow("acme", "p-1", "Alice O'Wonderland", "alice o'wonderland", NINE, 0, 4, "closed", NINE)
    assert people.closed(ALICE._replace(open_account_count=2), event, envelope(4)) == expected


def test_totals_go_up_and_down_beyond_64_bits() -> None:
    """A total adds up several accounts, so it is not bound by one account's range."""
    nearly = PersonTotalRow("acme", "p-1", "USD", 9_223_372_036_854_775_807)
    more = account_pb2.MoneyDeposited(owner_id="p-1", currency="USD", amount_minor=9_223_372_036_854_775_807)
    less = account_pb2.MoneyWithdrawn(owner_id="p-1", currency="USD", amount_minor=7)
    raised = people.deposited(nearly, more, envelope(2))
    assert raised == PersonTotalRow("acme", "p-1", "USD", 18_446_744_073_709_551_614)
    assert people.withdrawn(raised, less, envelope(3)) == PersonTotalRow("acme", "p-1", "USD", 18_446_744_073_709_551_607)


def test_a_second_account_of_a_currency_keeps_its_total() -> None:
    """Opening an account begins a total at zero, once."""
    event = account_pb2.AccountOpened(owner_id="p-1", currency="USD")
    first = people.account_opened(None, event, envelope(1))
    assert first == PersonTotalRow("acme", "p-1", "USD", 0)
    assert people.account_opened(first._replace(total_minor=5), event, envelope(1)).total_minor == 5


def test_what_cannot_be_is_raised() -> None:
    """An event that does not fit the row stops the projection rather than being guessed at."""
    with pytest.raises(ValueError, match="already"):
        people.registered(ALICE, person_pb2.PersonRegistered(), envelope(1))
    with pytest.raises(ValueError, match="not there"):
        people.renamed(None, person_pb2.PersonRenamed(), envelope(2))
    with pytest.raises(ValueError, match="not there"):
        people.deposited(None, account_pb2.MoneyDeposited(), envelope(2))


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("ALICE", "alice"),
        ("Straße", "strasse"),
        ("\ufb01nn", "finn"),  # the ligature fi
        ("Å", "a"),
        ("A\u030a", "a"),
        ("André Ångström", "andre angstrom"),
        ("Ελλάδα", "ελλαδα"),  # A and a combining ring
        ("\u0345", "\u03b9"),  # changes under NFKC only after casefold
        ("a\0b", "a\ufffdb"),
    ],
)
def test_names_are_folded_for_search(name: str, folded: str) -> None:
    """Neither case, accents nor the way of writing a letter matter, and no name stops the tables."""
    assert people.fold_name(name) == folded


def test_a_name_that_postgresql_cannot_hold_is_changed_rather_than_stopping_us() -> None:
    """NUL passes protobuf but no text column."""
    row = people.registered(None, person_pb2.PersonRegistered(person_id="p-1", name="a\0b"), envelope(1))
    assert (row.name, row.name_folded) == ("a\ufffdb", "a\ufffdb")
