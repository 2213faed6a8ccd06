"""Which commands for later are due, read from the command log in the order in which they are sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import LiteralString

from msgspec import Struct

from shared.commands.turns import TENANTS_MAX, TenantTurns
from shared.platform.postgres import Connection

Place = tuple[datetime, datetime, str]
"""Of a due command among the others: when it is due and was received, and its id."""


class DueCommand(Struct, frozen=True):
    """A scheduled command, with what its row keeps until it runs."""

    tenant: str
    command_id: str
    type: str
    payload: bytes
    user_id: str
    on_behalf_of: str
    correlation_id: str
    causation_id: str | None
    traceparent: str
    received_at: datetime
    due_at: datetime
    roles: list[str]
    expected_version: int | None

    @property
    def place(self) -> Place:
        """Where it is among the due commands."""
        return self.due_at, self.received_at, self.command_id


_COLUMNS: LiteralString = """tenant, command_id::text, type, payload, user_id, on_behalf_of, correlation_id::text,
  causation_id::text, traceparent, received_at, due_at, roles, expected_version"""
_DUE: LiteralString = """SELECT {columns} FROM commands WHERE status = 'scheduled' AND due_at <= clock_timestamp()
  AND command_id <> ALL(%s::uuid[])
ORDER BY due_at, received_at LIMIT %s"""
_DUE_BEHIND: LiteralString = """SELECT {columns} FROM commands WHERE status = 'scheduled' AND due_at <= clock_timestamp()
  AND command_id <> ALL(%s::uuid[]) AND (due_at, received_at, command_id) > (%s, %s, %s::uuid)
ORDER BY due_at, received_at, command_id LIMIT %s"""

FIRST: Place = (datetime.min.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC), "00000000-0000-0000-0000-000000000000")
"""Before every command."""


def turns_of_commands() -> TenantTurns:
    """What `read_due` takes tenants in turns by."""
    return TenantTurns("commands", "scheduled", _COLUMNS, "received_at")


async def read_due(
    connection: Connection,
    limit: int,
    turns: TenantTurns | None = None,
    *,
    besides: Sequence[str] = (),
    behind: Place | None = None,
) -> tuple[Sequence[DueCommand], float]:
    """The commands that are due, the earliest first; if there are none, in how many seconds the next one is due.

    If none is scheduled, that is never: infinity. Those whose ids are in `besides` are passed over, and so are those up to
    `behind`. The database's clock decides, as it does in the append. If there are more than `limit`, half of them are the first
    ones of the tenants whose turn it is.
    """
    query, places = (_DUE, ()) if behind is None else (_DUE_BEHIND, behind)
    cursor = await connection.execute(query.format(columns=_COLUMNS), (list(besides), *places, limit))
    if due := [DueCommand(*row) for row in await cursor.fetchall()]:
        if turns is not None and len(due) == limit:
            first = [DueCommand(*row) for row in await turns.read(connection, max(1, limit // (2 * TENANTS_MAX)))]
            first = [row for row in first if row.command_id not in besides]
            keys = {(row.tenant, row.command_id) for row in first}
            others = [row for row in due if (row.tenant, row.command_id) not in keys]
            due = sorted([*first, *others][:limit], key=lambda row: (row.due_at, row.received_at))
        return due, 0.0
    cursor = await connection.execute(
        """SELECT extract(epoch FROM due_at - clock_timestamp())::float8 FROM commands
           WHERE status = 'scheduled' AND command_id <> ALL(%s::uuid[]) ORDER BY due_at LIMIT 1""",
        (list(besides),),
    )
    following = await cursor.fetchall()
    return [], max(0.0, following[0][0]) if following else math.inf
