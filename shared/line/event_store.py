"""Reads the event store: the stream of one aggregate, or the line of all events. `shared/commands/append.py` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from msgspec import Struct

from foldline.v1 import event_store_pb2
from shared.folds.moments import set_moment
from shared.platform.packing import int8s
from shared.platform.postgres import Connection, one

TABLES = (
    "line",
    "events",
    "commands",
    "snapshots",
    "credentials",
    "boxes",
    "boxed_events",
    "schedules",
    "tenant_purges",
    "purged_events",
    "aggregate_purges",
)

BOXED = "foldline.v1.AggregateBoxed"
"""The type of the event that ends the stream of an aggregate whose other events are in the archive."""

UNBOXED = "foldline.v1.AggregateUnboxed"
"""The type of the event that says that they are back."""

PURGED = "foldline.v1.EventPurged"
"""The type that `ReadAll` shows in place of an event that was purged."""


AggregateKey = tuple[str, str, str]
"""Names an aggregate: tenant, category, aggregate id."""


class StoredEvent(Struct, frozen=True):
    """An event as it was appended. `metadata` is a serialized foldline.v1.EventMetadata."""

    position: int
    event_id: UUID
    tenant: str
    category: str
    aggregate_id: str
    version: int
    type: str
    payload: bytes
    recorded_at: datetime
    metadata: bytes


class Head(Struct, frozen=True):
    """The end of the line: position 0 and no event if it is empty."""

    position: int
    event_id: UUID | None
    epoch: str
    shard: int


_EVENT_COLUMNS: LiteralString = (
    "position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata"
)


class Place(Struct, frozen=True):
    """Where the event of a position is that is in the archive."""

    position: int
    event_id: UUID
    key: AggregateKey
    location: str
    chain: bytes


async def read_line(connection: Connection, *, after: int, limit: int) -> list[StoredEvent]:
    """Up to `limit` events behind the position `after`, without those that are in the archive."""
    cursor = await connection.execute(
        f"SELECT {_EVENT_COLUMNS} FROM events WHERE position > %s ORDER BY position LIMIT %s",  # noqa: S608
        (after, limit),
    )
    return [StoredEvent(*row) for row in await cursor.fetchall()]


async def read_places(connection: Connection, *, after: int, upto: int, limit: int) -> list[Place]:
    """Where the events behind `after` and up to `upto` are that are in the archive: the first `limit` of them."""
    cursor = await connection.execute(
        """SELECT e.position, e.event_id, b.tenant, b.category, b.aggregate_id, b.location, b.chain
           FROM boxed_events e JOIN boxes b USING (box_id)
           WHERE e.position > %s AND e.position <= %s ORDER BY e.position LIMIT %s""",
        (after, upto, limit),
    )
    return [Place(row[0], row[1], (row[2], row[3], row[4]), row[5], row[6]) for row in await cursor.fetchall()]


async def read_positions(connection: Connection, tenant: str, positions: Sequence[int]) -> list[StoredEvent]:
    """The events of a tenant at these positions, in any order, without those that are not in the table."""
    cursor = await connection.execute(
        f"SELECT {_EVENT_COLUMNS} FROM events WHERE position = ANY (%s) AND tenant = %s",  # noqa: S608
        (int8s(positions), tenant),
    )
    return [StoredEvent(*row) for row in await cursor.fetchall()]


async def read_places_of(connection: Connection, tenant: str, positions: Sequence[int]) -> list[Place]:
    """Where the events of a tenant at these positions are, in order, without those that are not in the archive."""
    cursor = await connection.execute(
        """SELECT e.position, e.event_id, b.tenant, b.category, b.aggregate_id, b.location, b.chain
           FROM boxed_events e JOIN boxes b USING (box_id) WHERE e.position = ANY (%s) AND b.tenant = %s ORDER BY e.position""",
        (int8s(positions), tenant),
    )
    return [Place(row[0], row[1], (row[2], row[3], row[4]), row[5], row[6]) for row in await cursor.fetchall()]


async def are_there(connection: Connection, places: Sequence[Place]) -> bool:
    """Whether all of these events are still in the archive where they were found."""
    cursor = await connection.execute(
        """SELECT e.position, b.location FROM boxed_events e JOIN boxes b USING (box_id) WHERE e.position = ANY (%s)""",
        (int8s([place.position for place in places]),),
    )
    return {(place.position, place.location) for place in places} == set(await cursor.fetchall())


async def read_tenant(connection: Connection, tenant: str, *, after: int, upto: int) -> tuple[list[StoredEvent], list[Place]]:
    """The events of a tenant behind `after` and up to `upto`: those in the tables, and where those in the archive are."""
    cursor = await connection.execute(
        f"SELECT {_EVENT_COLUMNS} FROM events WHERE position > %s AND position <= %s AND tenant = %s",  # noqa: S608
        (after, upto, tenant),
    )
    online = [StoredEvent(*row) for row in await cursor.fetchall()]
    places = await read_places(connection, after=after, upto=upto, limit=upto - after)
    return online, [place for place in places if place.key[0] == tenant]


async def read_holes(connection: Connection, *, after: int, upto: int, limit: int) -> list[StoredEvent]:
    """What stands in place of the events behind `after` and up to `upto` that were purged: of the first `limit` of them."""
    cursor = await connection.execute(
        """SELECT h.position, h.event_id, h.tenant, coalesce(h.purged_at, p.closed_at)
           FROM purged_events h LEFT JOIN tenant_purges p USING (tenant)
           WHERE h.position > %s AND h.position <= %s ORDER BY h.position LIMIT %s""",
        (after, upto, limit),
    )
    return [StoredEvent(at, id_, tenant, "", "", 0, PURGED, b"", when, b"") for at, id_, tenant, when in await cursor.fetchall()]


async def read_event_id(connection: Connection, position: int) -> UUID | None:
    """The id of the event at a position, also of one that is in the archive or was purged; None if there is none."""
    cursor = await connection.execute(
        """SELECT event_id FROM events WHERE position = %s
           UNION ALL SELECT event_id FROM boxed_events WHERE position = %s
           UNION ALL SELECT event_id FROM purged_events WHERE position = %s""",
        (position, position, position),
    )
    row = await cursor.fetchone()
    return row[0] if row else None


def envelope(event: StoredEvent) -> event_store_pb2.EventEnvelope:
    """A stored event as the message that other programs get."""
    shown = event_store_pb2.EventEnvelope(
        position=event.position,
        event_id=str(event.event_id),
        tenant=event.tenant,
        aggregate_type=event.category,
        aggregate_id=event.aggregate_id,
        version=event.version,
        type=event.type,
        payload=event.payload,
    )
    set_moment(shown.recorded_at, event.recorded_at)
    shown.metadata.MergeFromString(event.metadata)
    return shown


async def read_stream(connection: Connection, key: AggregateKey, *, after: int, limit: int) -> list[StoredEvent]:
    """Up to `limit` events of one aggregate with the versions after + 1, after + 2 …"""
    cursor = await connection.execute(
        f"""SELECT {_EVENT_COLUMNS} FROM events
            WHERE tenant = %s AND category = %s AND aggregate_id = %s AND version > %s ORDER BY version LIMIT %s""",  # noqa: S608
        (*key, after, limit),
    )
    return [StoredEvent(*row) for row in await cursor.fetchall()]


async def mark_restored(connection: Connection, epoch: str) -> Head | None:
    """Gives the line a new epoch; returns the head, or None if the epoch is not `epoch` any more."""
    (done,) = await one(connection, "SELECT line_restored(%s)", (epoch,))
    return await read_head(connection) if done else None


async def read_head(connection: Connection) -> Head:
    """The head of the line."""
    shard, epoch, position, event_id = await one(
        connection,
        """SELECT l.shard, line_epoch(), coalesce(e.position, 0), e.event_id
           FROM line l LEFT JOIN (SELECT position, event_id FROM events ORDER BY position DESC LIMIT 1) e ON true""",
    )
    return Head(position, event_id, epoch, shard)
