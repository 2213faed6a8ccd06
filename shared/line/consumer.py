"""The loop of a consumer, which follows the line with a checkpoint: the projector and the runner of processes are consumers.

An event whose fold raises, or that cannot be read, parks its key (a row, an aggregate, a process or a stream), and the consumer
goes on. It stops if more is parked within a minute than bad events explain, if such an event names no key, or if the history is
not the one that it followed. Then the process stays up, writes nothing, and saves the reason in its checkpoint's row. An
operator reads it and lets it go on.

Every other error may pass: a database that is away, read-only or full, a missing right, a table that changed under a prepared
statement, another leader that was faster. The consumer logs it and tries again on a fresh
connection, with longer and longer pauses. If the error lasts, its reason is saved in the checkpoint's row as well.
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
from shared.line.checkpoint import Checkpoint, Fenced, Replaced
from shared.line.follower import EventBatch, HistoryDiverged
from shared.platform.postgres import Connection, UnsafeDatabase, describe
from shared.platform.telemetry import logger

log = logger(__name__)

RETRY_MIN_S, RETRY_MAX_S = 0.5, 5.0
# After another has led, before the checkpoint is read anew: it may be gone for good, when other tables serve.
FENCED_S = 0.02
# After another has taken over: by then a process that was paused has found its lease to be lost, and this task is cancelled.
REPLACED_S = 1.0
# After this many failed tries the reason is saved in the checkpoint's row, where operators see it.
TRIES_NOTED = 3
# How often a stopped consumer checks whether an operator has let it go on.
LOOK_S = 1.0


class ConsumerFailed(Exception):
    """The consumer cannot go on, and nothing was written. Each type of consumer has a subclass with its own `reason`."""

    reason = "CONSUMER_FAILED"


class Misplaced(Exception):
    """A batch is not of the events directly behind those that were applied. Applied, it would count events twice or skip some."""


def must_follow(batch: EventBatch, at: Checkpoint) -> None:
    """Refuses a batch that does not continue at a checkpoint, whoever handed it out. Raises Misplaced.

    The fence cannot tell: it proves that the checkpoint is where the consumer left it, not which events come next.
    """
    if not batch.follows(at):
        first = batch.events[0].position if batch.events else batch.after.position
        raise Misplaced(f"a batch from position {first} to {batch.after.position} does not follow position {at.position}")


class Consumer(ABC):
    """Follows the line as long as it leads."""

    failed: ClassVar[type[ConsumerFailed]] = ConsumerFailed

    def __init__(self, name: str, shard: int, connect: Callable[[], Awaitable[Connection]]) -> None:
        """`name` is the checkpoint's name; `connect` opens a connection with the role that may write."""
        self.name = name
        self.shard = shard
        self._connect = connect
        self.stopped: str | None = None
        """Why the consumer stopped itself: UPPER_SNAKE, then a sentence. None while it runs."""
        self.at = Checkpoint()

    @abstractmethod
    async def _consume(self, connection: Connection) -> None:
        """Follows the line from `self.at` and fences every write, until an exception."""

    async def _heed(self, connection: Connection) -> None:  # noqa: B027 (most kinds of consumers need none)
        """Carries out what an operator has asked a stopped consumer to do."""

    def _moved(self, after: Checkpoint) -> None:
        """Notes that the checkpoint was moved in the database."""
        if after.epoch != self.at.epoch:
            log.info("epoch_adopted", consumer=self.name, epoch=after.epoch, position=after.position)
        self.at = after

    async def run(self) -> None:
        """Follows the line until it is cancelled. When the consumer stops itself, it saves why and waits for an operator.

        Raises UnsafeDatabase, because waiting does not help.
        """
        tries = 0
        while True:
            began = self.at
            try:
                await self._go_on(await self._connect())
            except Fenced as error:
                log.warning("consumer_fenced", consumer=self.name, text=str(error))
                await asyncio.sleep(REPLACED_S if isinstance(error, Replaced) else FENCED_S)
            except (HistoryDiverged, ConsumerFailed) as error:
                await self._stop(f"{error.reason}: {error}")
                await self._until_released()
            except UnsafeDatabase:
                raise
            except Exception as error:  # noqa: BLE001 (whatever it is, it must be seen, and nothing skipped)
                tries = 1 if self.at != began else tries + 1
                await self._wait_out(error, tries)

    async def _wait_out(self, error: Exception, tries: int) -> None:
        """Logs the error and waits, longer after each try."""
        pause_s = min(RETRY_MIN_S * 2.0 ** (tries - 1), RETRY_MAX_S)
        where = None if isinstance(error, psycopg.Error) else traceback.format_tb(error.__traceback__)[-4:]
        what = describe(error)
        facts = {"consumer": self.name, "position": self.at.position, "tries": tries, "again_in_s": pause_s}
        log.error("consumer_retries", error=what, where=where, **facts)
        if tries >= TRIES_NOTED:
            # If the database cannot be written, only the log and the lag show the reason.
            with suppress(psycopg.Error, Fenced, OSError):
                async with await self._connect() as connection:
                    reason = f"RETRYING: behind position {self.at.position}, {tries} times in vain: {what}"
                    await checkpoints.note(connection, self.name, self.shard, self.at, reason)
        await asyncio.sleep(pause_s)

    async def _go_on(self, connection: Connection) -> None:
        """Follows the line from the checkpoint. In the end closes the connection, and with it any open transaction."""
        try:
            # Plans are not kept: one that was made while a table was empty may use an index that finds a row only by walking
            # through all of a tenant's. What is on the hot path has nothing to choose, and is a `Prepared`.
            connection.prepare_threshold = None
            self.at = await checkpoints.load(connection, self.name, self.shard)
            log.info("consumer_starts", consumer=self.name, position=self.at.position)
            await self._consume(connection)
        finally:
            with suppress(psycopg.Error):
                await connection.close()

    async def _stop(self, reason: str) -> None:
        """Saves the reason in the checkpoint's row, and tries until that succeeds."""
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
        """Waits until an operator lets the consumer go on, from this checkpoint or another."""
        while self.stopped is not None:
            await asyncio.sleep(LOOK_S)
            with suppress(psycopg.Error):
                async with await self._connect() as connection:
                    await self._heed(connection)
                    if not await checkpoints.is_stopped(connection, self.name, self.shard, self.at):
                        log.info("consumer_released", consumer=self.name, was=self.stopped)
                        self.stopped = None
