"""Parts of work that several processes lead: each part is led by one, whatever the others do, and none stays without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.line.standing import State, read_standings
from shared.platform import leader
from shared.platform import parts as parts_module
from shared.platform.leader import LockClass, hold_lease
from shared.platform.parts import lead_parts
from shared.platform.postgres import connect
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually

WHOLE = LockClass.PROJECTOR
PARTS = ("people", "accounts", "transfers", "users")
END_SESSION = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND pid = %s"
LEADERS = """
SELECT pid, count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 6 AND mode = 'ExclusiveLock' AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY pid
"""


@dataclass
class Process:
    """What one process does: the parts that it works on now, and each begin of its work."""

    now: tuple[str, ...] = ()
    begun: list[tuple[str, ...]] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self, names: Sequence[str]) -> None:
        """Works until it is told to stop, or cancelled."""
        self.now = tuple(names)
        self.begun.append(self.now)
        try:
            await self.stopping.wait()
        finally:
            self.now = ()

    @asynccontextmanager
    async def running(self, database: Database, parts: Sequence[str] = PARTS, shard: int = 1) -> AsyncIterator[Process]:
        """The process; it ends as a process does that is told to."""
        task = asyncio.create_task(lead_parts(database.app, WHOLE, shard, parts, self.work, self.stopping))
        try:
            yield self
        finally:
            self.stopping.set()
            await asyncio.wait_for(task, 30)


async def led(database: Database, shard: int = 1) -> dict[str, State]:
    """The state of a consumer of each part, and of a version of one that a rebuild made."""
    async with await connect(database.app, application_name="test") as connection:
        found = await read_standings(connection, WHOLE, shard, (*PARTS, "accounts@2"))
    return {it.name: it.state for it in found}


def leaders(database: Database) -> list[tuple[int, int]]:
    """The sessions that lead parts, and how many."""
    with psycopg.connect(database.admin) as admin:
        return admin.execute(LEADERS).fetchall()


async def test_each_process_leads_its_own_parts_and_who_leads_none_is_told(read_db: Database) -> None:
    """A part that no process may lead is away, though its neighbours are led. Another shard's are others."""
    async with Process().running(read_db, ["accounts"]) as one, Process().running(read_db, ["people", "users"]) as other:
        await eventually(lambda: (one.now, other.now) == (("accounts",), ("people", "users")))
        running, away = State.RUNNING, State.AWAY
        assert await led(read_db) == {
            "accounts": running, "accounts@2": running, "people": running, "transfers": away, "users": running
        }  # fmt: skip
        assert set((await led(read_db, shard=2)).values()) == {away}
        async with Process().running(read_db, ["accounts"], shard=2) as third:
            await eventually(lambda: third.now == ("accounts",))
    assert set((await led(read_db)).values()) == {State.AWAY}


async def test_of_processes_with_the_same_parts_each_part_is_led_by_one(read_db: Database) -> None:
    """Five begin at once, with parts that overlap, and end one after another: each part is led once, by whoever is left."""
    sets = [PARTS, PARTS[:2], PARTS[1:3], PARTS[3:], PARTS]
    processes = [Process() for _ in sets]

    def one_leads_each() -> bool:
        return sorted(name for it in processes for name in it.now) == sorted(PARTS)

    async with AsyncExitStack() as last:
        ending = []
        for it, parts in zip(processes, sets, strict=True):
            ending.append(await last.enter_async_context(AsyncExitStack()))
            await ending[-1].enter_async_context(it.running(read_db, parts))
        for stack in ending[:-1]:
            await eventually(one_leads_each)
            await stack.aclose()
        await eventually(lambda: processes[-1].now == PARTS)


async def test_who_takes_a_part_over_begins_with_all_of_its_parts(read_db: Database) -> None:
    """The work knows all that it has to do. Who has all asks no more."""
    async with Process().running(read_db, ["accounts", "people"]) as rest:
        await eventually(lambda: rest.now == ("accounts", "people"))
        async with Process().running(read_db) as every:
            await eventually(lambda: every.now == ("transfers", "users"))
            rest.stopping.set()
            await eventually(lambda: every.now == PARTS)
            assert every.begun == [("transfers", "users"), PARTS]


