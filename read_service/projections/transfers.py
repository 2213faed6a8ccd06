"""Transfers: one row each, with the time of every step.

The row, then folds, then the table of which event goes to which fold.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import account_pb2, transfer_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Projection, RowKey, existing, recorded_at, storable
from shared.folds.table import Column, Table, Type

STARTED, COMPLETED, FAILED = "started", "completed", "failed"

transfers = Table(
    "transfers",
    Column("tenant", Type.TEXT_C, primary_key=True),
    Column("transfer_id", Type.TEXT_C, primary_key=True),
    Column("from_account_id", Type.TEXT_C),
    Column("to_account_id", Type.TEXT_C),
    Column("amount_minor", Type.BIGINT),
    Column("currency", Type.TEXT_C),
    Column("status", Type.TEXT_C),
    Column("reason", Type.TEXT),
    Column("compensation", Type.INTEGER),
    Column("started_at", Type.TIMESTAMP),
    Column("debited_at", Type.TIMESTAMP, nullable=True),
    Column("credited_at", Type.TIMESTAMP, nullable=True),
    Column("refunded_at", Type.TIMESTAMP, nullable=True),
    Column("suspended_at", Type.TIMESTAMP, nullable=True),
    Column("ended_at", Type.TIMESTAMP, nullable=True),
)


class TransferRow(NamedTuple):
    """A row of `transfers`. A step that has not happened has no time."""

    tenant: str
    transfer_id: str
    from_account_id: str
    to_account_id: str
    amount_minor: int
    currency: str
    status: str
    reason: str
    compensation: int
    started_at: datetime
    debited_at: datetime | None
    credited_at: datetime | None
    refunded_at: datetime | None
    suspended_at: datetime | None
    ended_at: datetime | None


Moved = account_pb2.MoneyDeposited | account_pb2.MoneyWithdrawn


def transfer_of(
    event: Moved
    | account_pb2.MoneySuspended
    | transfer_pb2.TransferStarted
    | transfer_pb2.TransferCompleted
    | transfer_pb2.TransferFailed,
    _: EventEnvelope,
) -> RowKey | None:
    """The transfer that an event belongs to; most money moves without one."""
    return (event.transfer_id,) if event.transfer_id else None


def started(_: TransferRow | None, event: transfer_pb2.TransferStarted, envelope: EventEnvelope) -> TransferRow:
    """A new transfer."""
    return TransferRow(
        tenant=envelope.tenant,
        transfer_id=event.transfer_id,
        from_account_id=event.from_account_id,
        to_account_id=event.to_account_id,
        amount_minor=event.amount_minor,
        currency=event.currency,
        status=STARTED,
        reason="",
        compensation=transfer_pb2.COMPENSATION_UNSPECIFIED,
        started_at=recorded_at(envelope),
        debited_at=None,
        credited_at=None,
        refunded_at=None,
        suspended_at=None,
        ended_at=None,
    )


def went_out(row: TransferRow | None, _: account_pb2.MoneyWithdrawn, envelope: EventEnvelope) -> TransferRow:
    """The money has left."""
    return existing(row)._replace(debited_at=recorded_at(envelope))


def came_in(row: TransferRow | None, event: account_pb2.MoneyDeposited, envelope: EventEnvelope) -> TransferRow:
    """The money has arrived, or is back where it came from."""
    row = existing(row)
    if event.account_id == row.to_account_id:
        return row._replace(credited_at=recorded_at(envelope))
    return row._replace(refunded_at=recorded_at(envelope))


def suspended(row: TransferRow | None, _: account_pb2.MoneySuspended, envelope: EventEnvelope) -> TransferRow:
    """The money could not be given back."""
    return existing(row)._replace(suspended_at=recorded_at(envelope))


def completed(row: TransferRow | None, _: transfer_pb2.TransferCompleted, envelope: EventEnvelope) -> TransferRow:
    """It has ended well."""
    return existing(row)._replace(status=COMPLETED, ended_at=recorded_at(envelope))


def failed(row: TransferRow | None, event: transfer_pb2.TransferFailed, envelope: EventEnvelope) -> TransferRow:
    """It has ended otherwise."""
    return existing(row)._replace(
        status=FAILED, reason=storable(event.reason), compensation=event.compensation, ended_at=recorded_at(envelope)
    )


TRANSFERS = Projection(
    table=transfers,
    row=TransferRow,
    key=transfer_of,
    on={
        transfer_pb2.TransferStarted: started,
        account_pb2.MoneyWithdrawn: went_out,
        account_pb2.MoneyDeposited: came_in,
        account_pb2.MoneySuspended: suspended,
        transfer_pb2.TransferCompleted: completed,
        transfer_pb2.TransferFailed: failed,
    },
)
