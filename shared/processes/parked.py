"""Parked events: those for which no process can be found.

A newer release wrote them, or their content cannot be decoded or names no process. Such an event parks its stream, the events
of its aggregate, at the runner; other streams go on. Later events of the stream wait behind it, in order, until an operator
lets them be routed again (retry) or gives the first one up (discard).

The runner knows the parked streams by heart. An operator's action raises the counter `parked` in the checkpoint's row, and so
does each new leader. The runner reads it with its fence: if that is not the counter it knows, it reads the streams again before
it folds anything. So an event never waits behind one that has gone, and never overtakes one that still waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.platform.packing import Packed, blobs, int8s, texts
from shared.platform.postgres import Connection

StreamKey = tuple[str, str, str]
"""Names a stream: tenant, aggregate type, aggregate id."""

EVENT_UNKNOWN = "EVENT_UNKNOWN"
"""A newer release wrote the event."""
EVENT_UNREADABLE = "EVENT_UNREADABLE"
"""The event's content is not what its type declares."""
NO_PROCESS_NAMED = "NO_PROCESS_NAMED"
"""The event does not say which process it belongs to."""

RECENT_S = 60.0
"""For so long what was parked counts as recent."""
EVENTS_MAX = 1000
"""So many events of a stream are routed again in one transaction."""

_LOAD: LiteralString = """
SELECT c.parked, p.tenant, p.aggregate_type, p.aggregate_id FROM checkpoints c
LEFT JOIN (SELECT DISTINCT shard, tenant, aggregate_type, aggregate_id FROM parked_events) AS p ON p.shard = c.shard
WHERE c.name = %s AND c.shard = %s
"""
_INSERT: LiteralString = """
INSERT INTO parked_events (shard, tenant, aggregate_type, aggregate_id, position, event_id, type, envelope, reason, parked_at)
SELECT %s, k.*, %s
FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::text[], %s::text[], %s::bytea[], %s::text[]) AS k
ON CONFLICT DO NOTHING
"""
_CHANGED: LiteralString = "UPDATE checkpoints SET parked = parked + 1 WHERE name = %s AND shard = %s"
_FIRST: LiteralString = """
SELECT f.tenant, f.aggregate_type, f.aggregate_id, f.position, f.event_id, f.type, f.reason, f.parked_at,
  (SELECT count(*) FROM parked_events e WHERE (e.shard, e.tenant, e.aggregate_type, e.aggregate_id)
                                            = (f.shard, f.tenant, f.aggregate_type, f.aggregate_id))
FROM (SELECT DISTINCT ON (tenant, aggregate_type, aggregate_id) * FROM parked_events
"""
_STREAM: LiteralString = """
      WHERE shard = %s AND tenant = %s AND aggregate_type = %s AND aggregate_id = %s
      ORDER BY tenant, aggregate_type, aggregate_id, position) AS f
"""
_STREAMS: LiteralString = """
      WHERE shard = %(shard)s AND (%(tenant)s = '' OR tenant = %(tenant)s)
        AND (tenant, aggregate_type, aggregate_id) > (%(tenant_at)s, %(type_at)s, %(id_at)s)
      ORDER BY tenant, aggregate_type, aggregate_id, position LIMIT %(limit)s) AS f
ORDER BY f.tenant, f.aggregate_type, f.aggregate_id
"""
_TAKE: LiteralString = """
SELECT position, envelope FROM parked_events
WHERE shard = %s AND tenant = %s AND aggregate_type = %s AND aggregate_id = %s ORDER BY position LIMIT %s
"""
_DELETE: LiteralString = """
DELETE FROM parked_events
WHERE shard = %s AND tenant = %s AND aggregate_type = %s AND aggregate_id = %s AND position <= %s
"""
_REASON: LiteralString = """
UPDATE parked_events SET reason = %s, parked_at = %s
WHERE shard = %s AND tenant = %s AND aggregate_type = %s AND aggregate_id = %s AND position = %s
"""


class Unroutable(Exception):
    """No process can be found for an event."""

    def __init__(self, reason: str, error: str) -> None:
        """`reason` is UPPER_SNAKE, `error` the kind of exception: its text may hold personal data."""
        super().__init__(f"{reason}: {error}" if error else reason)


class ParkedEvent(NamedTuple):
    """An event to park. The reason is empty if it waits behind an earlier one of its stream."""

    envelope: EventEnvelope
    reason: str

    @property
    def stream(self) -> StreamKey:
        """The stream it belongs to."""
        return stream_of(self.envelope)


