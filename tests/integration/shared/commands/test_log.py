"""The command log, listed: by any filter, in order, page by page, and each by one read of an index."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from msgspec.structs import asdict

from deploy.bootstrap import Database
from shared.commands.log import LISTED_BYTES_MAX, StoredCommand, Wanted, count_commands, list_commands, listing
from shared.commands.sweeper import CHUNK, Sweeper, made_before
from shared.platform.postgres import Connection, Reads
from tests.support.checks.history import commands_of, connected

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CAUSE, COURSE = str(UUID(int=7)), str(UUID(int=8))

# Numbers that share no divisor with each other, so that every combination of values comes up.
FILL = """
INSERT INTO commands (tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id, on_behalf_of,
  correlation_id, causation_id, traceparent, received_at, finished_at, version, events_appended, position, head, due_at, roles)
SELECT t, id, CASE WHEN n % 11 = 0 THEN 'trial.Rare' ELSE 'trial.Add' END, CASE WHEN n % 2 = 0 THEN 'counter' ELSE 'clock' END,
  'a' || n % 13, '', '',
  (ARRAY['completed', 'completed', 'completed', 'rejected', 'failed', 'cancelled', 'scheduled'])[n % 7 + 1],
  'u' || n % 5, CASE WHEN n % 3 = 0 THEN 'b' || n % 9 ELSE '' END,
  CASE WHEN n % 17 = 0 THEN '{course}'::uuid ELSE id END, CASE WHEN n % 19 = 0 THEN '{cause}'::uuid END, '',
  '{began}'::timestamptz + n / 3 * interval '1 second', '{began}'::timestamptz + n * interval '1 second', 0, 0, 0, 0,
  CASE WHEN n % 7 = 6 THEN '9999-01-01 00:00Z'::timestamptz END, CASE WHEN n % 7 = 6 THEN '{{user}}'::text[] END
FROM unnest(ARRAY['acme', 'umbrella']) AS t, generate_series(1, {rows}) AS n,
  LATERAL (SELECT gen_random_uuid() AS id, t AS of_t, n AS of_n) AS made
