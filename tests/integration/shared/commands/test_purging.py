"""Purging a tenant on a real database and a real folder: closed for every way to write, gone in the end, the line whole."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import purging
from shared.commands.append import AppendConflict, Batch, append
from shared.commands.purging import Purge, Purger
from shared.commands.recurring import Recurring
from shared.commands.schedule import Schedule
from shared.folds.errors import Refusal
from shared.line.archive import Archive
from shared.line.ends import CLOSED
from shared.line.event_store import PURGED, StoredEvent, read_event_id
from shared.line.read_through import read_through
from shared.platform.postgres import Reads
from tests.support.checks.history import connected
from tests.support.domains.trial import Add, SetPassword, build_registry, lone
from tests.support.fakes.replica import reasons, replica
from tests.support.system import forked
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.purging import main, reading
from tests.support.system.waiting import eventually

OTHER = "umbrella"
BUS = build_registry()


async def filled(database: Database, folder: Path) -> None:
    """Two tenants by turns, 24 commands each; of the first a password, a box, and a box that was undone."""
    async with replica(database, BUS) as one, boxer(database.app, files_in(folder)) as mover:
        for nth in range(1, 13):
            for tenant in (TENANT, OTHER):
                for name in "ab":
                    await one.ask_one(Add(counter_id=name, amount=nth), tenant=tenant)
        await Recurring(mover._reads).add(one.command(Add(counter_id="r", amount=1)), "0 0 1 1 *", "UTC", "none")
        await one.ask_one(SetPassword(counter_id="c", subject_id="s", word="long enough"))
        await move(mover, "box", "a", str(uuid4()))
        await move(mover, "box", "b", str(uuid4()))
        await move(mover, "unbox", "b", str(uuid4()))


async def whole(reads: Reads, folder: Path) -> list[StoredEvent]:
    """The line, read through; it has no gap."""
    found: list[StoredEvent] = []
    while page := await read_through(reads, Archive(files_in(folder)), after=len(found), limit=7):
        found += page
    assert [event.position for event in found] == list(range(1, len(found) + 1))
    return found


async def purged(reads: Reads, folder: Path | None) -> Purge:
    """Purges the first tenant; returns what is known of it."""
    await Purger(reads, Archive(files_in(folder)) if folder else None).purge(TENANT)
    found = await purging.read(reads, TENANT)
    assert found is not None
    return found


async def refusal_of(call: Any) -> str:
    """Why a call was refused."""
    with pytest.raises(Refusal) as told:
        await call
    return told.value.reason


async def left(database: Database) -> dict[str, int]:
    """Rows of the first tenant, by table, where there are any."""
    found: dict[str, int] = {}
    async with connected(database.app) as connection:
        for table in ("events", "commands", "schedules", "snapshots", "credentials", "boxes"):
            cursor = await connection.execute(f"SELECT count(*) FROM {table} WHERE tenant = %s", (TENANT,))
            [(count,)] = await cursor.fetchall()
            if count:
                found[table] = count
    return found


def files_left(folder: Path) -> list[str]:
    """What is in the archive."""
    return [path.name for path in folder.iterdir()]


async def test_a_purge_leaves_holes_and_nothing_else(write_db: Database, tmp_path: Path) -> None:
    """Position, id and tenant of each event stay, those that were in the archive too; the other tenant's are as they were."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads:
        before = await whole(reads, tmp_path)
        assert await purging.counts(reads, TENANT) == {
            "events": 16,
            "boxed_events": 12,
            "commands": 28,
            "schedules": 1,
            "snapshots": 1,
            "credentials": 1,
            "boxes": 2,
        }
        await purging.close(reads, 1, TENANT, "olga")
        done = await purged(reads, tmp_path)
        after = await whole(reads, tmp_path)
    assert len(after) == len(before) + 1
    for old, new in zip(before, after, strict=False):
        if old.tenant == OTHER:
            assert new == old
        else:
            assert (new.event_id, new.tenant, new.category, new.aggregate_id) == (old.event_id, TENANT, "", "")
            assert (new.type, new.version, new.payload, new.metadata) == (PURGED, 0, b"", b"")
    assert (after[-1].type, after[-1].tenant, done.position) == (CLOSED, TENANT, len(after))
    assert await left(write_db) == {"events": 1}
    mine = [event for event in before if event.tenant == TENANT]
    assert (done.stage, done.asked_by, done.done_at is not None) == ("done", "olga", True)
    assert done.gone["events"] + done.gone["boxed_events"] == len(mine) == 28
    assert {name: done.gone[name] for name in ("boxed_events", "commands", "credentials", "boxes", "files")} == {
        "boxed_events": 12,
        "commands": 28,
        "credentials": 1,
        "boxes": 2,
        "files": 6,
    }
    assert files_left(tmp_path) == []
    async with connected(write_db.app) as connection:
        assert await read_event_id(connection, mine[0].position) == mine[0].event_id


