"""The projector on a real PostgreSQL: rows, and connections that are lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import psycopg
import pytest

from bank.v1 import account_pb2, transfer_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, AccountRow
from read_service.projections.people import PEOPLE
from read_service.projections.transfers import TRANSFERS
from shared.folds.projection import Group, RowKey
from shared.folds.table import Type
from shared.line import checkpoint, consumer
from shared.line.checkpoint import Checkpoint
from shared.line.follower import EventBatch, Follower
from shared.platform.postgres import Connection, UnsafeDatabase, connect, refuse_unsafe
from shared.projections.projector import Projector
from shared.projections.rows import Rows
from shared.projections.tables import Tables
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import SHARD, SUMMARIES, checkpoint_row, dump, folded, folding, projector, reached
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually
from tests.support.system.working import running

ALICE, BLUE, RED = uid(1), uid(2), uid(3)


def bank() -> Store:
    """Two tenants with the same ids: people, accounts in two currencies, and money that moves."""
    store = Store()
    for tenant, sign in (("acme", 1), ("umbrella", 7)):
        store.person(tenant, ALICE, "Alice O'Wonderland")
        store.account(tenant, BLUE, ALICE)
        store.account(tenant, RED, ALICE, "EUR", "red")
        store.deposit(tenant, BLUE, ALICE, 100 * sign, 100 * sign)
        store.rename(tenant, ALICE, "Alice Cooper")
        store.withdraw(tenant, BLUE, ALICE, 69 * sign, 31 * sign)
        store.deposit(tenant, RED, ALICE, 5, 5, "EUR")
        store.append(tenant, RED, account_pb2.AccountFrozen(account_id=RED, owner_id=ALICE))
    return store


def batch_of(store: Store, begin: int, end: int) -> EventBatch:
    """The events from `begin` to `end` inclusive."""
    events = store.events[begin - 1 : end]
    return EventBatch(events, Checkpoint(store.epoch, end, events[-1].event_id))


@pytest.mark.parametrize("batch_max", [1, 2, 3, 500])
async def test_the_tables_are_the_fold_of_the_line(read_db: Database, batch_max: int) -> None:
    """Whatever the size of the batches, also if a row is touched many times in one."""
    store = bank()
    async with running(projector(read_db, StoreLine(store), batch_max=batch_max)) as it:
        await reached(it, len(store.events))
    tables = dump(read_db)
    assert tables == folded(store.events)
    assert [row[:2] + row[5:7] for row in tables["accounts"]] == [
        ("acme", BLUE, 31, "active"),
        ("acme", RED, 5, "frozen"),
        ("umbrella", BLUE, 217, "active"),
        ("umbrella", RED, 5, "frozen"),
    ]
    assert [(row[0], row[2], row[5], row[6]) for row in tables["people"]] == [
        ("acme", "Alice Cooper", 2, 4),
        ("umbrella", "Alice Cooper", 2, 4),
    ]


@pytest.mark.parametrize("begin", [1, 5, 8])
async def test_a_batch_that_does_not_follow_the_checkpoint_is_not_applied(
    read_db: Database, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events again, or behind a gap: the projector writes nothing of them and follows the line anew."""
    monkeypatch.setattr(consumer, "RETRY_MIN_S", 0.01)
    store, handed_out = bank(), asyncio.Event()

    async def follow(at: Checkpoint) -> AsyncGenerator[EventBatch, None]:
        if at.position == 0:
            yield batch_of(store, 1, 6)
            handed_out.set()
            yield batch_of(store, begin, 9)
        async with aclosing(Follower(StoreLine(store), None, silence_s=0.001).follow(at)) as batches:
            async for batch in batches:
                yield batch

    it = Projector(Tables(SUMMARIES), SHARD, follow, lambda: connect(read_db.app, application_name="test"))
    with capture_logs() as logs:
        async with running(it):
            await reached(it, len(store.events))
    assert handed_out.is_set()
    assert [log["position"] for log in logs if log["event"] == "consumer_retries"] == [6]
    assert dump(read_db) == folded(store.events)


