"""What one process has done and waits for: its history, commands, timers and inputs, for operators.

The caller opens the transaction; one that writes locks the checkpoint first (`store.lock`).
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from shared.platform.postgres import Connection
from shared.processes.records import HistoryEntry, PendingCommand, ProcessKey, WaitingInput

HISTORY_MAX = 5000

_TAKE_INPUTS = """
WITH gone AS (DELETE FROM process_inputs WHERE tenant = %s AND type = %s AND process_id = %s
              RETURNING number, tenant, type, process_id, kind, name, content)
SELECT tenant, type, process_id, kind, name, content FROM gone ORDER BY number
"""

_COMMANDS_OF = """
SELECT c.tenant, c.type, c.process_id, c.step, c.attempt, c.command_id, c.command_type, c.payload, c.causation_id,
  c.on_behalf_of, c.traceparent, c.tries, c.failures, c.due_at, c.answered, c.given_up, c.last_error
FROM process_commands c WHERE c.tenant = %s AND c.type = %s AND c.process_id = %s ORDER BY c.step
"""

_TIMERS_OF = """
SELECT name, due_at FROM process_timers WHERE tenant = %s AND type = %s AND process_id = %s ORDER BY due_at, name
"""

_HISTORY_OF = """
SELECT tenant, type, process_id, number, happened_at, kind, name, step, id, position, attempts, error, phase, note
FROM process_history WHERE tenant = %s AND type = %s AND process_id = %s ORDER BY number DESC LIMIT %s
"""

_SEND_AGAIN = """
UPDATE process_commands SET attempt = %s, command_id = %s, payload = %s, due_at = %s, given_up = false, failures = 0,
  tries = CASE WHEN %s THEN 0 ELSE tries END, answered = CASE WHEN %s THEN 0 ELSE answered END
WHERE tenant = %s AND type = %s AND process_id = %s AND step = %s
"""

_ACKNOWLEDGEMENT_OF = """
SELECT attention, resolution, asked_by, asked_at FROM process_acknowledgements
WHERE tenant = %s AND type = %s AND process_id = %s
"""

_ASK = """
INSERT INTO process_acknowledgements (tenant, type, process_id, attention, resolution, asked_by, asked_at)
VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (tenant, type, process_id) DO UPDATE SET attention = excluded.attention, resolution = excluded.resolution,
  asked_by = excluded.asked_by, asked_at = excluded.asked_at
"""

_DELETE_ACKNOWLEDGEMENT = """
DELETE FROM process_acknowledgements WHERE tenant = %s AND type = %s AND process_id = %s
"""

_DELETE_COMMAND = """
DELETE FROM process_commands WHERE tenant = %s AND type = %s AND process_id = %s AND step = %s
"""


async def take_inputs(connection: Connection, key: ProcessKey) -> list[WaitingInput]:
    """Deletes and returns the inputs that wait for a process, in order."""
    cursor = await connection.execute(_TAKE_INPUTS, key)
    return [WaitingInput(*row) for row in await cursor.fetchall()]


class Acknowledgement(NamedTuple):
    """One person's word that what a process says was settled, until another confirms it; the fields are the row's columns."""

    attention: str
    # How it was settled.
    resolution: str
    asked_by: str
    asked_at: datetime


class Pending(NamedTuple):
    """A command with the delivery columns of its row."""

    command: PendingCommand
    due_at: datetime
    answered: int
    given_up: bool
    last_error: str

    @property
    def may_have_happened(self) -> bool:
        """Whether any try has no answer, so that the command may have been carried out."""
        return self.command.tries > self.answered


async def commands_of(connection: Connection, key: ProcessKey) -> list[Pending]:
    """The commands of a process that have no answer."""
    cursor = await connection.execute(_COMMANDS_OF, key)
    return [Pending(PendingCommand(*row[:13]), *row[13:]) for row in await cursor.fetchall()]


async def timers_of(connection: Connection, key: ProcessKey) -> list[tuple[str, datetime]]:
    """The timers of a process."""
    cursor = await connection.execute(_TIMERS_OF, key)
    return list(await cursor.fetchall())


async def history_of(connection: Connection, key: ProcessKey) -> list[HistoryEntry]:
    """The last HISTORY_MAX lines of a process's history, in their order."""
    cursor = await connection.execute(_HISTORY_OF, (*key, HISTORY_MAX))
    return [HistoryEntry(*row) for row in reversed(await cursor.fetchall())]


async def send_again(connection: Connection, before: PendingCommand, after: PendingCommand, now: datetime) -> None:
    """Makes a command due at once. Another attempt starts with zero tries."""
    fresh = before.attempt != after.attempt
    where = (*before.key, before.step)
    await connection.execute(_SEND_AGAIN, (after.attempt, after.command_id, after.payload, now, fresh, fresh, *where))


async def delete_command(connection: Connection, command: PendingCommand) -> None:
    """Deletes a command, so that it is not sent again."""
    await connection.execute(_DELETE_COMMAND, (*command.key, command.step))


async def acknowledgement_of(connection: Connection, key: ProcessKey) -> Acknowledgement | None:
    """The acknowledgement of a process that was asked for and neither confirmed nor rejected."""
    cursor = await connection.execute(_ACKNOWLEDGEMENT_OF, key)
    row = await cursor.fetchone()
    return None if row is None else Acknowledgement(*row)


async def ask(connection: Connection, key: ProcessKey, asked: Acknowledgement) -> None:
    """Saves an acknowledgement that is asked for, in place of an earlier one."""
    await connection.execute(_ASK, (*key, *asked))


async def delete_acknowledgement(connection: Connection, key: ProcessKey) -> None:
    """Deletes the acknowledgement that was asked for."""
    await connection.execute(_DELETE_ACKNOWLEDGEMENT, key)
