"""Purging aggregates while others command, box, unbox, read and purge them, and are killed."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import aggregate_purging, export, purging
from shared.commands.purging import Purger
from shared.folds.errors import Rejected
from shared.line import streams
from shared.line.archive import Archive
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import PURGED, StoredEvent, read_places
from shared.line.read_through import read_through
from shared.platform.postgres import Connection, Reads
from tests.integration.shared.commands.test_boxing import online
from tests.integration.shared.commands.test_purging import refusal_of, whole
from tests.support.checks.history import connected
from tests.support.domains.trial import Add
from tests.support.fakes.replica import reasons, replica
from tests.support.system.aggregate_purges import BUS, GONE, files, filled, finished, held, is_beginning, planned, rows
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.retention import purger_of
from tests.support.system.waiting import eventually


@pytest.mark.parametrize("first", ["command", "purge"])
async def test_a_command_at_the_same_time_is_before_or_refused(write_db: Database, tmp_path: Path, first: str) -> None:
    """Both wait for the shard's lock. Whoever gets it first wins; the other finds that the aggregate moved."""
    async with (
        replica(write_db, BUS) as one,
        boxer(write_db.app, files_in(tmp_path), BUS) as mover,
        connected(write_db.app) as connection,
        connected(write_db.app) as watch,
    ):
        for amount in (1, -1):
            await one.ask_one(Add(counter_id="a", amount=amount))
        [goes] = await planned(mover)
        purger = purger_of(mover, BUS)
        both: dict[str, Callable[[], Awaitable[Any]]] = {
            "command": lambda: one.ask_one(Add(counter_id="a", amount=1)),
            "purge": lambda: purger.begin(goes),
        }
        tasks: dict[str, asyncio.Future[Any]] = {}
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(1, 1)")
            for name in (first, *(both.keys() - {first})):
                tasks[name] = asyncio.ensure_future(both[name]())
                await eventually(lambda: _waiting(watch, len(tasks)), 10)
        outcome: Any
        purge: Any
        outcome, purge = await asyncio.gather(tasks["command"], tasks["purge"], return_exceptions=True)
        if first == "purge":
            assert (reasons([outcome]), purge) == (["AGGREGATE_PURGED"], None)
        else:
            assert (reasons([outcome]), purge.reason) == (["completed"], aggregate_purging.MOVED)
            assert (await purger.open(), await held(mover)) == ([], [])


async def _waiting(connection: Connection, count: int) -> bool:
    """Whether so many sessions wait for the shard's lock."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1 AND NOT granted"
    return (await (await connection.execute(query)).fetchone()) == (count,)


async def test_it_cannot_be_boxed_or_put_back_at_the_same_time(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is purged between the reading and the last call of a box, and of an unboxing; nothing of it stays in the archive."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for name in "ab":
            for amount in (1, -1):
                await one.ask_one(Add(counter_id=name, amount=amount))
        await move(mover, "box", "b", str(uuid4()))
        archive, purger = mover.archive, purger_of(mover, BUS)
        goes = {each.key[2]: each for each in await planned(mover)}
        read = Archive.read

        async def purging_meanwhile(self: Archive, location: str, key: tuple[str, str, str], chain: bytes) -> Any:
            found = await read(self, location, key, chain)
            if key[2] in goes:
                await purger.begin(goes.pop(key[2]))
            return found

        monkeypatch.setattr(Archive, "read", purging_meanwhile)
        assert await refusal_of(move(mover, "box", "a", str(uuid4()))) == "AGGREGATE_PURGED"
        assert await refusal_of(move(mover, "unbox", "b", str(uuid4()))) == "AGGREGATE_PURGED"
        assert goes == {}
        await finished(purger)
        assert archive is mover.archive
        for name in "ab":
            assert [event.type for event in await online(write_db, name)] == [AGGREGATE_PURGED]
        await whole(mover._reads, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("reader", ["line", "streams", "export"])
async def test_a_reader_that_finds_a_box_gone_looks_again(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """The aggregate is purged after its place was looked up: that is no damage. Files that are missing at a place are."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for name in "ab":
            for amount in (1, -1):
                await one.ask_one(Add(counter_id=name, amount=amount))
            await move(mover, "box", name, str(uuid4()))
        goes, events = await planned(mover), Archive.events
        positions = [1, 2, 3, 4, 5, 6]

        async def read() -> list[StoredEvent]:
            if reader == "line":
                return await whole(mover._reads, tmp_path)
            pages: AsyncIterator[Sequence[StoredEvent]]
            if reader == "streams":
                pages = streams.pages_of(mover._reads, mover.archive, TENANT, positions)
            else:
                pages = export.events_of(mover._reads, mover.archive, TENANT, 6)
            return [event async for page in pages for event in page]

        async def purging_before(self: Archive, *asked: Any) -> Any:
            if goes and asked[1][2] == "a":
                await purger_of(mover, BUS).begin(goes.pop(0))
                await finished(purger_of(mover, BUS))
            return await events(self, *asked)

        monkeypatch.setattr(Archive, "events", purging_before)
        if reader == "streams":
            assert await refusal_of(read()) == "LINE_CHANGING"  # its positions are of before
            positions = [4, 5, 6]
        assert {event.aggregate_id for event in await read() if event.aggregate_id != "a"} >= {"b"}
        await mover.archive.forget_aggregate((TENANT, "counter", "b"))
        assert await refusal_of(read()) == "ARCHIVE_DAMAGED"


