"""The projector: follows the line for one group of tables, and does what operators ask to be done with parked keys."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from shared.line.checkpoint import Checkpoint
from shared.line.consumer import Consumer, must_follow
from shared.line.ends import closed_in, purged_in
from shared.line.follower import EventBatch
from shared.line.spans import consumed
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger
from shared.projections import forget, refill, replay
from shared.projections.failures import ProjectionFailed
from shared.projections.tables import Tables

log = logger(__name__)

ASKED_S = 0.2
"""How often a projector with parked keys looks for what operators have asked."""
PASSED_S = 0.05
"""How much later than the tables that an event concerns those that it does not concern may move their checkpoint. Of a transfer's
events two of four groups take none, and the others two or three. At 50 transfers a second, moving at once took a third of the
projector's and PostgreSQL's time for them, and moving 0.02 s later an eighth."""

GATHER_S, BATCH_MAX = 0.08, 2000
"""Under load a batch comes so much later than the one before, in seconds, and is larger, up to so many events: of the events of a
batch that change one row only the last is written. With 0.03 s an event at full rate took an eighth more of PostgreSQL, and with
batches of 500, where a thousand accounts are paid into in turn, a third more (`make bench ARGS=pipeline`)."""

_NOTE_FOLDS = "UPDATE checkpoints SET folds = %s WHERE name = %s AND shard = %s AND position = 0"


class ReleaseTooOld(ProjectionFailed):
    """A newer release has made the tables; folds of this one would spoil them."""

    reason = "RELEASE_TOO_OLD"


class Projector(Consumer):
    """Follows the line for one group, as long as it leads."""

    failed = ProjectionFailed

    def __init__(
        self,
        tables: Tables,
        shard: int,
        follow: Callable[[Checkpoint], AsyncGenerator[EventBatch, None]],
        connect: Callable[[], Awaitable[Connection]],
    ) -> None:
        """`follow` yields the batches behind a checkpoint; `connect` opens a connection with the role that may write."""
        super().__init__(tables.consumer, shard, connect)
        self._tables = tables
        self._follow = follow

    async def _refuse_newer_tables(self, connection: Connection) -> None:
        """Notes whose folds make the tables, if they are empty. Raises ReleaseTooOld."""
        version = self._tables.group.version
        await connection.execute(_NOTE_FOLDS, (version, self.name, self.shard))
        cursor = await connection.execute("SELECT folds FROM checkpoints WHERE name = %s AND shard = %s", (self.name, self.shard))
        row = await cursor.fetchone()
        if row is not None and row[0] > version:
            raise ReleaseTooOld(f"the tables are of version {row[0]} of the group, and this release is of version {version}")

    async def _heed(self, connection: Connection) -> None:
        """Empties the tables if they follow a lost history and an operator asked to fill them from the present line."""
        cursor = await connection.execute(
            "SELECT refill_asked FROM checkpoints WHERE name = %s AND shard = %s", (self.name, self.shard)
        )
        if await cursor.fetchone() == (True,) and await refill.empty(self._tables, connection, self.shard, self.at):
            log.warning("projection_emptied", projection=self.name, epoch=self.at.epoch, position=self.at.position)

    async def _consume(self, connection: Connection) -> None:
        await self._refuse_newer_tables(connection)
        if self.at.position == 0 and await refill.clear_unaccounted(self._tables, connection, self.shard, self.at):
            log.warning("projection_emptied", projection=self.name, epoch=self.at.epoch, position=0)
        await self._tables.refresh(connection, self.shard)
        await replay.retry_known(self._tables, connection, self.shard, self.at)
        looked_at = time.monotonic()
        async with aclosing(self._follow(self.at)) as batches, _coming(batches) as coming:
            seen, move_by = self.at, math.inf  # events up to `seen` were read; those behind the checkpoint concern other groups
            while True:
                asks = self._tables.parked.known != {}
                batch = await coming(min(ASKED_S if asks else math.inf, max(move_by - time.monotonic(), 0)))
                if batch is not None:
                    must_follow(batch, seen)
                    seen = batch.after
                    if batch.events and not self._tables.concerned(batch.events):
                        move_by = min(move_by, time.monotonic() + PASSED_S)
                    else:
                        await self._take(connection, batch)
                        move_by = math.inf
                if time.monotonic() >= move_by:
                    await self._tables.apply(connection, self.shard, self.at, EventBatch((), seen))
                    self._moved(seen)
                    move_by = math.inf
                if asks and time.monotonic() - looked_at >= ASKED_S:
                    await replay.carry_out(self._tables, connection, self.shard, self.at)
                    looked_at = time.monotonic()

    async def _take(self, connection: Connection, batch: EventBatch) -> None:
        """Applies a batch, and passes the events before it that concern other groups."""
        if (tenant := closed_in(batch.events)) is not None:
            await forget.forget_tenant(self._tables, connection, self.shard, self.at, tenant)
        elif (key := purged_in(batch.events)) is not None:
            await forget.forget_aggregate(self._tables, connection, self.shard, self.at, key)
        with consumed(self.name, self.shard, filter(self._tables.takes, batch.events)):
            await self._tables.apply(connection, self.shard, self.at, batch)
        self._moved(batch.after)


@asynccontextmanager
async def _coming(
    batches: AsyncGenerator[EventBatch, None],
) -> AsyncIterator[Callable[[float], Awaitable[EventBatch | None]]]:
    """A function that waits for the next batch, or returns None after so many seconds; the wait for the batch then goes on."""
    awaited: asyncio.Future[EventBatch] | None = None

    async def following(timeout_s: float) -> EventBatch | None:
        nonlocal awaited
        awaited = awaited or asyncio.ensure_future(anext(batches))
        await asyncio.wait({awaited}, timeout=timeout_s if timeout_s < math.inf else None)
        if not awaited.done():
            return None
        batch, awaited = awaited.result(), None
        return batch

    try:
        yield following
    finally:
        if awaited is not None:
            awaited.cancel()
            await asyncio.gather(awaited, return_exceptions=True)
