"""Parked keys: a key whose event could not be folded, with the error, and the later events of that key, in order.

Everything else goes on. The key of a row is (table, tenant, ...). An event that cannot be read names no row, so the key of its
aggregate is parked, with the table "": later events of the aggregate wait at the rows that they would change, because those
rows lack what the event says.

Killed anywhere, what is left? Keys and events are written in the transaction that moves the checkpoint. A leader that was
paused and replaced is fenced there, also if an operator's action has removed a key meanwhile without moving the checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID, uuid4

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import RowKey, storable
from shared.line.event_store import AggregateKey
from shared.platform.packing import int8s
from shared.platform.postgres import Connection, describe

KEYS_PER_MINUTE_MAX = 20
"""More keys that fail within a minute are a bad release, not bad events: the group stops."""
PAGE = 500

Place = tuple[str, RowKey]
"""A table and the key of a row, or "" and (tenant, type, id) of an aggregate."""


@dataclass(slots=True)
class Parked:
    """A parked key. `behind` is the parked aggregate that the row waits for."""

    parked_id: UUID
    place: Place
    error: str
    behind: UUID | None


class Parking:
    """What one batch parks, over what is parked already."""

    def __init__(self, known: Mapping[Place, Parked]) -> None:
        """`known` has at least what is parked of the batch's rows and aggregates."""
        self._known = known
        self.new: dict[Place, Parked] = {}
        self.failed: set[Place] = set()
        """Rows whose fold raised in this batch."""
        self.queue: list[tuple[UUID, EventEnvelope]] = []

    @property
    def active(self) -> bool:
        """Whether anything is parked."""
        return bool(self._known) or bool(self.new)

    @property
    def failures(self) -> int:
        """How many of the new keys have failed, and do not only wait for an aggregate."""
        return sum(1 for parked in self.new.values() if parked.error)

    def holds(self, envelope: EventEnvelope, place: Place) -> bool:
        """Whether an event must wait at a row; if so, it is queued."""
        parked = self._find(place)
        if parked is None:
            aggregate = self._find(aggregate_of(envelope))
            if aggregate is None:
                return False
            parked = self._park(place, "", aggregate.parked_id)
        self.queue.append((parked.parked_id, envelope))
        return True

    def fail(self, envelope: EventEnvelope, place: Place, error: str) -> None:
        """Parks the key at this event."""
        parked = self._find(place) or self._park(place, error)
        if place in self.new:
            parked.error = error
        self.failed.add(place)
        self.queue.append((parked.parked_id, envelope))

    def _find(self, place: Place) -> Parked | None:
        return self.new.get(place) or self._known.get(place)

    def _park(self, place: Place, error: str, behind: UUID | None = None) -> Parked:
        parked = self.new[place] = Parked(uuid4(), place, error, behind)
        return parked

    async def write(self, connection: Connection, consumer: str, shard: int) -> None:
        """Sends what is new, inside the transaction of the batch."""
        for parked in self.new.values():
            await insert_key(connection, consumer, shard, parked)
        for parked_id, envelope in self.queue:
            await insert_event(connection, parked_id, envelope)


def aggregate_of(envelope: EventEnvelope) -> Place:
    """The key of the event's aggregate."""
    return "", (envelope.tenant, envelope.aggregate_type, envelope.aggregate_id)


def event_name(envelope: EventEnvelope) -> str:
    """The event in a few words, without anything of its content."""
    return f"event {envelope.event_id} ({envelope.type}) at position {envelope.position}"


def cause_of(envelope: EventEnvelope, error: Exception) -> str:
    """Why a key is parked, for operators. The exception's text may hold contents of the event, so only its class is shown."""
    return f"{event_name(envelope)} raised {type(error).__name__}"


def refusal_of(envelope: EventEnvelope, error: Exception) -> str:
    """Why a key is parked whose row is refused, for operators, without contents of the row."""
    return f"{event_name(envelope)}: the database refuses its row: {describe(error)}"


