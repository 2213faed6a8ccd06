"""A leader that was replaced writes nothing on rows that another has replayed or forgotten where the checkpoint stands."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deploy.bootstrap import Database
from shared.line import checkpoint
from shared.line.checkpoint import Checkpoint, Fenced
from shared.platform.postgres import Connection
from shared.projections import forget, replay
from shared.projections.tables import Tables
from tests.integration.shared.projections.parked_keys import (
    ALICE,
    BLUE,
    GROUP,
    NAMES,
    RED,
    Reader,
    apply,
    ask,
    at_begin,
    bank,
    unreadable,
)
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.tables import SHARD, dump, folded

Rewrite = Callable[[Database, Tables, Connection, Checkpoint], Awaitable[Any]]


class Paused(Reader):
    """Does something, once, between its reading of rows and its writing."""

    meanwhile: Callable[[], Awaitable[Any]] | None = None

    async def _read(self, connection: Connection, touched: Any) -> None:
        await super()._read(connection, touched)
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            await meanwhile()


async def retry(database: Database, tables: Tables, connection: Connection, at: Checkpoint) -> None:
    """What waits of the blue account reaches its rows, and the owner's total."""
    unreadable.clear()
    ask(database, "")
    await replay.carry_out(tables, connection, SHARD, at)


async def forget_account(_: Database, tables: Tables, connection: Connection, at: Checkpoint) -> None:
    """The red account is purged: this leader read holes where the paused one has the account's events."""
    await forget.forget_aggregate(tables, connection, SHARD, at, ("acme", "account", RED))


async def forget_tenant(_: Database, tables: Tables, connection: Connection, at: Checkpoint) -> None:
    """All of the tenant is purged."""
    await forget.forget_tenant(tables, connection, SHARD, at, "acme")


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "just read"])
@pytest.mark.parametrize("rewrite", [retry, forget_account, forget_tenant])
async def test_a_paused_leader_does_not_write_back_what_another_has_rewritten(
    read_db: Database, rewrite: Rewrite, cached: bool
) -> None:
    """Its checkpoint is where it left it, but its rows are older than the tables: it is fenced, and goes on from the new rows."""
    store = bank()
    unreadable.add(store.deposit("acme", BLUE, ALICE, 13, 113).event_id)
    store.deposit("acme", RED, ALICE, 5, 5)
    async with at_begin(read_db) as (newer, other), at_begin(read_db) as (_, connection):
        older = Paused(GROUP)
        await apply(older if cached else newer, connection, store)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        last = store.deposit("acme", RED, ALICE, 7, 12).position
        await newer.refresh(other, SHARD)
        left: dict[str, Any] = {}

        async def rewriting() -> None:
            await rewrite(read_db, newer, other, at)
            left.update(dump(read_db, NAMES))

        if cached:
            await rewriting()
        else:
            await older.refresh(connection, SHARD)
            older.meanwhile = rewriting
        with pytest.raises(Fenced):
            await older.apply(connection, SHARD, at, batch_of(store, last, last))
        assert dump(read_db, NAMES) == left
        await older.refresh(connection, SHARD)
        await apply(older, connection, store)
    if rewrite is retry:
        assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_the_leader_that_has_rewritten_rows_goes_on(read_db: Database) -> None:
    """It knows what it did itself, and folds later events on the rows as they are now."""
    store = bank()
    unreadable.add(store.deposit("acme", BLUE, ALICE, 13, 113).event_id)
    async with at_begin(read_db) as (tables, connection):
        for amount in (5, 7):
            store.deposit("acme", RED, ALICE, amount, amount)
            await apply(tables, connection, store)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        await retry(read_db, tables, connection, at)
        store.deposit("acme", RED, ALICE, 9, 9)
        await apply(tables, connection, store)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)
