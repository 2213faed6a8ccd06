"""Ended processes leave after the retention, whole, and nothing leaves that somebody still needs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

from shared.folds.errors import Rejected, Unavailable
from shared.line import checkpoint as checkpoints
from shared.line.files import open_files
from shared.platform import postgres
from shared.processes import retention as retention_module
from shared.processes import store
from shared.processes.forget import forget, forget_aggregate
from shared.processes.history_archive import HistoryArchive
from shared.processes.retention import ProcessRetention
from shared.processes.runner import CHECKPOINT
from tests.support.checks.history import connected
from tests.support.domains.gifts import World, frozen, key
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

KEPT = timedelta(days=90)


async def connect(world: World) -> postgres.Connection:
    """A connection of the application's role."""
    return await postgres.connect(world.database.app, application_name="test-retention")


async def forgotten(world: World, archive: HistoryArchive | None = None) -> int:
    """Forgets, perhaps with an archive; returns how many left."""
    keeping = ProcessRetention(1, connect=lambda: connect(world), retention=KEPT, clock=world.clock, archive=archive)
    async with await connect(world) as connection:
        return await keeping.forget(connection)


async def are(world: World, **counts: int) -> None:
    """Waits for so many processes of each status."""

    async def reached() -> bool:
        return dict(await world.statuses()) == counts

    await eventually(reached, 20)


async def left(world: World) -> list[tuple[str, bool]]:
    """The processes that are there, and whether they have a history."""
    query = """SELECT process_id, EXISTS (SELECT FROM process_history h WHERE h.process_id = p.process_id)
               FROM processes p ORDER BY 1"""
    return list(await world.query(query))


