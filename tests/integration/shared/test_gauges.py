"""Gauges that a database is asked for have the values that it has."""

from __future__ import annotations

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.line.lag import relay_lag
from shared.platform import metrics as module
from shared.platform.clock import utc_now
from shared.processes.runners import watch_processes
from shared.projections.admin import watch_parked
from tests.support.fakes.relaying import grow
from tests.support.system.gauges import asking, page
from tests.support.system.waiting import eventually

HOUR_S = 3600
PARKED = """
INSERT INTO checkpoints (name, shard) VALUES ('accounts', 1), ('people', 1), ('users', 1);
INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error)
SELECT gen_random_uuid(), consumer, 1, true, 'acme', consumer, key, key, 'ValueError'
FROM (SELECT 'accounts' AS consumer, n::text AS key FROM generate_series(1, 1200) n
      UNION ALL VALUES ('people', 'x'), ('people', 'y')) AS rows
"""
PROCESSES = """
INSERT INTO checkpoints (name, shard) VALUES ('processes', 1);
INSERT INTO processes
SELECT 'acme', 'gift', 'p' || n, '{}', 1, status, '', attention, 'giving', '', '', '', '', '', 1, now(), now()
FROM (VALUES (1, 'running', ''), (2, 'running', ''), (3, 'parked', ''), (4, 'ended', 'LOOK')) AS rows (n, status, attention);
INSERT INTO process_timers VALUES ('acme', 'gift', 'p1', 'late', now() - interval '2 hours'),
  ('acme', 'gift', 'p2', 'late', now() + interval '1 hour');
INSERT INTO process_commands (tenant, type, process_id, step, attempt, command_id, command_type, payload, causation_id,
  on_behalf_of, traceparent, due_at, tries)
VALUES ('acme', 'gift', 'p2', 'gift', 1, gen_random_uuid(), 'x', '', '', '', '', now() - interval '1 hour', 0)
"""


async def test_the_streams_lag_is_the_age_of_the_first_event_that_it_lacks(
    write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many follow it; none if it has all, or nobody leads."""
    monkeypatch.setattr(module, "WATCH_S", 0.3)
    grow(write_db, 3)
    with psycopg.connect(write_db.owner) as connection:
        connection.execute("ALTER TABLE events DISABLE TRIGGER USER")
        connection.execute("UPDATE events SET recorded_at = recorded_at - (3 - position) * interval '1 hour'")
    places = {"1": 1}
    async with asking(write_db.app) as (metrics, probe):
        relay_lag(metrics, lambda: places, probe)
        lag = 'foldline_relay_lag_seconds{foldline_shard="1"}'

        async def is_near(seconds: float) -> bool:
            return seconds <= (await page(metrics))[lag] < seconds + 60

        await eventually(lambda: is_near(HOUR_S), 20)
        places["1"] = 3
        assert (await page(metrics))[lag] == 0
        places["1"] = 0
        await eventually(lambda: is_near(2 * HOUR_S), 20)
        places.clear()
        assert lag not in await page(metrics)


async def test_parked_keys_are_counted_by_group(read_db: Database) -> None:
    """Each once, and up to a thousand of a group: those of one do not hide another's. That there are none is told as well."""
    with psycopg.connect(read_db.owner) as connection:
        connection.execute(PARKED)
    async with asking(str(read_db.query)) as (metrics, probe):
        watch_parked(metrics, probe, 1, ["people", "users"])

        async def counted() -> bool:
            found = await page(metrics)
            names = ("accounts", "people", "users")
            parked = [found.get(f'foldline_projection_parked{{foldline_consumer="{name}"}}') for name in names]
            return parked == [1000, 2, 0]

        await eventually(counted, 20)


async def test_processes_are_counted_and_what_is_overdue_is_told_apart(saga_db: Database) -> None:
    """By status, of each type; the oldest command that is due apart from the oldest timer; what will be due is not."""
    with psycopg.connect(saga_db.owner) as connection:
        connection.execute(PROCESSES)
    async with asking(saga_db.app) as (metrics, probe):
        watch_processes(metrics, probe, 1, utc_now, ["gift", "loan"])
        await eventually(lambda: _there(metrics), 20)
        found = await page(metrics)
    gifts = 'foldline_process_type="gift"'
    assert found[f'foldline_processes{{foldline_process_status="running",{gifts}}}'] == 2
    assert found[f'foldline_processes{{foldline_process_status="parked",{gifts}}}'] == 1
    assert found[f"foldline_process_attention{{{gifts}}}"] == 1
    # A type without processes is told, too: what shows it is not empty, and a count that falls to nothing falls to 0.
    loans = [value for name, value in found.items() if 'foldline_process_type="loan"' in name]
    assert loans == [0, 0, 0]
    assert found["foldline_process_streams_parked"] == found["foldline_process_types_paused"] == 0
    for work, hours in (("commands", 1), ("timers", 2)):
        overdue = found[f'foldline_process_overdue_seconds{{foldline_process_work="{work}"}}']
        assert hours * HOUR_S <= overdue < hours * HOUR_S + 60


async def _there(metrics: module.Metrics) -> bool:
    return "foldline_process_streams_parked" in await page(metrics)
