"""The projector on a real PostgreSQL: rows, the fence, what stops it and what does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, AccountRow
from shared.folds.projection import Group, Projection
from shared.folds.table import Type
from shared.line import checkpoint, consumer
from shared.line.checkpoint import Checkpoint, Fenced
from shared.line.follower import EventBatch, FeedPage, Follower
from shared.platform.postgres import UnsafeDatabase, connect, refuse_unsafe
from shared.projections.projector import Projector
from shared.projections.tables import EventWithoutKey, Tables
from tests.support.fakes.line import EPOCH, ScriptedFeed, Store, StoreLine, delivery, uid
from tests.support.fakes.tables import SHARD, SUMMARIES, checkpoint_row, dump, folded, projector, reached, running
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually

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
    accounts = ACCOUNTS.on

    def closed(row: AccountRow | None, _: account_pb2.AccountFrozen, envelope: EventEnvelope) -> None:
        assert row is not None
        assert envelope.version == row.version + 1

    on = {**accounts, account_pb2.AccountFrozen: closed}
    closing = Projection(table=ACCOUNTS.table, row=AccountRow, key=ACCOUNTS.key, on=on)
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


# --- the fence ---


async def stands_at(database: Database, tables: Tables, store: Store, position: int) -> Checkpoint:
    """Applies the line up to a position."""
    connection = await connect(database.app, application_name="test")
    async with connection:
        begin = await checkpoint.load(connection, SUMMARIES.name, SHARD)
        batch = batch_of(store, 1, position)
        await tables.apply(connection, SHARD, begin, batch)
        return batch.after


async def test_a_paused_projector_that_wakes_up_is_refused(read_db: Database) -> None:
    """Two projectors on one checkpoint: the older finishes its batch after the newer, and writes nothing."""
    store, tables = bank(), Tables(SUMMARIES)
    begin = await stands_at(read_db, tables, store, 3)
    older = await connect(read_db.app, application_name="older")
    newer = await connect(read_db.app, application_name="newer")
    async with older, newer:
        batch = batch_of(store, 4, 6)
        await Tables(SUMMARIES).apply(newer, SHARD, begin, batch)
        after_newer = dump(read_db)
        with pytest.raises(Fenced):
            await tables.apply(older, SHARD, begin, batch)
        assert dump(read_db) == after_newer == folded(store.events[:6])
        # It reloads and goes on from where the other is.
        begin = await checkpoint.load(older, SUMMARIES.name, SHARD)
        await tables.apply(older, SHARD, begin, batch_of(store, 7, 20))
    assert dump(read_db) == folded(store.events)


@pytest.mark.parametrize("changes", [True, False], ids=["cached rows", "no row"])
async def test_the_fence_holds_where_nothing_is_read(read_db: Database, changes: bool) -> None:
    """A replaced projector that has all rows in its cache, or has none to change, finds out by its write, which does nothing."""
    store, tables = bank(), Tables(SUMMARIES)
    if not changes:
        store.append("acme", BLUE, account_pb2.AccountFrozen()).type = "bank.v1.Unknown"
    begin = await stands_at(read_db, tables, store, 5 if changes else len(store.events) - 1)
    batch = batch_of(store, begin.position + 1, begin.position + 1)
    older = await connect(read_db.app, application_name="older")
    newer = await connect(read_db.app, application_name="newer")
    async with older, newer:
        await Tables(SUMMARIES).apply(newer, SHARD, begin, batch)
        after_newer = dump(read_db)
        with pytest.raises(Fenced):
            await tables.apply(older, SHARD, begin, batch)
        assert dump(read_db) == after_newer == folded(store.events[: batch.after.position])
        at = await checkpoint.load(older, SUMMARIES.name, SHARD)
        assert at == batch.after
        if changes:
            await tables.apply(older, SHARD, at, batch_of(store, 7, 20))
            assert dump(read_db) == folded(store.events)


async def test_without_the_fence_the_same_write_would_have_doubled(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with a fence that matches any position, the older projector adds the money a second time."""
    store, tables = bank(), Tables(SUMMARIES)
    begin = await stands_at(read_db, tables, store, 5)
    monkeypatch.setattr(
        checkpoint,
        "MOVE_OR_FAIL",
        checkpoint.MOVE_OR_FAIL.replace("AND position = %s", "AND position >= 0 * %s").replace(
            "AND event_id = %s", "AND event_id <> %s || '!'"
        ),
    )
    older = await connect(read_db.app, application_name="older")
    newer = await connect(read_db.app, application_name="newer")
    totals = Tables(Group("summaries", [each for each in SUMMARIES.projections if each.table.name == "person_totals"]))
    async with older, newer:
        batch = batch_of(store, 6, 6)
        await totals.apply(newer, SHARD, begin, batch)
        await totals.apply(older, SHARD, begin, batch)
    assert dump(read_db)["person_totals"] == [("acme", ALICE, "EUR", 0), ("acme", ALICE, "USD", 200)]
    assert folded(store.events[:6])["person_totals"] == [("acme", ALICE, "EUR", 0), ("acme", ALICE, "USD", 100)]


