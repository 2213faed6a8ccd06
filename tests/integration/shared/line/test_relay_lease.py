"""The lease: one leads, the others stand by, and it is lost with its connection, also by one that only sleeps."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.platform import leader
from shared.platform.leader import LockClass, hold_lease, lead
from tests.support.logs import capture_logs
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

END_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = 'foldline-lease' AND datname = current_database()
"""


def end_sessions(database: Database) -> None:
    """Ends the sessions of all who hold or want a lease."""
    with psycopg.connect(database.admin, autocommit=True) as admin:
        admin.execute(END_SESSIONS)


async def test_one_leads_and_the_next_waits_for_its_end(write_db: Database) -> None:
    """Given back, the lease goes to the stand-by."""
    gained = asyncio.Event()

    async def stand_by() -> None:
        async with hold_lease(write_db.app, LockClass.RELAY, 1):
            gained.set()

    async with hold_lease(write_db.app, LockClass.RELAY, 1) as first:
        standing_by = asyncio.create_task(stand_by())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gained.wait(), 0.6)
        assert not first.lost.is_set()
    await asyncio.wait_for(standing_by, 30)
    assert gained.is_set()


async def test_leases_of_other_classes_and_shards_are_others(write_db: Database) -> None:
    """The key is (class, shard)."""
    async with (
        asyncio.timeout(20),
        hold_lease(write_db.app, LockClass.RELAY, 1),
        hold_lease(write_db.app, LockClass.RELAY, 2),
        hold_lease(write_db.app, LockClass.PROJECTOR, 1) as third,
    ):
        assert not third.lost.is_set()


async def test_a_lease_is_lost_with_its_session(write_db: Database) -> None:
    """The heartbeat notices within a second or two."""
    async with hold_lease(write_db.app, LockClass.RELAY, 1) as lease:
        end_sessions(write_db)
        await asyncio.wait_for(lease.lost.wait(), 30)


async def test_the_server_takes_the_lease_from_a_silent_leader(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that says nothing, as one that was stopped, loses the lock 3 s later. The heartbeat is what keeps it."""
    monkeypatch.setattr(leader, "HEARTBEAT_S", 60.0)
    async with (
        hold_lease(write_db.app, LockClass.RELAY, 1) as silent,
        asyncio.timeout(20),
        hold_lease(write_db.app, LockClass.RELAY, 1),
    ):
        await asyncio.wait_for(silent.lost.wait(), 30)


async def test_a_lost_lease_is_said_even_if_the_alarm_is_first(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that wakes up late stops its work at once, and the operator still reads why."""
    monkeypatch.setattr(leader, "HEARTBEAT_S", 60.0)
    stopping = asyncio.Event()

    async def work() -> None:
        await stopping.wait()

    with capture_logs() as logs:
        leading = asyncio.create_task(lead(write_db.app, LockClass.RELAY, 1, work, stopping))
        await eventually(lambda: [line["event"] for line in logs].count("lease_gained") == 2, 30)
    stopping.set()
    await asyncio.wait_for(leading, 30)
    events = [line["event"] for line in logs if line["event"] != "lease_stands_by"]
    assert events[:3] == ["lease_gained", "lease_lost", "lease_gained"]


async def test_a_leader_that_speaks_keeps_the_lease(write_db: Database) -> None:
    """The control of the test above: the same wait, with the heartbeat."""
    async with hold_lease(write_db.app, LockClass.RELAY, 1) as lease:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5), hold_lease(write_db.app, LockClass.RELAY, 1):
                pass
        assert not lease.lost.is_set()


async def test_work_is_cancelled_when_the_lease_is_lost_and_begun_afresh(write_db: Database) -> None:
    """`lead` runs the work once for each lease, and ends when it is told to."""
    stopping, begun, cancelled = asyncio.Event(), 0, 0

    async def work() -> None:
        nonlocal begun, cancelled
        begun += 1
        try:
            await stopping.wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise

    leading = asyncio.create_task(lead(write_db.app, LockClass.RELAY, 1, work, stopping))
    await eventually(lambda: begun == 1)
    end_sessions(write_db)
    await eventually(lambda: begun == 2)
    assert cancelled == 1
    stopping.set()
    await asyncio.wait_for(leading, 30)
    assert (begun, cancelled) == (2, 1)


async def test_a_stand_by_that_is_told_to_stop_stops(write_db: Database) -> None:
    """It never worked."""
    stopping = asyncio.Event()

    async def work() -> None:
        raise AssertionError("it led")

    async with hold_lease(write_db.app, LockClass.RELAY, 1):
        standing_by = asyncio.create_task(lead(write_db.app, LockClass.RELAY, 1, work, stopping))
        await asyncio.sleep(0)
        stopping.set()
        await asyncio.wait_for(standing_by, 30)


async def test_what_the_work_raises_is_raised(write_db: Database) -> None:
    """A leader that cannot work must not lead on in silence."""

    async def work() -> None:
        raise LookupError("a defect")

    with pytest.raises(LookupError):
        await asyncio.wait_for(lead(write_db.app, LockClass.RELAY, 1, work, asyncio.Event()), 30)


async def test_a_lease_waits_for_a_database_that_is_away(private_engines: Engines) -> None:
    """It is gained when the database comes, and lost when it goes."""
    database = private_engines.clone("write")
    gained, lost = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with hold_lease(database.app, LockClass.RELAY, 1) as lease:
            gained.set()
            await lease.lost.wait()
            lost.set()

    private_engines.postgres.stop()
    with capture_logs() as logs:
        holding = asyncio.create_task(hold())
        await eventually(lambda: any(line["event"] == "lease_waits_for_database" for line in logs))
    private_engines.postgres.start()
    await asyncio.wait_for(gained.wait(), 30)
    assert not lost.is_set()
    private_engines.postgres.kill()
    await asyncio.wait_for(holding, 30)
    assert lost.is_set()
