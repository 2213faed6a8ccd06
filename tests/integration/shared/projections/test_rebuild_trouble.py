"""Rebuilds where not all is well: tables that stopped, keys that the new version parks, and a migration in between."""

from __future__ import annotations

import psycopg
import pytest

from deploy.bootstrap import Database
from tests.integration.shared.projections import parked_keys
from tests.support.fakes.line import Store, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, dump, folded
from tests.support.system.rebuilding import (
    ALICE,
    FILL_S,
    NAMES,
    at_end,
    bank,
    made,
    operator,
    running,
    serving,
    shape,
    start,
    state,
)
from tests.support.system.waiting import eventually

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


@pytest.mark.parametrize(
    "migration",
    [
        "CREATE INDEX accounts_by_test ON accounts (tenant, opened_at DESC)",
        "CREATE INDEX accounts_by_opening_too ON accounts (tenant, opened_at, account_id)",
        "ALTER TABLE accounts ADD COLUMN note text NOT NULL DEFAULT ''",
    ],
)
async def test_a_migration_during_a_rebuild_is_not_lost(read_db: Database, migration: str) -> None:
    """What was begun before it is begun anew: the tables that serve then have what it made, also a second index of one kind."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
            with psycopg.connect(read_db.app) as app:
                app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
            version = (await start(admin, only_if_same=True)).version
            await eventually(state(admin, "waiting"), FILL_S)
        with psycopg.connect(read_db.owner) as owner:
            owner.execute(migration)
        before = [[row for row in part if "__v" not in str(row)] for part in shape(read_db)]
        await admin.switch("accounts")
        async with running(made(read_db, store)):
            await eventually(state(admin, "switched"), FILL_S)
            await at_end(read_db, store)
            assert (await admin.get("accounts")).version > version
            await admin.drop("accounts")
            await eventually(state(admin, ""), FILL_S)
    assert shape(read_db) == before
