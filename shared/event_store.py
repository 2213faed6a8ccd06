"""The write database: appends batches to the line, loads states, and reads streams, the line and the command log.

Hand-written SQL on the driver: this is the hot path. The rules that keep the line in order are in the function
`append_batch` (write_service/migrations), and in `append_one` for what a lone caller waits for: nothing else writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import uuid_utils
from google.protobuf.timestamp_pb2 import Timestamp
from psycopg.errors import SerializationFailure, UniqueViolation

from foldline.v1 import event_store_pb2
from shared.bus import Bus
from shared.postgres import (
    Connection,
    Packed,
    Prepared,
    blob,
    blobs,
    boolean,
    int4,
    int4s,
    int8,
    int8s,
    one,
    read_int8,
    read_timestamptz,
    text,
    texts,
    timestamps,
    timestamptz,
    uuid,
    uuid_text,
    uuid_texts,
    uuids,
)

TABLES = ("line", "events", "commands", "snapshots", "credentials")

LOCK_CLASS_APPEND = 1
"""The first key of the advisory lock that `append_batch` takes; the second is the shard."""

Key = tuple[str, str, str]
"""Names an aggregate: tenant, category, aggregate id."""

CommandKey = tuple[str, str]
"""Names a command: tenant and command id, a UUID in its canonical form: lower case, with dashes."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
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


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the line: position 0 and no event if it is empty."""

    position: int
    event_id: UUID | None
    epoch: str
    shard: int


@dataclass(slots=True)
class Versioned:
    """A state and how many events it is the fold of."""

    version: int
    state: Any


class NewEvent(NamedTuple):
    """An event to append."""

    event_id: UUID | uuid_utils.UUID
    key: Key
    version: int
    type: str
    payload: bytes
    metadata: bytes


class NewCommand(NamedTuple):
    """A row of the command log to write. `last_event` counts from 1 within the batch; 0 if the command has none.

    The ids of commands are UUIDs as text.
    """

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
    version: int
    events_appended: int
    last_event: int
    error: bytes | None


@dataclass(slots=True)
class NewSnapshot:
    """A state to keep."""

    key: Key
    version: int
    schema: int
    state: bytes


@dataclass(slots=True)
class NewCredential:
    """A password's hash to keep."""

    tenant: str
    subject_id: str
    password_hash: str = field(repr=False)


