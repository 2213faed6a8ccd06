"""The folds of accounts and their movements: given a row, when an event, then the row."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bank.v1 import account_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections import accounts
from read_service.projections.accounts import AccountRow, MovementRow

NINE = datetime(2026, 3, 4, 9, 0, 0, 123456, tzinfo=UTC)
BLUE = AccountRow("acme", "a-1", "p-1", "blue", "USD", 100, "active", NINE, 2)


def envelope(version: int) -> EventEnvelope:
    """What is known about an event of acme, recorded at nine."""
    made = EventEnvelope(tenant="acme", version=version)
    made.recorded_at.FromDatetime(NINE)
    return made


def test_an_account_is_opened_with_nothing_on_it() -> None:
    """The first event makes the row."""
    event = account_pb2.AccountOpened(account_id="a-1", owner_id="p-1", currency="USD", name="blue")
    expected = AccountRow("acme", "a-1", "p-1", "blue", "USD", 0, "active", NINE, 1)
    assert accounts.opened(None, event, envelope(1)) == expected
    with pytest.raises(ValueError, match="already"):
        accounts.opened(BLUE, event, envelope(1))


def test_the_balance_is_what_the_event_says() -> None:
    """Events carry the balance after, so a fold has nothing to compute."""
    event = account_pb2.MoneyWithdrawn(account_id="a-1", amount_minor=69, balance_after_minor=31)
    assert accounts.money_moved(BLUE, event, envelope(3)) == BLUE._replace(balance_minor=31, version=3)


def test_freezing_and_back() -> None:
    """The status follows; the balance stays."""
    frozen = accounts.frozen(BLUE, account_pb2.AccountFrozen(account_id="a-1"), envelope(3))
    assert frozen == BLUE._replace(status="frozen", version=3)
    again = accounts.unfrozen(frozen, account_pb2.AccountUnfrozen(account_id="a-1"), envelope(4))
    assert again == BLUE._replace(version=4)


def test_closing() -> None:
    """The row stays, so that the statement can still be read."""
    closed = accounts.closed(BLUE._replace(balance_minor=0), account_pb2.AccountClosed(account_id="a-1"), envelope(4))
    assert closed == AccountRow("acme", "a-1", "p-1", "blue", "USD", 0, "closed", NINE, 4)


@pytest.mark.parametrize("fold", [accounts.money_moved, accounts.frozen, accounts.unfrozen, accounts.closed])
def test_nothing_happens_to_an_account_that_is_not_there(fold: object) -> None:
    """Such an event stops the projection."""
    with pytest.raises(ValueError, match="not there"):
        fold(None, account_pb2.AccountFrozen(), envelope(2))  # type: ignore[operator]


def test_a_statement_has_a_sign() -> None:
    """What came in is positive, what went out negative; without a transfer, nobody else is named."""
    came = account_pb2.MoneyDeposited(account_id="a-1", amount_minor=100, balance_after_minor=100)
    went = account_pb2.MoneyWithdrawn(account_id="a-1", amount_minor=69, balance_after_minor=31)
    assert accounts.came_in(None, came, envelope(2)) == MovementRow("acme", "a-1", 2, 100, 100, NINE, "", "")
    assert accounts.went_out(None, went, envelope(3)) == MovementRow("acme", "a-1", 3, -69, 31, NINE, "", "")


def test_a_statement_names_the_transfer_and_its_other_end() -> None:
    """In both directions."""
    more = {"account_id": "a-1", "transfer_id": "t-1", "counterparty_account_id": "a-2"}
    came = account_pb2.MoneyDeposited(**more, amount_minor=5, balance_after_minor=105)
    went = account_pb2.MoneyWithdrawn(**more, amount_minor=5, balance_after_minor=95)
    assert accounts.came_in(None, came, envelope(3)) == MovementRow("acme", "a-1", 3, 5, 105, NINE, "t-1", "a-2")
    assert accounts.went_out(None, went, envelope(3)) == MovementRow("acme", "a-1", 3, -5, 95, NINE, "t-1", "a-2")
