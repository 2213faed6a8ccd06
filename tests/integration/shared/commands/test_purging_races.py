"""What goes on beside a purge, on a real database: whatever it is, nothing of the tenant is left, and no other tenant waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import export, firing, purging
from shared.commands.purging import Purger
from shared.commands.recurring import Recurring
from shared.commands.schedule import Schedule, cancel_waiting
from shared.line.archive import Archive
from shared.line.event_store import read_tenant
from shared.line.files import Store
from shared.platform.postgres import Connection, Reads
from tests.integration.shared.commands.test_boxing_turns import ShutStore
from tests.integration.shared.commands.test_purging import OTHER, files_left, filled, left, purged, refusal_of
from tests.integration.shared.commands.test_schedule import ADMIN, adding
from tests.support.checks.history import connected, somebody_waits, somebody_waits_for_a_row
from tests.support.logs import capture_logs
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.purging import reading
from tests.support.system.waiting import eventually

LATER = timedelta(days=1)


class Regret(Exception):
    """Rolls a transaction back."""


class StuckStore:
    """A store that deletes nothing of the first tenant."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(self, path: str, data: bytes) -> None:
        """As in Store."""
        await self._store.write(path, data)

    async def read(self, path: str) -> bytes:
        """As in Store."""
        return await self._store.read(path)

    async def forget(self, folder: str) -> int:
        """As in Store."""
        if folder == TENANT:
            raise OSError("the store is away")
        return await self._store.forget(folder)


async def step(connection: Connection) -> str:
    """One step of the first tenant's purge, with room for all of it; returns the stage."""
    cursor = await connection.execute("SELECT purge_tenant(%s, 1000, 1000)", (TENANT,))
    [(stage,)] = await cursor.fetchall()
    return str(stage)


async def entries_read(connection: Connection) -> int:
    """How many entries of the indexes of events the current transaction has read."""
    cursor = await connection.execute(
        "SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid)) FROM pg_index WHERE indrelid = 'events'::regclass"
    )
    [(count,)] = await cursor.fetchall()
    return int(count)


async def stage_of(reads: Reads, tenant: str) -> str:
    """How far the purge of a tenant is."""
    found = await purging.read(reads, tenant)
    assert found is not None
    return found.stage


