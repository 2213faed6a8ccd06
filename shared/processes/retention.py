"""Deletes processes that ended long ago, with their histories.

A process leaves if it has ended, waits for nothing, and nobody need look at it: money in suspense stays until it is acknowledged.
Its event lies behind the checkpoint, so it never begins anew.

Killed anywhere, what is left? A whole process, or nothing of it. Two at once: the lock on the runner's checkpoint orders them. It
also orders this and a round that notes a late answer.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import LiteralString

import psycopg

from shared.platform.postgres import Connection, describe
from shared.platform.telemetry import logger
from shared.processes import store
from shared.processes.runner import CHECKPOINT

log = logger(__name__)

EVERY_S = 60.0
# So many in one transaction, during which no round runs.
FORGET_MAX = 200

_FORGET: LiteralString = """
WITH old AS MATERIALIZED (
  SELECT p.tenant, p.type, p.process_id FROM processes p
  WHERE p.status = 'ended' AND p.trouble = '' AND p.attention = '' AND p.moved_at < %s
    AND NOT EXISTS (SELECT FROM process_commands c
                    WHERE c.tenant = p.tenant AND c.type = p.type AND c.process_id = p.process_id)
  ORDER BY p.moved_at LIMIT %s),
told AS (
  DELETE FROM process_history h USING old o WHERE h.tenant = o.tenant AND h.type = o.type AND h.process_id = o.process_id),
asked AS (
  DELETE FROM process_acknowledgements a USING old o
  WHERE a.tenant = o.tenant AND a.type = o.type AND a.process_id = o.process_id)
DELETE FROM processes p USING old o WHERE p.tenant = o.tenant AND p.type = o.type AND p.process_id = o.process_id
"""


class ProcessRetention:
    """Deletes what is past its date, for a shard, as long as it leads."""

    def __init__(
        self,
        shard: int,
        *,
        connect: Callable[[], Awaitable[Connection]],
        retention: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`retention` is counted from the end of a process."""
        self._shard = shard
        self._connect = connect
        self._retention = retention
        self._clock = clock

    async def run(self) -> None:
        """Deletes until cancelled. Whatever goes wrong is logged and tried again a minute later."""
        while True:
            try:
                async with await self._connect() as connection:
                    count = await self.forget(connection)
                    if count:
                        log.info("processes_forgotten", count=count)
            except psycopg.Error as error:
                log.warning("processes_not_forgotten", error=describe(error))
            except Exception as defect:  # noqa: BLE001 (it must not end the processes that run beside it)
                where = traceback.format_tb(defect.__traceback__)[-4:]
                log.error("retention_defect", error=type(defect).__name__, where=where)  # noqa: TRY400
            await asyncio.sleep(EVERY_S)

    async def forget(self, connection: Connection) -> int:
        """Deletes all that is past its date, some at a time; returns how many."""
        before, total = self._clock() - self._retention, 0
        while True:
            async with connection.transaction():
                await store.lock(connection, CHECKPOINT, self._shard)
                cursor = await connection.execute(_FORGET, (before, FORGET_MAX))
                count = cursor.rowcount
            total += count
            if count < FORGET_MAX:
                return total
            # Rounds come first.
            await asyncio.sleep(0.05)
