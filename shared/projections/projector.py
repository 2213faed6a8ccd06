"""Keeps the tables of a group up to date: folds batches of events in memory and writes each changed row once.

A batch is one transaction: the fence, one query for the rows, the folds, one upsert for each table, commit. Statements are
sent together (pipelined), so a batch waits for the database twice.

Killed anywhere, what is left? The checkpoint and the rows change in one transaction, so the tables are always the fold of the
line up to the checkpoint. The next leader goes on from there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from typing import Any, LiteralString

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Fold, Group, Projection, RowKey
from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint, Fenced
from shared.line.consumer import Consumer, ConsumerFailed
from shared.line.follower import EventBatch
from shared.line.spans import consumed
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger
from shared.projections.rows import Rows

log = logger(__name__)

ROWS_KEPT_MAX = 10_000
"""For each table, of those touched last."""
EMPTYING_S = 600
# The role's limit is for batches, which take milliseconds.
_TAKE_TIME: LiteralString = "SELECT set_config(name, %s, true) FROM pg_settings WHERE name = 'transaction_timeout'"


class ProjectionFailed(ConsumerFailed):
    """A fold raised. Nothing of its batch was written."""

    reason = "PROJECTION_FAILED"


@dataclass(slots=True)
class _Touched:
    """The rows of one table that a batch changes: as read, then as folded."""

    keys: dict[RowKey, None]
    rows: dict[RowKey, Any]
    wanted: list[RowKey]
    """The keys whose rows must be read."""


Work = list[tuple[EventEnvelope, Message, int, RowKey, Fold[Any]]]
"""The folds of a batch, in order: event, table, key, fold."""


class Tables:
    """The tables of a group, and the folds of each event.

    The rows that were used last are cached in memory, as of one checkpoint. The fence proves that the cache is valid: another
    writer moves the checkpoint, and then the cache is dropped.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._rows = [Rows(projection) for projection in group.projections]
        self._append_only = [projection.append_only for projection in group.projections]
        self._kept: list[dict[RowKey, Any]] = [{} for _ in self._rows]
        self._kept_at: Checkpoint | None = None
        self._routes: dict[str, tuple[type[Message], list[tuple[int, Projection[Any], Fold[Any]]]]] = {}
        for at, projection in enumerate(group.projections):
            for event, fold in projection.on.items():
                self._routes.setdefault(event.DESCRIPTOR.full_name, (event, []))[1].append((at, projection, fold))

    async def apply(self, connection: Connection, shard: int, before: Checkpoint, batch: EventBatch) -> None:
        """Moves the tables and their checkpoint by one batch, in one transaction.

        Raises Fenced or ProjectionFailed; then nothing is written. After any other exception, including a cancellation, the
        connection is closed, so that nobody commits half a transaction.
        """
        if before != self._kept_at:
            self._kept = [{} for _ in self._rows]
        self._kept_at = None
        try:
            work, touched = self._route(batch.events)
            self._recall(touched)
            answers = await self._begin(connection, shard, before, batch.after, touched)
            for rows, part, answer in zip(self._rows, touched, answers, strict=True):
                if answer is not None:
                    await rows.load(answer, part.rows)
            self._fold(work, touched)
            await self._write(connection, touched)
        except (Fenced, ProjectionFailed):
            await connection.execute("ROLLBACK")
            raise
        except BaseException:
            await connection.close()
            raise
        self._keep(touched)
        self._kept_at = batch.after

    async def empty(self, connection: Connection, shard: int, at: Checkpoint) -> bool:
        """Deletes all rows and sets the checkpoint to the begin, in one transaction. False if the group is not diverged there.

        Killed anywhere: the rows are there, and the checkpoint still says that they follow a lost history. Two at once: one
        moves the checkpoint, the other finds it moved.
        """
        async with connection.transaction():
            await connection.execute(_TAKE_TIME, (f"{EMPTYING_S}s",))
            if not await checkpoints.accept(connection, self.group.name, shard, at, Checkpoint()):
                return False
            for rows in self._rows:
                await rows.delete_all(connection)
            await connection.execute(
                "UPDATE checkpoints SET refill_asked = false WHERE name = %s AND shard = %s", (self.group.name, shard)
            )
        return True

    def _recall(self, touched: list[_Touched]) -> None:
        """Takes rows from the cache, and returns the keys of the rows that must be read."""
        for part, kept, append_only in zip(touched, self._kept, self._append_only, strict=True):
            if not append_only:
                part.rows.update((key, kept[key]) for key in part.keys if key in kept)
                part.wanted = [key for key in part.keys if key not in kept]

    def _keep(self, touched: list[_Touched]) -> None:
        """Caches the rows as written, and drops the least recently used ones."""
        for part, kept, append_only in zip(touched, self._kept, self._append_only, strict=True):
            if append_only:
                continue
            for key, row in part.rows.items():
                kept.pop(key, None)
                if row is not None:
                    kept[key] = row
            for key in list(islice(kept, max(len(kept) - ROWS_KEPT_MAX, 0))):
                del kept[key]

    async def _begin(
        self, connection: Connection, shard: int, before: Checkpoint, after: Checkpoint, touched: list[_Touched]
    ) -> list[Any]:
        """Passes the fence and reads the rows. Raises Fenced."""
        async with connection.pipeline():
            await connection.execute("BEGIN")
            moved = await connection.execute(checkpoints.MOVE, checkpoints.move(self.group.name, shard, before, after))
            answers = [
                await rows.select(connection, part.wanted) if part.wanted else None
                for rows, part in zip(self._rows, touched, strict=True)
            ]
        if moved.rowcount != 1:
            raise Fenced(f"{self.group.name} is not at position {before.position}")
        return answers

    async def _write(self, connection: Connection, touched: list[_Touched]) -> None:
        """Writes each row once, and commits."""
        async with connection.pipeline():
            for rows, part in zip(self._rows, touched, strict=True):
                if kept := [row for row in part.rows.values() if row is not None]:
                    await rows.upsert(connection, kept)
                if gone := [key for key, row in part.rows.items() if row is None]:
                    await rows.delete(connection, gone)
            await connection.execute("COMMIT")

    def _route(self, events: Sequence[EventEnvelope]) -> tuple[Work, list[_Touched]]:
        """The folds of the events and the keys of their rows. Events without a fold are skipped."""
        work: Work = []
        touched = [_Touched({}, {}, []) for _ in self._rows]
        for envelope in events:
            if (route := self._routes.get(envelope.type)) is None:
                continue
            try:
                event = route[0].FromString(envelope.payload)
                for at, projection, fold in route[1]:
                    if (own := projection.key(event, envelope)) is None:
                        continue
                    key = (envelope.tenant, *own)
                    touched[at].keys[key] = None
                    work.append((envelope, event, at, key, fold))
            except Exception as error:
                raise _failed(envelope, error) from error
        return work, touched

    def _fold(self, work: Work, touched: list[_Touched]) -> None:
        for envelope, event, at, key, fold in work:
            rows = touched[at].rows
            try:
                rows[key] = fold(rows.get(key), event, envelope)
            except Exception as error:
                raise _failed(envelope, error) from error


def _failed(envelope: EventEnvelope, error: Exception) -> ProjectionFailed:
    # The exception's text may hold contents of the event, so only its class is logged.
    return ProjectionFailed(
        f"event {envelope.event_id} ({envelope.type}) at position {envelope.position} raised {type(error).__name__}"
    )


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
        super().__init__(tables.group.name, shard, connect)
        self._tables = tables
        self._follow = follow

    async def _heed(self, connection: Connection) -> None:
        """Empties the tables if they follow a lost history and an operator asked to fill them from the present line."""
        cursor = await connection.execute(
            "SELECT refill_asked FROM checkpoints WHERE name = %s AND shard = %s", (self.name, self.shard)
        )
        if await cursor.fetchone() == (True,) and await self._tables.empty(connection, self.shard, self.at):
            log.warning("projection_emptied", projection=self.name, epoch=self.at.epoch, position=self.at.position)

    async def _consume(self, connection: Connection) -> None:
        async with aclosing(self._follow(self.at)) as batches:
            async for batch in batches:
                with consumed(self.name, self.shard, batch.events):
                    await self._tables.apply(connection, self.shard, self.at, batch)
                self._moved(batch.after)
