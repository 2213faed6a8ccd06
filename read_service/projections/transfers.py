"""Transfers: one row each, with the time of every step.

The row, then folds, then the table of which event goes to which fold, then the summary that is shown.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import account_pb2, transfer_pb2, transfer_query_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.moments import set_moment
from shared.folds.projection import Projection, Purge, RowKey, existing, making, on, recorded_at, storable
from shared.folds.summary import AggregateName, History, Summary, equals, is_id, moment_between, rows_of, whole_between
from shared.folds.table import Code, Int32, Table, by

STARTED, COMPLETED, FAILED = "started", "completed", "failed"


class TransferRow(NamedTuple):
    """A row of `transfers`. A step that has not happened has no time."""

    tenant: Code
    transfer_id: Code
    from_account_id: Code
    to_account_id: Code
    amount_minor: int
    currency: Code
    status: Code
    reason: str
    compensation: Int32
    started_at: datetime
    debited_at: datetime | None
    credited_at: datetime | None
    refunded_at: datetime | None
    suspended_at: datetime | None
    ended_at: datetime | None


transfers = Table(
    "transfers",
    TransferRow,
    keys=2,
    indexes=[
        by("started_at"),
        by("amount_minor"),
        by("status", "started_at"),
        by("from_account_id", "started_at"),
        by("from_account_id", "status", "started_at"),
        by("to_account_id", "started_at"),
        by("to_account_id", "status", "started_at"),
    ],
    filled=60,
)


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


def started(event: transfer_pb2.TransferStarted, envelope: EventEnvelope) -> TransferRow:
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


def without_source(row: TransferRow) -> TransferRow:
    """The account that the money came from is purged: when it left and came back is not known any more."""
    return row._replace(debited_at=None, refunded_at=None)


def without_target(row: TransferRow) -> TransferRow:
    """The account that the money went to is purged."""
    return row._replace(credited_at=None)


TRANSFERS = Projection(
    table=transfers,
    key=transfer_of,
    on=[
        making(transfer_pb2.TransferStarted, started),
        on(account_pb2.MoneyWithdrawn, went_out),
        on(account_pb2.MoneyDeposited, came_in),
        on(account_pb2.MoneySuspended, suspended),
        on(transfer_pb2.TransferCompleted, completed),
        on(transfer_pb2.TransferFailed, failed),
    ],
    purges=[
        Purge("account", "from_account_id", without_source, order="started_at"),
        Purge("account", "to_account_id", without_target, order="started_at"),
    ],
)

STATUSES = {
    transfer_query_pb2.TRANSFER_STATUS_STARTED: STARTED,
    transfer_query_pb2.TRANSFER_STATUS_COMPLETED: COMPLETED,
    transfer_query_pb2.TRANSFER_STATUS_FAILED: FAILED,
}
STATUS_OF = {text: status for status, text in STATUSES.items()}


def show(row: TransferRow, shown: transfer_query_pb2.TransferSummary) -> None:
    """A transfer as it is shown, with the steps that have happened."""
    steps = [
        ("started", row.started_at),
        ("debited", row.debited_at),
        ("credited", row.credited_at),
        ("refunded", row.refunded_at),
        ("suspended", row.suspended_at),
        (row.status, row.ended_at),
    ]
    shown.transfer_id = row.transfer_id
    shown.from_account_id = row.from_account_id
    shown.to_account_id = row.to_account_id
    shown.amount_minor = row.amount_minor
    shown.currency = row.currency
    shown.status = STATUS_OF[row.status]
    shown.reason = row.reason
    shown.compensation = transfer_pb2.Compensation.ValueType(row.compensation)
    for name, moment in steps:
        if moment is not None:
            set_moment(shown.steps.add(name=name).happened_at, moment)
    set_moment(shown.started_at, row.started_at)
    set_moment(shown.ended_at, row.ended_at)


def where_money_moves(event: transfer_pb2.TransferStarted) -> tuple[AggregateName, ...]:
    """The aggregates whose events tell of the transfer's steps."""
    return ("account", event.from_account_id), ("account", event.to_account_id), ("suspense", event.suspense_id)


TRANSFER = Summary(
    name="transfer",
    source=rows_of(transfers),
    show=show,
    history=History(
        "transfer",
        names={transfer_pb2.TransferStarted: where_money_moves},
        # The process ends a transfer with its last command, when all others are answered.
        ends=(transfer_pb2.TransferCompleted, transfer_pb2.TransferFailed),
    ),
    orders={"started_at": "started_at", "amount_minor": "amount_minor"},
    filters={
        "account_id": is_id("from_account_id", "to_account_id"),
        "status": equals("status", STATUSES),
        "amount_minor": whole_between("amount_minor"),
        "started_at": moment_between("started_at"),
    },
    only_in={
        "account_id": ["started_at"],
        "status": ["started_at"],
        "amount_minor": ["amount_minor"],
        "started_at": ["started_at"],
    },
)
