"""Reads all processes in flight, page by page, in one snapshot of the database."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, LiteralString

from shared.platform.packing import texts
from shared.platform.postgres import Connection, one, take_time
from shared.processes.compatibility import Case, PastEntry, WaitingCommand
from shared.processes.records import Process, ProcessKey, WaitingInput

PAGE = 1000
BEGIN = datetime(1, 1, 1, tzinfo=UTC)

# In the order in which they began, so that the events of a page are near each other on the line. The condition is that of the
# index processes_open.
_PAGE: LiteralString = """
SELECT p.tenant, p.type, p.process_id, p.state, p.schema, p.status, p.trouble, p.attention, p.phase, p.correlation_id,
  p.causation_id, p.on_behalf_of, p.traceparent, p.attempts, p.entries, p.started_at, p.moved_at
FROM processes p
WHERE p.status IN ('running', 'parked') AND (p.status <> 'ended' OR p.trouble <> '' OR p.attention <> '')
  AND (p.started_at, p.tenant, p.type, p.process_id) > (%s, %s, %s, %s)
ORDER BY p.started_at, p.tenant, p.type, p.process_id LIMIT %s
"""
_KEYS: LiteralString = "FROM unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id) JOIN "
_STEPS: LiteralString = (
    "SELECT c.tenant, c.type, c.process_id, c.step, c.command_type, c.payload "
    + _KEYS
    + "process_commands c USING (tenant, type, process_id) ORDER BY c.step"
)
_TIMERS: LiteralString = (
    "SELECT c.tenant, c.type, c.process_id, c.name, c.due_at "
    + _KEYS
    + "process_timers c USING (tenant, type, process_id) ORDER BY c.due_at, c.name"
)
_INPUTS: LiteralString = (
    "SELECT c.tenant, c.type, c.process_id, c.kind, c.name, c.content "
    + _KEYS
    + "process_inputs c USING (tenant, type, process_id) ORDER BY c.number"
)
_HISTORY: LiteralString = (
    "SELECT c.tenant, c.type, c.process_id, c.kind, c.name, c.step, c.id, c.position, c.error, c.note "
    + _KEYS
    + "process_history c USING (tenant, type, process_id) ORDER BY c.number"
)


async def pages(connection: Connection, *, histories_max: int | None) -> AsyncGenerator[list[Case], None]:
    """Every process that runs or is parked, with what it waits for; the oldest first.

    The first `histories_max` come with their histories, or all of them.
    """
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await take_time(connection, 0)
        # Between two pages the caller reads events and folds them, for longer than the role's transactions may idle. This
        # one only reads, and holds up nobody but a migration.
        await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        (now,) = await one(connection, "SELECT now()")
        after: tuple[Any, ...] = (BEGIN, "", "", "")
        left = histories_max
        while True:
            cursor = await connection.execute(_PAGE, (*after, PAGE))
            page = {process.key: Case(process, now) for process in [Process(*row) for row in await cursor.fetchall()]}
            if not page:
                return
            cases = list(page.values())
            after = (cases[-1].process.started_at, *cases[-1].process.key)
            keys = list(page)
            for tenant, type_, id_, *command in await _rows(connection, _STEPS, keys):
                page[tenant, type_, id_].commands.append(WaitingCommand(*command))
            for tenant, type_, id_, name, due_at in await _rows(connection, _TIMERS, keys):
                page[tenant, type_, id_].timers[name] = due_at
            for row in await _rows(connection, _INPUTS, keys):
                page[row[:3]].inputs.append(WaitingInput(*row))
            told = keys if left is None else keys[:left]
            histories: dict[ProcessKey, list[PastEntry]] = {key: [] for key in told}
            for tenant, type_, id_, *entry in await _rows(connection, _HISTORY, told):
                histories[tenant, type_, id_].append(PastEntry(*entry))
            for key in told:
                page[key].history = histories[key]
            left = None if left is None else left - len(told)
            yield cases


async def _rows(connection: Connection, query: LiteralString, keys: Sequence[ProcessKey]) -> list[Any]:
    if not keys:
        return []
    cursor = await connection.execute(query, [texts(list(map(itemgetter(place), keys))) for place in range(3)])
    return list(await cursor.fetchall())
