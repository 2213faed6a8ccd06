"""Reads the command log: the outcome of each command. The append writes its rows, together with the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from msgspec import Struct

from shared.platform.packing import texts, uuid_texts
from shared.platform.postgres import Connection

CommandKey = tuple[str, str]
"""Tenant and command id, a UUID as canonical text: lower case, with dashes."""


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
    """The rows of the command log for these keys; a key without a row is left out."""
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
    """The newest password hash of a subject, or None."""
    cursor = await connection.execute(
        "SELECT password_hash FROM credentials WHERE tenant = %s AND subject_id = %s", (tenant, subject_id)
    )
    row = await cursor.fetchone()
    return None if row is None else str(row[0])