async def test_one_stopped_inside_its_transaction_holds_up_nobody_for_long(read_db: Database) -> None:
    """A projector that is frozen between its two statements holds the checkpoint's lock; the server takes it away."""
    store, tables = bank(), Tables(SUMMARIES)
    begin = await stands_at(read_db, tables, store, 3)
    frozen = await connect(read_db.app, application_name="frozen")
    newer = await connect(read_db.app, application_name="newer")
    async with newer:
        batch = batch_of(store, 4, 6)
        await frozen.execute("BEGIN")
        await frozen.execute(checkpoint.MOVE, checkpoint.move(SUMMARIES.name, SHARD, begin, batch.after))
        async with asyncio.timeout(20):
            await tables.apply(newer, SHARD, begin, batch)
    with pytest.raises(psycopg.Error):
        await frozen.execute("COMMIT")
    await frozen.close()
    assert dump(read_db) == folded(store.events[:6])


async def test_two_projectors_at_once_give_the_same_tables(read_db: Database) -> None:
    """Two that both believe they lead fence each other all the way, and each event is applied once."""
    store = bank()
    async with (
        running(projector(read_db, StoreLine(store), batch_max=1)) as first,
        running(projector(read_db, StoreLine(store), batch_max=2)) as second,
    ):
        await reached(first, len(store.events))
        await reached(second, len(store.events))
    assert dump(read_db) == folded(store.events)


# --- what stops it ---


def nameless(store: Store) -> EventEnvelope:
    """An event that cannot be read and names no aggregate."""
    bad = store.deposit("acme", uid(77), uid(78), 5, 5)
    bad.payload, bad.aggregate_id = b"\xff\xff\xff", ""
    return bad


async def test_an_event_that_names_no_key_stops_the_projection_loudly(read_db: Database) -> None:
    """Nothing is skipped: the tables stay before the batch, and the checkpoint's row names the event's place."""
    store = bank()
    bad = nameless(store)
    store.person("acme", uid(79), "After the bad one")
    async with running(projector(read_db, StoreLine(store), batch_max=20)) as it:
        await eventually(lambda: it.stopped)
        position, state, reason = checkpoint_row(read_db)
        assert (position, state) == (20, "stopped")
        told = f"event {bad.event_id} (bank.v1.MoneyDeposited) at position 21 names no aggregate and raised DecodeError"
        assert reason == f"EVENT_WITHOUT_KEY: {told}"
    assert dump(read_db) == folded(store.events[:20])


async def test_a_stopped_projection_goes_on_when_its_cause_is_mended(read_db: Database) -> None:
    """The next start tries again; the row then says running."""
    store = bank()
    bad = nameless(store)
    async with running(projector(read_db, StoreLine(store))) as it:
        await eventually(lambda: it.stopped)
    bad.type = "bank.v1.Understood"
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 21)
    assert checkpoint_row(read_db) == (21, "running", "")