@pytest.mark.parametrize("changed", ["schedule", "command"])
async def test_a_row_that_is_changed_meanwhile_goes_too(write_db: Database, tmp_path: Path, changed: str) -> None:
    """The step that deletes it waits for the other transaction, passes the row over, and does not end its stage."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads, connected(write_db.app) as other, connected(write_db.app) as mine:
        schedule = await Recurring(reads).add(adding(), "* * * * *", "UTC", "all")
        command = adding()
        await Schedule(reads).add(command, datetime.now(UTC) + LATER)
        await purging.close(reads, 1, TENANT, "olga")
        while changed == "command" and await step(mine) != "rows":
            pass
        async with connected(write_db.admin) as watch:
            async with other.transaction():
                if changed == "schedule":
                    await firing.change(other, (TENANT, schedule.schedule_id), "paused")
                else:
                    await cancel_waiting(other, command.key, ADMIN)
                stepping = asyncio.create_task(step(mine))
                await eventually(lambda: somebody_waits_for_a_row(watch), 10)
            assert await stepping == ("closed" if changed == "schedule" else "rows")
        assert (await purged(reads, tmp_path)).stage == "done"
    assert await left(write_db) == {"events": 1}


async def test_nothing_fires_for_a_closed_tenant(write_db: Database) -> None:
    """Not what was read before it was closed, and it is not among the due, where it would be in the way of others."""
    async with reading(write_db.app) as reads, connected(write_db.app) as connection:
        for tenant in (TENANT, OTHER):
            await Recurring(reads).add(adding(tenant=tenant), "* * * * *", "UTC", "all")
        async with connected(write_db.owner) as owner:
            await owner.execute("UPDATE schedules SET due_at = due_at - interval '1 minute'")
        before = await firing.read_due(connection)
        assert {schedule.tenant for schedule in before} == {TENANT, OTHER}
        await purging.close(reads, 1, TENANT, "olga")
        assert {schedule.tenant for schedule in await firing.read_due(connection)} == {OTHER}
        assert await firing.release(connection, before) == 1
        wait_s = await firing.release_due(connection)
        assert wait_s is not None
        assert wait_s > 0
    assert await left(write_db) == {"events": 1, "schedules": 1}


class Within:
    """What a replica calls functions on: one connection, in whose transaction they are."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """As in Reads."""
        yield self._connection


@pytest.mark.parametrize("writes", ["command", "schedule", "firing"])
async def test_a_tenant_is_closed_behind_those_who_have_looked(write_db: Database, tmp_path: Path, writes: str) -> None:
    """Whoever has looked, and writes, is waited for; what was written goes with the rest. Another tenant is closed at once."""
    await filled(write_db, tmp_path)
    async with (
        reading(write_db.app) as reads,
        connected(write_db.app) as mine,
        connected(write_db.app) as watch,
    ):
        within: Any = Within(mine)
        await Recurring(reads).add(adding(), "* * * * *", "UTC", "all")
        async with connected(write_db.owner) as owner:
            await owner.execute("UPDATE schedules SET due_at = due_at - interval '1 minute' WHERE cron = '* * * * *'")
        async with mine.transaction():
            if writes == "command":
                await Schedule(within).add(adding(), datetime.now(UTC) + LATER)
            elif writes == "schedule":
                await Recurring(within).add(adding(), "0 0 1 1 *", "UTC", "none")
            else:
                assert await firing.release(mine, await firing.read_due(mine)) == 1
            closing = asyncio.create_task(purging.close(reads, 1, TENANT, "olga"))
            await eventually(lambda: somebody_waits(watch), 10)
            await purging.close(reads, 1, OTHER, "olga")
        await closing
        assert (await purged(reads, tmp_path)).stage == "done"
    assert await left(write_db) == {"events": 1}


async def test_who_has_looked_and_not_written_yet_is_waited_for(write_db: Database, tmp_path: Path) -> None:
    """Its row waits for another of the same id, so its transaction has no number, which the purge could go by."""
    await filled(write_db, tmp_path)
    async with (
        reading(write_db.app) as reads,
        connected(write_db.app) as first,
        connected(write_db.admin) as rows,
        connected(write_db.app) as watch,
    ):
        within: Any = Within(first)
        command = adding()
        with suppress(Regret):
            async with first.transaction():
                await Schedule(within).add(command, datetime.now(UTC) + LATER)
                second = asyncio.create_task(Schedule(reads).add(command, datetime.now(UTC) + LATER))
                await eventually(lambda: somebody_waits_for_a_row(rows), 10)
                closing = asyncio.create_task(purging.close(reads, 1, TENANT, "olga"))
                await eventually(lambda: somebody_waits(watch), 10)
                raise Regret
        assert (await second).status == "scheduled"
        await closing
        assert (await purged(reads, tmp_path)).stage == "done"
    assert await left(write_db) == {"events": 1}


async def test_a_row_that_comes_late_goes_too(write_db: Database, tmp_path: Path) -> None:
    """Its writer had looked before the tenant was closed: the purge goes through all stages again. The hash is the same."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads, connected(write_db.app) as mine:
        await purging.close(reads, 1, TENANT, "olga")
        while await step(mine) != "archive":
            pass
        before = await purging.read(reads, TENANT)
        async with connected(write_db.owner) as late:
            await late.execute("INSERT INTO snapshots VALUES (%s, 'counter', 'late', 1, 1, '')", (TENANT,))
        cursor = await mine.execute("SELECT finish_purge(%s, 0, 1000)", (TENANT,))
        assert await cursor.fetchall() == [("closed",)]
        after = await purged(reads, tmp_path)
    assert before is not None
    assert (after.stage, after.gone["events"], after.gone["snapshots"]) == (
        "done",
        before.gone["events"],
        before.gone["snapshots"] + 1,
    )
    assert await left(write_db) == {"events": 1}


