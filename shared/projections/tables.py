"""Keeps the tables of a group up to date: folds batches of events in memory and writes each changed row once.

A batch is one statement, which passes the fence and writes each table's rows. Rows that are not cached are read before it. A
batch that deletes rows, or parks the key of a fold that raised (see `parking`), is a transaction of several statements.

Killed anywhere, what is left? The checkpoint and the rows change in one transaction, so the tables are always the fold of the
line up to the checkpoint, but for the parked keys. The next leader goes on from there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import psycopg
from google.protobuf.message import Message
from psycopg.errors import DivisionByZero
from psycopg.pq import TransactionStatus

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Fold, Group, Making, Projection, RowKey
from shared.folds.upcasting import UnknownEvent
from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint, Fenced
from shared.line.ends import ENDS
from shared.line.follower import EventBatch
from shared.platform.packing import Packed
from shared.platform.postgres import Connection, Prepared, describe
from shared.platform.telemetry import logger
from shared.projections import changes
from shared.projections.changes import RowId
from shared.projections.failures import EventWithoutKey, ProjectionFailed, RowRefused
from shared.projections.parked import ParkedKeys
from shared.projections.parking import Parking, Place, aggregate_of, cause_of, event_name, refusal_of
from shared.projections.rows import Rows, lock, refuses

log = logger(__name__)

ROWS_KEPT_MAX = 10_000
"""For each table, of those touched last."""
LONG_S = 600
"""So long a transaction may take that is not a batch."""


@dataclass(slots=True)
class _Touched:
    """The rows of one table that a batch changes: as read, then as folded."""

    keys: dict[RowKey, bool]
    """With each, whether its row must be known: not if the batch's first event of it makes the row."""
    rows: dict[RowKey, Any]
    wanted: list[RowKey]
    """The keys whose rows must be read."""

    @property
    def kept(self) -> list[Any]:
        """The rows to be written."""
        return [row for row in self.rows.values() if row is not None]

    @property
    def gone(self) -> list[RowKey]:
        """The keys of rows to be deleted."""
        return [key for key, row in self.rows.items() if row is None]


Fence = tuple[Packed, ...]
"""The parameters of MOVE_OR_FAIL."""
Item = tuple[int, RowKey, Fold[Any]]
"""What an event does to one row: table, key, fold."""
Work = list[tuple[EventEnvelope, Message, int, RowKey, Fold[Any]]]
"""The folds of a batch, in order: event, table, key, fold."""


