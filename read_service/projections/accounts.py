"""Accounts, and the statement of what moved on each.

Rows, then folds, then the table of which event goes to which fold, then the summary that is shown.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import account_pb2, account_query_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.moments import set_moment, timestamp
from shared.folds.projection import MARKS, Projection, Purge, boxed_at, existing, key_of, on, recorded_at, storable
from shared.folds.summary import History, Summary, equals, is_id, moment_between, rows_of, whole_between
from shared.folds.table import Code, Table, by

ACTIVE = "active"
FROZEN = "frozen"
CLOSED = "closed"


class AccountRow(NamedTuple):
    """A row of `accounts`. `boxed_at` is None unless the account is in the archive."""

    tenant: Code
    account_id: Code
    owner_id: Code
    name: str
    currency: Code
    balance_minor: int
    status: Code
    opened_at: datetime
    version: int
    boxed_at: datetime | None = None


accounts = Table(
    "accounts",
    AccountRow,
    keys=2,
    indexes=[
        by("opened_at"),
        by("balance_minor"),
        by("owner_id", "opened_at"),
        by("status", "opened_at"),
        by("status", "balance_minor"),
        by("currency", "opened_at"),
        by("currency", "balance_minor"),
    ],
    filled=60,
)


class MovementRow(NamedTuple):
    """A row of `movements`: the money that moved at one version of an account; negative if it went out."""

    tenant: Code
    account_id: Code
    version: int
    amount_minor: int
    balance_after_minor: int
    moved_at: datetime
    transfer_id: Code
    counterparty_account_id: Code


movements = Table("movements", MovementRow, keys=3)


def opened(row: AccountRow | None, event: account_pb2.AccountOpened, envelope: EventEnvelope) -> AccountRow:
    """A new account, with nothing on it."""
    if row is not None:
        raise ValueError("this account is open already")
    return AccountRow(
        tenant=envelope.tenant,
        account_id=event.account_id,
        owner_id=event.owner_id,
        name=storable(event.name),
        currency=event.currency,
        balance_minor=0,
        status=ACTIVE,
        opened_at=recorded_at(envelope),
        version=envelope.version,
    )


def money_moved(
    row: AccountRow | None, event: account_pb2.MoneyDeposited | account_pb2.MoneyWithdrawn, envelope: EventEnvelope
) -> AccountRow:
    """Another balance."""
    return existing(row)._replace(balance_minor=event.balance_after_minor, version=envelope.version)


def frozen(row: AccountRow | None, _: account_pb2.AccountFrozen, envelope: EventEnvelope) -> AccountRow:
    """No money moves any more."""
    return existing(row)._replace(status=FROZEN, version=envelope.version)


def unfrozen(row: AccountRow | None, _: account_pb2.AccountUnfrozen, envelope: EventEnvelope) -> AccountRow:
    """Money moves again."""
    return existing(row)._replace(status=ACTIVE, version=envelope.version)


def closed(row: AccountRow | None, _: account_pb2.AccountClosed, envelope: EventEnvelope) -> AccountRow:
    """It takes no more money and gives none."""
    return existing(row)._replace(status=CLOSED, version=envelope.version)


def marked(row: AccountRow | None, _: object, envelope: EventEnvelope) -> AccountRow:
    """Into the archive, or out of it."""
    return existing(row)._replace(version=envelope.version, boxed_at=boxed_at(envelope))


def came_in(_: MovementRow | None, event: account_pb2.MoneyDeposited, envelope: EventEnvelope) -> MovementRow:
    """A line of the statement."""
    return MovementRow(
        envelope.tenant,
        event.account_id,
        envelope.version,
        event.amount_minor,
        event.balance_after_minor,
        recorded_at(envelope),
        event.transfer_id,
        event.counterparty_account_id,
    )


def went_out(_: MovementRow | None, event: account_pb2.MoneyWithdrawn, envelope: EventEnvelope) -> MovementRow:
    """A line of the statement."""
    return MovementRow(
        envelope.tenant,
        event.account_id,
        envelope.version,
        -event.amount_minor,
        event.balance_after_minor,
        recorded_at(envelope),
        event.transfer_id,
        event.counterparty_account_id,
    )


ACCOUNTS = Projection(
    table=accounts,
    key=key_of("account", lambda event: event.account_id),
    on=[
        on(account_pb2.AccountOpened, opened),
        on(account_pb2.MoneyDeposited, money_moved),
        on(account_pb2.MoneyWithdrawn, money_moved),
        on(account_pb2.AccountFrozen, frozen),
        on(account_pb2.AccountUnfrozen, unfrozen),
        on(account_pb2.AccountClosed, closed),
        *(on(mark, marked) for mark in MARKS),
    ],
    purges=[Purge("account", "account_id")],
)

MOVEMENTS = Projection(
    table=movements,
    key=lambda event, envelope: (event.account_id, envelope.version),
    on=[
        on(account_pb2.MoneyDeposited, came_in),
        on(account_pb2.MoneyWithdrawn, went_out),
    ],
    append_only=True,
    purges=[Purge("account", "account_id")],
)

STATUSES = {
    account_query_pb2.ACCOUNT_STATUS_ACTIVE: ACTIVE,
    account_query_pb2.ACCOUNT_STATUS_FROZEN: FROZEN,
    account_query_pb2.ACCOUNT_STATUS_CLOSED: CLOSED,
}
STATUS_OF = {text: status for status, text in STATUSES.items()}


def show(row: AccountRow, shown: account_query_pb2.AccountSummary) -> None:
    """An account as it is shown."""
    shown.account_id = row.account_id
    shown.owner_id = row.owner_id
    shown.name = row.name
    shown.currency = row.currency
    shown.balance_minor = row.balance_minor
    shown.status = STATUS_OF[row.status]
    set_moment(shown.opened_at, row.opened_at)
    shown.version = row.version
    set_moment(shown.boxed_at, row.boxed_at)


def movement_view(row: MovementRow) -> account_query_pb2.Movement:
    """A line of the statement as it is shown."""
    return account_query_pb2.Movement(
        version=row.version,
        amount_minor=row.amount_minor,
        balance_after_minor=row.balance_after_minor,
        moved_at=timestamp(row.moved_at),
        transfer_id=row.transfer_id,
        counterparty_account_id=row.counterparty_account_id,
    )


ACCOUNT = Summary(
    name="account",
    source=rows_of(accounts),
    show=show,
    history=History("account"),
    orders={"opened_at": "opened_at", "balance_minor": "balance_minor"},
    filters={
        "owner_id": is_id("owner_id"),
        "status": equals("status", STATUSES),
        "currency": equals("currency"),
        "balance_minor": whole_between("balance_minor"),
        "opened_at": moment_between("opened_at"),
    },
    only_in={"balance_minor": ["balance_minor"], "opened_at": ["opened_at"]},
    apart={("status", "currency"): "owner_id"},
)