"""

FILTERS: dict[str, dict[str, Any]] = {
    "commands_by_time": {},
    "commands_by_type": {"type": "trial.Rare"},
    "commands_by_user": {"user_id": "u3"},
    "commands_by_aggregate": {"category": "counter", "aggregate_id": "a5"},
    "commands_by_status": {"status": "failed"},
    "commands_by_behalf": {"on_behalf_of": "b6"},
    "commands_by_correlation": {"correlation_id": COURSE},
    "commands_by_cause": {"causation_id": CAUSE},
}
MORE: list[dict[str, Any]] = [
    {"status": "completed"},
    {"category": "clock"},
    {"received_from": BEGAN + timedelta(seconds=20)},
    {"received_before": BEGAN + timedelta(seconds=40)},
    {"received_from": BEGAN + timedelta(seconds=20), "received_before": BEGAN + timedelta(seconds=40)},
    {"status": "rejected", "type": "trial.Add", "user_id": "u1", "category": "counter"},
    {"correlation_id": COURSE, "status": "completed"},
    {"type": "trial.None"},
]


async def fill(database: Database, rows: int) -> None:
    """Commands of two tenants, in which every value of every filter occurs."""
    async with connected(database.owner) as owner:
        await owner.execute(FILL.format(rows=rows, began=BEGAN.isoformat(), course=COURSE, cause=CAUSE).encode())
        await owner.execute("ANALYZE commands")


def expected(log: list[StoredCommand], wanted: Wanted) -> list[str]:
    """The ids that a filter leaves, by a look at each row, the newest first."""
    plain = {name: value for name, value in asdict(wanted).items() if value and not name.startswith("received_")}
    found = [
        row
        for row in log
        if all(getattr(row, name) == value for name, value in plain.items())
        and (wanted.received_from is None or row.received_at >= wanted.received_from)
        and (wanted.received_before is None or row.received_at < wanted.received_before)
    ]
    return [row.command_id for row in sorted(found, key=lambda row: (row.received_at, row.command_id), reverse=True)]


async def pages(connection: Connection, wanted: Wanted, size: int) -> list[str]:
    """All ids that a filter leaves, page by page."""
    listed: list[str] = []
    after = None
    while page := await list_commands(connection, wanted, limit=size, after=after):
        listed += [row.command_id for row in page]
        after = page[-1].received_at, page[-1].command_id
    return listed


async def test_every_filter_leaves_what_it_says(write_db: Database) -> None:
    """In pages of seven, where three commands have the same time: none is skipped, none comes twice, none is another tenant's."""
    await fill(write_db, 300)
    log = [row for row in (await commands_of(write_db)).values() if row.tenant == "acme"]
    own = log[0].command_id
    async with connected(write_db.app) as connection:
        for filter_ in [*FILTERS.values(), *MORE, {"correlation_id": own}, {"correlation_id": own, "type": "trial.None"}]:
            wanted = Wanted(tenant="acme", **filter_)
            listed = expected(log, wanted)
            assert await pages(connection, wanted, 7) == listed, filter_
            assert await count_commands(connection, wanted, limit=50) == min(len(listed), 50), filter_
        assert await list_commands(connection, Wanted(tenant="nobody"), limit=10) == []


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes."""
    return itertools.chain([plan], *map(nodes, plan.get("Plans", [])))


async def plan_of(connection: Connection, wanted: Wanted, **more: Any) -> list[dict[str, Any]]:
    """The nodes of the plan that serves a filter whatever its values are."""
    query, parameters = listing(wanted, "c.command_id", limit=50, **more)
    used = [name for name in parameters if f"%({name})s" in query]
    numbered = query % {name: f"${nth}" for nth, name in enumerate(used, start=1)}
    cursor = psycopg.AsyncClientCursor(connection)  # which does not prepare: there are no parameters to bind
    await cursor.execute(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {numbered}".encode())
    [(plans,)] = await cursor.fetchall()
    return list(nodes(plans[0]["Plan"]))


async def test_every_filter_is_answered_by_an_index_of_its_own(write_db: Database) -> None:
    """In the order of time, so that a page reads as many entries as it shows: nothing is sorted but rows of one moment."""
    await fill(write_db, 20_000)
    async with connected(write_db.app) as connection:
        for index, filter_ in FILTERS.items():
            for more in ({}, {"after": (BEGAN, str(uuid4()))}):
                found = await plan_of(connection, Wanted(tenant="acme", **filter_), **more)
                used = {node["Index Name"] for node in found if "Index Name" in node}
                assert used == {index} | ({"commands_pkey"} if "correlation_id" in filter_ else set()), (filter_, found)
                kinds = {node["Node Type"] for node in found}
                assert "Seq Scan" not in kinds, found
                if "correlation_id" not in filter_:
                    assert "Sort" not in kinds, found


async def test_a_long_payload_is_left_out_of_a_list(write_db: Database) -> None:
    """Five hundred commands of a mebibyte would not fit into an answer."""
    await fill(write_db, 2)
    async with connected(write_db.owner) as owner:
        sizes = (LISTED_BYTES_MAX, LISTED_BYTES_MAX + 1)
        for nth, size in enumerate(sizes):
            await owner.execute(
                "UPDATE commands SET payload = %s, user_id = %s WHERE tenant = 'acme' AND user_id = %s",
                (b"x" * size, f"big{nth}", f"u{nth + 1}"),
            )
    async with connected(write_db.app) as connection:
        listed = {row.user_id: len(row.payload) for row in await list_commands(connection, Wanted(tenant="acme"), limit=10)}
    assert listed == {"big0": LISTED_BYTES_MAX, "big1": 0}


# Retention


async def test_what_is_old_goes_and_the_rest_stays(write_db: Database) -> None:
    """In several chunks, by two sweepers at once. What waits for its time stays, however old it is."""
    await fill(write_db, 4000)
    before = BEGAN + timedelta(seconds=1000)  # of three thousand commands received by then, a quarter had ended
    log = (await commands_of(write_db)).values()
    kept = {row.command_id for row in log if row.status == "scheduled" or row.finished_at is None or row.finished_at >= before}
    assert len(log) - len(kept) > CHUNK / 2
    reads = Reads(write_db.app, application_name="test")
    await reads.open()
    try:
        now = before + timedelta(days=30)
        sweepers = [Sweeper(reads, timedelta(days=30), clock=lambda: now) for _ in range(2)]
        swept = sum(await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers)))
        swept += await sweepers[0].sweep()  # what one had locked, the other left
    finally:
        await reads.close()
    assert swept == len(log) - len(kept)
    assert {row.command_id for row in (await commands_of(write_db)).values()} == kept


@pytest.mark.parametrize(
    ("command_id", "old"),
    [
        ("019b7b16-3bd1-7000-8000-000000000000", True),  # 2026-01-01 21:27
        ("019b7d00-0000-7000-8000-000000000000", False),  # 2026-01-02 06:22
        ("ffffffff-ffff-7fff-bfff-ffffffffffff", False),
        ("00000000-0000-7000-8000-000000000000", True),
        ("00000000-0000-4000-8000-000000000000", False),
        ("00000000-0000-5000-8000-000000000000", False),
    ],
)
def test_only_an_id_that_says_so_is_old(command_id: str, old: bool) -> None:
    """Version 7 begins with the milliseconds since 1970; other versions do not say when they were made."""
    assert made_before(command_id, BEGAN) == old
