"""Rebuilds where not all is well: tables that stopped, keys that the new version parks, and a migration in between."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.line import checkpoint
from tests.integration.shared.projections import parked_keys
from tests.support.fakes.line import Store, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD, dump, folded
from tests.support.system.rebuilding import (
    ALICE,
    FILL_S,
    NAMES,
    at_end,
    bank,
    made,
    operator,
    serving,
    shape,
    start,
    state,
    unhurried,
)
from tests.support.system.waiting import eventually
from tests.support.system.working import running

pytestmark = pytest.mark.usefixtures("quick")


def spoiled(database: Database, store: Store) -> None:
    """Rows are lost whose accounts then get events: more than bad events would explain."""
    with psycopg.connect(database.app) as app:
        app.execute("DELETE FROM accounts")
    for number in range(30):
        store.deposit("acme", uid(100 + number), ALICE, 1, 6)


async def test_tables_that_have_stopped_are_rebuilt(read_db: Database) -> None:
    """They are not compared, since the new ones do not wait for them; those serve, and are right."""
    store = bank()
    async with running(made(read_db, store)):
        await at_end(read_db, store)
    spoiled(read_db, store)
    async with running(made(read_db, store)) as it, operator(read_db) as admin:
        await eventually(lambda: (it.stopped or "").startswith("TOO_MANY_PARKED"))
        await start(admin)
        await eventually(state(admin, "switched"), FILL_S)
        assert (await admin.get("accounts")).compared_at is None
        await at_end(read_db, store)
        await eventually(lambda: it.stopped is None)
    assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
    with psycopg.connect(read_db.app) as app:
        assert app.execute("SELECT count(*) FROM parked_keys").fetchone() == (0,)


async def test_tables_that_have_stopped_are_not_the_same(read_db: Database) -> None:
    """Of a rebuild that is to switch only if nothing differs, an operator decides."""
    store = bank()
    async with running(made(read_db, store)):
        await at_end(read_db, store)
    spoiled(read_db, store)
    async with running(made(read_db, store)) as it, operator(read_db) as admin:
        await eventually(lambda: (it.stopped or "").startswith("TOO_MANY_PARKED"))
        await start(admin, only_if_same=True)
        await eventually(state(admin, "waiting"), FILL_S)
        await admin.switch("accounts")
        await eventually(state(admin, "switched"), FILL_S)
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


async def looked(database: Database) -> None:
    """Waits until the rebuilder has looked after the rebuild once more, and taken the step that it then takes."""
    asked = """SELECT max(query_start) FROM pg_stat_activity WHERE datname = %s AND application_name = 'projector'
               AND query LIKE 'SELECT version, state%%'"""
    with psycopg.connect(database.admin, autocommit=True) as admin:
        [(at,)] = admin.execute("SELECT clock_timestamp()").fetchall()
        for _ in range(2):

            def later(at: datetime = at) -> datetime | None:
                [(begun,)] = admin.execute(asked, (database.name,)).fetchall()
                return begun if begun is not None and begun > at else None

            at = await eventually(later, FILL_S)


async def test_tables_that_are_behind_for_a_moment_are_compared(read_db: Database) -> None:
    """The new ones have passed them; they wait to be at one position with them, as they have not stopped."""
    store = bank()
    async with (
        operator(read_db) as admin,
        running(made(read_db, store)),
        await unhurried(read_db.app, "holds") as holds,
    ):
        await at_end(read_db, store)
        end = len(store.events)
        async with holds.transaction():
            await checkpoint.hold(holds, "accounts", SHARD, await checkpoint.load(holds, "accounts", SHARD))
            store.deposit("acme", uid(100), ALICE, 1, 6)
            version = (await start(admin, only_if_same=True)).version

            def passed() -> bool:
                with psycopg.connect(read_db.app) as app:
                    asked = "SELECT position > %s FROM checkpoints WHERE name = %s"
                    return app.execute(asked, (end, f"accounts@{version}")).fetchone() == (True,)

            await eventually(passed, FILL_S)
            await looked(read_db)
            assert (await admin.get("accounts")).state == "filling"
        await eventually(state(admin, "switched"), FILL_S)
        assert (await admin.get("accounts")).rows_differing == 0


async def test_a_row_is_not_replaced_by_one_that_lacks_events(read_db: Database) -> None:
    """A key that is parked in the new tables alone makes the rebuild wait: queries would be answered from before."""
    store = parked_keys.bank()
    store.deposit("acme", parked_keys.BLUE, parked_keys.ALICE, 7, 107)
    async with running(made(read_db, store, parked_keys.GROUP)), operator(read_db) as admin:
        await at_end(read_db, store)
        before = dump(read_db, ["accounts"])
        parked_keys.broken.add(100)
        await start(admin)
        await eventually(state(admin, "waiting"), FILL_S)
        assert (await admin.get("accounts")).parked == 1
        assert (dump(read_db, ["accounts"]), serving(read_db)[0]) == (before, "accounts")
        await admin.switch("accounts")
        await eventually(state(admin, "switched"), FILL_S)
        assert dump(read_db, ["accounts"]) != before


async def test_a_key_that_is_parked_in_both_versions_does_not_hold_it_up(read_db: Database) -> None:
    """The row lacks the same events as before."""
    store = parked_keys.bank()
    parked_keys.broken.add(100)
    async with running(made(read_db, store, parked_keys.GROUP)), operator(read_db) as admin:
        await at_end(read_db, store)
        assert len(parked_keys.parked(read_db)) == 1
        await start(admin)
        await eventually(state(admin, "switched"), FILL_S)
        assert [row[0] for row in parked_keys.parked(read_db)] == ["accounts"]


INDEX = "CREATE INDEX accounts_by_test ON accounts (tenant, opened_at DESC)"
SECOND_INDEX = "CREATE INDEX accounts_by_opening_too ON accounts (tenant, opened_at, account_id)"
COLUMN = "ALTER TABLE accounts ADD COLUMN note text NOT NULL DEFAULT ''"
CHECK = "ALTER TABLE accounts ADD CONSTRAINT named CHECK (name <> '')"


@pytest.mark.parametrize(
    ("migration", "led"), [(INDEX, False), (INDEX, True), (SECOND_INDEX, False), (COLUMN, True), (CHECK, True)]
)
async def test_a_migration_during_a_rebuild_is_not_lost(read_db: Database, migration: str, led: bool) -> None:
    """What was begun before it is begun anew: the tables that serve then have what it made, also a second index of one kind.

    Whether the projector that fills goes on meanwhile, or another takes over.
    """
    store, before = bank(), list[Any]()

    def migrate() -> None:
        with psycopg.connect(read_db.owner) as owner:
            owner.execute(migration)
        before.extend([row for row in part if "__v" not in str(row)] for part in shape(read_db))

    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
            with psycopg.connect(read_db.app) as app:
                app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
            version = (await start(admin, only_if_same=True)).version
            await eventually(state(admin, "waiting"), FILL_S)
            if led:
                migrate()
                await admin.switch("accounts")
                await eventually(state(admin, "switched"), FILL_S)
        if not led:
            migrate()
            await admin.switch("accounts")
        async with running(made(read_db, store)):
            await eventually(state(admin, "switched"), FILL_S)
            await at_end(read_db, store)
            assert (await admin.get("accounts")).version > version
            await admin.drop("accounts")
            await eventually(state(admin, ""), FILL_S)
    assert shape(read_db) == before


async def test_what_begins_anew_before_the_operator_said_switch_waits_again(read_db: Database) -> None:
    """It is still to switch only if nothing differs."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
            with psycopg.connect(read_db.app) as app:
                app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
            version = (await start(admin, only_if_same=True)).version
            await eventually(state(admin, "waiting"), FILL_S)
        with psycopg.connect(read_db.owner) as owner:
            owner.execute(INDEX)
        async with running(made(read_db, store)):

            async def renewed() -> str:
                rebuild = await admin.get("accounts")
                return rebuild.state if rebuild.version > version and rebuild.state in ("waiting", "switched") else ""

            assert await eventually(renewed, FILL_S) == "waiting"
