"""Elects the leader for work that one process does at a time: a PostgreSQL session advisory lock with a heartbeat.

The lock ends with its connection, so a killed leader is replaced at once. A *stopped* leader (SIGSTOP, a frozen virtual
machine, a long swap) keeps its connection and the lock for as long as the kernel answers for it, and a stand-by would wait
for ever. Therefore the session has `idle_session_timeout`: the leader sends a statement every second, or the server ends the
session and with it the lease.

A lease saves work; correctness does not depend on it. Between the time when the server releases the lock and the time when
the old leader wakes up and learns of it, two processes believe that they lead. So each write of a leader is fenced by its
target: the relay's by the expected sequence of the stream, the consumers' by their checkpoint.

Killed anywhere, what is left? Nothing: the server drops the locks of a session with the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from enum import IntEnum
from typing import LiteralString, TypeVar

import psycopg

from shared.platform.postgres import Connection, connect, refuse_pooler
from shared.platform.telemetry import logger

log = logger(__name__)

SESSION_TIMEOUT_S = 3.0  # the server ends the session of a leader that is silent for so long
HEARTBEAT_S = 1.0
RETRY_S = 0.25  # how often a stand-by asks for the lock, and for a database that is away
REPEAT_LOG_S = 10.0

T = TypeVar("T")


class LockClass(IntEnum):
    """The first key of every advisory lock; the second is the shard. Each database has locks of its own."""

    APPEND = 1  # taken by whatever appends, for the length of its transaction
    RELAY = 2
    PROJECTOR = 3
    SAGA = 4
    SCHEDULER = 5
    PART = 6  # the second key is that of a part's name and the shard: see `parts`


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to lead, until `lost` is set."""

    lock_class: int
    shard: int
    lost: asyncio.Event = field(default_factory=asyncio.Event)


async def lead(
    database_url: str,
    lock_class: int,
    shard: int,
    work: Callable[[], Coroutine[None, None, None]],
    stopping: asyncio.Event,
) -> None:
    """Runs `work` while this process leads; stands by while another does. Returns after `stopping` is set.

    `work` is cancelled when the lease is lost, and started afresh when it is gained again, so it must read where
    things stand when it begins. It is expected to drain and return by itself when `stopping` is set. What it raises
    is raised here. Raises UnsafeDatabase if the URL leads to a pooler.
    """
    while not stopping.is_set():
        connection = await until(stopping, gain(database_url, lock_class, shard))
        if connection is not None:
            async with held(connection, Lease(lock_class, shard)) as lease:
                await until(lease.lost, work())


async def until(event: asyncio.Event, coroutine: Coroutine[None, None, T]) -> T | None:
    """The coroutine's result, or None if the event came first: then the coroutine is cancelled."""
    running, gate = asyncio.ensure_future(coroutine), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({running, gate}, return_when=asyncio.FIRST_COMPLETED)
        return running.result() if running.done() else None
    finally:
        running.cancel()
        gate.cancel()
        await asyncio.gather(running, gate, return_exceptions=True)


@contextlib.asynccontextmanager
async def hold_lease(database_url: str, lock_class: int, shard: int) -> AsyncIterator[Lease]:
    """Waits for the lease, however long it takes, also for a database that is away; gives it back at the end.

    `database_url` must lead to the server itself: behind a pooler that shares connections between transactions, the
    lock would belong to whoever uses the connection next.
    """
    async with held(await gain(database_url, lock_class, shard), Lease(lock_class, shard)) as lease:
        yield lease


@contextlib.asynccontextmanager
async def held(connection: Connection, lease: Lease) -> AsyncIterator[Lease]:
    """Keeps a lease that a connection has gained, and ends both with the block."""
    heart = asyncio.create_task(_beat(connection, lease))
    try:
        yield lease
    finally:
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)
        with contextlib.suppress(psycopg.Error):
            await connection.close()


async def gain(database_url: str, lock_class: int, shard: int, *, shared: bool = False) -> Connection:
    """Returns a connection that holds the lock; if `shared`, beside any number of others that do so too."""
    told, told_at = "", 0.0

    def say(what: str, **facts: object) -> None:
        nonlocal told, told_at
        if what != told or time.monotonic() - told_at > REPEAT_LOG_S:
            told, told_at = what, time.monotonic()
            log.info(what, lock_class=int(lock_class), shard=shard, **facts)

    while True:
        try:
            connection = await connect(database_url, application_name="foldline-lease")
        except psycopg.Error as error:
            say("lease_waits_for_database", error=str(error).strip())
            await asyncio.sleep(RETRY_S)
            continue
        try:
            await refuse_pooler(connection)
            await connection.execute("SELECT set_config('idle_session_timeout', %s, false)", (f"{SESSION_TIMEOUT_S * 1000:.0f}",))
            while not await _try_lock(connection, lock_class, shard, shared=shared):
                say("lease_stands_by")
                await asyncio.sleep(RETRY_S)
        except psycopg.Error as error:
            say("lease_waits_for_database", error=str(error).strip())
            with contextlib.suppress(psycopg.Error):
                await connection.close()
            await asyncio.sleep(RETRY_S)
        except BaseException:
            await connection.close()
            raise
        else:
            log.info("lease_shared" if shared else "lease_gained", lock_class=int(lock_class), shard=shard)
            return connection


async def _try_lock(connection: Connection, lock_class: int, shard: int, *, shared: bool) -> bool:
    function: LiteralString = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
    cursor = await connection.execute(f"SELECT {function}(%s::integer, %s::integer)", (int(lock_class), shard))
    row = await cursor.fetchone()
    return row is not None and row[0] is True


async def _beat(connection: Connection, lease: Lease) -> None:
    """Sends a statement every second. Sets `lost` when the server has not answered for as long as its own session timeout.

    A process that was stopped finds the alarm overdue when it wakes up. The alarm does not wait until the statement is
    cancelled, because a frozen server would not answer that either.
    """

    def lose(why: str) -> None:
        # Logged here, because the task that sees `lost` first ends this one.
        if not lease.lost.is_set():
            lease.lost.set()
            log.warning("lease_lost", lock_class=int(lease.lock_class), shard=lease.shard, error=why)

    loop = asyncio.get_running_loop()
    try:
        while not lease.lost.is_set():
            alarm = loop.call_later(SESSION_TIMEOUT_S, lose, "the database is silent")
            try:
                await asyncio.sleep(HEARTBEAT_S)
                await connection.execute("SELECT 1")
            finally:
                alarm.cancel()
    except psycopg.Error as error:
        lose(str(error).strip())
    finally:
        lease.lost.set()