async def test_nothing_is_carried_out_for_a_closed_tenant(write_db: Database, tmp_path: Path) -> None:
    """By replicas that have its states in memory or not, alone, in a batch, beside others, scheduled, boxed, or by SQL."""
    store = files_in(tmp_path)
    later = datetime.now(UTC) + timedelta(days=1)
    async with (
        replica(write_db, BUS) as one,
        replica(write_db, BUS) as other,
        boxer(write_db.app, store) as mover,
        reading(write_db.app) as reads,
    ):
        for each in (one, other):
            for tenant in (TENANT, OTHER):
                await each.ask_one(Add(counter_id="a", amount=5), tenant=tenant)
        first = one.command(Add(counter_id="a", amount=1))
        assert reasons(await one.ask(first)) == ["completed"]
        await purging.close(reads, 1, TENANT, "olga")
        assert reasons([await one.ask_one(Add(counter_id="a", amount=1))]) == ["TENANT_CLOSED"]
        assert reasons([await one.ask_one(Add(counter_id="a", amount=-99))]) == ["TENANT_CLOSED"]
        both = [other.command(Add(counter_id="a", amount=1), tenant=tenant) for tenant in (TENANT, OTHER)]
        assert reasons(await other.ask(*both)) == ["TENANT_CLOSED", "completed"]
        assert reasons(await one.ask(first)) == ["TENANT_CLOSED"]
        assert await refusal_of(Schedule(reads).add(one.command(Add(counter_id="a", amount=1)), later)) == "TENANT_CLOSED"
        again = Recurring(reads).add(one.command(Add(counter_id="a", amount=1)), "0 0 1 1 *", "UTC", "none")
        assert await refusal_of(again) == "TENANT_CLOSED"
        for way in ("box", "unbox"):
            assert await refusal_of(move(mover, way, "a", str(uuid4()))) == "TENANT_CLOSED"
        async with connected(write_db.app) as connection:
            for version in (1, 4):
                alone, beside = lone((TENANT, "counter", "z"), version), lone((OTHER, "counter", f"z{version}"), 1)
                for batch in (alone, Batch({}, [*alone.commands, *beside.commands], [*alone.events, *beside.events])):
                    with pytest.raises(AppendConflict):
                        await append(connection, 1, batch)
        await purged(reads, tmp_path)
        async with replica(write_db, BUS) as fresh:
            for _ in range(2):
                assert reasons([await fresh.ask_one(Add(counter_id="new", amount=1))]) == ["TENANT_CLOSED"]
                assert reasons([await fresh.ask_one(Add(counter_id="new", amount=1), tenant=OTHER)]) == ["completed"]
        assert await left(write_db) == {"events": 1}