class ParkedStream(NamedTuple):
    """A stream with its first parked event; the fields are the columns of the query."""

    tenant: str
    aggregate_type: str
    aggregate_id: str
    position: int
    event_id: str
    type: str
    reason: str
    parked_at: datetime
    # How many events wait, the first included.
    events: int

    @property
    def key(self) -> StreamKey:
        """Its name."""
        return self.tenant, self.aggregate_type, self.aggregate_id


class ParkedStreams(NamedTuple):
    """The streams that are parked, and the counter they belong to."""

    version: int
    streams: set[StreamKey]


class Recently:
    """Counts what was parked within RECENT_S and saved, to tell a bad release from bad events."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._saved_at: deque[float] = deque()

    def too_many(self, more: int) -> bool:
        """Whether so many more would be too many; then the count begins anew, so that an operator may let it try again."""
        while self._saved_at and self._saved_at[0] < time.monotonic() - RECENT_S:
            self._saved_at.popleft()
        if not more or len(self._saved_at) + more <= self._count_max:
            return False
        self._saved_at.clear()
        return True

    def add(self, more: int) -> None:
        """Counts so many, which were saved."""
        self._saved_at.extend([time.monotonic()] * more)


def stream_of(envelope: EventEnvelope) -> StreamKey:
    """The stream of an event."""
    return envelope.tenant, envelope.aggregate_type, envelope.aggregate_id


async def load(connection: Connection, name: str, shard: int) -> ParkedStreams:
    """The parked streams of a shard, whose checkpoint must exist."""
    cursor = await connection.execute(_LOAD, (name, shard))
    rows = await cursor.fetchall()
    return ParkedStreams(rows[0][0], {(tenant, type_, id_) for _, tenant, type_, id_ in rows if tenant is not None})


async def insert(connection: Connection, shard: int, events: Sequence[ParkedEvent], now: datetime) -> None:
    """Parks events."""
    rows = [
        (*it.stream, it.envelope.position, it.envelope.event_id, it.envelope.type, it.envelope.SerializeToString(), it.reason)
        for it in events
    ]
    packs: list[Callable[[Any], Packed]] = [texts, texts, texts, int8s, texts, texts, blobs, texts]
    columns = [pack(column) for pack, column in zip(packs, zip(*rows, strict=True), strict=True)]
    await connection.execute(_INSERT, (shard, now, *columns))


async def find(connection: Connection, shard: int, limit: int, after: StreamKey, tenant: str) -> list[ParkedStream]:
    """Parked streams behind `after`, in the order of their names."""
    tenant_at, type_at, id_at = after
    parameters = {
        "shard": shard,
        "tenant": tenant,
        "tenant_at": tenant_at,
        "type_at": type_at,
        "id_at": id_at,
        "limit": limit,
    }
    cursor = await connection.execute(_FIRST + _STREAMS, parameters)
    return [ParkedStream(*row) for row in await cursor.fetchall()]


async def get(connection: Connection, shard: int, stream: StreamKey) -> ParkedStream | None:
    """A parked stream; None if nothing of it is parked."""
    cursor = await connection.execute(_FIRST + _STREAM, (shard, *stream))
    row = await cursor.fetchone()
    return None if row is None else ParkedStream(*row)


async def events_of(connection: Connection, shard: int, stream: StreamKey) -> list[tuple[int, EventEnvelope]]:
    """The first EVENTS_MAX parked events of a stream, with their positions, in order."""
    cursor = await connection.execute(_TAKE, (shard, *stream, EVENTS_MAX))
    return [(position, EventEnvelope.FromString(content)) for position, content in await cursor.fetchall()]


async def delete_until(connection: Connection, name: str, shard: int, stream: StreamKey, position: int) -> None:
    """Deletes the parked events of a stream up to a position, and tells the runner."""
    await connection.execute(_DELETE, (shard, *stream, position))
    await connection.execute(_CHANGED, (name, shard))


async def delete_behind(connection: Connection, name: str, shard: int, position: int) -> None:
    """Deletes the parked events behind a position, because a restored line has them no longer, and tells the runner."""
    await connection.execute("DELETE FROM parked_events WHERE shard = %s AND position > %s", (shard, position))
    await connection.execute(_CHANGED, (name, shard))


async def set_reason(connection: Connection, shard: int, stream: StreamKey, position: int, reason: str, now: datetime) -> None:
    """Notes why an event of a stream, now its first, is parked."""
    await connection.execute(_REASON, (reason, now, shard, *stream, position))
