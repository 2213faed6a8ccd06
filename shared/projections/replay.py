"""What operators ask to be done with a parked key: to fold its events again, or to skip some and fold the rest.

A request is one transaction that raises the checkpoint's generation and leaves it where it is: the rows, the queue, the key and
the request's answer change together, or nothing does. Killed anywhere, the request is found again and carried out once.

The events of a key are folded in order. At the first one that fails the key stays parked, with that error, and the events
before it are no longer in its queue. The events of an aggregate are given to the queues of their rows, at their positions, and
then the rows that waited for it are folded. A row that comes to an event of an aggregate that is parked before that event
waits for the aggregate from there on.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import RowKey
from shared.folds.upcasting import UnknownEvent
from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint
from shared.platform.postgres import Connection, describe, take_time
from shared.platform.telemetry import logger
from shared.projections import changes, parking
from shared.projections.parking import Parked, Place, aggregate_of, cause_of
from shared.projections.rows import refuses
from shared.projections.tables import LONG_S, Tables

log = logger(__name__)

RELEASED, STILL_PARKED, BEHIND = "released", "parked", "behind"
SKIPPED_SHOWN_MAX = 100
ANSWERS_KEPT = "1 day"

_REQUESTS = """
SELECT r.request_id, r.parked_id, r.action, r.all_events, r.asked_by FROM parked_requests r JOIN parked_keys k USING (parked_id)
WHERE r.done_at IS NULL AND k.consumer = %s AND k.shard = %s ORDER BY r.asked_at
"""
_ANSWER = """
UPDATE parked_requests SET done_at = clock_timestamp(), outcome = %s, applied = %s, skipped = %s, skipped_events = %s
WHERE request_id = %s AND done_at IS NULL
"""
_KNOWN = f"""
SELECT k.parked_id FROM parked_keys k
JOIN LATERAL (SELECT e.type FROM parked_events e WHERE e.parked_id = k.parked_id ORDER BY e.position LIMIT 1) AS first ON true
WHERE k.consumer = %s AND k.shard = %s AND k.table_name = '' AND k.error LIKE '%%raised {UnknownEvent.__name__}'
  AND first.type = ANY(%s) ORDER BY k.parked_at
"""  # noqa: S608 (a constant of ours)


@dataclass(slots=True)
class _Done:
    """What a request came to. `skips` is how many events are to be skipped yet: None for all."""

    skips: int | None
    applied: int = 0
    skipped: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)

    def skip(self, envelope: EventEnvelope) -> bool:
        """Whether this event is to be skipped; counts and notes it if so."""
        if self.skips is not None and self.skipped >= self.skips:
            return False
        self.skipped += 1
        if len(self.shown) < SKIPPED_SHOWN_MAX:
            self.shown.append({"position": envelope.position, "event_id": envelope.event_id, "type": envelope.type})
        return True


async def carry_out(tables: Tables, connection: Connection, shard: int, at: Checkpoint) -> None:
    """Carries out what has been asked of the group's parked keys. Raises Fenced."""
    name = tables.consumer
    requests = await (await connection.execute(_REQUESTS, (name, shard))).fetchall()
    for request_id, parked_id, action, all_events, asked_by in requests:
        done = _Done(0 if action == "retry" else None if all_events else 1)
        async with connection.transaction():
            outcome = await _fold_again(tables, connection, shard, at, parked_id, done)
            answer = (outcome, done.applied, done.skipped, json.dumps(done.shown), request_id)
            if (await connection.execute(_ANSWER, answer)).rowcount != 1:
                raise checkpoints.Fenced("another has carried out the same request")
            await connection.execute(
                "DELETE FROM parked_requests WHERE done_at < clock_timestamp() - %s::interval", (ANSWERS_KEPT,)
            )
        log.warning(
            "parked_request_done",
            action=action,
            projection=name,
            parked_id=str(parked_id),
            asked_by=asked_by,
            outcome=outcome,
            applied=done.applied,
            skipped=done.skipped,
        )
    if requests:
        await tables.refresh(connection, shard)


async def retry_known(tables: Tables, connection: Connection, shard: int, at: Checkpoint) -> None:
    """Folds the keys again that an older release parked at an event which it did not know, and this one knows. Raises Fenced."""
    if (known := tables.group.upcasters.known) is None:
        return
    found = await (await connection.execute(_KNOWN, (tables.consumer, shard, sorted(known)))).fetchall()
    for (parked_id,) in found:
        done = _Done(0)
        async with connection.transaction():
            outcome = await _fold_again(tables, connection, shard, at, parked_id, done)
        facts = {"projection": tables.consumer, "parked_id": str(parked_id), "outcome": outcome, "applied": done.applied}
        log.warning("parked_key_of_newer_release_retried", **facts)
    if found:
        await tables.refresh(connection, shard)


async def _fold_again(tables: Tables, connection: Connection, shard: int, at: Checkpoint, parked_id: UUID, done: _Done) -> str:
    """Replays a key inside the caller's transaction, and tells those who watch rows; returns what became of it."""
    await take_time(connection, LONG_S)
    await tables.rewrite(connection, shard, at)
    outcome = await _Replay(tables, connection, shard, done).key(parked_id)
    await changes.write(connection, tables.group.name, shard, None)
    return outcome