async def test_only_what_is_over_and_old_leaves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its history. What says something to operators, waits for an answer, runs or is young stays."""
    monkeypatch.setattr(retention_module, "FORGET_MAX", 2)
    world.open(1, 2, 3)
    async with world.running():
        await are(world, ended=3)
        world.write.decide = frozen
        world.open(4)
        await are(world, ended=4)
        world.write.decide = lambda command: Unavailable("AWAY", "away")
        world.open(5)
        await are(world, ended=4, running=1)
    assert await forgotten(world) == 0
    world.clock.ahead = KEPT + timedelta(minutes=1)
    world.write.decide = lambda command: None
    world.open(6)
    async with world.running():

        async def given() -> bool:
            return (await world.process(6))[3] == "given"

        await eventually(given)
        await are(world, ended=6)
    assert await forgotten(world) == 3
    assert await left(world) == [(uid(number), True) for number in (4, 5, 6)]
    histories = await world.query("SELECT DISTINCT process_id FROM process_history ORDER BY 1")
    assert histories == [(uid(number),) for number in (4, 5, 6)]
    await world.query(
        "UPDATE processes SET status = 'undone', attention = 'HISTORY_LOST' WHERE process_id = %s RETURNING 1", uid(6)
    )
    assert await forgotten(world) == 0  # undone a moment ago
    world.clock.ahead *= 2
    assert await forgotten(world) == 2
    assert await left(world) == [(uid(4), True)]


async def test_the_record_of_what_two_people_settled_outlives_the_retention(world: World, tmp_path: Path) -> None:
    """Without an archive the process stays, and is listed; with one its history is there, and it leaves."""
    world.write.decide = frozen
    world.open(1)
    async with world.running():
        await are(world, ended=1)
        world.write.decide = lambda command: None
        world.open(2)
        await are(world, ended=2)
    async with world.steering() as (desk, steering):
        await steering.ask(key(1), "GIFT_REFUSED", "sent by post", "olga")
        assert await desk.find(9, None, acknowledged=True) == []
        await steering.confirm(key(1), "otto")
        world.clock.ahead = KEPT + timedelta(minutes=1)
        assert await forgotten(world) == 1
        [kept] = await desk.find(9, None, acknowledged=True)
        told = [(it.name, it.id, it.note) for it in (await desk.get(kept.key)).history if it.kind == "operator"]
        assert told == [("ask", "olga", "GIFT_REFUSED: sent by post"), ("confirm", "otto", "GIFT_REFUSED: sent by post")]
        assert await forgotten(world, HistoryArchive(open_files(f"file://{tmp_path}/archive"), 1)) == 1
        assert await desk.find(9, None) == []
    [file] = (tmp_path / "archive").rglob("processes.jsonl")
    [line] = file.read_text().splitlines()
    assert [it["id"] for it in json.loads(line)["history"] if it["kind"] == "operator"] == ["olga", "otto"]


async def test_an_undone_process_is_archived_without_a_state(world: World, tmp_path: Path) -> None:
    """It has none any more; its line is JSON all the same."""
    world.open(1)
    async with world.running():
        await are(world, ended=1)
    await world.query("UPDATE processes SET status = 'undone', attention = 'HISTORY_LOST', state = '' RETURNING 1")
    world.clock.ahead = KEPT + timedelta(minutes=1)
    assert await forgotten(world, HistoryArchive(open_files(f"file://{tmp_path}/archive"), 1)) == 1
    [file] = (tmp_path / "archive").rglob("processes.jsonl")
    assert json.loads(file.read_text())["state"] is None


async def test_it_waits_for_a_round_that_is_under_way(world: World) -> None:
    """The round may be writing a late answer of the process: it must not bring back a process without its history."""
    world.open(1)
    async with world.running():
        await are(world, ended=1)
    world.clock.ahead = KEPT + timedelta(minutes=1)
    async with await connect(world) as connection:
        async with connection.transaction():
            await store.lock(connection, CHECKPOINT, 1)
            forgetting = asyncio.create_task(forgotten(world))

            async def waits() -> bool:
                return bool(await world.query("SELECT FROM pg_locks WHERE NOT granted"))

            await eventually(waits)
            assert not forgetting.done()
        assert await forgetting == 1


async def test_it_goes_on_after_the_database_was_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is tried again."""
    monkeypatch.setattr(retention_module, "EVERY_S", 0.05)
    world.open(1)
    async with world.running():
        await are(world, ended=1)
    world.clock.ahead = KEPT + timedelta(minutes=1)
    tries = []

    async def unsure() -> postgres.Connection:
        tries.append(1)
        if len(tries) < 3:
            raise psycopg.OperationalError("away") if len(tries) == 1 else KeyError("a defect")
        return await connect(world)

    task = asyncio.create_task(ProcessRetention(1, connect=unsure, retention=KEPT, clock=world.clock).run())
    try:
        await eventually(lambda: _none(world))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _none(world: World) -> bool:
    return await left(world) == []


class FaultyStore:
    """A folder of this machine, whose `write` fails at a chosen call, or which answers with other bytes."""

    def __init__(self, folder: Path) -> None:
        self._files = open_files(folder.as_uri())
        self.fails_at = 0
        self.lies = False
        self.writes = 0
        self.before: Callable[[], Awaitable[None]] | None = None

    async def write(self, path: str, data: bytes) -> None:
        """As `Store` says."""
        self.writes += 1
        if self.before is not None:
            await self.before()
        if self.writes == self.fails_at:
            raise OSError("the disk is full")
        await self._files.write(path, data)

    async def read(self, path: str) -> bytes:
        """As `Store` says."""
        data = await self._files.read(path)
        return data[:-1] if self.lies else data

    async def paths(self, folder: str) -> list[str]:
        """As `SweepStore` says."""
        return await self._files.paths(folder)

    async def forget(self, folder: str) -> int:
        """As `Store` says."""
        return await self._files.forget(folder)


