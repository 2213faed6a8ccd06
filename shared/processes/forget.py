"""Deletes what the saga service keeps of a tenant that is gone: processes, with all that belongs to them, and deliveries."""

from __future__ import annotations

from typing import LiteralString

from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint
from shared.platform.postgres import Connection, one
from shared.platform.telemetry import logger

FORGET_MAX = 1000
"""Rows of each table that one transaction deletes."""

# Commands and timers first: what is left of a process, if the work is interrupted, does nothing more by itself.
TABLES: tuple[LiteralString, ...] = (
    "process_commands",
    "process_timers",
    "process_inputs",
    "parked_events",
    "deliveries",
    "process_acknowledgements",
    "process_history",
    "processes",
    "notices",
    "switched_off",
    "announcement_switches",
)

log = logger(__name__)


async def forget(connection: Connection, name: str, shard: int, at: Checkpoint, tenant: str) -> int:
    """Deletes all rows of a tenant whose last event is behind the checkpoint `at`; returns how many there were.

    Killed anywhere: the checkpoint is before that event, so the next leader deletes the others. Raises Fenced.
    """
    total = 0
    while True:
        gone = 0
        async with connection.transaction():
            await checkpoints.hold(connection, name, shard, at)
            for table in TABLES:
                some: LiteralString = f"SELECT ctid FROM {table} WHERE tenant = %s LIMIT %s"  # noqa: S608 (names of ours)
                cursor = await connection.execute(
                    f"DELETE FROM {table} WHERE ctid = ANY (ARRAY({some}))",  # noqa: S608
                    (tenant, FORGET_MAX),
                )
                gone += cursor.rowcount
            # A row that somebody else changed while it was looked for has been passed over.
            left = not gone and await _is_left(connection, tenant)
        total += gone
        if not gone and not left:
            log.info("tenant_forgotten", consumer=name, tenant=tenant, rows=total)
            return total


async def _is_left(connection: Connection, tenant: str) -> bool:
    """Whether any table has a row of the tenant."""
    some: LiteralString = " OR ".join(f"EXISTS (SELECT FROM {table} WHERE tenant = %s)" for table in TABLES)
    (found,) = await one(connection, f"SELECT {some}", (tenant,) * len(TABLES))
    return bool(found)
