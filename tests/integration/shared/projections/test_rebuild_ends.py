"""Rebuilds that are cut off, and that are cancelled."""

from __future__ import annotations

import asyncio
import random

import psycopg
import pytest

from deploy.bootstrap import Database
from tests.support.fakes.line import uid
from tests.support.fakes.tables import ACCOUNT_TABLES, dump, folded
from tests.support.system.rebuilding import ALICE, NAMES, at_end, bank, made, operator, running, serving, shape, start, state
from tests.support.system.waiting import eventually

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("moment", ["asked", "filling", "waiting"])
async def test_a_cancelled_rebuild_leaves_nothing(read_db: Database, moment: str) -> None:
    """No table, checkpoint or parked key; what serves goes on, and another rebuild may begin."""
    store = bank()
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        before = shape(read_db)
    async with operator(read_db) as admin:
        with psycopg.connect(read_db.app) as app:
            app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
        await start(admin, only_if_same=True)
        if moment == "asked":
            await admin.cancel("accounts")
        async with running(made(read_db, store)):
            if moment != "asked":
                await eventually(state(admin, moment), 20)
                await admin.cancel("accounts")
            await eventually(state(admin, ""), 20)
            assert shape(read_db) == before
            store.deposit("acme", uid(103), ALICE, 1, 6)
            await at_end(read_db, store)
            assert serving(read_db)[0] == "accounts"
            with psycopg.connect(read_db.app) as app:
                assert app.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)
            await start(admin)
            await eventually(state(admin, "switched"), 20)


async def test_cut_off_anywhere_it_goes_on_and_ends_once(read_db: Database) -> None:
    """Leader after leader is cut off after a random time, under load; the last sees it through."""
    store, chance = bank(), random.Random(7)
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        await start(admin)
        for number in range(25):
            store.deposit("acme", uid(100 + number), ALICE, 1, 6)
            async with running(made(read_db, store)):
                await asyncio.sleep(chance.random() * 0.08)
        async with running(made(read_db, store)):
            await eventually(state(admin, "switched"), 30)
            store.deposit("acme", uid(139), ALICE, 1, 6)
            await at_end(read_db, store)
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
        with psycopg.connect(read_db.app) as app:
            assert app.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)
