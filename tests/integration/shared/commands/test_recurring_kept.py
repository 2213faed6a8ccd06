"""Recurring schedules as they are kept: who steers them, how many there may be, when they leave, and how they are read."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.commands.firing import read_due, turns_of_schedules
from shared.commands.recurring import WAITING, Recurring, listing
from shared.commands.sweeper import Sweeper
from shared.folds.errors import Invalid, NotFound, OverLimit
from shared.platform.identity import Identity, Role
from shared.platform.postgres import Connection
from tests.integration.shared.commands.firings import all_ran, create, set_back
from tests.integration.shared.commands.test_log import nodes
from tests.integration.shared.commands.test_schedule import ADMIN, ALICE, BOB, REGISTRY, adding, firing, now, pool
from tests.support.checks.history import connected
from tests.support.domains.trial import SetPassword
from tests.support.fakes.replica import make_command, replica
from tests.support.system.waiting import eventually

STRANGER = Identity(tenant="umbrella", user_id="alice", roles=frozenset({Role.TENANT_ADMIN}))


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
