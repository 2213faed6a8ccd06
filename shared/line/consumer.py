"""Whoever follows the line with a checkpoint, projections and processes alike: connects, goes on, or stops and says so.

It stops for two reasons only: its fold cannot take an event, or the history is not the one that it followed. Then it
stays up, writes nothing, and the reason is in its checkpoint's row for an operator to see, who lets it go on from there.

Everything else passes, and is tried again on a fresh connection, ever slower and loudly: a database that is away,
read-only or full, a right that is missing, a table that was changed under a prepared statement, a row that it refuses,
another leader that was faster. Should it last, the reason is in the checkpoint's row as well.
"""

from __future__ import annotations

import asyncio
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ClassVar

import psycopg

from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint, Fenced
from shared.line.follower import HistoryDiverged
from shared.platform.postgres import Connection, UnsafeDatabase, describe
from shared.platform.telemetry import logger

log = logger(__name__)

RETRY_MIN_S, RETRY_MAX_S = 0.5, 5.0
# So many tries in vain are worth an operator's attention.
TRIES_NOTED = 3
# How often a stopped consumer looks whether an operator lets it go on.
LOOK_S = 1.0

# A plan made while a table was empty, and kept, goes through whichever index came first and slows down with every row
# (eight times slower at 2,000 rows). So a plan is made anew for each batch, which costs little.
_PLANS = "SET plan_cache_mode = force_custom_plan"


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

    async def _heed(self, connection: Connection) -> None:  # noqa: B027 (most kinds of consumers need none)
        """Does what an operator has asked a stopped consumer for."""

    def _moved(self, after: Checkpoint) -> None:
        """The checkpoint is there now."""
        if after.epoch != self.at.epoch:
            log.info("epoch_adopted", consumer=self.name, epoch=after.epoch, position=after.position)
        self.at = after

    async def run(self) -> None:
        """Follows the line until it is cancelled. When it stops itself, it says why and waits for an operator's word.

        Raises UnsafeDatabase, which no waiting mends.
        """
        tries = 0
        while True:
            began = self.at
            try:
                await self._go_on(await self._connect())
            except Fenced as error:
                log.warning("consumer_fenced", consumer=self.name, text=str(error))
            except (HistoryDiverged, ConsumerFailed) as error:
                await self._stop(f"{error.reason}: {error}")
                await self._until_released()
            except UnsafeDatabase:
                raise
            except Exception as error:  # noqa: BLE001 (whatever it is, it must be seen, and nothing skipped)
                tries = 1 if self.at != began else tries + 1
                await self._wait_out(error, tries)

    async def _wait_out(self, error: Exception, tries: int) -> None:
        """Says what keeps it from going on, and waits a little, longer each time."""
        pause_s = min(RETRY_MIN_S * 2.0 ** (tries - 1), RETRY_MAX_S)
        where = None if isinstance(error, psycopg.Error) else traceback.format_tb(error.__traceback__)[-4:]
        what = describe(error)
        facts = {"consumer": self.name, "position": self.at.position, "tries": tries, "again_in_s": pause_s}
        log.error("consumer_retries", error=what, where=where, **facts)
        if tries >= TRIES_NOTED:
            # A database that cannot be written cannot keep this either; then the log and the lag must do.
            with suppress(psycopg.Error, Fenced, OSError):
                async with await self._connect() as connection:
                    reason = f"RETRYING: behind position {self.at.position}, {tries} times in vain: {what}"
                    await checkpoints.note(connection, self.name, self.shard, self.at, reason)
        await asyncio.sleep(pause_s)

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
        """Says it where an operator sees it, however long that takes."""
        log.error("consumer_stopped", consumer=self.name, position=self.at.position, reason=reason)
        while self.stopped is None:
            try:
                async with await self._connect() as connection:
                    await checkpoints.stop(connection, self.name, self.shard, self.at, reason)
                self.stopped = reason
            except Fenced:  # another has gone on from here: perhaps it is of a newer release, and can
                await asyncio.sleep(RETRY_MIN_S)
                return
            except psycopg.Error as error:
                log.warning("consumer_stop_not_stored", consumer=self.name, error=describe(error))
                await asyncio.sleep(RETRY_MIN_S)

    async def _until_released(self) -> None:
        """Waits until an operator let it go on, from here or from elsewhere."""
        while self.stopped is not None:
            await asyncio.sleep(LOOK_S)
            with suppress(psycopg.Error):
                async with await self._connect() as connection:
                    await self._heed(connection)
                    if not await checkpoints.is_stopped(connection, self.name, self.shard, self.at):
                        log.info("consumer_released", consumer=self.name, was=self.stopped)
                        self.stopped = None
