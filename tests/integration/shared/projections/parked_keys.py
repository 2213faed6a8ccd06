"""A group of tables over accounts whose fold raises for amounts that a test breaks, and what operators ask of parked keys."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
from google.protobuf.message import DecodeError, Message

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, MOVEMENTS, AccountRow, money_moved
from read_service.projections.people import PERSON_TOTALS
from shared.folds.projection import Group
from shared.line import checkpoint
from shared.platform.postgres import Connection, connect
from shared.projections.tables import Item, Tables
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import Store, uid
from tests.support.fakes.tables import SHARD, folding

ALICE, BLUE, RED = uid(1), uid(2), uid(3)


broken: set[int] = set()
"""Amounts of deposits on which the fold of accounts raises."""


slow: set[int] = set()
"""Amounts of deposits whose fold takes half a second."""


unreadable: set[str] = set()
"""Ids of events that cannot be read."""


def deposited(row: AccountRow | None, event: account_pb2.MoneyDeposited, envelope: EventEnvelope) -> AccountRow:
    """As the bank's, but for the amounts that are broken."""
    if event.amount_minor in broken:
        raise ArithmeticError("of this amount nothing can be made")
    if event.amount_minor in slow:
        time.sleep(0.5)
    return money_moved(row, event, envelope)


GROUP = Group("accounts", (folding(ACCOUNTS, account_pb2.MoneyDeposited, deposited), MOVEMENTS, PERSON_TOTALS))


NAMES = [projection.table.name for projection in GROUP.projections]


PARK_RED = """
INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error)
VALUES (gen_random_uuid(), 'accounts', 1, true, 'acme', 'accounts', %s, %s, '')
"""


class Reader(Tables):
    """Cannot read the events that are said to be unreadable: as a release whose contracts are wrong."""

    def items_of(self, envelope: EventEnvelope) -> tuple[Message, list[Item]] | None:
        if envelope.event_id in unreadable:
            raise DecodeError("of these bytes nothing can be made")
        return super().items_of(envelope)


def bank() -> Store:
    """Alice with two accounts in dollars, and 100 on the first."""
    store = Store()
    store.person("acme", ALICE, "Alice")
    store.account("acme", BLUE, ALICE)
    store.account("acme", RED, ALICE)
    store.deposit("acme", BLUE, ALICE, 100, 100)
    return store


@asynccontextmanager
async def at_begin(database: Database, group: Group = GROUP) -> AsyncIterator[tuple[Tables, Connection]]:
    """Tables and a connection that is at the begin of the line."""
    tables = Reader(group)
    async with await connect(database.app, application_name="test") as connection:
        await checkpoint.load(connection, GROUP.name, SHARD)
        await tables.refresh(connection, SHARD)
        yield tables, connection


async def apply(tables: Tables, connection: Connection, store: Store, *, batch: int = 500) -> None:
    """Applies the line from the checkpoint to its end."""
    at = await checkpoint.load(connection, GROUP.name, SHARD)
    while at.position < len(store.events):
        part = batch_of(store, at.position + 1, min(at.position + batch, len(store.events)))
        await tables.apply(connection, SHARD, at, part)
        at = part.after


def parked(database: Database) -> list[tuple[Any, ...]]:
    """Table, key, error and positions of what is parked."""
    with psycopg.connect(database.app) as connection:
        return connection.execute(
            """SELECT k.table_name, k.key, k.error, array_agg(e.position ORDER BY e.position) FILTER (WHERE e.position > 0)
               FROM parked_keys k LEFT JOIN parked_events e USING (parked_id)
               GROUP BY k.parked_id ORDER BY k.table_name, min(e.position)"""
        ).fetchall()


def ask(database: Database, table: str, action: str = "retry", *, all_events: bool = False, row_id: str = "%") -> UUID:
    """Leaves an operator's request for the parked key of a table, or of a row of it; returns its id."""
    request_id = uuid4()
    assert database.query
    with psycopg.connect(database.app) as app, psycopg.connect(database.query, autocommit=True) as connection:
        found = "SELECT parked_id FROM parked_keys WHERE table_name = %s AND row_id LIKE %s AND serves"
        [(parked_id,)] = app.execute(found, [table, row_id]).fetchall()
        asked = connection.execute("SELECT ask_parked(%s, %s, %s, %s, 'olga')", (request_id, parked_id, action, all_events))
        assert asked.fetchone() == (True,)
    return request_id


def answered(database: Database, request_id: UUID) -> tuple[Any, ...]:
    """Outcome, how many events were applied and skipped."""
    assert database.query
    with psycopg.connect(database.query) as connection:
        row = connection.execute("SELECT outcome, applied, skipped FROM parked_answer(%s)", [request_id]).fetchone()
        assert row is not None
        return row