async def test_a_session_that_ends_gives_its_parts_up_and_no_others(read_db: Database) -> None:
    """As after kill -9. The stand-by has them; the process that lives stands by for them, and its neighbour goes on."""
    async with Process().running(read_db, ["accounts", "people"]) as one, Process().running(read_db, ["users"]) as neighbour:
        await eventually(lambda: (one.now, neighbour.now) == (("accounts", "people"), ("users",)))
        async with Process().running(read_db, ["people", "accounts"]) as standby:
            [killed] = [pid for pid, parts in leaders(read_db) if parts == 2]
            with psycopg.connect(read_db.admin, autocommit=True) as admin:
                admin.execute(END_SESSION, (killed,))
            await eventually(lambda: len(one.begun) + len(standby.begun) > 1)
            await eventually(lambda: sorted((*one.now, *standby.now)) == ["accounts", "people"])
            assert neighbour.begun == [("users",)]


async def test_the_server_takes_parts_from_a_silent_leader(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that says nothing, as one that was stopped, has lost its parts 3 s later, and learns it."""
    monkeypatch.setattr(leader, "HEARTBEAT_S", 60.0)
    with capture_logs() as logs:
        async with Process().running(read_db, ["accounts"]) as silent:
            await eventually(lambda: silent.now == ("accounts",))
            monkeypatch.undo()
            async with Process().running(read_db, ["accounts", "people"]) as other:
                await eventually(lambda: any(line["event"] == "lease_lost" for line in logs))
                await eventually(lambda: sorted((*silent.now, *other.now)) == ["accounts", "people"])


async def test_a_release_that_leads_the_whole_and_one_that_leads_parts_exclude_each_other(read_db: Database) -> None:
    """During an upgrade, and during the way back."""
    process, went_back = Process(), asyncio.Event()

    async def former_release() -> None:
        async with hold_lease(read_db.app, WHOLE, 1):
            went_back.set()

    async with hold_lease(read_db.app, WHOLE, 1):
        assert set((await led(read_db)).values()) == {State.RUNNING}
        with capture_logs() as logs:
            async with process.running(read_db) as it:
                await eventually(lambda: any(line["event"] == "lease_stands_by" for line in logs))
        assert it.begun == []
    async with Process().running(read_db, ["accounts"]) as newer, Process().running(read_db, ["people"]) as newest:
        await eventually(lambda: newer.now and newest.now)
        back = asyncio.create_task(former_release())
        newer.stopping.set()
        await eventually(lambda: not newer.now)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(went_back.wait(), 0.6)
    await asyncio.wait_for(back, 30)


async def test_what_the_work_raises_is_raised(read_db: Database) -> None:
    """A leader that cannot work must not lead on in silence, whether it has all of its parts or waits for some."""

    async def work(_: Sequence[str]) -> None:
        raise LookupError("a defect")

    async with Process().running(read_db, ["people"]) as other:
        await eventually(lambda: other.now)
        for parts in (["accounts"], ["accounts", "people"]):
            with pytest.raises(LookupError):
                await asyncio.wait_for(lead_parts(read_db.app, WHOLE, 1, parts, work, asyncio.Event()), 30)


async def test_parts_that_cannot_be_asked_for_are_asked_for_again(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that does not end the session, as of a database that has no room for another lock, ends no work."""
    monkeypatch.setattr(parts_module, "_TAKE", "SELECT 1 / 0 WHERE %s::text[] <> '{}' AND %s <> %s")
    with capture_logs() as logs:
        async with Process().running(read_db) as process:
            await eventually(lambda: any(line["event"] == "parts_not_asked" for line in logs))
            monkeypatch.undo()
            await eventually(lambda: process.now == PARTS)
