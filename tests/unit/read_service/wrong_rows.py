"""Folds and summaries that do not fit. mypy refuses each line that ends in `# wrong`, and no other.

No test runs this file and mypy does not check it with the rest: `tests/unit/test_wrong_rows.py` gives it to mypy.
"""

from __future__ import annotations

from bank.v1 import account_pb2, person_pb2, transfer_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections import accounts, people, transfers, users
from read_service.projections.accounts import AccountRow
from read_service.registry import CALLERS
from shared.folds.projection import Group, Projection, existing, making, on
from shared.folds.summary import History, Summary, equals, rows_of
from shared.projections.summary_rpcs import SummaryRpcs


def renamed(row: AccountRow | None, event: person_pb2.PersonRenamed, envelope: EventEnvelope) -> AccountRow:
    """A fold with fields that the event and the row do not have."""
    existing(row)._replace(name=event.name)
    existing(row)._replace(name=event.title)  # wrong
    existing(row)._replace(title=event.name)  # wrong
    return existing(row)._replace(name=envelope.version)  # wrong


def folds() -> None:
    """A fold of another event, or of another table's row."""
    on(account_pb2.MoneyDeposited, accounts.money_moved)
    on(account_pb2.AccountOpened, accounts.money_moved)  # wrong
    on(person_pb2.PersonRenamed, accounts.opened)  # wrong
    making(transfer_pb2.TransferStarted, transfers.started)
    making(transfer_pb2.TransferFailed, transfers.started)  # wrong
    key = accounts.ACCOUNTS.key
    Projection(table=accounts.accounts, key=key, on=[on(account_pb2.AccountOpened, accounts.opened)])
    Projection(table=accounts.accounts, key=key, on=[on(person_pb2.PersonRenamed, people.renamed)])  # wrong
    Projection(table=accounts.accounts, key=key, on=[on(accounts.opened, accounts.opened)])  # wrong


def summaries() -> None:
    """A mapping from another row, a filter of nothing, a row of the registry without roles."""
    history, source = History("account"), rows_of(accounts.accounts)
    by = {"status": equals("status", accounts.STATUSES)}
    order = {"opened_at": "opened_at"}
    Summary(name="account", source=source, show=accounts.show, history=history, orders=order, filters=by)
    Summary(name="account", source=source, show=users.show, history=history, orders=order, filters=by)  # wrong
    Summary(name="account", source=source, show=accounts.show, history=history, orders=order, filters={"x": "y"})  # wrong
    SummaryRpcs(accounts.ACCOUNT, Group("accounts", (accounts.ACCOUNTS,)), CALLERS)
    SummaryRpcs(accounts.ACCOUNT, Group("accounts", (accounts.accounts,)), CALLERS)  # wrong
    SummaryRpcs(accounts.ACCOUNT, Group("accounts", (accounts.ACCOUNTS,)), {"user"})  # wrong