class _Replay:
    """One request, inside its transaction."""

    def __init__(self, tables: Tables, connection: Connection, shard: int, done: _Done) -> None:
        self._tables = tables
        self._connection = connection
        self._shard = shard
        self._done = done
        self._known: dict[Place, Parked | None] = {}
        """What is parked at the places that were looked up."""
        self._first: dict[UUID, int | None] = {}
        """Of parked aggregates: the position of the first event that waits."""

    async def key(self, parked_id: UUID) -> str:
        """Folds the events of a key; returns whether it is released, still parked, or waits for its aggregate."""
        parked = await parking.get(self._connection, self._tables.consumer, self._shard, parked_id)
        if parked is None:
            return RELEASED
        if parked.behind is not None:
            return BEHIND
        if parked.place[0]:
            return await self._row(parked)
        return await self._aggregate(parked)

    async def _row(self, parked: Parked) -> str:
        table, key = parked.place
        at, rows = self._tables.table_at(table)
        found: dict[RowKey, Any] = {}
        await rows.load(await rows.select(self._connection, [key]), found)
        row, last, error = found.get(key), 0, ""
        behind: Parked | None = None
        while not (error or behind) and (events := await parking.events_of(self._connection, parked.parked_id, last)):
            await self._look_up({aggregate_of(envelope) for envelope in events})
            for envelope in events:
                if not self._done.skip(envelope):
                    if behind := await self._lacks(envelope):
                        break
                    try:
                        row = self._folded(at, key, row, envelope)
                        self._done.applied += 1
                    except Exception as raised:  # noqa: BLE001 (the key stays parked)
                        error = cause_of(envelope, raised)
                        break
                last = envelope.position
        try:
            async with self._connection.transaction():
                await (rows.delete(self._connection, [key]) if row is None else rows.upsert(self._connection, [row]))
        except Exception as refused:
            if not refuses(refused):
                raise
            self._done.applied, self._done.skipped, self._done.shown = 0, 0, []
            await self._note(parked, f"the database refuses the row: {describe(refused)}")
            return STILL_PARKED
        if not (error or behind):
            await self._release(parked)
            return RELEASED
        await parking.drop_events(self._connection, parked.parked_id, last)
        if behind:
            await self._wait_for(parked, behind)
            return BEHIND
        await self._note(parked, error)
        return STILL_PARKED

    async def _lacks(self, envelope: EventEnvelope) -> Parked | None:
        """The event's aggregate, if it is parked at an earlier event, which may change the same row."""
        if (aggregate := self._known[aggregate_of(envelope)]) is None:
            return None
        if aggregate.parked_id not in self._first:
            self._first[aggregate.parked_id] = await parking.first_position(self._connection, aggregate.parked_id)
        first = self._first[aggregate.parked_id]
        return aggregate if first is not None and first < envelope.position else None

    def _folded(self, at: int, key: RowKey, row: Any, envelope: EventEnvelope) -> Any:
        """The row behind the event. A row that the event does not change any more, by the present folds, stays."""
        if (found := self._tables.items_of(envelope)) is not None:
            event, items = found
            for table, its_key, fold in items:
                if (table, its_key) == (at, key):
                    return fold(row, event, envelope)
        return row

    async def _aggregate(self, parked: Parked) -> str:
        last = 0
        while events := await parking.events_of(self._connection, parked.parked_id, last):
            for envelope in events:
                if not self._done.skip(envelope):
                    try:
                        found = self._tables.items_of(envelope)
                    except Exception as raised:  # noqa: BLE001 (the key stays parked)
                        await parking.drop_events(self._connection, parked.parked_id, last)
                        await self._note(parked, cause_of(envelope, raised))
                        return STILL_PARKED
                    for at, key, _ in found[1] if found else ():
                        await self._queue((self._tables.name_of(at), key), parked, envelope)
                last = envelope.position
        self._known[parked.place] = None  # the rows that waited for it do no longer
        after = UUID(int=0)
        while waiting := await parking.waiting_behind(self._connection, parked.parked_id, after):
            for row in waiting:
                self._done.skips = 0
                await self._row(row)
            after = waiting[-1].parked_id
        await self._release(parked)
        return RELEASED

    async def _look_up(self, places: Set[Place]) -> None:
        """Knows what is parked at these places from now on."""
        if new := places - self._known.keys():
            found = await parking.find(self._connection, self._tables.consumer, self._shard, new)
            self._known.update((place, found.get(place)) for place in new)

    async def _queue(self, place: Place, aggregate: Parked, envelope: EventEnvelope) -> None:
        await self._look_up({place})
        if (row := self._known[place]) is None:
            row = self._known[place] = Parked(uuid4(), place, "", aggregate.parked_id)
            await parking.insert_key(self._connection, self._tables.consumer, self._shard, row)
        await parking.insert_event(self._connection, row.parked_id, envelope)

    async def _note(self, parked: Parked, error: str) -> None:
        await self._connection.execute("UPDATE parked_keys SET error = %s WHERE parked_id = %s", (error, parked.parked_id))

    async def _wait_for(self, parked: Parked, aggregate: Parked) -> None:
        await self._connection.execute(
            "UPDATE parked_keys SET error = '', behind = %s WHERE parked_id = %s", (aggregate.parked_id, parked.parked_id)
        )

    async def _release(self, parked: Parked) -> None:
        await self._connection.execute("DELETE FROM parked_keys WHERE parked_id = %s", (parked.parked_id,))
