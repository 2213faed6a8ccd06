"""Recurring schedules: each time fires once, whoever fires it and whatever is killed; pausing stops all that has not run."""

from __future__ import annotations

import asyncio
import itertools
from datetime import timedelta

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.commands.cron import CATCH_UP_MAX
from shared.commands.firing import RELEASED_MAX, read_due, release, release_due
from shared.commands.recurring import Recurring
from shared.commands.schedule import Schedule, Scheduler
from shared.folds.errors import Rejected
from shared.folds.ids import firing_id
from tests.integration.shared.commands.firings import all_ran, create, fired, set_back
from tests.integration.shared.commands.test_schedule import ADMIN, ALICE, REGISTRY, adding, firing, now, pool
from tests.support.checks.history import check_line, commands_of, connected
from tests.support.fakes.replica import replica
from tests.support.system.waiting import eventually


async def test_a_firing_is_a_command_of_its_creators(write_db: Database) -> None:
    """At its time, under the creator's identity and trace; its id and cause say which schedule and which time it is of."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = await create(reads, "0 0 * * *", user_id="alice", traceparent="00-1-2-01")
        assert (schedule.status, schedule.user_id, schedule.fired_at) == ("active", "alice", None)
        assert schedule.due_at is not None
        assert timedelta() < schedule.due_at - now() <= timedelta(days=1)
        await set_back(write_db, timedelta(days=1))
        due_at = schedule.due_at - timedelta(days=1)
        async with firing(write_db, one, reads):
            [row] = await all_ran(write_db, schedule, 1)
        assert row.command_id == firing_id(schedule.schedule_id, due_at)
        assert (row.status, row.due_at, row.user_id, row.traceparent) == ("completed", due_at, "alice", "00-1-2-01")
        assert row.correlation_id == schedule.schedule_id
        after = await Recurring(reads).get(ALICE, schedule.schedule_id)
        assert (after.fired_at, after.due_at) == (due_at, schedule.due_at)
        last = await Recurring(reads).last_firings([after])
        assert last[("acme", schedule.schedule_id)] == row
    [event] = await check_line(write_db)
    assert row.command_id.encode() in event.metadata


async def test_three_replicas_fire_each_time_once(write_db: Database) -> None:
    """All of them release and send, without the lease: what three hours of minutes missed, of two schedules."""
    async with (
        pool(write_db) as reads,
        replica(write_db, REGISTRY) as one,
        replica(write_db, REGISTRY) as two,
        replica(write_db, REGISTRY) as three,
    ):
        schedules = [await create(reads, counter_id=name) for name in ("a", "b")]
        await set_back(write_db, timedelta(minutes=180))
        async with firing(write_db, one, reads), firing(write_db, two, reads), firing(write_db, three, reads):
            ran = [await all_ran(write_db, schedule, 180) for schedule in schedules]
    for schedule, rows in zip(schedules, ran, strict=True):
        assert {row.status for row in rows} == {"completed"}
        times = [row.due_at for row in rows if row.due_at]
        assert {later - earlier for earlier, later in itertools.pairwise(times)} == {timedelta(minutes=1)}
        assert [row.command_id for row in rows] == [firing_id(schedule.schedule_id, time) for time in times]
    assert len(await check_line(write_db)) == sum(map(len, ran))


@pytest.mark.parametrize(("catch_up", "count"), [("none", 0), ("one", 1), ("all", 3)])
async def test_what_was_missed_is_caught_up_as_the_schedule_says(write_db: Database, catch_up: str, count: int) -> None:
    """Three days of a daily schedule; then it goes on with its next time."""
    # Beyond the grace of a minute at any time of this test.
    hour = (now() - timedelta(hours=2)).hour
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = await create(reads, cron=f"0 {hour} * * *", catch_up=catch_up)
        await set_back(write_db, timedelta(days=3))
        scheduler = Scheduler(reads, one.committer)
        await scheduler._fire()
        assert await scheduler._fire() > 0
        assert [row.status for row in await fired(write_db, schedule)] == ["completed"] * count
        after = await Recurring(reads).get(ALICE, schedule.schedule_id)
        assert (after.status, after.due_at) == ("active", schedule.due_at)


@pytest.mark.parametrize(("seen_ago_h", "count"), [(3, 0), (1, 1)])
async def test_what_was_due_while_a_scheduler_was_there_is_not_missed(write_db: Database, seen_ago_h: int, count: int) -> None:
    """Nobody had been there for an hour by then, or somebody was for an hour more. One that was stopped knows, and a new one."""
    hour = (now() - timedelta(hours=2)).hour
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one, connected(write_db.owner) as owner:
        stopped = Scheduler(reads, one.committer)
        await stopped._be_seen()
        for scheduler in (stopped, Scheduler(reads, one.committer)):
            schedule = await create(reads, cron=f"0 {hour} * * *", catch_up="none")
            await set_back(write_db, timedelta(days=1), schedule)
            await owner.execute("UPDATE scheduler_lives SET seen_at = now() - make_interval(hours => %s)", (seen_ago_h,))
            scheduler._seen_at = float("-inf")
            await scheduler._fire()
            await scheduler._fire()
            assert [row.status for row in await fired(write_db, schedule)] == ["completed"] * count


async def test_two_schedulers_at_once_know_of_each_other(write_db: Database) -> None:
    """Whoever comes second finds the first there, and neither finds a time without one."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        both = [Scheduler(reads, one.committer) for _ in range(2)]
        for _ in range(2):
            await asyncio.gather(*(each._be_seen() for each in both))
        found = [each._away for each in both]
        assert all(away is not None and away.until - away.since < timedelta(seconds=30) for away in found)