_SELECT: LiteralString = "SELECT k.parked_id, k.tenant, k.table_name, k.key, k.error, k.behind FROM parked_keys k"
_ALL: LiteralString = f"{_SELECT} WHERE k.consumer = %s AND k.shard = %s LIMIT %s"
_AT: LiteralString = f"""
{_SELECT} JOIN unnest(%s::text[], %s::text[], %s::text[]) AS p (tenant, table_name, key) USING (tenant, table_name, key)
WHERE k.consumer = %s AND k.shard = %s
"""
_ONE: LiteralString = f"{_SELECT} WHERE k.consumer = %s AND k.shard = %s AND k.parked_id = %s"
_BEHIND: LiteralString = f"{_SELECT} WHERE k.behind = %s AND k.parked_id > %s ORDER BY k.parked_id LIMIT %s"
_FAILED: LiteralString = """
SELECT extract(epoch FROM clock_timestamp() - parked_at)::float8 FROM parked_keys
WHERE consumer = %s AND group_name = split_part(%s, '@', 1) AND shard = %s AND error <> ''
  AND parked_at > clock_timestamp() - interval '1 minute'
ORDER BY parked_at DESC LIMIT %s
"""


async def load(connection: Connection, consumer: str, shard: int, limit: int) -> dict[Place, Parked] | None:
    """The parked keys of a consumer; None if there are more than `limit`."""
    found = await _read(connection, _ALL, (consumer, shard, limit + 1))
    return found if len(found) <= limit else None


async def find(connection: Connection, consumer: str, shard: int, places: Collection[Place]) -> dict[Place, Parked]:
    """Those keys of a consumer that are among `places`."""
    tenants, tables = [key[0] for _, key in places], [table for table, _ in places]
    keys = [json.dumps(key[1:]) for _, key in places]
    return await _read(connection, _AT, (tenants, tables, keys, consumer, shard))


async def get(connection: Connection, consumer: str, shard: int, parked_id: UUID) -> Parked | None:
    """A parked key of a consumer; None if it is gone."""
    return next(iter((await _read(connection, _ONE, (consumer, shard, parked_id))).values()), None)


async def waiting_behind(connection: Connection, parked_id: UUID, after: UUID) -> list[Parked]:
    """A page of the rows that wait for a parked aggregate, in the order of their ids: those behind the id `after`."""
    return list((await _read(connection, _BEHIND, (parked_id, after, PAGE))).values())


async def failed_lately(connection: Connection, consumer: str, shard: int) -> list[float]:
    """When the keys failed, within the last minute, that are still parked, by time.monotonic(): as many as stop the group."""
    cursor = await connection.execute(_FAILED, (consumer, consumer, shard, KEYS_PER_MINUTE_MAX + 1))
    now = time.monotonic()
    return [now - age_s for (age_s,) in await cursor.fetchall()]


async def _read(connection: Connection, query: LiteralString, parameters: Sequence[Any]) -> dict[Place, Parked]:
    cursor = await connection.execute(query, parameters)
    found = (
        Parked(parked_id, (table, (tenant, *json.loads(key))), error, behind)
        for parked_id, tenant, table, key, error, behind in await cursor.fetchall()
    )
    return {parked.place: parked for parked in found}


async def insert_key(connection: Connection, consumer: str, shard: int, parked: Parked) -> None:
    """Parks a key."""
    table, (tenant, *own) = parked.place
    row_id = storable(str(own[0] if table else own[1]))
    await connection.execute(
        """INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error, behind)
           VALUES (%s, %s, %s, coalesce((SELECT serves FROM checkpoints WHERE name = %s AND shard = %s), false),
                   %s, %s, %s, %s, %s, %s)""",
        (parked.parked_id, consumer, shard, consumer, shard, tenant, table, json.dumps(own), row_id, parked.error, parked.behind),
    )


async def insert_event(connection: Connection, parked_id: UUID, envelope: EventEnvelope) -> None:
    """Queues an event at a key. An event that waits there already stays as it is."""
    await connection.execute(
        "INSERT INTO parked_events (parked_id, position, event_id, type, envelope) VALUES (%s, %s, %s, %s, %s)"
        " ON CONFLICT (parked_id, position) DO NOTHING",
        (parked_id, envelope.position, envelope.event_id, envelope.type, envelope.SerializeToString()),
    )


