"""The switch of a rebuild against queries, commits of the old version, and leaders that were paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

import psycopg
import pytest

from deploy.bootstrap import Database
from read_service.projections.accounts import ACCOUNTS, AccountRow
from shared.folds.projection import Group, Purge
from shared.line import checkpoint
from shared.line.checkpoint import Checkpoint, Fenced
from shared.platform.postgres import Connection
from shared.projections import forget, refill, replay
from shared.projections.tables import Tables
from tests.integration.shared.projections import parked_keys
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import Store, uid
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
    start,
    state,
    unhurried,
    waits,
)
from tests.support.system.waiting import eventually
from tests.support.system.working import running

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
    async with await unhurried(read_db.app, "paused") as connection:
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
                async with asyncio.timeout(20):
                    await asyncio.to_thread(other.execute, "SELECT count(*) FROM accounts")
                store.deposit("acme", uid(100 + number), ALICE, 1, 6)
                await at_end(read_db, store)
            assert (await admin.get("accounts")).state == "filling"
            long.rollback()
            await eventually(state(admin, "switched"), 20)


async def known(connection: Connection, group: Group = parked_keys.GROUP) -> Tables:
    """The tables of the old version, as its leader has them in memory."""
    tables = Tables(group)
    await tables.refresh(connection, SHARD)
    return tables


async def forgets(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version forgets a tenant."""
    await forget.forget_tenant(await known(connection), connection, SHARD, at, "acme")