def archived(folder: Path) -> list[dict[str, Any]]:
    """The processes in all sweeps of a folder; of each every byte is what its manifest says."""
    found = []
    for manifest in sorted(folder.rglob("manifest.json")):
        told = json.loads(manifest.read_bytes())
        data = (manifest.parent / "processes.jsonl").read_bytes()
        assert told["files"] == {"processes.jsonl": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        lines = [json.loads(line) for line in data.splitlines()]
        assert len(lines) == told["processes"]
        found += [{**line, "tenant": told["tenant"]} for line in lines]
    return found


async def old(world: World, *numbers: int) -> None:
    """Processes that ended longer ago than they are kept."""
    world.open(*numbers)
    async with world.running():
        await are(world, ended=len(numbers))
    world.clock.ahead = KEPT + timedelta(minutes=1)


async def test_histories_are_archived_before_they_leave(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sweeps, a folder for each tenant; a sweep is bounded by the lines of histories, too."""
    await old(world, 1, 2, 3)
    async with connected(world.database.admin) as connection:
        for table in ("processes", "process_history"):
            statement = f"UPDATE {table} SET tenant = '../other' WHERE process_id = '{uid(3)}'"
            await connection.execute(statement.encode())
        await connection.commit()
    columns = "kind, name, step, id, position, phase"
    query = f"SELECT {columns} FROM process_history WHERE process_id = '{uid(1)}' ORDER BY number"
    history = await world.query(query)
    monkeypatch.setattr(retention_module, "ENTRIES_MAX", 2 * len(history) - 1)
    folder = tmp_path / "archive"
    assert await forgotten(world, HistoryArchive(FaultyStore(folder), 1)) == 3
    assert await left(world) == []
    found = {it["process_id"]: it for it in archived(folder)}
    assert {id_: it["tenant"] for id_, it in found.items()} == {uid(1): "acme", uid(2): "acme", uid(3): "../other"}
    assert len(list((folder / "acme/processes-1/gift").iterdir())) == 2
    assert found[uid(1)]["state"] == {"phase": "given", "account_id": uid(1), "renames": []}
    assert [tuple(entry[name] for name in columns.split(", ")) for entry in found[uid(1)]["history"]] == history


@pytest.mark.parametrize("fault", ["first write", "manifest", "other bytes"])
async def test_what_the_archive_does_not_take_stays(world: World, tmp_path: Path, fault: str) -> None:
    """Whatever goes wrong; the next sweep archives it."""
    await old(world, 1)
    store_ = FaultyStore(tmp_path / "archive")
    store_.fails_at = {"first write": 1, "manifest": 2, "other bytes": 0}[fault]
    store_.lies = fault == "other bytes"
    archive = HistoryArchive(store_, 1)
    with pytest.raises(Rejected if store_.lies else Unavailable):
        await forgotten(world, archive)
    assert await left(world) == [(uid(1), True)]
    store_.lies = False
    assert await forgotten(world, archive) == 1
    assert uid(1) in [it["process_id"] for it in archived(tmp_path / "archive")]


def _sweep_and_die(url: str, folder: str, at: str) -> None:
    """A process that sweeps, and is killed at a place."""

    def die() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    store_ = FaultyStore(Path(folder))

    async def before() -> None:
        if store_.writes == 2:
            die()

    async def connect_() -> postgres.Connection:
        return await postgres.connect(url, application_name="test-retention")

    if at == "before the manifest":
        store_.before = before
    keeping = ProcessRetention(1, connect=connect_, retention=timedelta(microseconds=1), archive=HistoryArchive(store_, 1))
    if at == "before the rows":
        keeping._delete = lambda *_: die()  # type: ignore[method-assign]

    async def main() -> None:
        async with await connect_() as connection:
            await keeping.forget(connection)

    asyncio.run(main())


@pytest.mark.long
@pytest.mark.parametrize("at", ["before the manifest", "before the rows"])
async def test_a_kill_loses_nothing(world: World, tmp_path: Path, at: str) -> None:
    """What was archived and not deleted is archived again; what was half written is not believed."""
    await old(world, 1)
    folder = tmp_path / "archive"
    child = multiprocessing.get_context("spawn").Process(target=_sweep_and_die, args=(world.database.app, str(folder), at))
    child.start()
    await asyncio.to_thread(child.join, 60)
    assert child.exitcode == -signal.SIGKILL
    assert await left(world) == [(uid(1), True)]
    copies = 1 if at == "before the rows" else 0
    assert len(archived(folder)) == copies
    assert await forgotten(world, HistoryArchive(FaultyStore(folder), 1)) == 1
    assert [it["process_id"] for it in archived(folder)] == [uid(1)] * (copies + 1)


async def test_a_process_that_changes_meanwhile_stays(world: World, tmp_path: Path) -> None:
    """What was added to its history is not in the copy."""
    await old(world, 1, 2)
    store_ = FaultyStore(tmp_path / "archive")

    async def change() -> None:
        store_.before = None
        async with connected(world.database.admin) as connection:
            await connection.execute("UPDATE processes SET entries = entries + 1 WHERE process_id = %s", [uid(2)])
            await connection.commit()

    store_.before = change
    assert await forgotten(world, HistoryArchive(store_, 1)) == 1
    assert await left(world) == [(uid(2), True)]


async def test_a_copy_of_what_is_gone_is_taken_back(world: World, tmp_path: Path) -> None:
    """Another leader has archived it, or its tenant has ended. The other's copy stays."""
    await old(world, 1)
    folder = tmp_path / "archive"
    store_ = FaultyStore(folder)

    async def overtaken() -> None:
        store_.before = None
        assert await forgotten(world, HistoryArchive(FaultyStore(folder), 1)) == 1

    store_.before = overtaken
    assert await forgotten(world, HistoryArchive(store_, 1)) == 0
    assert [it["process_id"] for it in archived(folder)] == [uid(1)]
    assert len(list((folder / "acme/processes-1/gift").iterdir())) == 1


async def test_a_sweep_under_way_keeps_no_copy_of_a_tenant_that_ends(world: World, tmp_path: Path) -> None:
    """The end of the tenant waits for the sweep, and then deletes what it and earlier ones have archived."""
    await old(world, 1)
    folder = tmp_path / "archive"
    store_ = FaultyStore(folder)
    archive = HistoryArchive(store_, 1)
    ending: list[asyncio.Task[int]] = []

    connection = await connect(world)
    at = await checkpoints.load(connection, CHECKPOINT, 1)

    async def ends() -> None:
        store_.before = None
        ending.append(asyncio.create_task(forget(connection, CHECKPOINT, 1, at, "acme", archive)))
        await asyncio.sleep(0)
        assert not ending[0].done()

    store_.before = ends
    async with connection:
        assert await forgotten(world, archive) == 1
        await ending[0]
    assert list(folder.rglob("*.json*")) == []


async def test_a_purged_aggregate_leaves_the_archive(world: World, tmp_path: Path) -> None:
    """The sweeps that have its process are written anew without it, and only those."""
    folder = tmp_path / "archive"
    archive = HistoryArchive(FaultyStore(folder), 1)
    await old(world, 1, 2)
    assert await forgotten(world, archive) == 2
    world.clock.ahead = timedelta()
    await old(world, 3)
    assert await forgotten(world, archive) == 1
    connection = await connect(world)
    async with connection:
        at = await checkpoints.load(connection, CHECKPOINT, 1)
        for number, rest in ((1, [2, 3]), (3, [2]), (3, [2])):
            await forget_aggregate(connection, CHECKPOINT, 1, at, ["gift"], ("acme", "account", uid(number)), archive)
            assert sorted(it["process_id"] for it in archived(folder)) == [uid(other) for other in rest]
    assert not [path for path in folder.rglob("*") if path.is_file() and uid(1).encode() in path.read_bytes()]