async def events_of(connection: Connection, parked_id: UUID, after: int) -> list[EventEnvelope]:
    """The events that wait at a key behind a position, in order, as many as are folded at once."""
    cursor = await connection.execute(
        "SELECT envelope FROM parked_events WHERE parked_id = %s AND position > %s ORDER BY position LIMIT %s",
        (parked_id, after, PAGE),
    )
    return [EventEnvelope.FromString(raw) for (raw,) in await cursor.fetchall()]


async def first_position(connection: Connection, parked_id: UUID) -> int | None:
    """The position of the first event that waits at a key; None if none does."""
    cursor = await connection.execute("SELECT min(position) FROM parked_events WHERE parked_id = %s", (parked_id,))
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def drop_events(connection: Connection, parked_id: UUID, up_to: int) -> None:
    """Removes events from the begin of a key's queue."""
    await connection.execute("DELETE FROM parked_events WHERE parked_id = %s AND position <= %s", (parked_id, up_to))


async def delete_all(connection: Connection, consumer: str, shard: int) -> None:
    """Forgets all keys of a consumer, with their events."""
    await connection.execute("DELETE FROM parked_keys WHERE consumer = %s AND shard = %s", (consumer, shard))


async def waiting_of(
    connection: Connection, consumer: str, shard: int, key: AggregateKey
) -> AsyncIterator[tuple[UUID, list[int]]]:
    """The events of an aggregate that wait at keys: a key and positions, of one page of its queue at a time.

    Call it outside of a transaction, so that each page has a time limit of its own.
    """
    cursor = await connection.execute(
        "SELECT parked_id FROM parked_keys WHERE consumer = %s AND shard = %s AND tenant = %s", (consumer, shard, key[0])
    )
    for (parked_id,) in await cursor.fetchall():
        after = 0
        while events := await events_of(connection, parked_id, after):
            if mine := [it.position for it in events if (it.tenant, it.aggregate_type, it.aggregate_id) == key]:
                yield parked_id, mine
            after = events[-1].position


async def take_out(connection: Connection, parked_id: UUID, positions: Sequence[int]) -> int:
    """Removes events from anywhere in a key's queue; returns how many there were."""
    cursor = await connection.execute(
        "DELETE FROM parked_events WHERE parked_id = %s AND position = ANY (%s)", (parked_id, int8s(positions))
    )
    return cursor.rowcount


async def release_empty(connection: Connection, consumer: str, shard: int, tenant: str) -> None:
    """Deletes the keys of a tenant at which no event is left since its aggregate was purged.

    What waited behind the aggregate stays parked until an operator replays it. Call it in a transaction.
    """
    await connection.execute(
        """WITH empty AS (
             SELECT parked_id FROM parked_keys k
             WHERE consumer = %s AND shard = %s AND tenant = %s
               AND NOT EXISTS (SELECT FROM parked_events e WHERE e.parked_id = k.parked_id)),
           waiting AS (
             UPDATE parked_keys SET behind = NULL, error = %s
             WHERE behind IN (SELECT parked_id FROM empty) AND parked_id NOT IN (SELECT parked_id FROM empty))
           DELETE FROM parked_keys WHERE parked_id IN (SELECT parked_id FROM empty)""",
        (consumer, shard, tenant, "the aggregate that it waited behind was purged"),
    )


async def forget(connection: Connection, consumer: str, shard: int, tenant: str, limit: int) -> int:
    """Deletes events that wait, and then keys, of a tenant, up to `limit` each; returns how many."""
    mine = "k.consumer = %s AND k.shard = %s AND k.tenant = %s"
    cursor = await connection.execute(
        f"""DELETE FROM parked_events WHERE ctid = ANY (ARRAY(
              SELECT e.ctid FROM parked_events e JOIN parked_keys k USING (parked_id) WHERE {mine} LIMIT %s))""",  # noqa: S608
        (consumer, shard, tenant, limit),
    )
    if cursor.rowcount == limit:
        return limit
    keys = await connection.execute(
        f"DELETE FROM parked_keys WHERE parked_id = ANY (ARRAY(SELECT k.parked_id FROM parked_keys k WHERE {mine} LIMIT %s))",  # noqa: S608
        (consumer, shard, tenant, limit),
    )
    return cursor.rowcount + keys.rowcount
