"""Which commands for later are due, read from the command log in the order in which they are sent."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import LiteralString

from msgspec import Struct

from shared.commands.log import CommandKey
from shared.commands.turns import TENANTS_MAX, TenantTurns
from shared.platform.postgres import Connection, one

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
    def key(self) -> CommandKey:
        """Its name."""
        return self.tenant, self.command_id

    @property
    def place(self) -> Place:
        """Where it is among the due commands."""
        return self.due_at, self.received_at, self.command_id


_COLUMNS: LiteralString = """tenant, command_id::text, type, payload, user_id, on_behalf_of, correlation_id::text,
  causation_id::text, traceparent, received_at, due_at, roles, expected_version"""
_BESIDES: LiteralString = "(tenant, command_id::text) NOT IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
_DUE: LiteralString = f"""SELECT {_COLUMNS} FROM commands
WHERE status = 'scheduled' AND due_at <= clock_timestamp() AND {_BESIDES}"""  # noqa: S608 (of ours)
_FIRST_DUE: LiteralString = f"{_DUE} ORDER BY due_at, received_at LIMIT %s"
_NEXT_DUE: LiteralString = f"""{_DUE} AND (due_at, received_at, command_id) > (%s, %s, %s::uuid)
ORDER BY due_at, received_at, command_id LIMIT %s"""
_FOLLOWING: LiteralString = f"""SELECT extract(epoch FROM due_at - clock_timestamp())::float8 FROM commands
WHERE status = 'scheduled' AND {_BESIDES} ORDER BY due_at LIMIT 1"""  # noqa: S608

FIRST: Place = (datetime.min.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC), "00000000-0000-0000-0000-000000000000")
"""Before every command."""


def turns_of_commands() -> TenantTurns:
    """What `read_due` takes tenants in turns by."""
    return TenantTurns("commands", "scheduled", _COLUMNS, "received_at")


_NEXT: LiteralString = """SELECT extract(epoch FROM least(
  (SELECT due_at FROM commands WHERE status = 'scheduled' ORDER BY due_at LIMIT 1),
  (SELECT due_at FROM schedules WHERE status = 'active' ORDER BY due_at LIMIT 1)) - clock_timestamp())::float8"""


async def next_due_in_s(connection: Connection) -> float:
    """In how many seconds the earliest command or schedule is due, by the database's clock; infinity if there is none."""
    (in_s,) = await one(connection, _NEXT)
    return math.inf if in_s is None else float(in_s)


async def read_due(
    connection: Connection,
    limit: int,
    turns: TenantTurns | None = None,
    *,
    besides: Collection[CommandKey] = frozenset(),
    behind: Place | None = None,
) -> tuple[Sequence[DueCommand], float]:
    """The commands that are due, the earliest first; if there are none, in how many seconds the next one is due.

    If none is scheduled, that is never: infinity. Those in `besides` are passed over, and so are those up to `behind`. The
    database's clock decides, as it does in the append. If there are more than `limit`, half of them are the first ones of the
    tenants whose turn it is.
    """
    without = [tenant for tenant, _ in besides], [command_id for _, command_id in besides]
    query, places = (_FIRST_DUE, ()) if behind is None else (_NEXT_DUE, behind)
    cursor = await connection.execute(query, (*without, *places, limit))
    if due := [DueCommand(*row) for row in await cursor.fetchall()]:
        if turns is not None and len(due) == limit:
            first = [DueCommand(*row) for row in await turns.read(connection, max(1, limit // (2 * TENANTS_MAX)))]
            first = [row for row in first if row.key not in besides]
            keys = {row.key for row in first}
            others = [row for row in due if row.key not in keys]
            due = sorted([*first, *others][:limit], key=lambda row: (row.due_at, row.received_at))
        return due, 0.0
    following = await (await connection.execute(_FOLLOWING, without)).fetchall()
    return [], max(0.0, following[0][0]) if following else math.inf
