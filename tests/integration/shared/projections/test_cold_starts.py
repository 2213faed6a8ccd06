"""Cold starts: whatever became of the read database, the tables end in the fold of the line, or stop with a name."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql

from deploy.bootstrap import Database
from shared.line import consumer
from shared.projections import rebuild
from tests.integration.shared.projections.test_projector import bank
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import TABLES, checkpoint_row, dump, folded, projector, reached
from tests.support.system.engines import Engines
from tests.support.system.rebuilding import made, operator, serving, start, state
from tests.support.system.waiting import eventually
from tests.support.system.working import running

HEAD = 20


async def fill(database: Database, store: Store) -> None:
    """Lets a projector reach the end of the line, and ends it."""
    async with running(projector(database, StoreLine(store))) as it:
        await reached(it, len(store.events))


def grown(store: Store) -> None:
    """Five events more."""
    for number in range(5):
        store.deposit("acme", uid(2), uid(1), 1, 32 + number)


def checkpoint_deleted(connection: psycopg.Connection) -> None:
    """As by hand, by the owner."""
    connection.execute("DELETE FROM checkpoints")


def checkpoint_reset(connection: psycopg.Connection) -> None:
    """As by hand."""
    connection.execute("UPDATE checkpoints SET epoch = '', position = 0, event_id = ''")


def all_emptied(connection: psycopg.Connection) -> None:
    """Tables and checkpoint, as in an empty database."""
    connection.execute(f"TRUNCATE {', '.join(TABLES)}, checkpoints, parked_keys, parked_events, row_changes, row_change_heads")


@pytest.mark.parametrize("happened", [checkpoint_deleted, checkpoint_reset, all_emptied])
async def test_a_read_database_that_begins_anew_ends_in_the_right_rows(
    read_db: Database, happened: Callable[[psycopg.Connection], None]
) -> None:
    """No row is folded a second time: money that was there already is not there twice."""
    store = bank()
    await fill(read_db, store)
    with psycopg.connect(read_db.owner) as owner:
        happened(owner)
    grown(store)
    await fill(read_db, store)
    assert dump(read_db) == folded(store.events)


async def test_a_checkpoint_that_is_reset_under_a_running_projector(read_db: Database) -> None:
    """It is fenced, reads the checkpoint, finds rows that it does not account for, and fills anew."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, HEAD)
        with psycopg.connect(read_db.owner) as owner:
            checkpoint_reset(owner)
        grown(store)
        await eventually(lambda: checkpoint_row(read_db)[0] == HEAD + 5)
        assert dump(read_db) == folded(store.events)


async def test_a_read_database_restored_to_an_older_state_catches_up(engines: Engines, read_db: Database) -> None:
    """Rows and checkpoint are of one moment, so nothing is missing and nothing doubled; under a running projector too."""
    store = bank()
    later = store.events[8:]
    del store.events[8:]
    await fill(read_db, store)
    copy, name, owner = (sql.Identifier(each) for each in (f"{read_db.name}_copy", read_db.name, "foldline_read_owner"))
    template = sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}")
    with psycopg.connect(engines.admin_url, autocommit=True) as admin:
        admin.execute(template.format(copy, name, owner))
        store.events.extend(later)
        async with running(projector(read_db, StoreLine(store))) as it:
            await reached(it, HEAD)
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
            admin.execute(template.format(name, copy, owner))
            admin.execute(sql.SQL("DROP DATABASE {}").format(copy))
            with psycopg.connect(read_db.admin, autocommit=True) as here:
                here.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO foldline_read_app, foldline_read_query").format(name))
            # In a process of its own the projector loses the lease with the database, and reads its checkpoint at once.
            grown(store)
            await eventually(lambda: checkpoint_row(read_db)[0] == HEAD + 5, 20)
    assert dump(read_db) == folded(store.events)


async def test_a_database_that_is_dropped_and_made_anew_is_filled_by_the_running_projector(
    engines: Engines, read_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it meets meanwhile: no database, no tables, an empty one."""
    monkeypatch.setattr(consumer, "RETRY_MAX_S", 0.05)
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, HEAD)
        name, empty = sql.Identifier(read_db.name), engines.clone("read")
        with psycopg.connect(engines.admin_url, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
            grown(store)
            admin.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(empty.name), name))
        await eventually(lambda: checkpoint_row(read_db)[0] == HEAD + 5, 20)
    assert dump(read_db) == folded(store.events)


async def test_a_read_database_newer_than_the_line_stops_with_a_name(read_db: Database) -> None:
    """Its rows are of a history that is lost; nothing is changed. `accept-history` goes on: see test_projector_stops."""
    store = bank()
    await fill(read_db, store)
    before = dump(read_db)
    del store.events[15:]
    async with running(projector(read_db, StoreLine(store))) as it:
        assert str(await eventually(lambda: it.stopped)).startswith("HISTORY_DIVERGED")
    assert dump(read_db) == before


async def test_rows_that_were_lost_come_back_by_a_rebuild(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint says that they are there, so only the line knows them: `foldline projection rebuild`."""
    monkeypatch.setattr(rebuild, "LOOK_S", 0.01)
    store = bank()
    async with running(made(read_db, store)), operator(read_db) as admin:
        await eventually(lambda: serving(read_db)[1] == HEAD)
        with psycopg.connect(read_db.app) as app:
            app.execute("DELETE FROM accounts")
            app.execute("DELETE FROM movements")
        await start(admin)
        await eventually(state(admin, "switched"), 20)
        assert (await admin.get("accounts")).rows_differing == 10
    wanted = folded(store.events)
    assert dump(read_db, ["accounts", "movements"]) == {name: wanted[name] for name in ("accounts", "movements")}
