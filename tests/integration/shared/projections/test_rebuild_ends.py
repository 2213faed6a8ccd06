"""Rebuilds that are cut off, and that are cancelled."""

from __future__ import annotations

import asyncio
import random

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.folds.errors import Rejected
from shared.line import checkpoint
from shared.line.checkpoint import Fenced
from shared.projections.tables import Tables
from tests.integration.shared.projections import parked_keys
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD, dump, folded
from tests.support.system.rebuilding import (
    ALICE,
    FILL_S,
    NAMES,
    at_end,
    bank,
    compared,
    made,
    operator,
    serving,
    shape,
    start,
    state,
    unhurried,
    waits,
)
from tests.support.system.waiting import eventually
from tests.support.system.working import running

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


async def test_keys_that_are_parked_in_a_cancelled_rebuild_go_with_it(read_db: Database) -> None:
    """Those of the tables that serve stay."""
    store = parked_keys.bank()
    store.deposit("acme", parked_keys.RED, parked_keys.ALICE, 7, 7)
    parked_keys.broken.add(7)
    async with running(made(read_db, store, parked_keys.GROUP)), operator(read_db) as admin:
        await at_end(read_db, store)
        before = parked_keys.parked(read_db)
        parked_keys.broken.add(100)
        await start(admin)
        await eventually(state(admin, "waiting"), FILL_S)
        assert (len(before), len(parked_keys.parked(read_db))) == (1, 3)
        await admin.cancel("accounts")
        await eventually(state(admin, ""), FILL_S)
        assert parked_keys.parked(read_db) == before


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


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
async def test_a_switch_that_came_before_a_cancellation(read_db: Database, ends: str) -> None:
    """The cancellation waits for its end: refused if it switched, else nothing is left of the rebuild."""
    store = bank(3)
    async with operator(read_db) as admin, await unhurried(read_db.app, "switch") as leader:
        version = await compared(read_db, store, admin)
        await leader.execute("BEGIN")
        cursor = await leader.execute("SELECT switch_rebuild('accounts', 1, %s)", (version,))
        assert await cursor.fetchone() == (True,)
        cancelling = asyncio.create_task(admin.cancel("accounts"))
        await eventually(waits(read_db, 1))
        await leader.execute(ends)
        if ends == "COMMIT":
            with pytest.raises(Rejected) as refused:
                await cancelling
            assert refused.value.reason == "REBUILD_NOT_RUNNING"
            assert (serving(read_db)[0], (await admin.get("accounts")).state) == (f"accounts@{version}", "switched")
            await admin.drop("accounts")
        else:
            await cancelling
        async with running(made(read_db, store)):
            await eventually(state(admin, ""), FILL_S)
            assert serving(read_db)[0] == (f"accounts@{version}" if ends == "COMMIT" else "accounts")
            store.deposit("acme", uid(100), ALICE, 1, 6)
            await at_end(read_db, store)
        assert not [row for row in shape(read_db)[0] if "__" in row[0]]
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
async def test_a_cancellation_that_came_before_a_switch(read_db: Database, ends: str) -> None:
    """The switch waits for its end: it changes nothing if the rebuild was cancelled, of which nothing is left."""
    store = bank(3)
    assert read_db.query
    async with (
        operator(read_db) as admin,
        await unhurried(read_db.app, "switch") as leader,
        await unhurried(read_db.query, "cancel") as cancelling,
    ):
        version = await compared(read_db, store, admin)
        await cancelling.execute("BEGIN")
        cursor = await cancelling.execute("SELECT steer_rebuild('accounts', 1, '{filling}', 'cancelling')")
        assert await cursor.fetchone() == (True,)
        switching = asyncio.create_task(leader.execute("SELECT switch_rebuild('accounts', 1, %s)", (version,)))
        await eventually(waits(read_db, 1))
        await cancelling.execute(ends)
        assert await (await switching).fetchone() == (ends == "ROLLBACK",)
        if ends == "ROLLBACK":
            await admin.drop("accounts")
        async with running(made(read_db, store)):
            await eventually(state(admin, ""), FILL_S)
            assert serving(read_db)[0] == (f"accounts@{version}" if ends == "ROLLBACK" else "accounts")
            store.deposit("acme", uid(100), ALICE, 1, 6)
            await at_end(read_db, store)
        assert not [row for row in shape(read_db)[0] if "__" in row[0]]
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


async def test_a_cancellation_and_a_batch_of_a_paused_leader_do_not_wait_for_each_other(read_db: Database) -> None:
    """The batch, which fills the new tables, began first and is let finish: then they go, with what it wrote."""
    store = bank(3)
    assert read_db.query
    async with (
        operator(read_db) as admin,
        await unhurried(read_db.app, "paused") as paused,
        await unhurried(read_db.app, "leader") as leader,
        await unhurried(read_db.app, "other") as other,
    ):
        version = await compared(read_db, store, admin)
        at = await checkpoint.load(paused, f"accounts@{version}", SHARD)
        await admin.cancel("accounts")
        store.deposit("acme", uid(100), ALICE, 1, 6)
        filling = Tables(ACCOUNT_TABLES, consumer=f"accounts@{version}", suffix=f"__v{version}")
        await filling.refresh(paused, SHARD)
        async with other.transaction():
            await checkpoint.hold(other, f"accounts@{version}", SHARD, at)
            ending = asyncio.create_task(leader.execute("SELECT end_rebuild('accounts', 1, %s)", (version,)))
            await eventually(waits(read_db, 1))
            batch = batch_of(store, len(store.events), len(store.events))
            applying = asyncio.create_task(filling.apply(paused, SHARD, at, batch))
            await eventually(waits(read_db, 2))
        assert await (await ending).fetchone() == (True,)
        with pytest.raises((Fenced, psycopg.errors.UndefinedTable)):
            await applying
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        assert not [row for row in shape(read_db)[0] if "__" in row[0]]
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


@pytest.mark.long
async def test_a_cancellation_at_any_moment_of_a_switch(read_db: Database) -> None:
    """Many times: either it is cancelled and nothing is left, or the new tables serve; and the rows are right."""
    store, chance, outcomes = bank(3), random.Random(15), set[str]()
    async with operator(read_db) as admin, running(made(read_db, store)):
        await at_end(read_db, store)
        for number in range(60):
            was = serving(read_db)[0]
            version = (await start(admin)).version
            await asyncio.sleep(chance.random() * 0.12)
            try:
                await admin.cancel("accounts")
            except Rejected:
                assert (await admin.get("accounts")).state == "switched"
                was = f"accounts@{version}"
                await admin.drop("accounts")
                outcomes.add("switched")
            else:
                outcomes.add("cancelled")
            await eventually(state(admin, ""), FILL_S)
            store.deposit("acme", uid(100), ALICE, 1, 6 + number)
            await at_end(read_db, store)
            assert serving(read_db)[0] == was
            assert not [row for row in shape(read_db)[0] if "__" in row[0]]
            assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
    assert outcomes == {"cancelled", "switched"}
