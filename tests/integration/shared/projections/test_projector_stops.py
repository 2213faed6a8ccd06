"""What stops a projector, what does not, and how it goes on."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import sql

from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import checkpoint, consumer
from shared.platform.postgres import connect
from shared.projections.failures import EventWithoutKey
from shared.projections.tables import Tables
from tests.integration.shared.projections.test_projector import BLUE, bank, batch_of
from tests.support.fakes.line import EPOCH, Store, StoreLine, uid
from tests.support.fakes.tables import SHARD, SUMMARIES, checkpoint_row, dump, folded, projector, reached
from tests.support.system.waiting import eventually
from tests.support.system.working import running


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
