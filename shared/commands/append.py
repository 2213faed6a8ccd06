"""Appends batches to the line, each in one statement.

Hand-written SQL on the driver: this is the hot path. The function `append_batch` (write_service/migrations) has the rules
that keep the line in order; `append_one` has them for one command with one event, which it appends in 0.78 of the time of
`append_batch` (`make bench ARGS=lone_append`). Nothing else writes the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import uuid_utils
from msgspec import Struct
from msgspec.structs import astuple
from psycopg.errors import SerializationFailure, UniqueViolation

from shared.commands.states import packed_keys
from shared.line.event_store import AggregateKey
from shared.platform.leader import LockClass
from shared.platform.packing import (
    Packed,
    blob,
    blobs,
    boolean,
    int4,
    int4s,
    int8,
    int8s,
    read_int8,
    read_timestamptz,
    text,
    texts,
    texts_or_null,
    timestamps,
    timestamptz,
    uuid,
    uuid_text,
    uuid_texts,
    uuids,
)
from shared.platform.postgres import Connection, Prepared


class NewEvent(Struct, frozen=True):
    """An event to append."""

    event_id: UUID | uuid_utils.UUID
    key: AggregateKey
    version: int
    type: str
    payload: bytes
    metadata: bytes


class NewCommand(Struct, frozen=True):
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
    decided_us: int = 0


class NewSnapshot(Struct, frozen=True):
    """A snapshot to write."""

    key: AggregateKey
    version: int
    schema: int
    state: bytes


@dataclass(slots=True)
class NewCredential:
    """A password hash to write, or to delete if it is None."""

    tenant: str
    subject_id: str
    password_hash: str | None = field(repr=False)


class Batch(Struct):
    """Everything that one append checks and writes. `reads` has the version of every aggregate that was read."""

    # Safe defaults: msgspec gives each struct its own copy of an empty collection.
    reads: dict[AggregateKey, int] = {}
    commands: list[NewCommand] = []
    events: list[NewEvent] = []
    snapshots: list[NewSnapshot] = []
    credentials: list[NewCredential] = []
    # Whether some commands were scheduled: their rows replace the `scheduled` ones.
    fires: bool = False


@dataclass(frozen=True, slots=True)
class Appended:
    """The position that a batch reached, and the time in its rows."""

    head: int
    recorded_at: datetime


class AppendConflict(Exception):
    """Nothing was written: an aggregate that the batch read has changed, or one of its commands has an outcome already."""


# The constraints that a batch decided on old states violates; a conflict of positions would be a defect.
_CONFLICTS = ("commands_pkey", "events_tenant_category_aggregate_id_version_key")
_APPEND = Prepared(
    f"SELECT o_head, o_recorded_at FROM append_batch({', '.join(f'${n}' for n in range(1, 43))})"  # noqa: S608 - of numbers alone
)
_APPEND_ONE = Prepared(
    f"SELECT o_head, o_recorded_at FROM append_one({', '.join(f'${n}' for n in range(1, 21))})"  # noqa: S608 - of numbers alone
)


async def append(connection: Connection, shard: int, batch: Batch, *, again: bool = False) -> Appended:
    """Appends a batch in one statement. `again`: commands of it may be in the log as `failed`, and are replaced.

    Rows that are `scheduled` and due are replaced as well, with `again` or if the batch `fires`.
    Raises AppendConflict, or another psycopg.Error; then nothing is written.
    """
    again = again or batch.fires
    try:
        if not again and _is_one(batch):
            head, recorded_at = await _APPEND_ONE.row(connection, _scalars(shard, batch.commands[0], batch.events[0]))
        else:
            head, recorded_at = await _APPEND.row(connection, _arrays(shard, again, batch))
    except SerializationFailure as error:
        raise AppendConflict from error
    except UniqueViolation as error:
        if error.diag.constraint_name not in _CONFLICTS:
            raise
        raise AppendConflict from error
    return Appended(read_int8(head), read_timestamptz(recorded_at))


def _is_one(batch: Batch) -> bool:
    """Whether the batch is one command with one event and nothing else: the usual batch of a single caller."""
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
        int4(command.decided_us),
    )


def _arrays(shard: int, again: bool, batch: Batch) -> tuple[Packed, ...]:
    """The parameters of `append_batch`, in its order."""
    # Aggregates that get events are checked by the unique index on version; aggregates that were only read are compared.
    written = {event.key for event in batch.events}
    reads = [key for key in batch.reads if key not in written]
    # If a subject changes its password twice in one batch, the last hash counts: one statement may upsert a row only once.
    credentials = list({(k.tenant, k.subject_id): k for k in batch.credentials}.values())
    snapshots = batch.snapshots
    commands = _columns(batch.commands, NewCommand)
    events = _columns(batch.events, NewEvent)
    return (
        int4(shard),
        boolean(again),
        *packed_keys(reads),
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
        int4s(commands["decided_us"]),
        uuids(events["event_id"]),
        *packed_keys(events["key"]),
        int8s(events["version"]),
        texts(events["type"]),
        blobs(events["payload"]),
        blobs(events["metadata"]),
        *packed_keys([s.key for s in snapshots]),
        int8s([s.version for s in snapshots]),
        int4s([s.schema for s in snapshots]),
        blobs([s.state for s in snapshots]),
        texts([k.tenant for k in credentials]),
        texts([k.subject_id for k in credentials]),
        texts_or_null([k.password_hash for k in credentials]),
    )


def _columns(rows: Sequence[Struct], kind: type[Struct]) -> dict[str, Sequence[Any]]:
    """The values of rows by column name."""
    names = kind.__struct_fields__
    return dict(zip(names, zip(*map(astuple, rows), strict=True) if rows else [()] * len(names), strict=True))


async def lock(connection: Connection, shard: int) -> None:
    """Takes the shard's append lock until the transaction ends."""
    await connection.execute("SELECT pg_advisory_xact_lock(%s::integer, %s::integer)", (int(LockClass.APPEND), shard))