async def test_it_goes_on_where_it_was(read_db: Database) -> None:
    """A new projector begins behind the checkpoint and applies nothing again."""
    store = bank()
    later = store.events[9:]
    del store.events[9:]
    async with running(projector(read_db, StoreLine(store))) as first:
        await reached(first, 9)
    store.events.extend(later)
    async with running(projector(read_db, StoreLine(store))) as second:
        await reached(second, len(store.events))
    assert dump(read_db) == folded(store.events)


async def test_events_that_nobody_asked_for_move_the_checkpoint(read_db: Database) -> None:
    """Another service may add events; they are passed over, not waited on."""
    store = bank()
    stranger = store.append("acme", uid(9), account_pb2.AccountFrozen())
    stranger.type = "bank.v1.SomethingOfNextYear"
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
    assert dump(read_db) == folded(store.events[:-1])


async def test_events_of_other_groups_move_the_checkpoint_together(read_db: Database) -> None:
    """Moving it for each would cost as much as the group's own events, each of which is applied at once."""
    store = Store()
    store.person("acme", ALICE, "Alice")
    for number in range(100):
        store.deposit("acme", BLUE, ALICE, 1, number + 1)
    store.rename("acme", ALICE, "Alice Cooper")
    moves: list[int] = []

    class Noting(Projector):
        def _moved(self, after: Checkpoint) -> None:
            moves.append(after.position)
            super()._moved(after)

    tables = Tables(Group("people", [PEOPLE]))
    it = Noting(
        tables,
        SHARD,
        Follower(StoreLine(store), None, batch_max=1, silence_s=0.02).follow,
        lambda: connect(read_db.app, application_name="test"),
    )
    async with running(it):
        await reached(it, 102)
        assert [row[:3] for row in dump(read_db)["people"]] == [("acme", ALICE, "Alice Cooper")]
        assert moves[-1] == 102
        assert len(moves) < 20
        # Events that come last are not left behind.
        store.deposit("acme", BLUE, ALICE, 1, 101)
        await reached(it, 103)
    # What a projector had not moved over when it ended, the next one reads again.
    store.rename("acme", ALICE, "Alice")
    async with running(projector(read_db, StoreLine(store), group=Group("people", [PEOPLE]))) as following:
        await reached(following, 104)
    assert [row[:3] for row in dump(read_db)["people"]] == [("acme", ALICE, "Alice")]


