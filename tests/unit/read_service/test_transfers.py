"""The folds of transfers: given a row, when an event, then the row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections import transfers
from read_service.projections.transfers import TRANSFERS, TransferRow

NINE = datetime(2026, 3, 4, 9, 0, 0, 123456, tzinfo=UTC)
TEN = NINE + timedelta(hours=1)

STARTED = transfer_pb2.TransferStarted(
    transfer_id="t-1", from_account_id="a-1", to_account_id="a-2", amount_minor=69, currency="USD", suspense_id="s-1"
)
ROW = TransferRow("acme", "t-1", "a-1", "a-2", 69, "USD", "started", "", 0, NINE, None, None, None, None, None)


def at(moment: datetime) -> EventEnvelope:
    """What is known about an event of acme."""
    made = EventEnvelope(tenant="acme", version=1)
    made.recorded_at.FromDatetime(moment)
    return made


def moved(kind: Any, account_id: str) -> Any:
    """Money of the transfer moves on an account."""
    return kind(account_id=account_id, transfer_id="t-1", amount_minor=69)


def test_a_transfer_is_started() -> None:
    """The first event makes the row, with the time of one step."""
    assert transfers.started(STARTED, at(NINE)) == ROW


# (event, the columns it changes at ten)
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "debited": (moved(account_pb2.MoneyWithdrawn, "a-1"), {"debited_at": TEN}),
    "credited": (moved(account_pb2.MoneyDeposited, "a-2"), {"credited_at": TEN}),
    "refunded": (moved(account_pb2.MoneyDeposited, "a-1"), {"refunded_at": TEN}),
    "suspended": (account_pb2.MoneySuspended(suspense_id="s-1", transfer_id="t-1"), {"suspended_at": TEN}),
    "completed": (transfer_pb2.TransferCompleted(transfer_id="t-1"), {"status": "completed", "ended_at": TEN}),
    "failed": (
        transfer_pb2.TransferFailed(transfer_id="t-1", reason="ACCOUNT_FROZEN", compensation=transfer_pb2.COMPENSATION_REFUNDED),
        {"status": "failed", "reason": "ACCOUNT_FROZEN", "compensation": 2, "ended_at": TEN},
    ),
    "failed, for a reason that PostgreSQL cannot hold": (
        transfer_pb2.TransferFailed(transfer_id="t-1", reason="A\0B", compensation=transfer_pb2.COMPENSATION_SUSPENDED),
        {"status": "failed", "reason": "A\ufffdB", "compensation": 3, "ended_at": TEN},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_step_has_its_time(name: str) -> None:
    """Each event sets the time of its own step, and nothing else; by the table that says which fold is whose."""
    event, changed = CHANGES[name]
    fold = dict(TRANSFERS.on)[type(event)]
    assert fold(ROW, event, at(TEN)) == ROW._replace(**changed)
    with pytest.raises(ValueError, match="not there"):
        fold(None, event, at(TEN))


def test_money_that_moves_without_a_transfer_concerns_no_row() -> None:
    """Deposits and withdrawals of users have no transfer."""
    by_a_user: list[Any] = [account_pb2.MoneyDeposited(account_id="a-1"), account_pb2.MoneyWithdrawn(account_id="a-1")]
    assert [TRANSFERS.key(event, at(NINE)) for event in by_a_user] == [None, None]
    ours: list[Any] = [STARTED, *(event for event, _ in CHANGES.values())]
    assert {TRANSFERS.key(event, at(NINE)) for event in ours} == {("t-1",)}
    assert {type(event) for event in ours} == {kind for kind, _ in TRANSFERS.on}
