"""Boxing on a real database and a real folder: killed, raced, on a store that fails."""

from __future__ import annotations

import asyncio
import errno
from multiprocessing.process import BaseProcess
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands.append import AppendConflict, Batch, append, lock
from shared.commands.registry import CommandRegistry
from shared.folds.errors import Refusal
from shared.line.archive import Archive
from shared.line.event_store import StoredEvent, read_stream
from shared.line.files import Store
from shared.line.read_through import read_through
from shared.platform.postgres import Reads
from tests.support.checks.history import connected, somebody_waits
from tests.support.domains.trial import Add, Move, build_registry, lone
from tests.support.fakes.replica import reasons, replica
from tests.support.system import forked
from tests.support.system.boxing import TENANT, boxer, files_in, main, move
from tests.support.system.waiting import eventually

BUS = build_registry()
STEPS_MAX = 40


async def filled(database: Database, *names: str, bus: CommandRegistry = BUS) -> None:
    """Counters with twelve events each, one after the other on the line, so that no two of one are neighbours."""
    async with replica(database, bus) as one:
        for nth in range(1, 13):
            for name in names:
                await one.ask_one(Add(counter_id=name, amount=nth))


async def whole(database: Database, store: Store) -> list[StoredEvent]:
    """The line, read through to the archive; it has no gap."""
    reads = Reads(database.app, application_name="test", size_max=2)
    await reads.open()
    try:
        found: list[StoredEvent] = []
        while page := await read_through(reads, Archive(store), after=len(found), limit=7):
            found += page
    finally:
        await reads.close()
    assert [event.position for event in found] == list(range(1, len(found) + 1))
    return found


async def online(database: Database, name: str) -> list[StoredEvent]:
    """What is in the tables of one counter."""
    async with connected(database.app) as connection:
        return await read_stream(connection, (TENANT, "counter", name), after=0, limit=1000)


def child(database: Database, folder: Path, way: str, name: str, command_id: str, step: int) -> BaseProcess:
    """A process that boxes or unboxes and is killed at a step."""
    return forked.start(main, database.app, str(folder), way, name, command_id, str(step))


async def refusal_of(call: object) -> str:
    """Why a call was refused."""
    with pytest.raises(Refusal) as told:
        await call  # type: ignore[misc]
    return told.value.reason


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["box", pytest.param("unbox", marks=pytest.mark.long)])
async def test_killed_at_every_step(write_db: Database, tmp_path: Path, way: str) -> None:
    """Before and after each file and each call: the counter is in one place, whole; the same command then ends the move."""
    store = files_in(tmp_path)
    await filled(write_db, "a", "b")
    before = await whole(write_db, store)
    async with boxer(write_db.app, store) as one:
        if way == "unbox":
            await move(one, "box", "a", str(uuid4()))
        for step in range(1, STEPS_MAX):
            command_id, start = str(uuid4()), await online(write_db, "a")
            code = await forked.ended(child(write_db, tmp_path, way, "a", command_id, step))
            left = await online(write_db, "a")
            assert (await whole(write_db, store))[: len(before)] == before
            moved = left != start
            assert (len(left) == 1) == ((way == "box") == moved)
            done = await move(one, way, "a", command_id)
            assert (done.status, done.events_appended) == ("completed", 1)
            assert (await whole(write_db, store))[: len(before)] == before
            if code == 0:
                break
            await move(one, "unbox" if way == "box" else "box", "a", str(uuid4()))
        else:
            raise AssertionError("it is never through")
        assert step > (14 if way == "box" else 8)
        if way == "box":
            await move(one, "unbox", "a", str(uuid4()))
    assert (await online(write_db, "a"))[:12] == [event for event in before if event.aggregate_id == "a"]
    async with replica(write_db, BUS) as last:
        assert reasons([await last.ask_one(Add(counter_id="a", amount=1))]) == ["completed"]


