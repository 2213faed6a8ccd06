"""Timers among a hundred thousand that wait, and clocks that are set forward and back."""

from __future__ import annotations

from datetime import datetime, timedelta

from tests.support.checks.history import connected
from tests.support.domains.gifts import World
from tests.support.system.waiting import eventually

PENDING = 100_000
SOON = 100
LATE_MAX_S = 0.25

PROCESSES = """
INSERT INTO processes
SELECT 'acme', 'gift', 'p' || n, '{"phase": "giving", "account_id": "", "renames": []}', 1, 'running', '', '', 'giving',
  '', '', '', '', '', 1, %(now)s, %(now)s FROM generate_series(1, %(count)s::int) AS n
"""
TIMERS = """
INSERT INTO process_timers
SELECT 'acme', 'gift', 'p' || n, 'late', %(first)s::timestamptz + (n - %(low)s::int) * make_interval(secs => %(apart_s)s)
FROM generate_series(%(low)s::int, %(high)s::int) AS n
"""
FIRED = "SELECT process_id, happened_at FROM process_history WHERE kind = 'timer_fired'"


async def put(world: World, low: int, high: int, first: datetime, apart_s: float = 0.0) -> None:
    """Sets the timers of some processes: the first at that time, each next one later."""
    async with connected(world.database.admin) as connection:
        await connection.execute(TIMERS, {"low": low, "high": high, "first": first, "apart_s": apart_s})
        await connection.commit()


async def make(world: World, count: int) -> None:
    """Makes processes that wait."""
    async with connected(world.database.admin) as connection:
        await connection.execute(PROCESSES, {"now": world.clock(), "count": count})
        await connection.commit()
        await connection.set_autocommit(True)
        await connection.execute("ANALYZE")


async def fired(world: World, count: int, deadline_s: float) -> dict[str, datetime]:
    """Waits for so many timers to have fired; returns when each did."""

    async def there() -> bool:
        [(found,)] = await world.query("SELECT count(*) FROM process_history WHERE kind = 'timer_fired'")
        return bool(found >= count)

    await eventually(there, deadline_s, every_s=0.1)
    rows = await world.query(FIRED)
    assert len(rows) == len(dict(rows)) == count, "a timer fired twice"
    return dict(rows)


async def test_timers_fire_in_time_among_a_hundred_thousand(world: World) -> None:
    """Every 20 ms one is due: nine of ten fire within a quarter of a second, and none before its time."""
    await make(world, PENDING + SOON)
    await put(world, 1, PENDING, world.clock() + timedelta(days=1))
    async with world.running() as runner:
        await runner.follows.wait()
        first = world.clock() + timedelta(seconds=1)
        await put(world, PENDING + 1, PENDING + SOON, first, 0.02)
        runner.wake()
        found = await fired(world, SOON, 30)
    late = sorted((at - first).total_seconds() - 0.02 * (int(process_id[1:]) - PENDING - 1) for process_id, at in found.items())
    assert late[0] >= 0
    assert late[SOON * 9 // 10] <= LATE_MAX_S
    [(left,)] = await world.query("SELECT count(*) FROM process_timers")
    assert left == PENDING


async def test_all_that_became_due_while_nobody_led_fire_late_rather_than_never(world: World) -> None:
    """Ten thousand at once, each once."""
    await make(world, 10_000)
    await put(world, 1, 10_000, world.clock() - timedelta(hours=1))
    async with world.running():
        await fired(world, 10_000, 60)


async def test_a_clock_that_is_set_forward_fires_what_is_due_then(world: World) -> None:
    """At once, without waiting for the next look at the table."""
    await make(world, 1)
    await put(world, 1, 1, world.clock() + timedelta(hours=1))
    async with world.running() as runner:
        await runner.follows.wait()
        world.clock.ahead = timedelta(hours=1)
        set_at = world.clock()
        [at] = (await fired(world, 1, 10)).values()
    assert (at - set_at).total_seconds() < 0.9


async def test_a_clock_that_is_set_back_keeps_timers_waiting_and_loses_none(world: World) -> None:
    """It fires when the clock is there again, once."""
    await make(world, 2)
    await put(world, 1, 2, world.clock() + timedelta(seconds=0.5), 3600)
    async with world.running() as runner:
        await runner.follows.wait()
        world.clock.ahead = timedelta(hours=-1)
        world.open(1)

        async def given() -> bool:
            return (await world.statuses())["ended"] == 1

        await eventually(given)
        assert await world.query(FIRED) == []
        world.clock.ahead = timedelta(seconds=1)
        await fired(world, 1, 10)
        world.clock.ahead = timedelta(hours=2)
        await fired(world, 2, 10)
