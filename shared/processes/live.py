"""Reads all processes in flight, page by page, in one snapshot of the database."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, LiteralString

from shared.platform.postgres import Connection, take_time
from shared.processes.compatibility import Case
from shared.processes.records import Process, ProcessKey, WaitingInput

PAGE = 2000

_PAGE: LiteralString = """
SELECT p.tenant, p.type, p.process_id, p.state, p.schema, p.status, p.trouble, p.attention, p.phase, p.correlation_id,
  p.causation_id, p.on_behalf_of, p.traceparent, p.attempts, p.entries, p.started_at, p.moved_at
FROM processes p
WHERE p.status IN ('running', 'parked') AND (p.tenant, p.type, p.process_id) > (%s, %s, %s)
ORDER BY p.tenant, p.type, p.process_id LIMIT %s
"""
_STEPS: LiteralString = """
SELECT tenant, type, process_id, step FROM process_commands
WHERE (tenant, type, process_id) BETWEEN (%s, %s, %s) AND (%s, %s, %s) ORDER BY step
"""
_TIMERS: LiteralString = """
SELECT tenant, type, process_id, name FROM process_timers
WHERE (tenant, type, process_id) BETWEEN (%s, %s, %s) AND (%s, %s, %s) ORDER BY due_at
"""
_INPUTS: LiteralString = """
SELECT tenant, type, process_id, kind, name, content FROM process_inputs
WHERE (tenant, type, process_id) BETWEEN (%s, %s, %s) AND (%s, %s, %s) ORDER BY number
"""


async def cases(connection: Connection) -> AsyncGenerator[Case, None]:
    """Every process that runs or is parked, with what it waits for."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await take_time(connection, 0)
        after: ProcessKey = ("", "", "")
        while True:
            cursor = await connection.execute(_PAGE, (*after, PAGE))
            page = {process.key: Case(process) for process in [Process(*row) for row in await cursor.fetchall()]}
            if not page:
                return
            first, after = next(iter(page)), next(reversed(page))
            # Rows of a process that has ended or is undone lie between: they belong to no case.
            for tenant, type_, id_, step in await _rows(connection, _STEPS, first, after):
                if (case := page.get((tenant, type_, id_))) is not None:
                    case.steps.append(step)
            for tenant, type_, id_, name in await _rows(connection, _TIMERS, first, after):
                if (case := page.get((tenant, type_, id_))) is not None:
                    case.timers.append(name)
            for row in await _rows(connection, _INPUTS, first, after):
                if (case := page.get(row[:3])) is not None:
                    case.inputs.append(WaitingInput(*row))
            for case in page.values():
                yield case


async def _rows(connection: Connection, query: LiteralString, first: ProcessKey, last: ProcessKey) -> list[Any]:
    cursor = await connection.execute(query, (*first, *last))
    return list(await cursor.fetchall())