async def test_catching_up_is_bounded(write_db: Database) -> None:
    """A year of minutes of three schedules: so many at a time, and no more before those are sent; in the order of times."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedules = [await create(reads, counter_id=name) for name in ("a", "b", "c")]
        await set_back(write_db, timedelta(days=365))
        async with connected(write_db.app) as connection:
            due = await read_due(connection)
            assert await release(connection, due) == RELEASED_MAX
        counts = sorted([len(await fired(write_db, schedule)) for schedule in schedules])
        assert counts == [RELEASED_MAX - 2 * CATCH_UP_MAX, CATCH_UP_MAX, CATCH_UP_MAX]
        await Scheduler(reads, one.committer)._fire()
        waiting = [row for row in (await commands_of(write_db)).values() if row.status == "scheduled"]
        assert len(waiting) <= RELEASED_MAX


async def test_a_tenant_that_catches_up_does_not_hold_up_another(write_db: Database) -> None:
    """A year of minutes of 300 schedules, and 300 commands that are due, are before it: another tenant's runs at once."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        await create(reads)
        other = await create(reads, tenant="umbrella")
        async with connected(write_db.owner) as owner:
            await owner.execute(
                """INSERT INTO schedules SELECT (jsonb_populate_record(s, jsonb_build_object('schedule_id', gen_random_uuid()))).*
                   FROM schedules s, generate_series(1, 300) WHERE tenant = 'acme'"""
            )
            await owner.execute(
                """INSERT INTO commands (tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id,
                     on_behalf_of, correlation_id, traceparent, received_at, version, events_appended,
                     position, head, due_at, roles)
                   SELECT tenant, gen_random_uuid(), type, category, aggregate_id, fingerprint, payload, 'scheduled', user_id, '',
                     correlation_id, '', now(), 0, 0, 0, 0, now() - interval '2 years', roles
                   FROM schedules, generate_series(1, 10) WHERE tenant = 'acme'"""
            )
        await set_back(write_db, timedelta(days=365))
        await set_back(write_db, timedelta(days=-364), other)
        await Scheduler(reads, one.committer)._fire()
        assert "completed" in {row.status for row in await fired(write_db, other)}


