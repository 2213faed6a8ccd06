"""Releases of a group of query tables: a newer one rebuilds by itself, an older one touches nothing."""

from __future__ import annotations

import asyncio
from functools import partial

import psycopg
import pytest

from deploy.bootstrap import Database
from tests.support.fakes.line import uid
from tests.support.fakes.tables import dump, folded
from tests.support.system.rebuilding import ALICE, NAMES, at_end, bank, made, operator, release, serving, start, state
from tests.support.system.waiting import eventually
from tests.support.system.working import running

pytestmark = pytest.mark.usefixtures("quick")

ONE_TOO_MANY = """
INSERT INTO accounts SELECT tenant, 'x', owner_id, name, currency, 1, status, opened_at, 1 FROM accounts LIMIT 1
"""


def folds_that_serve(database: Database) -> int:
    """By which version the tables that serve were made."""
    with psycopg.connect(database.app) as connection:
        [(folds,)] = connection.execute("SELECT folds FROM checkpoints WHERE group_name = 'accounts' AND serves").fetchall()
        return int(folds)


def serve_of(database: Database, version: int) -> bool:
    """Whether tables of a version serve."""
    return folds_that_serve(database) == version


async def test_a_newer_release_rebuilds_by_itself(read_db: Database) -> None:
    """Cut off again and again; the former rows answer until the switch. The next release does not wait for an operator's drop."""
    store = bank()
    async with running(made(read_db, store, release(1))):
        await at_end(read_db, store)
    for version in (2, 3):
        for pause_s in (0.02, 0.05, 0.1):
            async with running(made(read_db, store, release(version))):
                await asyncio.sleep(pause_s)
            names = {row[3] for row in dump(read_db, ["accounts"])["accounts"]}
            assert names in ({f"blue {version - 1}"}, {f"blue {version}"})
        async with running(made(read_db, store, release(version))):
            await eventually(partial(serve_of, read_db, version), 20)
            store.account("acme", uid(1000 + version), ALICE)
            await at_end(read_db, store)
        assert dump(read_db, NAMES) == folded(store.events, release(version))
    with psycopg.connect(read_db.app) as connection:
        assert connection.execute("SELECT state, asked_by FROM projection_rebuilds").fetchall() == [("switched", "release 3")]


async def test_a_rebuild_that_older_folds_began_is_begun_anew(read_db: Database) -> None:
    """An operator's, which waits with rows of version 1: they never serve."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store, release(1))):
            await at_end(read_db, store)
            with psycopg.connect(read_db.app) as connection:
                connection.execute(ONE_TOO_MANY)
            await start(admin, only_if_same=True)
            await eventually(state(admin, "waiting"), 20)
        async with running(made(read_db, store, release(2))):
            await eventually(lambda: folds_that_serve(read_db) == 2, 20)
        assert dump(read_db, NAMES) == folded(store.events, release(2))


async def test_an_older_release_does_not_touch_the_tables_of_a_newer_one(read_db: Database) -> None:
    """It stops by name; the newer one goes on."""
    store = bank()
    async with running(made(read_db, store, release(2))):
        await at_end(read_db, store)
    end = len(store.events)
    store.account("acme", uid(1000), ALICE)
    async with running(made(read_db, store, release(1))) as it:
        await eventually(lambda: (it.stopped or "").startswith("RELEASE_TOO_OLD"), 20)
    assert serving(read_db)[1] == end
    async with running(made(read_db, store, release(2))):
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, release(2))
