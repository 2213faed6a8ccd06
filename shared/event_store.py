"""The write database, read: states of aggregates, streams, the line and the command log.

Hand-written SQL on the driver, since loading is on the hot path. What writes is `shared/appending.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from msgspec import Struct

from foldline.v1 import event_store_pb2
from shared.bus import Bus
from shared.packing import Packed, int4s, texts, uuid_texts
from shared.postgres import Connection, one

TABLES = ("line", "events", "commands", "snapshots", "credentials")

Key = tuple[str, str, str]
"""Names an aggregate: tenant, category, aggregate id."""

CommandKey = tuple[str, str]
"""Names a command: tenant and command id, a UUID in its canonical form: lower case, with dashes."""


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


class Versioned(Struct):
    """A state and how many events it is the fold of."""

    version: int
    state: Any


def packed_keys(keys: Sequence[Key]) -> tuple[Packed, Packed, Packed]:
    """Keys as three arrays: tenants, categories, aggregate ids."""
    return texts([key[0] for key in keys]), texts([key[1] for key in keys]), texts([key[2] for key in keys])


# The newest snapshot of the current schema, if there is one, and the events after it. A row without a type is a
# snapshot; it comes before its events.
_LOAD = """
WITH wanted AS (
  SELECT * FROM unnest(%s, %s, %s, %s) WITH ORDINALITY AS w(tenant, category, aggregate_id, schema, nth)
), base AS MATERIALIZED (
  SELECT w.*, s.version AS base_version, s.state
  FROM wanted w LEFT JOIN LATERAL (
    SELECT s.version, s.state FROM snapshots s
    WHERE s.tenant = w.tenant AND s.category = w.category AND s.aggregate_id = w.aggregate_id AND s.schema = w.schema
    ORDER BY s.version DESC LIMIT 1) s ON true
)
SELECT nth::integer, base_version AS version, '' AS type, state AS data FROM base WHERE base_version IS NOT NULL
UNION ALL
SELECT b.nth::integer, e.version, e.type, e.payload FROM base b JOIN LATERAL (
  SELECT e.version, e.type, e.payload FROM events e
  WHERE e.tenant = b.tenant AND e.category = b.category AND e.aggregate_id = b.aggregate_id
    AND e.version > coalesce(b.base_version, 0)
  ORDER BY e.version OFFSET 0) e ON true
ORDER BY 1, 2
"""


async def load(connection: Connection, bus: Bus, keys: Iterable[Key]) -> dict[Key, Versioned]:
    """The states of aggregates, in one query: each from its newest usable snapshot and the events after it.

    An aggregate without events is at version 0 in its initial state.
    """
    wanted = list(keys)
    aggregates = [bus.aggregate_of(category) for _, category, _ in wanted]
    cursor = await connection.execute(_LOAD, (*packed_keys(wanted), int4s([a.schema for a in aggregates])))
    versions = [0] * len(wanted)
    states = [aggregate.initial for aggregate in aggregates]
    for nth, version, type_name, data in await cursor.fetchall():
        at = nth - 1
        versions[at] = version
        if type_name:
            states[at] = aggregates[at].evolve(states[at], bus.codec.decode(type_name, data))
        else:
            states[at] = bus.load_state(wanted[at][1], data)
    return {key: Versioned(versions[at], states[at]) for at, key in enumerate(wanted)}


_EVENT_COLUMNS: LiteralString = (
    "position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata"
)


async def read_line(connection: Connection, *, after: int, limit: int) -> list[StoredEvent]:
    """Up to `limit` events with the positions after + 1, after + 2 …"""
    cursor = await connection.execute(
        f"SELECT {_EVENT_COLUMNS} FROM events WHERE position > %s ORDER BY position LIMIT %s",  # noqa: S608
        (after, limit),
    )
    return [StoredEvent(*row) for row in await cursor.fetchall()]


def envelope(event: StoredEvent) -> event_store_pb2.EventEnvelope:
    """A stored event as it is sent to other processes."""
    return event_store_pb2.EventEnvelope(
        position=event.position,
        event_id=str(event.event_id),
        tenant=event.tenant,
        aggregate_type=event.category,
        aggregate_id=event.aggregate_id,
        version=event.version,
        type=event.type,
        payload=event.payload,
        recorded_at=timestamp(event.recorded_at),
        metadata=event_store_pb2.EventMetadata.FromString(event.metadata),
    )


def timestamp(moment: datetime) -> Timestamp:
    """A moment as messages carry it."""
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


async def read_stream(connection: Connection, key: Key, *, after: int, limit: int) -> list[StoredEvent]:
    """Up to `limit` events of one aggregate with the versions after + 1, after + 2 …"""
    cursor = await connection.execute(
        f"""SELECT {_EVENT_COLUMNS} FROM events
            WHERE tenant = %s AND category = %s AND aggregate_id = %s AND version > %s ORDER BY version LIMIT %s""",  # noqa: S608
        (*key, after, limit),
    )
    return [StoredEvent(*row) for row in await cursor.fetchall()]


async def read_head(connection: Connection) -> Head:
    """Where the line ends now."""
    shard, epoch, position, event_id = await one(
        connection,
        """SELECT l.shard, line_epoch(), coalesce(e.position, 0), e.event_id
           FROM line l LEFT JOIN (SELECT position, event_id FROM events ORDER BY position DESC LIMIT 1) e ON true""",
    )
    return Head(position, event_id, epoch, shard)


class StoredCommand(Struct, frozen=True):
    """A row of the command log. `error` is a serialized google.rpc.Status."""

    tenant: str
    command_id: str
    type: str
    category: str
    aggregate_id: str
    fingerprint: bytes
    payload: bytes
    status: str
    user_id: str
    on_behalf_of: str
    correlation_id: str
    causation_id: str | None
    traceparent: str
    received_at: datetime
    finished_at: datetime | None
    version: int
    events_appended: int
    position: int
    head: int
    error: bytes | None


async def read_commands(connection: Connection, ids: Sequence[CommandKey]) -> Mapping[CommandKey, StoredCommand]:
    """The rows of the command log with these tenants and command ids, as far as there are any."""
    cursor = await connection.execute(
        """SELECT c.tenant, c.command_id::text, c.type, c.category, c.aggregate_id, c.fingerprint, c.payload, c.status,
                  c.user_id, c.on_behalf_of, c.correlation_id::text, c.causation_id::text, c.traceparent, c.received_at,
                  c.finished_at, c.version, c.events_appended, c.position, c.head, c.error
           FROM unnest(%s, %s) AS w(tenant, command_id) JOIN commands c USING (tenant, command_id)""",
        (texts([tenant for tenant, _ in ids]), uuid_texts([command_id for _, command_id in ids])),
    )
    rows = [StoredCommand(*row) for row in await cursor.fetchall()]
    return {(row.tenant, row.command_id): row for row in rows}


async def read_password_hash(connection: Connection, tenant: str, subject_id: str) -> str | None:
    """The hash that was saved last for a subject of a tenant, if there is one."""
    cursor = await connection.execute(
        "SELECT password_hash FROM credentials WHERE tenant = %s AND subject_id = %s", (tenant, subject_id)
    )
    row = await cursor.fetchone()
    return None if row is None else str(row[0])