async def test_killed_between_any_two_steps_a_time_fires_once(write_db: Database) -> None:
    """The release is one statement: a connection that is killed in it leaves nothing or all. Released again: nothing new."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = await create(reads, "0 0 * * *")
        await set_back(write_db, timedelta(days=1))
        async with connected(write_db.owner) as owner:
            await owner.set_autocommit(False)
            await owner.execute("LOCK TABLE commands IN SHARE MODE")  # the release waits for it, holding its schedule
            releasing = asyncio.create_task(_released_by(write_db))
            async with connected(write_db.admin) as other:
                waiting = (
                    "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT release_firings%' AND wait_event_type = 'Lock'"
                )

                async def blocked() -> int | None:
                    rows = await (await other.execute(waiting)).fetchall()
                    return int(rows[0][0]) if rows else None

                pid = await eventually(blocked, 10, every_s=0.02)
                await other.execute("SELECT pg_terminate_backend(%s)", (pid,))
            assert await releasing is None
            await owner.rollback()
        assert await fired(write_db, schedule) == []
        async with connected(write_db.app) as connection:
            due = await read_due(connection)
            assert await release(connection, due) == 1
            # As by a replica that was stopped between reading and releasing, while another let the next time fire as well.
            await set_back(write_db, -timedelta(days=1))
            further = (await Recurring(reads).get(ALICE, schedule.schedule_id)).due_at
            assert await release(connection, due) == 0
            assert (await Recurring(reads).get(ALICE, schedule.schedule_id)).due_at == further
            # As after a database that was promoted with a clock that is behind: the same time comes due once more.
            await set_back(write_db, timedelta(days=2))
            assert await release(connection, await read_due(connection)) == 0
        async with firing(write_db, one, reads):
            [row] = await all_ran(write_db, schedule, 1)
    assert row.status == "completed"
    assert len(await check_line(write_db)) == 1


async def _released_by(database: Database) -> int | None:
    """How many firings a connection released that may be killed meanwhile; None if it was."""
    try:
        async with connected(database.app) as connection:
            return await release(connection, await read_due(connection))
    except psycopg.OperationalError:
        return None


async def test_pausing_stops_whatever_has_not_run(write_db: Database) -> None:
    """Fifty times, at another step of the firing each: once it is answered, nothing more runs, and each firing ran or not."""
    totals = {"completed": 0, "cancelled": 0, "none": 0}
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one, replica(write_db, REGISTRY) as two:
        recurring, schedulers = Recurring(reads), [Scheduler(reads, each.committer) for each in (one, two)]
        for nth in range(50):
            schedule = await create(reads, counter_id=f"c{nth}")
            await set_back(write_db, timedelta(minutes=2), schedule)
            running = [asyncio.create_task(scheduler._fire()) for scheduler in schedulers]
            for _ in range(nth):
                await asyncio.sleep(0)
            paused = await recurring.pause(ALICE, schedule.schedule_id)
            assert (paused.status, paused.due_at) == ("paused", None)
            ran = [row.status for row in await fired(write_db, schedule)]
            assert "scheduled" not in ran
            await asyncio.gather(*running)
            await asyncio.gather(*(scheduler._fire() for scheduler in schedulers))
            assert [row.status for row in await fired(write_db, schedule)] == ran
            for status in set(ran) or {"none"}:
                totals[status] += 1
    completed = [row for row in (await commands_of(write_db)).values() if row.status == "completed"]
    assert len(await check_line(write_db)) == len(completed)
    assert totals["completed"] > 0, totals
    assert totals["cancelled"] + totals["none"] > 0, totals


@pytest.mark.parametrize("stop", ["pause", "end"])
async def test_a_rescheduled_firing_does_not_outlive_its_schedule(write_db: Database, stop: str) -> None:
    """It was put off until tomorrow, after its time had come: it is cancelled; what the caller scheduled besides stays."""
    async with pool(write_db) as reads:
        schedule, other = await create(reads, "0 0 * * *"), adding()
        await Schedule(reads).add(other, now() + timedelta(days=1))
        await set_back(write_db, timedelta(days=1), schedule)
        async with connected(write_db.app) as connection:
            assert await release(connection, await read_due(connection)) == 1
        [row] = await fired(write_db, schedule)
        await Schedule(reads).move(ALICE, row.command_id, now() + timedelta(days=1))
        recurring = Recurring(reads)
        await (recurring.pause if stop == "pause" else recurring.end)(ALICE, schedule.schedule_id)
        assert [found.status for found in await fired(write_db, schedule)] == ["cancelled"]
        assert (await commands_of(write_db))[other.key].status == "scheduled"


async def test_a_paused_schedule_goes_on_from_now_and_an_ended_one_never(write_db: Database) -> None:
    """What was due meanwhile does not fire, whatever is said about catching up. Each may be asked for twice."""
    async with pool(write_db) as reads:
        recurring, schedule = Recurring(reads), await create(reads)
        id_ = schedule.schedule_id
        for _ in range(2):
            paused = await recurring.pause(ADMIN, id_)
            assert (paused.status, paused.due_at, paused.changed_by) == ("paused", None, "ann")
        async with connected(write_db.app) as connection:
            assert await release_due(connection) is None
        for _ in range(2):
            resumed = await recurring.resume(ALICE, id_)
            assert (resumed.status, resumed.changed_by) == ("active", "alice")
            assert resumed.due_at is not None
            assert resumed.due_at > now()
        for _ in range(2):
            ended = await recurring.end(ALICE, id_)
            assert (ended.status, ended.due_at) == ("ended", None)
        for call in (recurring.pause, recurring.resume):
            with pytest.raises(Rejected, match="ended"):
                await call(ALICE, id_)
        assert await recurring.add(adding(id=id_), "* * * * *", "UTC", "all") == ended
