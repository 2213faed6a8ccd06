"""Reads the command log: the outcome of each command. The append writes its rows, together with the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, LiteralString

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
    decided_us: int = 0
    due_at: datetime | None = None
    epoch: str = ""
    """Of the line, when the row was read."""


_COLUMNS: LiteralString = """c.tenant, c.command_id::text, c.type, c.category, c.aggregate_id, c.fingerprint, {payload},
  c.status, c.user_id, c.on_behalf_of, c.correlation_id::text, c.causation_id::text, c.traceparent, c.received_at,
  c.finished_at, c.version, c.events_appended, c.position, c.head, c.error, c.decided_us, c.due_at, (SELECT line_epoch())"""


async def read_commands(connection: Connection, ids: Sequence[CommandKey]) -> Mapping[CommandKey, StoredCommand]:
    """The rows of the command log for these keys; a key without a row is left out."""
    cursor = await connection.execute(
        f"""SELECT {_COLUMNS.format(payload="c.payload")}
            FROM unnest(%s, %s) AS w(tenant, command_id) JOIN commands c USING (tenant, command_id)""",  # noqa: S608
        (texts([tenant for tenant, _ in ids]), uuid_texts([command_id for _, command_id in ids])),
    )
    rows = [StoredCommand(*row) for row in await cursor.fetchall()]
    return {(row.tenant, row.command_id): row for row in rows}


class Wanted(Struct, frozen=True, kw_only=True):
    """Which commands to list: those of one tenant for which all that is set holds, outside of the `hidden` categories."""

    tenant: str
    hidden: list[str] = []
    status: str = ""
    type: str = ""
    category: str = ""
    aggregate_id: str = ""
    user_id: str = ""
    on_behalf_of: str = ""
    correlation_id: str = ""
    causation_id: str = ""
    received_from: datetime | None = None
    received_before: datetime | None = None
    # What the user sent, and what was sent on the user's behalf.
    concerns: str = ""
    # What the command or event caused, and the command itself.
    follows: str = ""


LISTED_BYTES_MAX = 4096
"""A longer payload is left out of a list."""

# Every condition is one that an index of its own answers, in the order of time. A generic plan uses a partial index only
# if its condition is in the query as it is in the index, so a status is written out, and what an index leaves out is said.
_CONDITIONS: dict[str, LiteralString] = {
    "type": "c.type = %(type)s",
    "hidden": "c.category <> ALL(%(hidden)s)",
    "category": "c.category = %(category)s",
    "aggregate_id": "c.aggregate_id = %(aggregate_id)s",
    "user_id": "c.user_id = %(user_id)s",
    "on_behalf_of": "c.on_behalf_of = %(on_behalf_of)s AND c.on_behalf_of <> ''",
    "causation_id": "c.causation_id = %(causation_id)s::uuid",
    "received_from": "c.received_at >= %(received_from)s",
    "received_before": "c.received_at < %(received_before)s",
}
_STATUS: dict[str, LiteralString] = {
    "scheduled": "c.status = 'scheduled'",
    "started": "c.status = 'started'",
    "completed": "c.status = 'completed'",
    "rejected": "c.status = 'rejected'",
    "failed": "c.status = 'failed'",
    "cancelled": "c.status = 'cancelled'",
}
# What holds in one of two ways is two reads, of an index each, without a row in common. Most commands are correlated with
# themselves alone, so the index of correlations leaves them out, and the command of that id is read besides.
_EITHER: dict[str, tuple[LiteralString, LiteralString]] = {
    "correlation_id": (
        "c.correlation_id = %(correlation_id)s::uuid AND c.correlation_id <> c.command_id",
        "c.command_id = %(correlation_id)s::uuid AND c.correlation_id = c.command_id",
    ),
    "concerns": (
        "c.user_id = %(concerns)s",
        "c.on_behalf_of = %(concerns)s AND c.on_behalf_of <> '' AND c.user_id <> %(concerns)s",
    ),
    "follows": (
        "c.causation_id = %(follows)s::uuid",
        "c.command_id = %(follows)s::uuid AND c.causation_id IS DISTINCT FROM c.command_id",
    ),
}
_BEHIND: LiteralString = "(c.received_at, c.command_id) < (%(after_at)s, %(after_id)s::uuid)"
_FROM: LiteralString = "(c.received_at, c.command_id) <= (%(after_at)s, %(after_id)s::uuid)"


async def list_commands(
    connection: Connection, wanted: Wanted, *, limit: int, after: tuple[datetime, str] | None = None, including: bool = False
) -> list[StoredCommand]:
    """Up to `limit` commands, the newest first, behind `after`, or from there on. A payload above LISTED_BYTES_MAX is empty."""
    columns = _COLUMNS.format(payload=f"CASE WHEN octet_length(c.payload) <= {LISTED_BYTES_MAX} THEN c.payload ELSE '' END")
    query, parameters = listing(wanted, columns, limit=limit, after=after, including=including)
    cursor = await connection.execute(query, parameters)
    return [StoredCommand(*row) for row in await cursor.fetchall()]


async def count_commands(connection: Connection, wanted: Wanted, *, limit: int) -> int:
    """How many commands match, at most `limit`."""
    query, parameters = listing(wanted, "c.received_at, c.command_id", limit=limit)
    cursor = await connection.execute(f"SELECT count(*) FROM ({query}) AS found", parameters)  # noqa: S608
    [(count,)] = await cursor.fetchall()
    return int(count)


def listing(
    wanted: Wanted,
    columns: LiteralString,
    *,
    limit: int,
    after: tuple[datetime, str] | None = None,
    including: bool = False,
) -> tuple[LiteralString, dict[str, Any]]:
    """The query of a list and its parameters: one read of one index, from the newest row on; see _EITHER for more than one."""
    parameters = {name: getattr(wanted, name) for name in wanted.__struct_fields__} | {"limit": limit}
    conditions: list[LiteralString] = ["c.tenant = %(tenant)s"]
    conditions += [condition for name, condition in _CONDITIONS.items() if parameters[name]]
    if wanted.status:
        conditions.append(_STATUS[wanted.status])
    if after is not None:
        parameters["after_at"], parameters["after_id"] = after
        conditions.append(_FROM if including else _BEHIND)
    ways = [conditions]
    for name, either in _EITHER.items():
        if parameters[name]:
            ways = [[*way, condition] for way in ways for condition in either]
    if len(ways) == 1:
        return _page(columns, conditions), parameters
    pages: list[LiteralString] = [f"({_page('c.*', way)})" for way in ways]
    query: LiteralString = (
        f"SELECT {columns} FROM ({' UNION ALL '.join(pages)}) AS c"  # noqa: S608 - of literals alone
        " ORDER BY c.received_at DESC, c.command_id DESC LIMIT %(limit)s"
    )
    return query, parameters


def _page(columns: LiteralString, conditions: Sequence[LiteralString]) -> LiteralString:
    return (
        f"SELECT {columns} FROM commands c WHERE {' AND '.join(conditions)}"  # noqa: S608 - of literals alone
        " ORDER BY c.received_at DESC, c.command_id DESC LIMIT %(limit)s"
    )


async def read_password_hash(connection: Connection, tenant: str, subject_id: str) -> str | None:
    """The newest password hash of a subject, or None."""
    cursor = await connection.execute(
        "SELECT password_hash FROM credentials WHERE tenant = %s AND subject_id = %s", (tenant, subject_id)
    )
    row = await cursor.fetchone()
    return None if row is None else str(row[0])
