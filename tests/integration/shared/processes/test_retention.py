"""Ended processes leave after the retention, whole, and nothing leaves that somebody still needs."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.folds.errors import Unavailable
from shared.platform import postgres
from shared.processes import retention as retention_module
from shared.processes import store
from shared.processes.retention import ProcessRetention
from shared.processes.runner import CHECKPOINT
from tests.support.domains import gifts
from tests.support.domains.gifts import World, frozen, key
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

KEPT = timedelta(days=90)


@pytest.fixture
def world(saga_db: Database, tmp_path: Path) -> World:
    """A line, a write service, a saga database."""
    file = tmp_path / "saga.token"
    file.write_text("t0ken\n")
    gifts.DEFECTS.accounts.clear()
    return World(saga_db, file)


async def connect(world: World) -> postgres.Connection:
    """A connection of the application's role."""
    return await postgres.connect(world.database.app, application_name="test-retention")


def retention(world: World) -> ProcessRetention:
    """What forgets."""
    return ProcessRetention(1, connect=lambda: connect(world), retention=KEPT, clock=world.clock)


async def forgotten(world: World) -> int:
    """Forgets; returns how many left."""
    async with await connect(world) as connection:
        return await retention(world).forget(connection)


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
    async with world.steering() as (_, steering):
        await steering.ask(key(4), "GIFT_REFUSED", "sent by post", "olga")
        await steering.confirm(key(4), "otto")
    assert await forgotten(world) == 1


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