async def test_the_event_that_makes_a_row_reads_none(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of the row which is there by then, which it replaces, nor that of a new one. What changes a row reads it."""
    store, group, read = Store(), Group("transfers", [TRANSFERS]), list[Sequence[RowKey]]()
    for amount in (5, 7):
        store.append("acme", uid(9), transfer_pb2.TransferStarted(transfer_id=uid(9), amount_minor=amount))
    select = Rows.select

    async def noting(self: Rows, connection: Connection, keys: Sequence[RowKey]) -> Any:
        read.append(keys)
        return await select(self, connection, keys)

    monkeypatch.setattr(Rows, "select", noting)
    async with running(projector(read_db, StoreLine(store), group=group)) as it:
        await reached(it, 2)
    assert read == []
    assert [(row[1], row[4], row[6]) for row in dump(read_db)["transfers"]] == [(uid(9), 7, "started")]
    # A leader that remembers no row.
    store.append("acme", uid(9), transfer_pb2.TransferStarted(transfer_id=uid(9), amount_minor=5))
    async with running(projector(read_db, StoreLine(store), group=group)) as it:
        await reached(it, 3)
        assert read == []
    store.append("acme", uid(9), transfer_pb2.TransferCompleted(transfer_id=uid(9)))
    async with running(projector(read_db, StoreLine(store), group=group)) as it:
        await reached(it, 4)
    assert read == [[("acme", uid(9))]]
    assert [(row[1], row[4], row[6]) for row in dump(read_db)["transfers"]] == [(uid(9), 5, "completed")]


async def test_a_table_that_was_empty_is_not_walked_through(read_db: Database) -> None:
    """A plan from the time when it was empty, kept, would find each new row's place by reading all rows of its tenant."""
    store, accounts = Store(), 6000
    for number in range(accounts):
        store.account("acme", uid(number), ALICE)
        store.deposit("acme", uid(number), ALICE, number + 1, number + 1)
    group = Group("accounts", [ACCOUNTS])
    async with running(projector(read_db, StoreLine(store), batch_max=50, group=group)) as it:
        await eventually(lambda: it.at.position == len(store.events), 60.0)
    with psycopg.connect(read_db.admin) as connection:
        scans = "SELECT indexrelname, idx_scan FROM pg_stat_user_indexes WHERE relname = 'accounts'"
        found: dict[str, int] = dict(connection.execute(scans).fetchall())
    assert found.pop("accounts_pkey") >= accounts
    assert sum(found.values()) < accounts / 5, found


async def test_a_total_beyond_64_bits_is_kept(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two accounts that are each full make a sum that no bigint holds, read back and added to."""
    monkeypatch.setattr("shared.projections.tables.ROWS_KEPT_MAX", 0)
    most = 9_223_372_036_854_775_807
    store = Store()
    store.person("acme", ALICE, "Croesus")
    for account_id in (BLUE, RED):
        store.account("acme", account_id, ALICE)
        store.deposit("acme", account_id, ALICE, most, most)
    store.withdraw("acme", RED, ALICE, 1, most - 1)
    async with running(projector(read_db, StoreLine(store), batch_max=1)) as it:
        await reached(it, len(store.events))
    assert dump(read_db)["person_totals"] == [("acme", ALICE, "USD", 18_446_744_073_709_551_613)]


async def test_a_fold_may_remove_its_row(read_db: Database) -> None:
    """None is no row: one that was there goes, and one that comes and goes within a batch was never there."""

    def closed(row: AccountRow | None, _: account_pb2.AccountFrozen, envelope: EventEnvelope) -> None:
        assert row is not None
        assert envelope.version == row.version + 1

    closing = folding(ACCOUNTS, account_pb2.AccountFrozen, closed)
    store = bank()
    for batch_max in (500, 1):
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("TRUNCATE accounts, checkpoints")
        async with running(projector(read_db, StoreLine(store), batch_max=batch_max, group=Group("summaries", (closing,)))) as it:
            await reached(it, len(store.events))
        assert [row[:2] for row in dump(read_db)["accounts"]] == [("acme", BLUE), ("umbrella", BLUE)]


@pytest.mark.parametrize("kept_max", [0, 1, 3])
async def test_rows_that_were_forgotten_are_read_again(read_db: Database, monkeypatch: pytest.MonkeyPatch, kept_max: int) -> None:
    """However few rows are kept in memory, the tables are the same."""
    monkeypatch.setattr("shared.projections.tables.ROWS_KEPT_MAX", kept_max)
    store = bank()
    async with running(projector(read_db, StoreLine(store), batch_max=2)) as it:
        await reached(it, 20)
    assert dump(read_db) == folded(store.events)


async def test_rows_kept_in_memory_are_forgotten_when_another_has_written(read_db: Database) -> None:
    """One that leads, loses the lead and leads again does not put back what it remembers."""
    store, first, second = Store(), Tables(SUMMARIES), Tables(SUMMARIES)
    store.person("acme", ALICE, "Alice")
    store.account("acme", BLUE, ALICE)
    for number in range(1, 5):
        store.deposit("acme", BLUE, ALICE, 5, 5 * number)
    begin = await stands_at(read_db, first, store, 5)
    async with await connect(read_db.app, application_name="test") as connection:
        batch = batch_of(store, 6, 6)
        await second.apply(connection, SHARD, begin, batch)
        await first.apply(connection, SHARD, batch.after, batch_of(store, 7, 7))
    assert dump(read_db) == folded(store.events)


async def stands_at(database: Database, tables: Tables, store: Store, position: int) -> Checkpoint:
    """Applies the line up to a position."""
    connection = await connect(database.app, application_name="test")
    async with connection:
        begin = await checkpoint.load(connection, SUMMARIES.name, SHARD)
        batch = batch_of(store, 1, position)
        await tables.apply(connection, SHARD, begin, batch)
        return batch.after


async def test_a_lost_connection_is_made_anew(read_db: Database) -> None:
    """The server ends the projector's session; it comes back and goes on."""
    store = bank()
    later = store.events[8:]
    del store.events[8:]
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 8)
        with psycopg.connect(read_db.admin, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND application_name = 'foldline-projector'",
                [read_db.name],
            )
        store.events.extend(later)
        await reached(it, 20)
    assert dump(read_db) == folded(store.events)


async def test_a_cancelled_batch_leaves_both_or_neither(read_db: Database) -> None:
    """Cancelled later and later until batches get through, checkpoint and rows still agree each time."""
    store, tables = bank(), Tables(SUMMARIES)
    applied, cancelled, turns, deadline = 0, 0, 0, time.monotonic() + 60.0
    while applied < 3:
        assert time.monotonic() < deadline, f"{turns} turns of the loop were not enough for a batch"
        connection = await connect(read_db.app, application_name="test")
        async with connection:
            begin = await checkpoint.load(connection, SUMMARIES.name, SHARD)
            task = asyncio.create_task(tables.apply(connection, SHARD, begin, batch_of(store, applied + 1, applied + 1)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: _quiet(read_db), 30)
        now = checkpoint_row(read_db)[0]
        assert dump(read_db) == folded(store.events[:now])
        cancelled += now == applied
        applied = now
        # One await at a time at first, then in longer strides: how many turns an answer takes depends on the machine.
        turns += 1 + turns // 4
    assert cancelled > 0


def _quiet(database: Database) -> bool:
    with psycopg.connect(database.admin) as admin:
        row = admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'test'", [database.name]
        ).fetchone()
    return row == (0,)


async def test_a_superuser_is_refused(read_db: Database) -> None:
    """Policies do not bind a superuser, so nothing is started as one."""
    connection = await connect(read_db.admin, application_name="test")
    async with connection:
        with pytest.raises(UnsafeDatabase):
            await refuse_unsafe(connection, tables=())


def test_the_database_has_the_tables_that_the_projections_describe(read_db: Database) -> None:
    """Migrations and descriptions are written apart, and agree: columns, types, collations, nulls and keys."""
    kinds = {
        Type.TEXT: ("text", None),
        Type.TEXT_C: ("text", "C"),
        Type.BIGINT: ("bigint", None),
        Type.INTEGER: ("integer", None),
        Type.NUMERIC: ("numeric", None),
        Type.TIMESTAMP: ("timestamp with time zone", None),
    }
    with psycopg.connect(read_db.owner) as owner:
        for projection in SUMMARIES.projections:
            table = projection.table
            found: list[Any] = owner.execute(
                """SELECT column_name, data_type, is_nullable = 'YES', collation_name FROM information_schema.columns
                   WHERE table_name = %s ORDER BY ordinal_position""",
                [table.name],
            ).fetchall()
            assert found == [
                (column.name, kinds[column.type][0], column.nullable, kinds[column.type][1]) for column in table.columns
            ]
            keys = owner.execute(
                """SELECT array_agg(a.attname::text ORDER BY array_position(i.indkey::int2[], a.attnum)) FROM pg_index i
                   JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
                   WHERE i.indrelid = %s::regclass AND i.indisprimary""",
                [table.name],
            ).fetchone()
            assert keys == ([column.name for column in table.primary_key],)
