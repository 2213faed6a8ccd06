"""Accounts, and the statement of what moved on each.

Rows, then folds, then the table of which event goes to which fold.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import BigInteger, Column, DateTime, MetaData, Table, Text

from bank.v1 import account_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Projection, existing, recorded_at, storable

metadata = MetaData()

ACTIVE = "active"
FROZEN = "frozen"
CLOSED = "closed"

accounts = Table(
    "accounts",
    metadata,
    Column("tenant", Text(collation="C"), primary_key=True),
    Column("account_id", Text(collation="C"), primary_key=True),
    Column("owner_id", Text(collation="C"), nullable=False),
    Column("name", Text, nullable=False),
    Column("currency", Text(collation="C"), nullable=False),
    Column("balance_minor", BigInteger, nullable=False),
    Column("status", Text(collation="C"), nullable=False),
    Column("opened_at", DateTime(timezone=True), nullable=False),
    Column("version", BigInteger, nullable=False),
)

movements = Table(
    "movements",
    metadata,
    Column("tenant", Text(collation="C"), primary_key=True),
    Column("account_id", Text(collation="C"), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("amount_minor", BigInteger, nullable=False),
    Column("balance_after_minor", BigInteger, nullable=False),
    Column("moved_at", DateTime(timezone=True), nullable=False),
    Column("transfer_id", Text(collation="C"), nullable=False),
    Column("counterparty_account_id", Text(collation="C"), nullable=False),
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