async def retries(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version carries out what was asked of its parked key."""
    await replay.carry_out(await known(connection), connection, SHARD, at)


async def applies(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version applies a batch."""
    store.deposit("acme", parked_keys.RED, ALICE, 1, 1)
    await applies_last(connection, at, store)


async def parks(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version applies a batch that parks a key."""
    store.deposit("acme", parked_keys.RED, ALICE, 9, 1)
    await applies_last(connection, at, store)


async def applies_alone(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version applies an event by itself, as one of a batch of which PostgreSQL takes no row."""
    store.deposit("acme", "\0", ALICE, 1, 1)
    await applies_last(connection, at, store)


async def purges(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version deletes the rows of a purged aggregate."""
    key = ("acme", "account", parked_keys.BLUE)
    await forget.forget_aggregate(await known(connection), connection, SHARD, at, key)


async def purges_in_part(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version takes out of rows what they had from a purged aggregate."""

    def nameless(row: AccountRow) -> AccountRow:
        return row._replace(name="")

    accounts = replace(ACCOUNTS, purges=[Purge("account", "account_id", nameless, order="opened_at")])
    tables = await known(connection, Group("accounts", (accounts, *parked_keys.GROUP.projections[1:])))
    await forget.forget_aggregate(tables, connection, SHARD, at, ("acme", "account", parked_keys.BLUE))


async def applies_last(connection: Connection, at: Checkpoint, store: Store) -> None:
    """The old version applies the last event."""
    batch = batch_of(store, len(store.events), len(store.events))
    await (await known(connection)).apply(connection, SHARD, at, batch)


async def test_a_switch_and_a_batch_of_the_old_version_do_not_wait_for_each_other(read_db: Database) -> None:
    """The batch begins while the switch waits for one of the new version: the switch succeeds, and the batch is fenced."""
    store = parked_keys.bank()
    async with operator(read_db) as admin:
        version = await compared(read_db, store, admin, parked_keys.GROUP)
    async with (
        await unhurried(read_db.app, "new") as new,
        await unhurried(read_db.app, "old") as old,
        await unhurried(read_db.app, "switch") as switch,
    ):
        at = await checkpoint.load(old, "accounts", SHARD)
        async with new.transaction():
            await checkpoint.hold(new, f"accounts@{version}", SHARD, at)
            switching = asyncio.create_task(switch.execute("SELECT switch_rebuild('accounts', 1, %s)", [version]))
            await eventually(waits(read_db, 1))
            writing = asyncio.create_task(applies(old, at, store))
            await eventually(waits(read_db, 2))
        assert await (await switching).fetchone() == (True,)
        with pytest.raises(Fenced):
            await writing
    assert serving(read_db) == (f"accounts@{version}", at.position)


BY_BATCH = (applies, parks, applies_alone)
IN_SEVERAL = (forgets, purges, purges_in_part)
"""Between whose transactions the switch comes."""


@pytest.mark.parametrize("writes", [*BY_BATCH, retries, *IN_SEVERAL])
async def test_a_switch_waits_for_what_the_old_version_writes(
    read_db: Database, writes: Callable[[Connection, Checkpoint, Store], Coroutine[None, None, None]]
) -> None:
    """Without a deadlock; then the new version is behind, if that has moved its checkpoint, and else serves."""
    store, moves = parked_keys.bank(), writes in BY_BATCH
    parked_keys.broken.add(9)
    if writes is retries:
        store.deposit("acme", parked_keys.BLUE, ALICE, 9, 109)
    async with operator(read_db) as admin:
        version = await compared(read_db, store, admin, parked_keys.GROUP)
    if writes is retries:
        parked_keys.ask(read_db, "accounts")
    async with (
        await unhurried(read_db.app, "holds") as holds,
        await unhurried(read_db.app, "old") as old,
        await unhurried(read_db.app, "switch") as switch,
    ):
        at = await checkpoint.load(old, "accounts", SHARD)
        async with holds.transaction():
            await checkpoint.hold(holds, "accounts", SHARD, at)
            writing = asyncio.create_task(writes(old, at, store))
            await eventually(waits(read_db, 1))
            switching = asyncio.create_task(switch.execute("SELECT switch_rebuild('accounts', 1, %s)", [version]))
            await eventually(waits(read_db, 2))
        await asyncio.wait({writing, switching})
        assert await switching.result().fetchone() == (not moves,)
        if writes in IN_SEVERAL:
            with pytest.raises(Fenced):
                writing.result()
        else:
            writing.result()
    assert serving(read_db) == ("accounts" if moves else f"accounts@{version}", at.position + moves)


AT_BEGIN = "UPDATE checkpoints SET position = 0, event_id = '' WHERE name = 'accounts'"
LOST = "UPDATE checkpoints SET state = 'stopped', reason = 'HISTORY_DIVERGED: ' WHERE name = 'accounts'"


@pytest.mark.parametrize(("happened", "empties"), [(LOST, refill.empty), (AT_BEGIN, refill.clear_unaccounted)])
async def test_a_switch_waits_for_the_old_version_to_be_emptied(
    read_db: Database, happened: str, empties: Callable[[Tables, Connection, int, Checkpoint], Coroutine[None, None, bool]]
) -> None:
    """Without a deadlock; a version that followed another history does not serve."""
    store = bank(3)
    async with operator(read_db) as admin:
        version = await compared(read_db, store, admin)
    with psycopg.connect(read_db.app) as app:
        app.execute(happened)
    async with (
        await unhurried(read_db.app, "holds") as holds,
        await unhurried(read_db.app, "old") as old,
        await unhurried(read_db.app, "switch") as switch,
    ):
        at, tables = await checkpoint.load(old, "accounts", SHARD), await known(old, ACCOUNT_TABLES)
        async with holds.transaction():
            await checkpoint.hold(holds, "accounts", SHARD, at)
            emptying = asyncio.create_task(empties(tables, old, SHARD, at))
            await eventually(waits(read_db, 1))
            switching = asyncio.create_task(switch.execute("SELECT switch_rebuild('accounts', 1, %s)", [version]))
            await eventually(waits(read_db, 2))
        assert await emptying
        assert await (await switching).fetchone() == (happened is AT_BEGIN,)
    assert serving(read_db)[0] == ("accounts" if happened is LOST else f"accounts@{version}")


async def test_a_commit_during_a_switch_is_in_what_serves(read_db: Database) -> None:
    """A batch of the old version that came first is waited for; then the new version catches up before it serves."""
    store = bank(3)
    async with operator(read_db) as admin:
        version = await compared(read_db, store, admin)
        async with (
            await unhurried(read_db.app, "row") as row,
            await unhurried(read_db.app, "old") as old,
            await unhurried(read_db.app, "switch") as switch,
        ):
            at, tables = await checkpoint.load(old, "accounts", SHARD), await known(old, ACCOUNT_TABLES)
            store.deposit("acme", uid(100), ALICE, 1, 6)
            async with row.transaction():
                await row.execute("SELECT FROM accounts WHERE account_id = %s FOR UPDATE", (uid(100),))
                batch = batch_of(store, len(store.events), len(store.events))
                applying = asyncio.create_task(tables.apply(old, SHARD, at, batch))
                await eventually(waits(read_db, 1))
                switching = asyncio.create_task(switch.execute("SELECT switch_rebuild('accounts', 1, %s)", [version]))
                await eventually(waits(read_db, 2))
            await applying
            assert await (await switching).fetchone() == (False,)
        assert serving(read_db) == ("accounts", len(store.events))
        async with running(made(read_db, store)):
            await eventually(state(admin, "switched"), FILL_S)
            assert serving(read_db) == (f"accounts@{version}", len(store.events))
    assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