class Tables:
    """The tables of a group, and the folds of each event.

    The rows that were used last are cached in memory, as of one checkpoint and one generation of it. The fence proves that the
    cache is valid: another writer moves the checkpoint or raises its generation, and then the cache is dropped.
    """

    def __init__(self, group: Group, *, consumer: str = "", suffix: str = "") -> None:
        """`consumer` is the checkpoint's name, if that is not the group's.

        `suffix` is behind the tables' names while they are filled beside those that serve; nobody watches their rows.
        """
        self.group = group
        self.consumer = consumer or group.name
        self.announced = not suffix
        """Whether those who watch rows are told of changes."""
        self.parked = ParkedKeys(self.consumer)
        self._generation = 0
        self._names = [projection.table.name for projection in group.projections]
        self._at = {name: at for at, name in enumerate(self._names)}
        self.rows = [Rows(projection, suffix) for projection in group.projections]
        """The rows of each projection of the group."""
        self._append_only = [projection.append_only for projection in group.projections]
        self._kept: list[dict[RowKey, Any]] = [{} for _ in self.rows]
        self._kept_at: Checkpoint | None = None
        self._routes: dict[str, tuple[type[Message], list[tuple[int, Projection[Any], Fold[Any]]]]] = {}
        for at, projection in enumerate(group.projections):
            for event, fold in projection.on:
                self._routes.setdefault(event.DESCRIPTOR.full_name, (event, []))[1].append((at, projection, fold))

    async def apply(self, connection: Connection, shard: int, before: Checkpoint, batch: EventBatch) -> None:
        """Moves the tables and their checkpoint by one batch, in one transaction.

        If a row cannot be stored, the events are applied one by one, a transaction each, and the first event whose row is refused
        parks the row's key. Raises as `_apply` does.
        """
        try:
            await self._apply(connection, shard, before, batch)
            return
        except RowRefused as error:
            log.warning("batch_refused", projection=self.consumer, behind=before.position, error=describe(error.cause))
        for envelope in batch.events:
            await self._apply_alone(connection, shard, before, envelope, batch.after.epoch)
            before = Checkpoint(batch.after.epoch, envelope.position, envelope.event_id)

    async def _apply(self, connection: Connection, shard: int, before: Checkpoint, batch: EventBatch) -> None:
        """Moves the tables and their checkpoint by one batch.

        Raises RowRefused, Fenced, TooManyParked or EventWithoutKey; then nothing is written. After any other exception,
        including a cancellation, the connection is closed, so that nobody commits half a transaction.
        """
        self._begin(before)
        fence = checkpoints.move_of(self.consumer, shard, before, batch.after, self._generation)
        async with self._or_nothing(connection, before):
            parking = await self.parked.of_batch(connection, shard, lambda: self._places(batch.events))
            work, touched = self._route(batch.events, parking)
            self._recall(touched)
            if any(part.wanted for part in touched):
                await self._read(connection, touched)
            self._fold(work, touched, parking)
            self.parked.refuse_too_many(parking)
            if parking.queue or any(part.gone for part in touched):
                async with connection.pipeline():
                    await connection.execute("BEGIN")
                    await lock(connection, self.rows)
                    await connection.execute(checkpoints.MOVE_OR_FAIL, fence)
                    await self._write(connection, shard, touched, parking)
            else:
                await self._save(connection, shard, touched, fence)
        self._applied(touched, parking, batch.after)

    async def _apply_alone(
        self, connection: Connection, shard: int, before: Checkpoint, envelope: EventEnvelope, epoch: str
    ) -> None:
        """As `_apply` for one event, but a row that is refused is parked instead of raising RowRefused."""
        self._begin(before)
        after = Checkpoint(epoch, envelope.position, envelope.event_id)
        fence = checkpoints.move_of(self.consumer, shard, before, after, self._generation)
        async with self._or_nothing(connection, before, alone=True):
            parking = await self.parked.of_batch(connection, shard, lambda: self._places([envelope]))
            work, touched = self._route([envelope], parking)
            self._recall(touched)
            await connection.execute("BEGIN")
            await lock(connection, self.rows)
            await connection.execute(checkpoints.MOVE_OR_FAIL, fence)
            try:
                async with connection.transaction():
                    await self._read(connection, touched)
            except Exception as error:
                if not refuses(error):
                    raise
                # Not even its keys can be looked up.
                for _, _, at, key, _ in work:
                    parking.fail(envelope, (self._names[at], key), refusal_of(envelope, error))
                work, touched = [], [_Touched({}, {}, []) for _ in self.rows]
            self._fold(work, touched, parking)
            await self._try_rows(connection, touched, parking, envelope)
            self.parked.refuse_too_many(parking)
            async with connection.pipeline():
                await self._write(connection, shard, touched, parking)
        self._applied(touched, parking, after)

    def _begin(self, before: Checkpoint) -> None:
        """Drops the cached rows unless they are as of this place."""
        if before != self._kept_at:
            self._kept = [{} for _ in self.rows]
        self._kept_at = None

    @asynccontextmanager
    async def _or_nothing(self, connection: Connection, before: Checkpoint, *, alone: bool = False) -> AsyncIterator[None]:
        """The block writes all or nothing. Raises as `_apply`, or `_apply_alone`."""
        try:
            yield
        except BaseException as error:
            known = isinstance(error, ProjectionFailed | DivisionByZero) or (not alone and refuses(error))
            if not known or connection.closed:
                await connection.close()
                raise
            if connection.info.transaction_status != TransactionStatus.IDLE:
                await connection.execute("ROLLBACK")
            if isinstance(error, DivisionByZero):
                raise Fenced(f"{self.consumer} is not at position {before.position}, or its rows were rewritten") from error
            if isinstance(error, ProjectionFailed):
                raise
            raise RowRefused(error) from error

    def _applied(self, touched: list[_Touched], parking: Parking, after: Checkpoint) -> None:
        self._keep(touched)
        self._note(parking)
        self._kept_at = after

    def _note(self, parking: Parking) -> None:
        """Logs and notes what a batch has parked, and drops those rows from the cache."""
        for (table, key), parked in parking.new.items():
            if parked.error:
                facts = {"projection": self.consumer, "table": table, "parked_id": str(parked.parked_id)}
                log.error("key_parked", error=parked.error, **facts)
            if table:
                self._kept[self._at[table]].pop(key, None)
        self.parked.add(parking)

    async def refresh(self, connection: Connection, shard: int) -> None:
        """Reads what is parked, and drops the cached rows: somebody may have changed both. Raises Fenced."""
        self._kept_at = None
        self._generation = await checkpoints.generation_of(connection, self.consumer, shard)
        await self.parked.refresh(connection, shard)

    async def rewrite(self, connection: Connection, shard: int, at: Checkpoint, tables: Iterable[Rows] | None = None) -> None:
        """Begins a transaction's changes of rows, of these tables or of all, that do not move the checkpoint. Raises Fenced."""
        await lock(connection, self.rows if tables is None else tables)
        await checkpoints.rewrite(connection, self.consumer, shard, at)

    def table_at(self, name: str) -> tuple[int, Rows]:
        """The table of a name."""
        at = self._at[name]
        return at, self.rows[at]

    def takes(self, envelope: EventEnvelope) -> bool:
        """Whether a table of the group has a fold for events of this type."""
        return envelope.type in self._routes

    def concerned(self, events: Iterable[EventEnvelope]) -> bool:
        """Whether any of the events changes a table, ends a tenant or an aggregate, or may be of a newer release."""
        known = self.group.upcasters
        return any(it.type in self._routes or it.type in ENDS or it.type in known or not known.knows(it.type) for it in events)

    def items_of(self, envelope: EventEnvelope) -> tuple[Message, list[Item]] | None:
        """The event and what it does to each row; None for an event of another group.

        An event of an older contract, which an older release parked or the follower could not read, is what it is today. Raises
        what reading it raises; UnknownEvent for one of a newer release, which may be for this group.
        """
        if (route := self._routes.get(envelope.type)) is None:
            if envelope.type in self.group.upcasters:
                return self.items_of(self.group.upcasters.today(envelope))
            if not self.group.upcasters.knows(envelope.type):
                raise UnknownEvent(envelope.type)
            return None
        event = route[0].FromString(envelope.payload)
        keyed = ((at, projection.key(event, envelope), fold) for at, projection, fold in route[1])
        return event, [(at, (envelope.tenant, *own), fold) for at, own, fold in keyed if own is not None]

    def _places(self, events: Iterable[EventEnvelope]) -> Iterator[Place]:
        """The aggregates of the events, and the rows that they change; an event that cannot be read changes none."""
        for envelope in events:
            yield aggregate_of(envelope)
            with suppress(Exception):
                found = self.items_of(envelope)
                yield from ((self._names[at], key) for at, key, _ in found[1]) if found else ()

    def name_of(self, at: int) -> str:
        """The name of a table."""
        return self._names[at]

    def _recall(self, touched: list[_Touched]) -> None:
        """Takes rows from the cache, and returns the keys of the rows that must be read."""
        for part, kept, append_only in zip(touched, self._kept, self._append_only, strict=True):
            if not append_only:
                part.rows.update((key, kept[key]) for key in part.keys if key in kept)
                part.wanted = [key for key, needed in part.keys.items() if needed and key not in kept]

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

    async def _read(self, connection: Connection, touched: list[_Touched]) -> None:
        """Reads the rows that are not cached, ahead of the fence, which proves them as it does cached ones."""
        async with connection.pipeline():
            answers = [
                await rows.select(connection, part.wanted) if part.wanted else None
                for rows, part in zip(self.rows, touched, strict=True)
            ]
        for rows, part, answer in zip(self.rows, touched, answers, strict=True):
            if answer is not None:
                await rows.load(answer, part.rows)

    async def _save(self, connection: Connection, shard: int, touched: list[_Touched], fence: Fence) -> None:
        """Passes the fence and writes each row once, in one statement. There are none to be deleted."""
        parameters = list(fence)
        parts: list[str] = []
        for rows, part in zip(self.rows, touched, strict=True):
            if kept := part.kept:
                parts.append(rows.upsert_part)
                parameters += rows.pack(kept)
        if self.announced and (changed := _changed(touched)):
            parts += changes.PARTS
            parameters += changes.parameters(self.group.name, shard, changed)
        await _statement(tuple(parts)).row(connection, parameters)

    async def _try_rows(self, connection: Connection, touched: list[_Touched], parking: Parking, envelope: EventEnvelope) -> None:
        """Writes the rows of one event, each behind a savepoint, and parks the keys of those that are refused."""
        for name, rows, part in zip(self._names, self.rows, touched, strict=True):
            for key, row in list(part.rows.items()):
                try:
                    async with connection.transaction():
                        await (rows.delete(connection, [key]) if row is None else rows.upsert(connection, [row]))
                        raise psycopg.Rollback  # `_write` writes them all
                except Exception as error:
                    if not refuses(error):
                        raise
                    del part.rows[key]
                    parking.fail(envelope, (name, key), refusal_of(envelope, error))

    async def _write(self, connection: Connection, shard: int, touched: list[_Touched], parking: Parking) -> None:
        """Writes each row once, and what was parked, and commits. Call it in a pipeline, behind the fence."""
        for rows, part in zip(self.rows, touched, strict=True):
            if kept := part.kept:
                await rows.upsert(connection, kept)
            if gone := part.gone:
                await rows.delete(connection, gone)
        await parking.write(connection, self.consumer, shard)
        if self.announced and (changed := _changed(touched, parking.new)):
            await changes.write(connection, self.group.name, shard, changed)
        await connection.execute("COMMIT")

    def _route(self, events: Sequence[EventEnvelope], parking: Parking) -> tuple[Work, list[_Touched]]:
        """The folds of the events and the keys of their rows. Events without a fold are skipped, those of parked keys queued."""
        work: Work = []
        touched = [_Touched({}, {}, []) for _ in self.rows]
        for envelope in events:
            try:
                if (found := self.items_of(envelope)) is None:
                    continue
            except Exception as error:
                if not (envelope.tenant and envelope.aggregate_type and envelope.aggregate_id):
                    named = event_name(envelope)
                    raise EventWithoutKey(f"{named} names no aggregate and raised {type(error).__name__}") from error
                parking.fail(envelope, aggregate_of(envelope), cause_of(envelope, error))
                continue
            event, items = found
            for at, key, fold in items:
                if parking.active and parking.holds(envelope, (self._names[at], key)):
                    continue
                touched[at].keys.setdefault(key, not isinstance(fold, Making))
                work.append((envelope, event, at, key, fold))
        return work, touched

    def _fold(self, work: Work, touched: list[_Touched], parking: Parking) -> None:
        failed = parking.failed
        for envelope, event, at, key, fold in work:
            rows = touched[at].rows
            if failed and (self._names[at], key) in failed:
                parking.holds(envelope, (self._names[at], key))
                continue
            try:
                rows[key] = fold(rows.get(key), event, envelope)
            except Exception as error:  # noqa: BLE001 (whatever a fold raises parks its key)
                parking.fail(envelope, (self._names[at], key), cause_of(envelope, error))


@cache
def _statement(parts: tuple[str, ...]) -> Prepared:
    """The fence and these parts as one statement. There are as many as there are sets of tables that a batch may change."""
    return Prepared(checkpoints.move_or_fail(*parts))


def _changed(touched: list[_Touched], parked: Iterable[Place] = ()) -> set[RowId]:
    """Tenant and id of the rows that a batch changes or parks."""
    rows = {(key[0], key[1]) for part in touched for key in part.keys}
    rows.update((key[0], str(key[1] if table else key[2])) for table, key in parked)
    return rows