async def test_closing_is_once_and_needs_a_tenant(write_db: Database, tmp_path: Path) -> None:
    """A name of which nothing is stored is not closed; a repeat, and a second operator at once, change nothing."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads:
        assert await refusal_of(purging.close(reads, 1, "acmee", "olga")) == "TENANT_NOT_FOUND"
        assert await purging.read(reads, "acmee") is None
        await asyncio.gather(*(purging.close(reads, 1, TENANT, name) for name in ("olga", "otto")))
        first = await purging.read(reads, TENANT)
        await purging.close(reads, 1, TENANT, "oskar")
        assert await purging.read(reads, TENANT) == first
        assert [event.type for event in await whole(reads, tmp_path)].count(CLOSED) == 1


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_killed_at_every_step_it_goes_on(write_db: Database, tmp_path: Path) -> None:
    """At any time the line has no gap, and what is left of the tenant is the beginning of its line; in the end all is gone."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads:
        before = await whole(reads, tmp_path)
        await purging.close(reads, 1, TENANT, "olga")
        # Each child takes a few steps more than the last and starts where that one came to.
        for step in (1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 3, 4, 5, 4, 3, 9, 100):
            code = await forked.ended(forked.start(main, write_db.app, str(tmp_path), TENANT, str(step)))
            assert code in (0, -9)
            line = await whole(reads, tmp_path)
            mine = [event.type != PURGED for event in line[:-1] if event.tenant == TENANT]
            assert mine == sorted(mine, reverse=True)
            assert [event for event in line if event.tenant == OTHER] == [event for event in before if event.tenant == OTHER]
            if code == 0:
                break
        done = await purging.read(reads, TENANT)
    assert done is not None
    assert (done.stage, done.gone["events"], done.gone["boxed_events"], done.gone["commands"]) == ("done", 16, 12, 28)
    assert await left(write_db) == {"events": 1}
    assert files_left(tmp_path) == []


async def test_two_purgers_and_a_reader_at_once(write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What went is counted once, and no reading has a gap or an event that is neither there nor a hole."""
    monkeypatch.setattr(purging, "WINDOW_POSITIONS", 3)
    monkeypatch.setattr(purging, "PAUSE_S", 0)
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads:
        before = await whole(reads, tmp_path)
        await purging.close(reads, 1, TENANT, "olga")
        working = asyncio.gather(*(purged(reads, tmp_path) for _ in range(2)))
        while not working.done():
            line = await whole(reads, tmp_path)
            assert [event.event_id for event in line[: len(before)]] == [event.event_id for event in before]
        first, second = await working
    assert first == second
    assert (first.gone["events"], first.gone["boxed_events"], first.gone["boxes"]) == (16, 12, 2)


async def test_it_waits_for_transactions_that_began_before(write_db: Database, tmp_path: Path) -> None:
    """Such a one may still write a row of the tenant, which would be left."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads, connected(write_db.admin) as early:
        async with early.transaction():
            await early.execute("INSERT INTO snapshots VALUES (%s, 'counter', 'late', 1, 1, '')", (TENANT,))
            await purging.close(reads, 1, TENANT, "olga")
            assert (await purged(reads, tmp_path)).stage == "closed"
        assert (await purged(reads, tmp_path)).stage == "done"
    assert await left(write_db) == {"events": 1}


async def test_without_the_archive_it_waits(write_db: Database, tmp_path: Path) -> None:
    """A service that does not know where the boxes are does not say that they are gone."""
    await filled(write_db, tmp_path)
    async with reading(write_db.app) as reads:
        await purging.close(reads, 1, TENANT, "olga")
        assert await refusal_of(purged(reads, None)) == "ARCHIVE_NOT_CONFIGURED"
        found = await purging.read(reads, TENANT)
        assert found is not None
        assert found.stage == "archive"
        running = asyncio.create_task(Purger(reads, Archive(files_in(tmp_path))).run())

        async def done() -> bool:
            now = await purging.read(reads, TENANT)
            return now is not None and now.stage == "done"

        await eventually(done, 10)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
