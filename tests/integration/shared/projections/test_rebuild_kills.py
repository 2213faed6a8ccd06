"""kill -9 of the projector at every step of a rebuild: the next leader goes on, and it ends in the right rows by itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.projections import rebuild
from shared.projections.rebuild_admin import RebuildAdmin
from tests.support.fakes.line import Store, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, dump, folded
from tests.support.system import forked, rebuilding_killed
from tests.support.system.rebuilding import (
    ALICE,
    FILL_S,
    NAMES,
    at_end,
    bank,
    made,
    operator,
    release,
    serving,
    shape,
    start,
    state,
)
from tests.support.system.rebuilding_killed import STATEMENTS
from tests.support.system.waiting import eventually
from tests.support.system.working import running

pytestmark = pytest.mark.usefixtures("quick")

WHENS = ("before", "during", "after")


async def killed(database: Database, store: Store, folder: Path, *words: str) -> None:
    """Lets a projector run until it dies at a step. Then one version serves; and there is an event that nobody has seen."""
    file = folder / "line"
    rebuilding_killed.save(store, file)
    process = forked.start(rebuilding_killed.main, database.app, str(file), *words)
    assert await forked.ended(process) == -9
    with psycopg.connect(database.app) as app:
        assert app.execute("SELECT count(*) FROM checkpoints WHERE serves").fetchone() == (1,)
    store.deposit("acme", uid(100), ALICE, 1, len(store.events))


async def answers(database: Database, store: Store) -> None:
    """What serves when the projector is dead is the fold of the line up to its checkpoint; PostgreSQL may yet end a statement."""
    await eventually(lambda: dump(database, NAMES) == folded(store.events[: serving(database)[1]], ACCOUNT_TABLES))


async def goes_on(database: Database, store: Store, admin: RebuildAdmin, wanted: str) -> None:
    """The next leader brings the rebuild into a state, and the tables to the end of the line."""
    async with running(made(database, store)):
        await eventually(state(admin, wanted), FILL_S)
        await at_end(database, store)


async def ended(database: Database, store: Store, admin: RebuildAdmin, before: list[Any]) -> None:
    """Nothing is left of the rebuild but its rows, which are right."""
    await goes_on(database, store, admin, "")
    assert shape(database) == before
    assert dump(database, NAMES) == folded(store.events, ACCOUNT_TABLES)
    with psycopg.connect(database.app) as app:
        assert app.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)


SELDOM = pytest.mark.long
STEPS = [
    "prepare",
    pytest.param("first batch", marks=SELDOM),
    "batch in between",
    pytest.param("compare", marks=SELDOM),
    "switch",
]


@pytest.mark.parametrize("step", STEPS)
async def test_killed_on_its_way_it_switches_all_the_same(read_db: Database, tmp_path: Path, step: str) -> None:
    """Once; queries had an answer while it was dead, and nothing is left of what was begun."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        before = shape(read_db)
        for when in WHENS:
            version = (await start(admin)).version
            await killed(read_db, store, tmp_path, step, when)
            await answers(read_db, store)
            await goes_on(read_db, store, admin, "switched")
            assert serving(read_db)[0] == f"accounts@{version}"
            await admin.drop("accounts")
            await ended(read_db, store, admin, before)


@SELDOM
async def test_killed_as_it_finds_a_difference_it_waits_for_an_operator(read_db: Database, tmp_path: Path) -> None:
    """As it would have; the operator's word is enough for it to switch."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        before = shape(read_db)
        for when in WHENS:
            with psycopg.connect(read_db.app) as app:
                app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
            await start(admin, only_if_same=True)
            await killed(read_db, store, tmp_path, "wait", when)
            await goes_on(read_db, store, admin, "waiting")
            assert (await admin.get("accounts")).rows_differing == 1
            await admin.switch("accounts")
            await goes_on(read_db, store, admin, "switched")
            await admin.drop("accounts")
            await ended(read_db, store, admin, before)


async def test_killed_while_it_is_cancelled_it_leaves_nothing(read_db: Database, tmp_path: Path) -> None:
    """Of a rebuild in the midst of its filling; what served goes on."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        before = shape(read_db)
        for when in WHENS:
            await start(admin)
            await killed(read_db, store, tmp_path, "batch in between", when)
            await admin.cancel("accounts")
            await killed(read_db, store, tmp_path, "end", when)
            await answers(read_db, store)
            await ended(read_db, store, admin, before)
            assert serving(read_db)[0] == "accounts"


@SELDOM
async def test_killed_while_former_tables_are_dropped(read_db: Database, tmp_path: Path) -> None:
    """They go, and what serves stays."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        before = shape(read_db)
        for when in WHENS:
            version = (await start(admin)).version
            await goes_on(read_db, store, admin, "switched")
            await admin.drop("accounts")
            await killed(read_db, store, tmp_path, "end", when)
            await answers(read_db, store)
            await ended(read_db, store, admin, before)
            assert serving(read_db)[0] == f"accounts@{version}"


@pytest.mark.parametrize("when", [pytest.param("before", marks=SELDOM), "during", pytest.param("after", marks=SELDOM)])
async def test_killed_as_it_begins_anew_after_a_migration(read_db: Database, tmp_path: Path, when: str) -> None:
    """What was filled before the migration goes, and the tables that serve in the end have what it made."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        await start(admin)
        await killed(read_db, store, tmp_path, "batch in between", "after")
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("CREATE INDEX accounts_by_test ON accounts (tenant, opened_at, account_id)")
        before = shape(read_db)
        await killed(read_db, store, tmp_path, "renew", when)
        await answers(read_db, store)
        await goes_on(read_db, store, admin, "switched")
        await admin.drop("accounts")
        await goes_on(read_db, store, admin, "")
        assert shape(read_db) == [[row for row in part if "__v" not in str(row)] for part in before]
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


@pytest.mark.parametrize("when", [pytest.param("before", marks=SELDOM), "during", pytest.param("after", marks=SELDOM)])
async def test_killed_as_a_release_asks_for_its_rebuild(read_db: Database, tmp_path: Path, when: str) -> None:
    """The next process of that release rebuilds all the same."""
    store = bank()
    async with running(made(read_db, store, release(1))):
        await at_end(read_db, store)
    await killed(read_db, store, tmp_path, "ask", when, "2")
    async with running(made(read_db, store, release(2))), operator(read_db) as admin:
        await eventually(state(admin, "switched"), FILL_S)
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, release(2))


def test_every_write_of_the_rebuilder_is_a_step() -> None:
    """Each function of the database that it calls, and each update."""
    written = re.findall(r"SELECT \w+_rebuild\(|UPDATE projection_rebuilds SET \w+ = \S+", inspect.getsource(rebuild))
    assert len(written) == len(STATEMENTS)
    assert all(any(it.startswith(known) or known.startswith(it) for known in STATEMENTS.values()) for it in written)
