"""Accounts, and the statement of what moved on each.

Rows, then folds, then the table of which event goes to which fold.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import account_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Projection, existing, recorded_at, storable
from shared.folds.table import Column, Table, Type

ACTIVE = "active"
FROZEN = "frozen"
CLOSED = "closed"

accounts = Table(
    "accounts",
    Column("tenant", Type.TEXT_C, primary_key=True),
    Column("account_id", Type.TEXT_C, primary_key=True),
    Column("owner_id", Type.TEXT_C),
    Column("name", Type.TEXT),
    Column("currency", Type.TEXT_C),
    Column("balance_minor", Type.BIGINT),
    Column("status", Type.TEXT_C),
    Column("opened_at", Type.TIMESTAMP),
    Column("version", Type.BIGINT),
)

movements = Table(
    "movements",
    Column("tenant", Type.TEXT_C, primary_key=True),
    Column("account_id", Type.TEXT_C, primary_key=True),
    Column("version", Type.BIGINT, primary_key=True),
    Column("amount_minor", Type.BIGINT),
    Column("balance_after_minor", Type.BIGINT),
    Column("moved_at", Type.TIMESTAMP),
    Column("transfer_id", Type.TEXT_C),
    Column("counterparty_account_id", Type.TEXT_C),
)


class AccountRow(NamedTuple):
    """A row of `accounts`."""

    tenant: str
    account_id: str
    owner_id: str
    name: str
    currency: str
    balance_minor: int
    status: str
    opened_at: datetime
    version: int


class MovementRow(NamedTuple):
    """A row of `movements`: the money that moved at one version of an account; negative if it went out."""

    tenant: str
    account_id: str
    version: int
    amount_minor: int
    balance_after_minor: int
    moved_at: datetime
    transfer_id: str
    counterparty_account_id: str


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
    row=AccountRow,
    key=lambda event, _: (event.account_id,),
    on={
        account_pb2.AccountOpened: opened,
        account_pb2.MoneyDeposited: money_moved,
        account_pb2.MoneyWithdrawn: money_moved,
        account_pb2.AccountFrozen: frozen,
        account_pb2.AccountUnfrozen: unfrozen,
        account_pb2.AccountClosed: closed,
    },
)

MOVEMENTS = Projection(
    table=movements,
    row=MovementRow,
    key=lambda event, envelope: (event.account_id, envelope.version),
    on={
        account_pb2.MoneyDeposited: came_in,
        account_pb2.MoneyWithdrawn: went_out,
    },
    append_only=True,
)