@pytest.mark.parametrize("way", ["box", pytest.param("unbox", marks=pytest.mark.long)])
async def test_killed_while_the_database_works_on_it(write_db: Database, tmp_path: Path, way: str) -> None:
    """The server may still carry it out, or not: all of it or nothing, and the same command tells which."""
    store = files_in(tmp_path)
    await filled(write_db, "a")
    before = await whole(write_db, store)
    async with boxer(write_db.app, store) as one, connected(write_db.app) as holder, connected(write_db.app) as watch:
        if way == "unbox":
            await move(one, "box", "a", str(uuid4()))
        command_id = str(uuid4())
        # The child may need seconds to start.
        await holder.execute("SET idle_in_transaction_session_timeout = 0")
        async with holder.transaction():
            await lock(holder, 1)
            killed = child(write_db, tmp_path, way, "a", command_id, STEPS_MAX)
            await eventually(lambda: somebody_waits(watch), 30)
            killed.kill()
            await forked.ended(killed)
        done = await move(one, way, "a", command_id)
        assert done.status == "completed"
    assert (await whole(write_db, store))[:12] == before
    assert len(await whole(write_db, store)) == (13 if way == "box" else 14)


async def test_a_replica_that_has_the_state_in_memory_notices(write_db: Database, tmp_path: Path) -> None:
    """Commands and reactions on a boxed counter are refused, whatever a cache says; after unboxing they go on.

    The first replica's state is older than the box: no row that is left on the line has the version that it would append.
    """
    store = files_in(tmp_path)
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other, boxer(write_db.app, store) as mover:
        for each in (one, other):
            assert reasons([await each.ask_one(Add(counter_id=name, amount=5)) for name in "ab"]) == ["completed"] * 2
        await move(mover, "box", "a", str(uuid4()))
        for each in (one, other):
            assert reasons([await each.ask_one(Add(counter_id="a", amount=1))]) == ["AGGREGATE_BOXED"]
            assert reasons([await each.ask_one(Move(counter_id="b", to_id="a", amount=1))]) == ["AGGREGATE_BOXED"]
            outcomes = await each.ask(*(each.command(Add(counter_id=name, amount=1)) for name in "ab"))
            assert reasons(outcomes) == ["AGGREGATE_BOXED", "completed"]
        await move(mover, "unbox", "a", str(uuid4()))
        for nth, each in enumerate((one, other)):
            outcome = await each.ask_one(Add(counter_id="a", amount=1))
            assert (outcome.status, outcome.version) == ("completed", 5 + nth)


async def test_two_that_box_at_once(write_db: Database, tmp_path: Path) -> None:
    """One of them does it; the other finds it done. The same command on both: both tell the same."""
    store = files_in(tmp_path)
    await filled(write_db, "a", "b")
    async with boxer(write_db.app, store) as one, boxer(write_db.app, store) as other:
        ids = [str(uuid4()), str(uuid4())]
        calls = (move(each, "box", "a", id_) for each, id_ in zip((one, other), ids, strict=True))
        told = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in told if isinstance(each, BaseException)]
        assert [getattr(each, "reason", each) for each in refused] == ["AGGREGATE_BOXED"]
        same = str(uuid4())
        first, second = await asyncio.gather(move(one, "box", "b", same), move(other, "box", "b", same))
        assert first == second
    assert len(await whole(write_db, store)) == 26