async def test_a_purge_that_is_stuck_holds_up_no_other(write_db: Database, tmp_path: Path) -> None:
    """Which tenant's purge waits, and why, is logged once."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads:
        for tenant in (TENANT, OTHER):
            await purging.close(reads, 1, tenant, "olga")
        with capture_logs() as logs:
            running = asyncio.create_task(Purger(reads, Archive(StuckStore(files_in(tmp_path)))).run())

            async def done() -> bool:
                return await stage_of(reads, OTHER) == "done"

            await eventually(done, 10)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert await stage_of(reads, TENANT) == "archive"
    told = [(line["purged_tenant"], line["reason"]) for line in logs if line["event"] == "purge_waits"]
    assert told == [(TENANT, "ARCHIVE_UNAVAILABLE")]


@pytest.mark.parametrize("table", ["schedules", "snapshots", "credentials", "boxes"])
async def test_rows_of_any_table_make_a_tenant(write_db: Database, tmp_path: Path, table: str) -> None:
    """One that has only ever had a schedule is closed and purged like any other."""
    rows = {
        "snapshots": "(tenant, category, aggregate_id, version, schema, state) VALUES (%s, 'counter', 'a', 1, 1, '')",
        "credentials": "(tenant, subject_id, password_hash) VALUES (%s, 's', '')",
        "boxes": "(tenant, category, aggregate_id, version, location, chain, boxed_at) "
        "VALUES (%s, 'counter', 'a', 1, 'acme/counter/a/1', '', now())",
    }
    async with reading(write_db.app) as reads, connected(write_db.owner) as owner:
        if table == "schedules":
            await Recurring(reads).add(adding(), "0 0 1 1 *", "UTC", "none")
        else:
            await owner.execute(f"INSERT INTO {table} {rows[table]}", (TENANT,))
        assert (await purging.counts(reads, TENANT))[table] == 1
        await purging.close(reads, 1, TENANT, "olga")
        assert (await purged(reads, tmp_path)).gone[table] == 1
    assert await left(write_db) == {"events": 1}


async def test_no_box_is_written_behind_the_purge(write_db: Database, tmp_path: Path) -> None:
    """The purge waits for one that is being written, whose command is then refused, and deletes its files."""
    await filled(write_db, tmp_path)
    store = ShutStore(files_in(tmp_path))
    async with reading(write_db.app) as reads, boxer(write_db.app, store) as mover, connected(write_db.app) as mine:
        boxing = asyncio.create_task(move(mover, "box", "b", str(uuid4())))
        await eventually(lambda: store.inside == 1, 10)
        await purging.close(reads, 1, TENANT, "olga")
        while await step(mine) != "archive":
            pass
        assert await refusal_of(purged(reads, tmp_path)) == "DATABASE_BUSY"
        store.opened.set()
        assert await refusal_of(boxing) == "TENANT_CLOSED"
        assert await refusal_of(move(mover, "box", "c", str(uuid4()))) == "TENANT_CLOSED"
        assert (await purged(reads, tmp_path)).stage == "done"
    assert files_left(tmp_path) == []


async def test_a_step_and_a_window_read_no_more_than_they_take(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten positions of a line that one large tenant shares with many small ones: not all of its index is read each time."""
    monkeypatch.setattr(export, "WINDOW_POSITIONS", 10)
    counts: list[int] = []

    async def counted(connection: Connection, *arguments: Any, **more: Any) -> Any:
        found = await read_tenant(connection, *arguments, **more)
        counts.append(await entries_read(connection))
        return found

    monkeypatch.setattr(export, "read_tenant", counted)
    async with connected(write_db.owner) as owner, connected(write_db.app) as mine, reading(write_db.app) as reads:
        await owner.execute(
            """INSERT INTO events
                 (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
               SELECT n, gen_random_uuid(), CASE n % 2 WHEN 0 THEN 'small' || n ELSE 'acme' END, 'counter', n, 1,
                 'trial.v1.Added', '', now(), ''
               FROM generate_series(1, 30000) n"""
        )
        await owner.execute("ANALYZE events")
        exported = [event async for page in export.events_of(reads, None, TENANT, 20) for event in page]
        assert (len(exported), len(counts)) == (10, 2)
        await purging.close(reads, 1, TENANT, "olga")
        while await step(mine) != "events":
            pass
        for _ in range(2):
            async with mine.transaction():
                await mine.execute("SELECT purge_tenant(%s, 10, 10)", (TENANT,))
                counts.append(await entries_read(mine))
    assert max(counts) < 100, counts
