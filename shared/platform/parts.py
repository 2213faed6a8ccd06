"""Divides work whose parts have names, such as groups of tables, among processes: each part is led by one process.

A process leads those of its parts that nobody else leads, and takes over others when their leader is gone. As with `leader.lead`,
correctness does not depend on it.

The parts' locks are session locks of one connection, so a process leads its parts for as long as that lasts. Beside them each
process holds the lock of the whole in shared mode. A process of a release without parts leads the whole by holding that lock
alone; so while it leads nobody leads a part, and it does not lead while others do.

Killed anywhere, what is left? Nothing: the server drops the locks of a session with the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import LiteralString

import psycopg

from shared.platform.leader import RETRY_S, Lease, LockClass, gain, held, until
from shared.platform.postgres import Connection, describe
from shared.platform.telemetry import logger

log = logger(__name__)

Work = Callable[[Sequence[str]], Coroutine[None, None, None]]
"""The work on the parts with these names."""

PART_KEY: LiteralString = "('x' || left(md5({name} || ' ' || {shard}::text), 8))::bit(32)::int"
"""In SQL, the second key of a part's lock, whose class is LockClass.PART."""
_KEY: LiteralString = PART_KEY.format(name="u.name", shard="%s::int")
_TAKE: LiteralString = f"SELECT u.name FROM unnest(%s::text[]) AS u (name) WHERE pg_try_advisory_lock(%s::int, {_KEY})"  # noqa: S608


async def lead_parts(
    database_url: str, whole: LockClass, shard: int, parts: Sequence[str], work: Work, stopping: asyncio.Event
) -> None:
    """Runs `work` on those of the parts that this process leads; stands by for the others. Returns after `stopping` is set.

    When a part is gained or the lease is lost, `work` is cancelled; it is started afresh with all parts that are led then. In
    everything else it is as with `leader.lead`.
    """
    while not stopping.is_set():
        connection = await until(stopping, gain(database_url, whole, shard, shared=True))
        if connection is not None:
            async with held(connection, Lease(whole, shard)) as lease:
                await until(lease.lost, _lead_what_is_free(connection, shard, parts, work, stopping))


async def _lead_what_is_free(
    connection: Connection, shard: int, parts: Sequence[str], work: Work, stopping: asyncio.Event
) -> None:
    led: list[str] = []
    awaited = list(parts)
    told: list[str] | None = None
    working: asyncio.Task[None] | None = None
    gate = asyncio.create_task(stopping.wait())
    try:
        while not stopping.is_set():
            gained = await _take(connection, shard, awaited)
            led = [name for name in parts if name in led or name in gained]
            awaited = [name for name in parts if name not in led]
            if led != told:
                told = led
                log.info("parts_led", shard=shard, led=led, awaited=awaited)
            if gained:
                await _end(working)
                working = asyncio.create_task(work(led))
            events = {gate} if working is None else {gate, working}
            done, _ = await asyncio.wait(events, timeout=RETRY_S if awaited else None, return_when=asyncio.FIRST_COMPLETED)
            if working in done:
                break
        if working is not None:
            await working
    finally:
        gate.cancel()
        await _end(working)


async def _take(connection: Connection, shard: int, parts: Sequence[str]) -> list[str]:
    """Those of the parts that nobody led."""
    if not parts:
        return []
    try:
        cursor = await connection.execute(_TAKE, (list(parts), int(LockClass.PART), shard))
        return [name for (name,) in await cursor.fetchall()]
    except psycopg.Error as error:  # if the session is gone, the heartbeat learns it and the lease is lost
        log.warning("parts_not_asked", shard=shard, error=describe(error))
        return []


async def _end(working: asyncio.Task[None] | None) -> None:
    if working is not None:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
