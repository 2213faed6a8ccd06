"""Recurring schedules: each time fires once, whoever fires it and whatever is killed; pausing stops all that has not run."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.commands.cron import CATCH_UP_MAX
from shared.commands.firing import RELEASED_MAX, read_due, release, release_due, turns_of_schedules
from shared.commands.log import StoredCommand, Wanted, list_commands
from shared.commands.recurring import WAITING, Recurring, StoredSchedule, listing
from shared.commands.schedule import Schedule, Scheduler
from shared.commands.sweeper import Sweeper
from shared.folds.errors import Invalid, NotFound, OverLimit, Rejected
from shared.folds.ids import firing_id
from shared.platform.identity import Identity, Role
from shared.platform.postgres import Connection, Reads
from tests.integration.shared.commands.test_log import nodes
from tests.integration.shared.commands.test_schedule import ADMIN, ALICE, BOB, REGISTRY, adding, firing, now, pool
from tests.support.checks.history import check_line, commands_of, connected
from tests.support.domains.trial import SetPassword
from tests.support.fakes.replica import make_command, replica
from tests.support.system.waiting import eventually

STRANGER = Identity(tenant="umbrella", user_id="alice", roles=frozenset({Role.TENANT_ADMIN}))


async def create(reads: Reads, cron: str = "* * * * *", zone: str = "UTC", catch_up: str = "all", **more: Any) -> StoredSchedule:
    """A schedule of alice's that adds one."""
    return await Recurring(reads).add(adding(**more), cron, zone, catch_up)


async def set_back(database: Database, by: timedelta, schedule: StoredSchedule | None = None) -> None:
    """Has the next firing of a schedule, or of all, be due so much earlier, as if time had passed while nothing ran."""
    async with connected(database.owner) as owner:
        await owner.execute(
            "UPDATE schedules SET due_at = due_at - %s WHERE status = 'active' AND coalesce(schedule_id = %s::uuid, true)",
            (by, schedule.schedule_id if schedule else None),
        )


async def fired(database: Database, schedule: StoredSchedule) -> list[StoredCommand]:
    """The firings of a schedule, in the order of their times."""
    async with connected(database.app) as connection:
        wanted = Wanted(tenant=schedule.tenant, causation_id=schedule.schedule_id)
        return sorted(await list_commands(connection, wanted, limit=1000), key=lambda row: row.due_at or now())


async def all_ran(database: Database, schedule: StoredSchedule, count: int) -> list[StoredCommand]:
    """The firings of a schedule when so many have ended."""

    async def ran() -> list[StoredCommand] | None:
        found = await fired(database, schedule)
        return found if len(found) >= count and all(row.finished_at for row in found) else None

    found = await eventually(ran, 30, every_s=0.05)
    assert found is not None
    return found


async def test_a_firing_is_a_command_of_its_creators(write_db: Database) -> None:
    """At its time, under the creator's identity and trace; its id and cause say which schedule and which time it is of."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = await create(reads, user_id="alice", traceparent="00-1-2-01")
        assert (schedule.status, schedule.user_id, schedule.fired_at) == ("active", "alice", None)
        assert schedule.due_at is not None
        assert timedelta() < schedule.due_at - now() <= timedelta(minutes=1)
        await set_back(write_db, timedelta(minutes=1))
        due_at = schedule.due_at - timedelta(minutes=1)
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
        await stopped._fire()
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
        schedule = await create(reads)
        await set_back(write_db, timedelta(minutes=1))
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
            await set_back(write_db, -timedelta(minutes=1))
            further = (await Recurring(reads).get(ALICE, schedule.schedule_id)).due_at
            assert await release(connection, due) == 0
            assert (await Recurring(reads).get(ALICE, schedule.schedule_id)).due_at == further
            # As after a database that was promoted with a clock that is behind: the same time comes due once more.
            await set_back(write_db, timedelta(minutes=2))
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
        schedule, other = await create(reads), adding()
        await Schedule(reads).add(other, now() + timedelta(days=1))
        await set_back(write_db, timedelta(minutes=1), schedule)
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


async def test_nobody_steers_a_strangers_schedule(write_db: Database) -> None:
    """For another user, and for another tenant's administrator, it is not there; nor in a list."""
    async with pool(write_db) as reads:
        recurring, schedule = Recurring(reads), await create(reads)
        for identity in (BOB, STRANGER):
            for call in (recurring.get, recurring.pause, recurring.resume, recurring.end):
                with pytest.raises(NotFound):
                    await call(identity, schedule.schedule_id)
            assert await recurring.page(identity, ended=False, hidden=[], after=None, limit=10) == []
        for identity in (ALICE, ADMIN):
            assert await recurring.page(identity, ended=False, hidden=[], after=None, limit=10) == [schedule]
            assert await recurring.page(identity, ended=False, hidden=["counter"], after=None, limit=10) == []