async def test_a_row_that_the_database_refuses_parks_its_key(read_db: Database) -> None:
    """An append-only table that holds the row already: that row is parked at its event, all else of the batch is applied."""
    store = bank()
    later = store.events[5:]
    del store.events[5:]
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 5)
    with psycopg.connect(read_db.app) as connection:
        connection.execute("INSERT INTO movements VALUES ('acme', %s, 2, 1, 1, now())", [BLUE])
    store.events.extend(later)
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 20)
    with psycopg.connect(read_db.app) as connection:
        parked = connection.execute("SELECT table_name, key, error FROM parked_keys").fetchall()
    [(table, key, error)] = parked
    assert (table, key) == ("movements", f'["{BLUE}", 2]')
    assert error.endswith("the database refuses its row: 23505 UniqueViolation")
    assert checkpoint_row(read_db) == (20, "running", "")
    wanted = folded(store.events)
    tables = [name for name in wanted if name != "movements"]
    assert dump(read_db, tables) == {name: wanted[name] for name in tables}
    assert len(dump(read_db, ["movements"])["movements"]) == len(wanted["movements"])


READ_ONLY = "ALTER DATABASE {database} SET default_transaction_read_only = {}"
MOMENTS = {
    "read-only": (READ_ONLY.format("on", database="{database}"), READ_ONLY.format("off", database="{database}")),
    "no right to the rows": ("REVOKE UPDATE, INSERT ON accounts FROM {app}", "GRANT UPDATE, INSERT ON accounts TO {app}"),
    "no right to the checkpoint": ("REVOKE UPDATE ON checkpoints FROM {app}", "GRANT UPDATE ON checkpoints TO {app}"),
    "a changed type": ("ALTER TABLE people ALTER COLUMN name TYPE varchar(5000)", ""),
    "a table that is not there": ("ALTER TABLE people RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO people"),
}


