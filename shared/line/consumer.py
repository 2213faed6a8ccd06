"""Whoever follows the line with a checkpoint, projections and processes alike: connects, goes on, or stops and says so.

It goes on from its checkpoint after everything that passes: a database that is away, another leader that was faster.
It stops at what trying again would not help: a history that is not the one it followed, a defect. Then it stays up,
writes nothing, and the reason is in its checkpoint's row for an operator to see.
"""

from __future__ import annotations

import asyncio
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ClassVar

import psycopg
from psycopg.errors import IdleInTransactionSessionTimeout, TransactionTimeout, UndefinedTable

from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint, Fenced
from shared.line.follower import HistoryDiverged
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger

log = logger(__name__)

RECONNECT_S = 0.5

# A plan made while a table was empty, and kept, goes through whichever index came first and slows down with every row
# (eight times slower at 2,000 rows). So a plan is made anew for each batch, which costs little.
_PLANS = "SET plan_cache_mode = force_custom_plan"

LOST = (psycopg.OperationalError, IdleInTransactionSessionTimeout, TransactionTimeout, UndefinedTable)
"""The database is away, was lost, or is not migrated yet: it is waited for."""


class ConsumerFailed(Exception):
    """A defect, of which nothing was written. Kinds of consumers have kinds of it, each with its `reason`."""

    reason = "CONSUMER_FAILED"


class Consumer(ABC):
    """One that follows the line as long as it leads."""

    failed: ClassVar[type[ConsumerFailed]] = ConsumerFailed

    def __init__(self, name: str, shard: int, connect: Callable[[], Awaitable[Connection]]) -> None:
        """`name` is that of its checkpoint; `connect` opens a connection of the role that writes."""
        self.name = name
        self.shard = shard
        self._connect = connect
        self.stopped: str | None = None
        """Why it stopped itself: UPPER_SNAKE, then a sentence. None while it runs."""
        self.at = Checkpoint()

    @abstractmethod
    async def _consume(self, connection: Connection) -> None:
        """Goes on behind `self.at`, fencing whatever it writes, until something is raised."""

    def _moved(self, after: Checkpoint) -> None:
        """The checkpoint is there now."""
        if after.epoch != self.at.epoch:
            log.info("epoch_adopted", consumer=self.name, epoch=after.epoch, position=after.position)
        self.at = after

    async def run(self) -> None:
        """Follows the line until it is cancelled. When it stops itself, it says why and waits to be cancelled."""
        while self.stopped is None:
            try:
                connection = await self._connect()
            except psycopg.Error as error:
                log.info("consumer_awaits_database", consumer=self.name, error=str(error).strip())
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                await self._go_on(connection)
            except Fenced as error:
                log.warning("consumer_fenced", consumer=self.name, text=str(error))
            except (HistoryDiverged, ConsumerFailed) as error:
                await self._stop(f"{error.reason}: {error}")
            except Exception as error:  # noqa: BLE001 (whatever it is, it must be seen, and nothing skipped)
                if isinstance(error, LOST):
                    log.warning("consumer_lost_database", consumer=self.name, error=str(error).strip())
                    await asyncio.sleep(RECONNECT_S)
                else:  # the database refuses the rows, or a defect of ours: trying again would not help
                    # The exception's text may hold a row: only where it was raised is told.
                    log.error("consumer_defect", consumer=self.name, where="".join(traceback.format_tb(error.__traceback__)))  # noqa: TRY400
                    what = getattr(error, "sqlstate", None) or type(error).__name__
                    await self._stop(f"{self.failed.reason}: the batch behind position {self.at.position} raised {what}")
        await asyncio.Event().wait()

    async def _go_on(self, connection: Connection) -> None:
        """Goes on from the checkpoint. The connection is closed in the end, and with it whatever transaction was open."""
        try:
            await connection.execute(_PLANS)
            self.at = await checkpoints.load(connection, self.name, self.shard)
            log.info("consumer_starts", consumer=self.name, position=self.at.position)
            await self._consume(connection)
        finally:
            with suppress(psycopg.Error):
                await connection.close()

    async def _stop(self, reason: str) -> None:
        """Says it where an operator sees it, however long that takes, and lets `run` come to rest."""
        log.error("consumer_stopped", consumer=self.name, position=self.at.position, reason=reason)
        while self.stopped is None:
            try:
                async with await self._connect() as connection:
                    await checkpoints.stop(connection, self.name, self.shard, self.at, reason)
                self.stopped = reason
            except Fenced:  # another has gone on from here: perhaps it is of a newer release, and can
                await asyncio.sleep(RECONNECT_S)
                return
            except psycopg.Error as error:
                log.warning("consumer_stop_not_stored", consumer=self.name, error=str(error).strip())
                await asyncio.sleep(RECONNECT_S)