async def test_the_same_id_is_the_same_schedule(write_db: Database) -> None:
    """A repeat answers with what is there; other times or another command under the id are refused."""
    async with pool(write_db) as reads:
        recurring, command = Recurring(reads), adding(5)
        first = await recurring.add(command, "0  9 * * *", "Europe/Berlin", "one")
        assert first.cron == "0 9 * * *"
        assert await recurring.add(command, "0 9 * * *", "Europe/Berlin", "one") == first
        others: list[tuple[Any, ...]] = [
            (adding(6, id=command.key[1]), "0 9 * * *", "Europe/Berlin", "one"),
            (command, "0 10 * * *", "Europe/Berlin", "one"),
            (command, "0 9 * * *", "UTC", "one"),
            (command, "0 9 * * *", "Europe/Berlin", "all"),
        ]
        for other in others:
            with pytest.raises(Invalid) as refused:
                await recurring.add(*other)
            assert refused.value.reason == "SCHEDULE_ID_REUSED"


async def test_secrets_and_versions_do_not_recur(write_db: Database) -> None:
    """The log keeps no secret, and the first firing would change the version that the second expects."""
    async with pool(write_db) as reads:
        secret = make_command(REGISTRY, SetPassword(counter_id="a", subject_id="s", word="secret"))
        for command, reason in ((secret, "HOLDS_A_SECRET"), (adding(expected_version=0), "INVALID_REQUEST")):
            with pytest.raises(Invalid) as refused:
                await Recurring(reads).add(command, "* * * * *", "UTC", "all")
            assert refused.value.reason == reason


async def test_a_tenant_has_so_many_schedules_and_no_more(write_db: Database) -> None:
    """Another tenant is not held up; a paused one counts, and one that has ended makes room."""
    async with pool(write_db) as reads:
        recurring = Recurring(reads, live_max=3)
        made = [await recurring.add(adding(), "* * * * *", "UTC", "all") for _ in range(3)]
        await recurring.add(adding(tenant="umbrella"), "* * * * *", "UTC", "all")
        await recurring.pause(ALICE, made[0].schedule_id)
        with pytest.raises(OverLimit) as refused:
            await recurring.add(adding(), "* * * * *", "UTC", "all")
        assert refused.value.reason == "TOO_MANY_SCHEDULES"
        await recurring.end(ALICE, made[0].schedule_id)
        await recurring.add(adding(), "* * * * *", "UTC", "all")


async def test_the_limit_holds_when_two_are_made_at_once(write_db: Database) -> None:
    """The second waits until the first is there, and then counts it."""
    async with pool(write_db) as reads, connected(write_db.owner) as owner, connected(write_db.admin) as admin:
        await create(reads)
        await owner.set_autocommit(False)
        copy = """SELECT create_schedule(tenant, gen_random_uuid(), cron, time_zone, catch_up, due_at, type, category,
                    aggregate_id, fingerprint, payload, user_id, roles, correlation_id, traceparent, 2) FROM schedules"""
        await owner.execute(copy)
        second = asyncio.create_task(Recurring(reads, live_max=2).add(adding(), "* * * * *", "UTC", "all"))

        async def waits() -> bool:
            rows = await (await admin.execute("SELECT FROM pg_stat_activity WHERE wait_event = 'advisory'")).fetchall()
            return bool(rows)

        await eventually(waits, 10, every_s=0.02)
        await owner.commit()
        with pytest.raises(OverLimit):
            await second


