"""At the event that ends a tenant its processes go, with all that belongs to them, whatever they wait for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from msgspec import Raw

from foldline.v1 import retention_pb2, tenant_pb2
from shared.folds.errors import Rejected, Unavailable
from shared.line import checkpoint as checkpoints
from shared.line.files import open_files
from shared.processes import forget as forget_module
from shared.processes import runner as runner_module
from shared.processes.history_archive import HistoryArchive, PastProcess
from tests.support.checks.history import connected, somebody_waits_for_a_row
from tests.support.domains.gifts import TENANT, World
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

TABLES = ("processes", "process_commands", "process_timers", "process_history", "process_inputs", "deliveries", "parked_events")


def end(world: World) -> int:
    """Ends the tenant; returns the position."""
    return world.store.append(TENANT, "tenant", tenant_pb2.TenantClosed(), category="tenant").position


async def rows(world: World, tenant: str = TENANT) -> dict[str, int]:
    """How many rows each table has of a tenant, where there are any."""
    found = {}
    for table in TABLES:
        [(count,)] = await world.query(f"SELECT count(*) FROM {table} WHERE tenant = '{tenant}'")
        if count:
            found[table] = count
    return found


async def passed(world: World, runner: Any, position: int) -> None:
    """Waits until a runner has taken the event at a position."""
    await eventually(lambda: runner._seen.position >= position, 20)
    assert runner.stopped is None


async def test_processes_in_every_state_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended, waiting for an answer, parked; and a parked stream. What was begun before comes to nothing."""
    monkeypatch.setattr(forget_module, "FORGET_MAX", 2)
    world.open(1, 2, 3)
    async with world.running() as runner:
        await eventually(lambda: _statuses(world, ended=3), 20)
        world.write.decide = lambda command: Unavailable("AWAY", "away")
        world.open(4, 5)
        await eventually(lambda: _statuses(world, ended=3, running=2), 20)
        broken = world.store.append(TENANT, uid(6), tenant_pb2.TenantClosed())
        broken.type, broken.payload = "bank.v1.AccountOpened", b"\xff"
        await passed(world, runner, broken.position)
        assert {"processes", "process_commands", "process_history", "parked_events"} <= (await rows(world)).keys()
        before = await rows(world)
        at = end(world)
        await passed(world, runner, at)
        await eventually(lambda: _none(world), 20)
        assert runner._parked.streams == set()
        counted = dict(await world.query(f"SELECT table_name, rows FROM forgotten_tenants WHERE tenant = '{TENANT}'"))
        assert {table: counted[table] for table in before} == before
        assert (set(counted), counted["notices"]) == (set(forget_module.TABLES), 0)
    async with world.running() as again:
        await passed(world, again, at)
        assert await rows(world) == {}


async def test_many_commands_that_are_refused_at_once_park_nothing(world: World) -> None:
    """Between the tenant's end on the line and the runner's sight of it every command is refused: that is no bad release."""
    world.write.decide = lambda command: Rejected("TENANT_CLOSED", "the tenant is closed")
    many = range(1, 3 * runner_module.PARKED_MAX)
    world.open(*many)
    async with world.running() as runner:
        await eventually(lambda: _statuses(world, running=len(many)), 20)
        await passed(world, runner, end(world))
        await eventually(lambda: _none(world), 20)
        assert runner.stopped is None


async def test_ended_between_two_deletions_the_next_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is still before the end of the tenant."""
    world.open(1, 2, 3, 4)
    async with world.running():
        await eventually(lambda: _statuses(world, ended=4), 20)
    at = end(world)
    forget, died = forget_module.forget, 0

    async def dying(connection: Any, *more: Any) -> int:
        nonlocal died
        died += 1
        if died == 1:
            async with connection.transaction():
                await connection.execute("DELETE FROM process_history WHERE process_id = %s", (uid(1),))
            raise psycopg.OperationalError("killed here")
        return await forget(connection, *more)

    monkeypatch.setattr(forget_module, "forget", dying)
    async with world.running() as runner:
        await passed(world, runner, at)
        await eventually(lambda: _none(world), 20)
    assert died == 2


async def test_a_row_that_is_changed_meanwhile_goes_too(world: World) -> None:
    """The deletion waits for the other transaction and passes the row over; it does not end there."""
    database = world.database
    async with connected(database.app) as mine, connected(database.app) as other, connected(database.admin) as watch:
        await mine.execute("INSERT INTO switched_off (shard, tenant, name, position) VALUES (1, %s, 'greeting', 1)", (TENANT,))
        at = await checkpoints.load(mine, "gift", 1)
        async with other.transaction():
            await other.execute("UPDATE switched_off SET position = 2")
            forgetting = asyncio.create_task(forget_module.forget(mine, "gift", 1, at, TENANT))
            await eventually(lambda: somebody_waits_for_a_row(watch), 10)
        assert await forgetting == 1
    assert await world.query("SELECT * FROM switched_off") == []


async def _statuses(world: World, **counts: int) -> bool:
    return dict(await world.statuses()) == counts


async def _none(world: World) -> bool:
    return await rows(world) == {}


async def test_what_was_archived_goes_too(world: World, tmp_path: Path) -> None:
    """Of a purged aggregate its process, of a tenant that ends all; of others nothing."""
    folder = tmp_path / "archive"
    archive = HistoryArchive(open_files(folder.as_uri()), 1)
    past = [_past(uid(number)) for number in (1, 2)]
    await archive.write(TENANT, "gift", past)
    await archive.write("other", "gift", past)

    def kept() -> list[tuple[str, str]]:
        files = sorted(folder.rglob("processes.jsonl"))
        lines = [(it.relative_to(folder).parts[0], line) for it in files for line in it.read_bytes().splitlines()]
        return [(tenant, orjson.loads(line)["process_id"]) for tenant, line in lines]

    others = [("other", uid(1)), ("other", uid(2))]
    async with world.running(world.runner(archive=archive)) as runner:
        await passed(world, runner, world.store.append(TENANT, uid(1), retention_pb2.AggregatePurged()).position)
        assert kept() == [(TENANT, uid(2)), *others]
        await passed(world, runner, end(world))
        assert kept() == others


def _past(process_id: str) -> PastProcess:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    return PastProcess(
        type="gift",
        process_id=process_id,
        state=Raw(b"{}"),
        schema=1,
        phase="given",
        correlation_id="",
        causation_id="",
        on_behalf_of="",
        traceparent="",
        started_at=moment,
        ended_at=moment,
        history=[],
    )


async def test_at_the_end_of_an_aggregate_its_process_goes_alone(world: World) -> None:
    """Whatever it waits for, with its parked stream; the others go on."""
    world.write.decide = lambda command: Unavailable("AWAY", "away")
    world.open(1, 2)
    async with world.running() as runner:
        await eventually(lambda: _statuses(world, running=2), 20)
        broken = world.store.append(TENANT, uid(1), tenant_pb2.TenantClosed())
        broken.type, broken.payload = "bank.v1.AccountOpened", b"\xff"
        await passed(world, runner, broken.position)
        assert (await rows(world))["parked_events"] == 1
        at = world.store.append(TENANT, uid(1), retention_pb2.AggregatePurged()).position
        await passed(world, runner, at)
        world.write.decide = lambda command: None
        world.open(3)
        await eventually(lambda: _statuses(world, ended=2), 20)
        assert runner._parked.streams == set()
    for table in (*forget_module.OF_PROCESSES, "parked_events"):
        column = "aggregate_id" if table == "parked_events" else "process_id"
        assert await world.query(f"SELECT 1 FROM {table} WHERE {column} = '{uid(1)}'") == []