@pytest.mark.parametrize("moment", MOMENTS)
async def test_whatever_the_database_says_passes(read_db: Database, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad moment of the database stops nothing: when it is over the tables reach the head by themselves."""
    monkeypatch.setattr(consumer, "RETRY_MAX_S", 0.02)
    tries = 0
    wait_out = consumer.Consumer._wait_out

    async def counted(self: consumer.Consumer, error: Exception, times: int) -> None:
        nonlocal tries
        tries += 1
        await wait_out(self, error, times)

    monkeypatch.setattr(consumer.Consumer, "_wait_out", counted)
    store = bank()
    later = store.events[8:]
    del store.events[8:]
    bad, mended = (
        sql.SQL(statement).format(database=sql.Identifier(read_db.name), app=sql.Identifier("foldline_read_app"))
        for statement in MOMENTS[moment]
    )
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 8)
        with psycopg.connect(read_db.admin, autocommit=True) as admin:
            admin.execute(bad)
            if moment == "read-only":  # which is for new sessions
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = %s AND application_name = 'foldline-projector'",
                    [read_db.name],
                )
            store.events.extend(later)
            if MOMENTS[moment][1]:
                await eventually(lambda: tries > 4)
                assert it.at.position < 20
                admin.execute("SET default_transaction_read_only = off")
                admin.execute(mended)
        await reached(it, 20)
    assert checkpoint_row(read_db) == (20, "running", "")
    assert dump(read_db) == folded(store.events)


async def test_one_that_an_earlier_release_stopped_goes_on(read_db: Database) -> None:
    """A checkpoint that was stopped for what the database said is no longer, once a projector has looked at it."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 20)
    with psycopg.connect(read_db.app) as connection:
        connection.execute("UPDATE checkpoints SET state = 'stopped', reason = 'PROJECTION_FAILED: 25006'")
    async with running(projector(read_db, StoreLine(store))):
        await eventually(lambda: checkpoint_row(read_db) == (20, "running", ""))


async def test_a_stopped_one_goes_on_at_an_operators_word(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a start: it looks at its row, and tries again as soon as that says running."""
    monkeypatch.setattr(consumer, "LOOK_S", 0.01)
    store = bank()
    bad = nameless(store)
    async with running(projector(read_db, StoreLine(store))) as it:
        await eventually(lambda: it.stopped)
        bad.type = "bank.v1.Understood"
        await asyncio.sleep(0.1)  # it has looked, and stays
        assert it.stopped
        with psycopg.connect(read_db.app) as connection:
            connection.execute("UPDATE checkpoints SET state = 'running', reason = ''")
        await eventually(lambda: it.stopped is None)
        await reached(it, 21)


async def test_a_checkpoint_ahead_of_a_restored_store_stops_it(read_db: Database) -> None:
    """HISTORY_DIVERGED stands in the checkpoint's row, the tables are left alone, and a start does not help."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 20)
    before = dump(read_db)
    del store.events[10:]
    for _ in range(2):
        async with running(projector(read_db, StoreLine(store))) as it:
            assert "HISTORY_DIVERGED" in str(await eventually(lambda: it.stopped))
            position, state, reason = checkpoint_row(read_db)
            assert (position, state) == (20, "stopped")
            assert reason == "HISTORY_DIVERGED: the store ends at 10, the tables are at 20"
    for number in range(10):
        store.person("acme", uid(100 + number), "of another history")
    async with running(projector(read_db, StoreLine(store))) as it:
        assert "at position 20 the tables have seen" in str(await eventually(lambda: it.stopped))
    assert dump(read_db) == before


async def test_tables_of_a_lost_history_are_filled_anew_at_an_operators_word(read_db: Database) -> None:
    """Emptied and filled from the line as it is, in every table; said of tables that are well, it does nothing."""
    assert read_db.query

    def ask() -> bool:
        with psycopg.connect(read_db.query or "", autocommit=True) as connection:
            return connection.execute("SELECT ask_refill('summaries', 1)").fetchone() == (True,)

    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 20)
        assert not ask()
    del store.events[10:]
    store.epoch = "22222222-2222-4222-8222-222222222222/1"
    async with running(projector(read_db, StoreLine(store))) as it, running(projector(read_db, StoreLine(store))) as other:
        await eventually(lambda: it.stopped and other.stopped)
        assert ask()
        for number in range(5):
            store.person("acme", uid(100 + number), "of another history")
        for each in (it, other):
            await eventually(lambda each=each: each.at.position == 15)  # type: ignore[misc]
    assert dump(read_db) == folded(store.events)
    with psycopg.connect(read_db.app) as connection:
        row = connection.execute("SELECT epoch, position, state, refill_asked FROM checkpoints").fetchone()
    assert row == (store.epoch, 15, "running", False)


async def test_a_new_epoch_of_the_same_history_is_stored(read_db: Database) -> None:
    """A failover that lost nothing stops nothing."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, 20)
        store.epoch = EPOCH.replace("/1", "/2")
        await eventually(lambda: it.at.epoch == store.epoch)
        store.person("acme", uid(9), "of the new epoch")
        await reached(it, 21)
    with psycopg.connect(read_db.app) as connection:
        assert connection.execute("SELECT epoch FROM checkpoints").fetchone() == (store.epoch,)


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


# --- any order of delivery ---


@st.composite
def lines(draw: st.DrawFn) -> Store:
    """A line of up to a dozen events on a few rows."""
    store = Store()
    balances: dict[tuple[str, str], int] = {}
    for tenant in ("acme", "umbrella"):
        store.person(tenant, ALICE, "Alice")
        store.account(tenant, BLUE, ALICE)
        balances[tenant, BLUE] = 0
    for _ in range(draw(st.integers(0, 12))):
        tenant, amount = draw(st.sampled_from(["acme", "umbrella"])), draw(st.integers(1, 9))
        kind = draw(st.sampled_from(["deposit", "withdraw", "rename", "stranger"]))
        if kind == "rename":
            store.rename(tenant, ALICE, f"Alice {amount}")
        elif kind == "stranger":
            store.append(tenant, BLUE, account_pb2.AccountFrozen()).type = "bank.v1.Unknown"
        else:
            balances[tenant, BLUE] += amount if kind == "deposit" else -amount
            getattr(store, kind)(tenant, BLUE, ALICE, amount, balances[tenant, BLUE])
    return store


@st.composite
def deliveries(draw: st.DrawFn, events: list[EventEnvelope]) -> list[list[FeedPage]]:
    """Some of the events, in any order, any number of times, some under a wrong epoch or unreadable, in any pages and parts."""
    script: list[list[FeedPage]] = []
    for _ in range(draw(st.integers(0, 6))):
        part: list[FeedPage] = []
        for begin in draw(st.lists(st.integers(0, len(events) - 1), max_size=8)):
            kind = draw(st.sampled_from(["good"] * 8 + ["stale", "unreadable", "shuffled"]))
            page = events[begin : begin + draw(st.integers(1, 4))]
            part.append(
                delivery(*page) if kind == "good"
                else delivery(*page, epoch="another epoch") if kind == "stale"
                else delivery(*reversed(page)) if kind == "shuffled"
                else FeedPage("", ())
            )  # fmt: skip
        script.append(sorted(part, key=lambda it: it.events[0].position if it.events else 0) if draw(st.booleans()) else part)
    return script


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_the_fold_of_the_line(read_db: Database, data: st.DataObject) -> None:
    """Any batch sizes, repeats, reorderings, gaps and lies of the broker end in the same tables."""
    store = data.draw(lines())
    events = list(store.events)
    known = data.draw(st.integers(0, len(events)))
    batch_max, page = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    feed = ScriptedFeed(data.draw(deliveries(events)), of=store)
    with psycopg.connect(read_db.owner) as owner:
        owner.execute("TRUNCATE people, person_totals, accounts, movements, checkpoints")
    del store.events[known:]  # what the store holds when the follower begins; the rest comes while it runs

    async def grow() -> None:
        while len(store.events) < len(events):
            await asyncio.sleep(0.001)
            store.events.append(events[len(store.events)])

    async def play() -> None:
        tables, follower = Tables(SUMMARIES), Follower(StoreLine(store, page=page), feed, batch_max=batch_max, silence_s=0.001)
        growing = asyncio.create_task(grow())
        connection = await connect(read_db.app, application_name="test")
        async with connection:
            at = await checkpoint.load(connection, SUMMARIES.name, SHARD)
            async with asyncio.timeout(20), aclosing(follower.follow(at)) as batches:
                async for batch in batches:
                    assert len(batch.events) <= batch_max
                    await tables.apply(connection, SHARD, at, batch)
                    at = batch.after
                    if at.position == len(events):
                        break
        await growing

    asyncio.run(play())
    assert dump(read_db) == folded(events)


# --- roles and tables ---


async def test_a_superuser_is_refused(read_db: Database) -> None:
    """Policies do not bind a superuser, so nothing is started as one."""
    connection = await connect(read_db.admin, application_name="test")
    async with connection:
        with pytest.raises(UnsafeDatabase):
            await refuse_unsafe(connection, tables=())


async def test_a_failed_batch_can_be_told_from_a_lost_one(read_db: Database) -> None:
    """After ProjectionFailed the connection is usable and nothing was written."""
    store, tables = bank(), Tables(SUMMARIES)
    bad = nameless(store)
    connection = await connect(read_db.app, application_name="test")
    async with connection:
        begin = await checkpoint.load(connection, SUMMARIES.name, SHARD)
        with pytest.raises(EventWithoutKey, match=bad.event_id):
            await tables.apply(connection, SHARD, begin, batch_of(store, 1, 21))
        await tables.apply(connection, SHARD, begin, batch_of(store, 1, 20))
    assert dump(read_db) == folded(store.events[:20])


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