async def test_what_a_release_does_not_understand_stands_still_alone(write_db: Database) -> None:
    """Its zone is gone from the data: it is paused and says so, and is not resumed; others fire."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        lost, good = await create(reads), await create(reads, counter_id="b")
        async with connected(write_db.owner) as owner:
            change = "UPDATE schedules SET time_zone = 'Europe/Atlantis' WHERE schedule_id = %s"
            await owner.execute(change, (lost.schedule_id,))
        await set_back(write_db, timedelta(minutes=1))
        async with firing(write_db, one, reads):
            await all_ran(write_db, good, 1)
        found = await Recurring(reads).get(ALICE, lost.schedule_id)
        assert (found.status, found.problem, found.changed_by) == ("paused", "TIME_ZONE_UNKNOWN", "")
        with pytest.raises(Invalid):
            await Recurring(reads).resume(ALICE, lost.schedule_id)


async def test_a_schedule_whose_times_are_over_has_ended(write_db: Database) -> None:
    """The last firing runs, and the row says that the scheduler ended it."""
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = await create(reads)
        async with connected(write_db.owner) as owner:
            await owner.execute(
                "SELECT release_firings(%s, %s::uuid[], %s, '{NULL}', %s, %s, %s::uuid[], %s::uuid[], %s)",
                (
                    *(["acme"], [schedule.schedule_id], [schedule.due_at], [schedule.due_at]),
                    *(["acme"], [schedule.schedule_id], [str(uuid4())], [now()]),
                ),
            )
        async with firing(write_db, one, reads):
            await all_ran(write_db, schedule, 1)
        found = await Recurring(reads).get(ALICE, schedule.schedule_id)
        assert (found.status, found.due_at, found.changed_by) == ("ended", None, "")


async def test_old_schedules_leave_with_the_log(write_db: Database) -> None:
    """Those that ended long ago; what may still fire stays, however old it is."""
    async with pool(write_db) as reads:
        live, gone = await create(reads), await create(reads)
        await Recurring(reads).end(ALICE, gone.schedule_id)
        sweeper = Sweeper(reads, timedelta(days=30), clock=lambda: datetime.now(UTC) + timedelta(days=31))
        await sweeper.sweep()
        assert [row.schedule_id for row in await Recurring(reads).page(ADMIN, ended=False, hidden=[], after=None, limit=9)] == [
            live.schedule_id
        ]
        assert await Recurring(reads).page(ADMIN, ended=True, hidden=[], after=None, limit=9) == []


# Plans

FILL = """
INSERT INTO schedules (tenant, schedule_id, cron, time_zone, catch_up, status, due_at, type, category, aggregate_id, fingerprint,
  payload, user_id, roles, correlation_id, traceparent, created_at, changed_at, changed_by)
SELECT t, gen_random_uuid(), '* * * * *', 'UTC', 'all', s, CASE WHEN s = 'active' THEN now() + interval '1 day' END, 'trial.Add',
  'counter', 'a', '', '', 'u' || n % 5, '{user}', gen_random_uuid(), '', now(), now(), ''
FROM unnest(ARRAY['acme', 'umbrella']) AS t, generate_series(1, 10000) AS n,
  LATERAL (SELECT (ARRAY['active', 'paused', 'ended'])[n % 3 + 1] AS s) AS of_n
"""


async def index_of(connection: Connection, query: str) -> set[str]:
    """The indexes that a query reads; nothing else is read, and nothing is sorted but rows of one moment."""
    cursor = psycopg.AsyncClientCursor(connection)
    await cursor.execute(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {query}".encode())
    [(plans,)] = await cursor.fetchall()
    found = list(nodes(plans[0]["Plan"]))
    assert not {"Seq Scan", "Sort"} & {node["Node Type"] for node in found}, found
    return {node["Index Name"] for node in found if "Index Name" in node}


async def test_lists_and_the_scheduler_read_indexes(write_db: Database) -> None:
    """Each list in its order, of any number of schedules; ten thousand that wait cost nothing."""
    async with connected(write_db.owner) as owner:
        await owner.execute(FILL)
        await owner.execute("ANALYZE schedules")
    after = (now(), str(uuid4()))
    wanted = {
        ("", False): "schedules_live",
        ("u1", False): "schedules_live",
        ("", True): "schedules_ended",
        ("u1", True): "schedules_ended_by_user",
    }
    async with connected(write_db.app) as connection:
        assert await read_due(connection) == []
        for (user_id, ended), index in wanted.items():
            for place in (None, after):
                query, parameters = listing("acme", user_id, ended=ended, hidden=[], after=place, limit=50)
                used = [name for name in parameters if f"%({name})s" in query]
                numbered = query % {name: f"${nth}" for nth, name in enumerate(used, start=1)}
                assert await index_of(connection, numbered) == {index}
        assert await index_of(connection, WAITING % ("$1", "$2")) == {"commands_by_cause"}
        turn = turns_of_schedules().query % {"after": "$1::text", "tenants": "$2", "each": "$3"}
        assert "schedules_due_by_tenant" in await index_of(connection, turn)
        due = (
            "SELECT * FROM schedules WHERE status = 'active' AND due_at <= clock_timestamp() ORDER BY due_at, tenant, schedule_id"
        )
        assert await index_of(connection, f"{due} LIMIT 256") == {"schedules_due"}