async def test_a_page_shows_no_event_without_those_before_it(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aggregate, in a box and with an event behind it, is purged between two queries of one page."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=5))
        await one.ask_one(Add(counter_id="whole", amount=-5))
        await move(mover, "box", "whole", str(uuid4()))
        [goes] = await planned(mover)

        async def purging_before(*asked: Any, **named: Any) -> Any:
            await purger_of(mover, BUS).begin(goes)
            await finished(purger_of(mover, BUS))
            return await read_places(*asked, **named)

        monkeypatch.setattr("shared.line.read_through.read_places", purging_before)
        page = await read_through(mover._reads, mover.archive, after=0, limit=3)
    assert [event.type for event in page] == [PURGED] * 3


async def test_two_purgers_and_a_reader_at_once(write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each aggregate is purged once, what went is counted once, and what is read at any time is a beginning."""
    monkeypatch.setattr(aggregate_purging, "LIMIT_ROWS", 2)
    monkeypatch.setattr(aggregate_purging, "PAUSE_S", 0)
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        goes = (await planned(mover))[1]
        begun = await asyncio.gather(*(purger_of(mover, BUS).begin(goes) for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in begun if each is not None] == [Rejected]  # the other found it moved
        working = asyncio.gather(*(finished(purger_of(mover, BUS)) for _ in range(2)))
        while not working.done():
            assert is_beginning(await whole(mover._reads, tmp_path))
        await working
        async with connected(write_db.app) as connection:
            cursor = await connection.execute(
                "SELECT sum(events), sum(boxed_events), sum(commands), sum(cardinality(versions)) FROM aggregate_purges"
            )
            assert await cursor.fetchall() == [(17, 4, 20, 2)]
        marks = [event for event in await whole(mover._reads, tmp_path) if event.type == AGGREGATE_PURGED]
        assert sorted(event.aggregate_id for event in marks) == ["part", "whole"]


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_killed_at_every_step_it_goes_on(write_db: Database, tmp_path: Path) -> None:
    """At any time the line has no gap, and what is left is a beginning; in the end it is as if nobody had been killed."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        for step in (1, 2, 5, 3, 4, 6, 2, 5, 100):
            words = ("-m", "tests.support.system.retention", write_db.app, str(tmp_path), str(step))
            code = await (await asyncio.create_subprocess_exec(sys.executable, *words)).wait()
            assert code in (0, -9)
            assert is_beginning(await whole(mover._reads, tmp_path))
            if code == 0:
                break
        assert code == 0
        left = await rows(write_db, "whole", "part")
        assert (left["events"], left["boxes"]) == (GONE["events"], GONE["boxes"])
        assert set(left["commands"]) == set(GONE["commands"])
        assert left.keys() == GONE.keys()
    assert files(tmp_path) == []


async def test_the_purge_of_the_tenant_takes_over(write_db: Database, tmp_path: Path) -> None:
    """A purge that is half done does nothing more; all holes are in the tenant's chain, and nothing of the tenant is left."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        purger = purger_of(mover, BUS)
        goes = (await planned(mover))[1]
        await purger.begin(goes)
        [purge_id] = await purger.open()
        async with connected(write_db.app) as connection:
            await connection.execute("SELECT purge_aggregates_step(%s, 4)", (purge_id,))
        await purging.close(mover._reads, 1, TENANT, "olga")
        assert await purger.open() == []
        await purger.purge(purge_id)  # of an older leader
        assert await refusal_of(purger.begin(goes)) == aggregate_purging.MOVED
        await _tenant_purged(mover._reads, tmp_path)
        done = await purging.read(mover._reads, TENANT)
        line = await whole(mover._reads, tmp_path)
        async with connected(write_db.app) as connection:
            assert await (await connection.execute("SELECT * FROM aggregate_purges")).fetchall() == []
    assert done is not None
    holes = [event for event in line if event.type == PURGED]
    text = hashlib.sha256(b"")
    link = "\n".join(f"{event.position} {event.event_id}" for event in reversed(holes))
    assert done.chain == hashlib.sha256(text.digest() + link.encode()).digest()
    assert await rows(write_db, "whole", "part", "live") == {}


async def _tenant_purged(reads: Reads, folder: Path) -> None:
    await Purger(reads, Archive(files_in(folder))).purge(TENANT)
