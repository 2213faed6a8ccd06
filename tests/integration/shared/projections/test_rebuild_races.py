"""The switch of a rebuild against queries, commits of the old version, and leaders that were paused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.line import checkpoint
from shared.line.checkpoint import Fenced
from shared.platform.postgres import connect
from shared.projections.tables import Tables
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD, dump, folded
from tests.support.system.rebuilding import ALICE, NAMES, at_end, bank, made, operator, running, serving, start, state
from tests.support.system.waiting import eventually

pytestmark = pytest.mark.usefixtures("quick")


async def test_whatever_still_runs_of_the_old_version_writes_nothing(read_db: Database) -> None:
    """A paused leader finds its checkpoint gone; one that was filling finds no table of that name."""
    store = bank()
    late = store.deposit("acme", uid(100), ALICE, 1, 6)
    del store.events[-1]
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        version = (await start(admin)).version
        await eventually(state(admin, "switched"), 20)
    before = dump(read_db, NAMES)
    store.events.append(late)
    async with await connect(read_db.app, application_name="paused") as connection:
        at = await checkpoint.load(connection, f"accounts@{version}", SHARD)
        batch = batch_of(store, len(store.events), len(store.events))
        with pytest.raises(Fenced):
            await Tables(ACCOUNT_TABLES).apply(connection, SHARD, at, batch)
        filling = Tables(ACCOUNT_TABLES, consumer=f"accounts@{version}", suffix=f"__v{version}")
        with pytest.raises(psycopg.errors.UndefinedTable):
            await filling.apply(connection, SHARD, at, batch)
    assert dump(read_db, NAMES) == before
    async with running(made(read_db, store)):
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


async def test_a_long_query_holds_up_the_switch_and_nobody_else(read_db: Database) -> None:
    """While it lasts other queries are answered, and events applied; when it ends the new tables serve."""
    store = bank()
    assert read_db.query
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        # A busy machine may take longer than the role's own limits, which would end the long query before the test does.
        unlimited = "-c transaction_timeout=0 -c idle_in_transaction_session_timeout=0"
        with (
            psycopg.connect(read_db.query, options=unlimited) as long,
            psycopg.connect(read_db.query, autocommit=True) as other,
        ):
            long.execute("SELECT count(*) FROM accounts")
            await start(admin)

            async def compared() -> bool:
                return (await admin.get("accounts")).rows_differing == 0

            await eventually(compared, 20)
            for number in range(6):
                began = time.monotonic()
                await asyncio.to_thread(other.execute, "SELECT count(*) FROM accounts")
                assert time.monotonic() - began < 1.5
                store.deposit("acme", uid(100 + number), ALICE, 1, 6)
                await at_end(read_db, store)
            assert (await admin.get("accounts")).state == "filling"
            long.rollback()
            await eventually(state(admin, "switched"), 20)


async def test_a_switch_and_a_batch_of_the_old_version_do_not_wait_for_each_other(read_db: Database) -> None:
    """The batch begins while the switch waits for one of the new version: the switch succeeds, and the batch is fenced."""
    store = bank(3)
    assert read_db.query
    with psycopg.connect(read_db.owner, autocommit=True) as owner:
        # Longer than PostgreSQL takes to find a deadlock.
        owner.execute("ALTER FUNCTION switch_rebuild SET lock_timeout = '20s'")
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        with psycopg.connect(read_db.query) as query:
            query.execute("SELECT count(*) FROM accounts")  # holds the switch up
            version = (await start(admin)).version

            async def compared() -> bool:
                return (await admin.get("accounts")).rows_differing == 0

            await eventually(compared, 20)
    with psycopg.connect(read_db.admin, autocommit=True) as watching:

        def waiting(count: int) -> Callable[[], bool]:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            return lambda: watching.execute(asked).fetchone() == (count,)

        async with (
            await connect(read_db.app, application_name="new") as new,
            await connect(read_db.app, application_name="old") as old,
            await connect(read_db.app, application_name="switch") as switch,
        ):
            at = await checkpoint.load(old, "accounts", SHARD)
            store.deposit("acme", uid(100), ALICE, 1, 6)
            async with new.transaction():
                await checkpoint.hold(new, f"accounts@{version}", SHARD, at)
                switching = asyncio.create_task(switch.execute("SELECT switch_rebuild('accounts', 1, %s)", [version]))
                await eventually(waiting(1))
                batch = batch_of(store, len(store.events), len(store.events))
                applying = asyncio.create_task(Tables(ACCOUNT_TABLES).apply(old, SHARD, at, batch))
                await eventually(waiting(2))
            assert await (await switching).fetchone() == (True,)
            with pytest.raises(Fenced):
                await applying
    assert serving(read_db) == (f"accounts@{version}", at.position)