class BadStore:
    """A folder on a disk that is full from some file on, or that gives back other bytes."""

    def __init__(self, store: Store, *, room: int = 9, wrong: bool = False) -> None:
        self._store = store
        self._room = room
        self._wrong = wrong

    async def write(self, path: str, data: bytes) -> None:
        """Fails half way, as the system does."""
        self._room -= 1
        await self._store.write(path, data if self._room >= 0 else data[: len(data) // 2])
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def forget(self, folder: str) -> int:
        """As in Store."""
        return await self._store.forget(folder)

    async def read(self, path: str) -> bytes:
        """A byte is another one, if told so."""
        data = await self._store.read(path)
        return data.replace(b"12", b"21") if self._wrong and path.endswith("events.jsonl") else data


@pytest.mark.parametrize("room", [0, 1, 2])
async def test_a_full_disk_leaves_the_line_as_it_was(write_db: Database, tmp_path: Path, room: int) -> None:
    """Nothing leaves the tables; with room again, the half-written box is written anew."""
    store = files_in(tmp_path)
    await filled(write_db, "a")
    before = await online(write_db, "a")
    async with boxer(write_db.app, BadStore(store, room=room)) as one:
        assert await refusal_of(move(one, "box", "a", str(uuid4()))) == "ARCHIVE_UNAVAILABLE"
    assert await online(write_db, "a") == before
    async with boxer(write_db.app, store) as one:
        await move(one, "box", "a", str(uuid4()))
    assert (await whole(write_db, store))[:12] == before


async def test_what_is_read_back_wrong_stays_on_the_line(write_db: Database, tmp_path: Path) -> None:
    """A store that keeps other bytes than it was given is found out before anything is deleted."""
    store = files_in(tmp_path)
    await filled(write_db, "a")
    before = await online(write_db, "a")
    async with boxer(write_db.app, BadStore(store, wrong=True)) as one:
        assert await refusal_of(move(one, "box", "a", str(uuid4()))) == "ARCHIVE_DAMAGED"
    assert await online(write_db, "a") == before


async def test_a_folder_that_is_gone_is_waited_for(write_db: Database, tmp_path: Path) -> None:
    """Boxing, unboxing and reading the line say that the archive is away; when it is back, all is there."""
    store = files_in(tmp_path / "archive")
    await filled(write_db, "a", "b")
    async with boxer(write_db.app, store) as one:
        await move(one, "box", "a", str(uuid4()))
        (tmp_path / "archive").rename(tmp_path / "away")
        (tmp_path / "archive").write_text("not a folder")
        assert await refusal_of(move(one, "box", "b", str(uuid4()))) == "ARCHIVE_UNAVAILABLE"
        assert await refusal_of(move(one, "unbox", "a", str(uuid4()))) == "ARCHIVE_UNAVAILABLE"
        assert await refusal_of(whole(write_db, store)) == "ARCHIVE_UNAVAILABLE"
        (tmp_path / "archive").unlink()
        (tmp_path / "away").rename(tmp_path / "archive")
        await move(one, "unbox", "a", str(uuid4()))
    assert len(await whole(write_db, store)) == 26


async def test_a_box_has_a_limit(write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One event more is refused, and stays where it is."""
    await filled(write_db, "a")
    async with boxer(write_db.app, files_in(tmp_path)) as one:
        monkeypatch.setattr("shared.commands.boxing.EVENTS_MAX", 11)
        assert await refusal_of(move(one, "box", "a", str(uuid4()))) == "BOX_TOO_LARGE"
        assert len(await online(write_db, "a")) == 12
        monkeypatch.setattr("shared.commands.boxing.EVENTS_MAX", 12)
        await move(one, "box", "a", str(uuid4()))


async def test_without_an_archive_nothing_is_boxed(write_db: Database) -> None:
    """It is said so, whatever is named."""
    await filled(write_db, "a")
    async with boxer(write_db.app, None) as one:
        for way in ("box", "unbox"):
            assert await refusal_of(move(one, way, "a", str(uuid4()))) == "ARCHIVE_NOT_CONFIGURED"


async def test_the_database_believes_no_chain_but_its_own(write_db: Database) -> None:
    """Whoever calls the function with another chain deletes nothing."""
    await filled(write_db, "a")
    statement = """SELECT box_aggregate(1, 'acme', 'counter', 'a', 12, 'x', %s, gen_random_uuid(), 't', 'f', 'p', 'alice',
        gen_random_uuid(), '', now(), gen_random_uuid(), 'foldline.v1.AggregateBoxed', '', '')"""
    async with connected(write_db.app) as connection:
        with pytest.raises(Exception, match="the archive has other events than the line"):
            await connection.execute(statement, (b"\0" * 32,))
    assert len(await online(write_db, "a")) == 12


@pytest.mark.parametrize("others", [0, 1], ids=["append_one", "append_batch"])
async def test_no_append_takes_a_version_that_is_in_the_archive(write_db: Database, tmp_path: Path, others: int) -> None:
    """Neither function, whatever version a stale replica believes in; other aggregates are appended to all the same."""
    store = files_in(tmp_path)
    await filled(write_db, "a")
    async with boxer(write_db.app, store) as one, connected(write_db.app) as connection:
        await move(one, "box", "a", str(uuid4()))
        for version in (1, 2, 12, 13):
            stale, other = lone((TENANT, "counter", "a"), version), lone((TENANT, "counter", f"b{version}"), 1)
            if others:
                stale = Batch({}, [*stale.commands, *other.commands], [*stale.events, *other.events])
            with pytest.raises(AppendConflict):
                await append(connection, 1, stale)
            await append(connection, 1, other)
        await move(one, "unbox", "a", str(uuid4()))
        await append(connection, 1, lone((TENANT, "counter", "a"), 15))
    assert len(await whole(write_db, store)) == 19
