"""Deletes what the saga service keeps of a tenant that is gone, or of an aggregate that is purged.

What was archived of its processes goes as well, last: nothing of it can be archived any more then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString

from shared.line import checkpoint as checkpoints
from shared.line import forgotten
from shared.line.checkpoint import Checkpoint
from shared.line.event_store import AggregateKey
from shared.platform.packing import texts
from shared.platform.postgres import Connection, one
from shared.platform.telemetry import logger
from shared.processes.history_archive import HistoryArchive

FORGET_MAX = 1000
"""Rows of each table that one transaction deletes."""

# Commands and timers first: what is left of a process, if the work is interrupted, does nothing more by itself.
OF_PROCESSES: tuple[LiteralString, ...] = (
    "process_commands",
    "process_timers",
    "process_inputs",
    "process_acknowledgements",
    "process_history",
    "processes",
    "notices",
)
TABLES: tuple[LiteralString, ...] = (*OF_PROCESSES, "parked_events", "deliveries", "switched_off", "announcement_switches")

log = logger(__name__)


async def forget(
    connection: Connection, name: str, shard: int, at: Checkpoint, tenant: str, archive: HistoryArchive | None = None
) -> int:
    """Deletes all rows of a tenant whose last event is behind the checkpoint `at`; returns how many there were.

    Killed anywhere: the checkpoint is before that event, so the next leader deletes the others. Raises Fenced, and Unavailable
    (ARCHIVE_UNAVAILABLE).
    """
    if archive is None:
        return await _forget_rows(connection, name, shard, at, tenant)
    async with archive.sweeping:
        total = await _forget_rows(connection, name, shard, at, tenant)
        await archive.forget(tenant)
        return total


async def _forget_rows(connection: Connection, name: str, shard: int, at: Checkpoint, tenant: str) -> int:
    total = 0
    while True:
        by_table: dict[str, int] = {}
        async with connection.transaction():
            await checkpoints.hold(connection, name, shard, at)
            for table in TABLES:
                some: LiteralString = f"SELECT ctid FROM {table} WHERE tenant = %s LIMIT %s"  # noqa: S608 (names of ours)
                cursor = await connection.execute(
                    f"DELETE FROM {table} WHERE ctid = ANY (ARRAY({some}))",  # noqa: S608
                    (tenant, FORGET_MAX),
                )
                by_table[table] = cursor.rowcount
            await forgotten.count(connection, shard, tenant, by_table)
            gone = sum(by_table.values())
            # A row that somebody else changed while it was looked for has been passed over.
            left = not gone and await _is_left(connection, tenant)
        total += gone
        if not gone and not left:
            log.info("tenant_forgotten", consumer=name, tenant=tenant, rows=total)
            return total


async def forget_aggregate(
    connection: Connection,
    name: str,
    shard: int,
    at: Checkpoint,
    types: Sequence[str],
    key: AggregateKey,
    archive: HistoryArchive | None = None,
) -> int:
    """Deletes the processes of some types that have an aggregate's id, and the aggregate's parked events; returns how many rows.

    The aggregate's last event is behind the checkpoint `at`. A process has a bounded number of rows, so it is one transaction.
    Raises Fenced, Unavailable (ARCHIVE_UNAVAILABLE) and Rejected (ARCHIVE_DAMAGED).
    """
    if archive is None:
        return await _forget_aggregate(connection, name, shard, at, types, key)
    async with archive.sweeping:
        gone = await _forget_aggregate(connection, name, shard, at, types, key)
        await archive.forget_process(key[0], types, key[2])
        return gone


async def _forget_aggregate(
    connection: Connection, name: str, shard: int, at: Checkpoint, types: Sequence[str], key: AggregateKey
) -> int:
    tenant, category, aggregate_id = key
    async with connection.transaction():
        await checkpoints.hold(connection, name, shard, at)
        gone = 0
        for table in OF_PROCESSES:
            cursor = await connection.execute(
                f"DELETE FROM {table} WHERE tenant = %s AND type = ANY (%s) AND process_id = %s",  # noqa: S608 (names of ours)
                (tenant, texts(types), aggregate_id),
            )
            gone += cursor.rowcount
        parked = await connection.execute(
            "DELETE FROM parked_events WHERE shard = %s AND tenant = %s AND aggregate_type = %s AND aggregate_id = %s",
            (shard, tenant, category, aggregate_id),
        )
    log.info("aggregate_forgotten", consumer=name, tenant=tenant, category=category, aggregate_id=aggregate_id, rows=gone)
    return gone + parked.rowcount


async def _is_left(connection: Connection, tenant: str) -> bool:
    """Whether any table has a row of the tenant."""
    some: LiteralString = " OR ".join(f"EXISTS (SELECT FROM {table} WHERE tenant = %s)" for table in TABLES)
    (found,) = await one(connection, f"SELECT {some}", (tenant,) * len(TABLES))
    return bool(found)