@dataclass(slots=True)
class Batch:
    """All that one append checks and writes. `reads` has the version of every aggregate that was looked at."""

    reads: dict[Key, int] = field(default_factory=dict)
    commands: list[NewCommand] = field(default_factory=list)
    events: list[NewEvent] = field(default_factory=list)
    snapshots: list[NewSnapshot] = field(default_factory=list)
    credentials: list[NewCredential] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a batch: the position it reached, and the moment its rows are stamped with."""

    head: int
    recorded_at: datetime


class Clash(Exception):
    """A batch was decided on a world that has moved: nothing was written.

    An aggregate that was read has other events by now, or a command of the batch has an outcome already.
    """


# What refuses a batch that was decided on an old world; a clash of positions would be a defect.
_CLASHES = ("commands_pkey", "events_tenant_category_aggregate_id_version_key")
_APPEND = Prepared(
    f"SELECT o_head, o_recorded_at FROM append_batch({', '.join(f'${n}' for n in range(1, 42))})"  # noqa: S608
)
_APPEND_ONE = Prepared(
    f"SELECT o_head, o_recorded_at FROM append_one({', '.join(f'${n}' for n in range(1, 20))})"  # noqa: S608
)


async def append(connection: Connection, shard: int, batch: Batch, *, again: bool = False) -> Appended:
    """Appends a batch in one statement. `again`: commands in it may be in the log as `failed`, and are replaced.

    Raises Clash, or another psycopg.Error; nothing is half written.
    """
    try:
        if not again and _is_one(batch):
            head, recorded_at = await _APPEND_ONE.row(connection, _scalars(shard, batch.commands[0], batch.events[0]))
        else:
            head, recorded_at = await _APPEND.row(connection, _arrays(shard, again, batch))
    except SerializationFailure as error:
        raise Clash from error
    except UniqueViolation as error:
        if error.diag.constraint_name not in _CLASHES:
            raise
        raise Clash from error
    return Appended(read_int8(head), read_timestamptz(recorded_at))


def _is_one(batch: Batch) -> bool:
    """Whether this is what a lone caller waits for most often: one command and its one event, and nothing else."""
    if len(batch.commands) != 1 or len(batch.events) != 1 or batch.snapshots or batch.credentials:
        return False
    [command], [event] = batch.commands, batch.events
    return (
        event.key == (command.tenant, command.category, command.aggregate_id)
        and (command.status, command.version, command.error) == ("completed", event.version, None)
        and all(key == event.key for key in batch.reads)
    )


def _scalars(shard: int, command: NewCommand, event: NewEvent) -> tuple[Packed, ...]:
    """The parameters of `append_one`, in its order."""
    return (
        int4(shard),
        text(command.tenant),
        text(command.category),
        text(command.aggregate_id),
        int8(command.version),
        uuid_text(command.command_id),
        text(command.type),
        blob(command.fingerprint),
        blob(command.payload),
        text(command.user_id),
        text(command.on_behalf_of),
        uuid_text(command.correlation_id),
        uuid_text(command.causation_id),
        text(command.traceparent),
        timestamptz(command.received_at),
        uuid(event.event_id),
        text(event.type),
        blob(event.payload),
        blob(event.metadata),
    )


def _arrays(shard: int, again: bool, batch: Batch) -> tuple[Packed, ...]:
    """The parameters of `append_batch`, in its order."""
    # Of what gets events, the versions are held against the log by the index of the events.
    written = {event.key for event in batch.events}
    reads = [key for key in batch.reads if key not in written]
    # Of a subject that changes its password twice in one batch the last hash counts; one statement upserts a row once.
    credentials = list({(k.tenant, k.subject_id): k for k in batch.credentials}.values())
    snapshots = batch.snapshots
    commands = _columns(batch.commands, NewCommand._fields)
    events = _columns(batch.events, NewEvent._fields)
    return (
        int4(shard),
        boolean(again),
        *_keys(reads),
        int8s([batch.reads[key] for key in reads]),
        texts(commands["tenant"]),
        uuid_texts(commands["command_id"]),
        texts(commands["type"]),
        texts(commands["category"]),
        texts(commands["aggregate_id"]),
        blobs(commands["fingerprint"]),
        blobs(commands["payload"]),
        texts(commands["status"]),
        texts(commands["user_id"]),
        texts(commands["on_behalf_of"]),
        uuid_texts(commands["correlation_id"]),
        uuid_texts(commands["causation_id"]),
        texts(commands["traceparent"]),
        timestamps(commands["received_at"]),
        int8s(commands["version"]),
        int4s(commands["events_appended"]),
        int4s(commands["last_event"]),
        blobs(commands["error"]),
        uuids(events["event_id"]),
        *_keys(events["key"]),
        int8s(events["version"]),
        texts(events["type"]),
        blobs(events["payload"]),
        blobs(events["metadata"]),
        *_keys([s.key for s in snapshots]),
        int8s([s.version for s in snapshots]),
        int4s([s.schema for s in snapshots]),
        blobs([s.state for s in snapshots]),
        texts([k.tenant for k in credentials]),
        texts([k.subject_id for k in credentials]),
        texts([k.password_hash for k in credentials]),
    )


def _columns(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The values of rows by the names of their columns."""
    return dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))


def _keys(keys: Sequence[Key]) -> tuple[Packed, Packed, Packed]:
    return texts([key[0] for key in keys]), texts([key[1] for key in keys]), texts([key[2] for key in keys])


async def lock(connection: Connection, shard: int) -> None:
    """Takes the shard's lock for the rest of the transaction: nobody else appends until it ends."""
    await connection.execute("SELECT pg_advisory_xact_lock(%s::integer, %s::integer)", (LOCK_CLASS_APPEND, shard))


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
    cursor = await connection.execute(_LOAD, (*_keys(wanted), int4s([a.schema for a in aggregates])))
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


@dataclass(frozen=True, slots=True)
class StoredCommand:
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
