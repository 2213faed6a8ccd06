"""The tables of processes, and every statement that reads or writes them. Rows travel in bulk, as packed arrays.

Deliveries have a module of their own (delivery_store.py).

The caller opens the transaction, and its first statement is the checkpoint's fence (`shared/line/checkpoint.py`), which
orders two writers. So a row that is read here cannot change before the transaction ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from shared.line.checkpoint import Checkpoint
from shared.platform.packing import Packed, blobs, int4s, int8s, texts, timestamps, uuids
from shared.platform.postgres import Connection
from shared.processes import delivery_store
from shared.processes.records import (
    CommandIdTaken,
    CommandResult,
    DeliveryFailure,
    DueTimer,
    HistoryEntry,
    PendingCommand,
    Process,
    ProcessKey,
)
from shared.processes.round import Round

TABLES = (
    "processes",
    "process_inputs",
    "process_commands",
    "process_timers",
    "process_history",
    "process_acknowledgements",
    "parked_events",
    "checkpoints",
)

_LOCK = "SELECT epoch, position, event_id FROM checkpoints WHERE name = %s AND shard = %s FOR UPDATE"

_SELECT = """
SELECT p.tenant, p.type, p.process_id, p.state, p.schema, p.status, p.trouble, p.attention, p.phase, p.correlation_id,
  p.causation_id, p.on_behalf_of, p.traceparent, p.attempts, p.entries, p.started_at, p.moved_at
FROM unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
JOIN processes p ON p.tenant = k.tenant AND p.type = k.type AND p.process_id = k.process_id
"""

# The subquery still sees what this statement deletes.
_DELETE_ANSWERED = """
WITH gone AS (
  DELETE FROM process_commands c
  USING unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::uuid[]) AS k (tenant, type, process_id, step, command_id)
  WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id AND c.step = k.step
    AND c.command_id = k.command_id
  RETURNING c.tenant, c.type, c.process_id, c.command_id, c.given_up)
SELECT g.tenant, g.type, g.process_id, g.command_id, g.given_up AND NOT EXISTS (
  SELECT FROM process_commands o
  WHERE o.tenant = g.tenant AND o.type = g.type AND o.process_id = g.process_id AND o.given_up
    AND NOT EXISTS (SELECT FROM gone a WHERE a.tenant = o.tenant AND a.type = o.type AND a.process_id = o.process_id
                                         AND a.command_id = o.command_id))
FROM gone g
"""

# A refusal is final: under this id it certainly never happened, and never will, whatever became of earlier tries.
_UPDATE_TROUBLED = """
UPDATE process_commands c SET due_at = k.due_at,
  answered = CASE WHEN k.given_up = 'COMMAND_REFUSED' THEN c.tries ELSE c.answered + k.undone END,
  failures = c.failures + k.failed, given_up = c.given_up OR k.given_up <> '', last_error = k.error
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::uuid[], %s::timestamptz[], %s::int[], %s::int[], %s::text[],
  %s::text[]) AS k (tenant, type, process_id, step, command_id, due_at, undone, failed, given_up, error)
WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id AND c.step = k.step
  AND c.command_id = k.command_id
RETURNING c.tenant, c.type, c.process_id, c.command_id, false
"""

_DELETE_FIRED = """
DELETE FROM process_timers t
USING unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::timestamptz[]) AS k (tenant, type, process_id, name, due_at)
WHERE t.tenant = k.tenant AND t.type = k.type AND t.process_id = k.process_id AND t.name = k.name AND t.due_at = k.due_at
RETURNING t.tenant, t.type, t.process_id, t.name
"""

_UPSERT = """
INSERT INTO processes (tenant, type, process_id, state, schema, status, trouble, attention, phase, correlation_id, causation_id,
  on_behalf_of, traceparent, attempts, entries, started_at, moved_at)
SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::int[], %s::text[], %s::text[], %s::text[],
  %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::int[], %s::timestamptz[], %s::timestamptz[])
ON CONFLICT (tenant, type, process_id) DO UPDATE SET state = excluded.state, schema = excluded.schema,
  status = excluded.status, trouble = excluded.trouble, attention = excluded.attention, phase = excluded.phase,
  correlation_id = excluded.correlation_id, on_behalf_of = excluded.on_behalf_of, traceparent = excluded.traceparent,
  causation_id = excluded.causation_id, attempts = excluded.attempts, entries = excluded.entries, moved_at = excluded.moved_at
"""

# A step that waits already is the same command: it is left as it is.
_INSERT_COMMANDS = """
INSERT INTO process_commands (tenant, type, process_id, step, attempt, command_id, command_type, payload, causation_id,
  on_behalf_of, traceparent, tries, due_at)
SELECT k.*, %s, %s FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::int[], %s::uuid[], %s::text[], %s::bytea[],
  %s::text[], %s::text[], %s::text[]) AS k
ON CONFLICT (tenant, type, process_id, step) DO NOTHING
"""

_SET_TIMERS = """
INSERT INTO process_timers (tenant, type, process_id, name, due_at)
SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::timestamptz[])
ON CONFLICT (tenant, type, process_id, name) DO UPDATE SET due_at = excluded.due_at
"""

_CANCEL_TIMERS = """
DELETE FROM process_timers t
USING unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id, name)
WHERE t.tenant = k.tenant AND t.type = k.type AND t.process_id = k.process_id AND t.name = k.name
"""

_CLEAR_TIMERS = """
DELETE FROM process_timers t USING unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
WHERE t.tenant = k.tenant AND t.type = k.type AND t.process_id = k.process_id
"""

_INSERT_HISTORY = """
INSERT INTO process_history (tenant, type, process_id, number, happened_at, kind, name, step, id, position, attempts, error,
  phase, note)
SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::timestamptz[], %s::text[], %s::text[], %s::text[],
  %s::text[], %s::bigint[], %s::int[], %s::bytea[], %s::text[], %s::text[])
"""

_INSERT_INPUTS = """
INSERT INTO process_inputs (tenant, type, process_id, kind, name, content)
SELECT tenant, type, process_id, kind, name, content
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::bytea[])
  WITH ORDINALITY AS k (tenant, type, process_id, kind, name, content, place)
ORDER BY place
"""

_DUE_TIMERS = """
SELECT tenant, type, process_id, name, due_at FROM process_timers WHERE due_at <= %s AND type <> ALL(%s)
ORDER BY due_at LIMIT %s
"""

_RECLAIM = "UPDATE process_commands SET due_at = %s WHERE NOT given_up AND tries > answered AND due_at > %s"

_CLAIM = """
UPDATE process_commands c SET tries = c.tries + 1, due_at = %s
FROM (SELECT tenant, type, process_id, step FROM process_commands WHERE NOT given_up AND due_at <= %s
        AND type <> ALL(%s)
      ORDER BY due_at LIMIT %s) AS k
WHERE c.tenant = k.tenant AND c.type = k.type AND c.process_id = k.process_id AND c.step = k.step
RETURNING c.tenant, c.type, c.process_id, c.step, c.attempt, c.command_id, c.command_type, c.payload, c.causation_id,
  c.on_behalf_of, c.traceparent, c.tries, c.failures
"""

_NEXT_DUE = """
SELECT (SELECT min(due_at) FROM process_commands WHERE NOT given_up AND NOT jsonb_exists(c.paused, type)),
  (SELECT min(due_at) FROM process_timers WHERE NOT jsonb_exists(c.paused, type)), c.paused
FROM checkpoints c WHERE c.name = %s AND c.shard = %s
"""


async def lock(connection: Connection, name: str, shard: int) -> Checkpoint | None:
    """The checkpoint, locked and unchanged until the transaction ends: the fence for a writer that does not follow the line.

    None if there is no checkpoint of this name yet.
    """
    cursor = await connection.execute(_LOCK, (name, shard))
    row = await cursor.fetchone()
    return None if row is None else Checkpoint(*row)


# The statements that a round begins with. Each function sends one; the caller reads the results after all are sent.


async def select(connection: Connection, keys: Iterable[ProcessKey]) -> Any:
    """Sends the query for the processes with these keys."""
    return await connection.execute(_SELECT, _columns([texts, texts, texts], keys))


async def read(cursor: Any) -> dict[ProcessKey, Process]:
    """The result of `select`, without the processes that do not exist."""
    found = [Process(*row) for row in await cursor.fetchall()]
    return {process.key: process for process in found}


async def delete_answered(connection: Connection, answers: Sequence[CommandResult | CommandIdTaken]) -> Any:
    """Deletes commands that have an answer. The result has process, command id and `relieved` of those that had a row.

    `relieved` is true if the command was given up and no other given-up command of its process is left.
    """
    return await connection.execute(_DELETE_ANSWERED, answered_columns(answers))


async def update_troubled(connection: Connection, troubles: Sequence[DeliveryFailure]) -> Any:
    """Notes failed tries of commands. The result has process and command id of those that have a row."""
    rows = [
        (
            *it.command.key,
            it.command.step,
            it.command.command_id,
            it.due_at,
            int(it.undone),
            int(it.failed),
            it.given_up,
            it.error,
        )
        for it in troubles
    ]
    packs = [texts, texts, texts, texts, uuids, timestamps, int4s, int4s, texts, texts]
    return await connection.execute(_UPDATE_TROUBLED, _columns(packs, rows))


async def delete_fired(connection: Connection, timers: Sequence[DueTimer]) -> Any:
    """Deletes timers that are still due at the given time. The result has process and name of those that had a row."""
    return await connection.execute(_DELETE_FIRED, _columns([texts, texts, texts, texts, timestamps], timers))


async def write(connection: Connection, done: Round, *, due_at: datetime, handed_out: bool, paused: Collection[str] = ()) -> None:
    """Writes the result of a round. If `handed_out`, the commands' rows count the first try, which follows the commit.

    A command that has no answer at `due_at` is sent then, or sent again. Commands of `paused` types wait, without a try.
    """
    if done.changed:
        await connection.execute(_UPSERT, process_columns(done.changed.values()))
    if done.commands:
        sent = [command for command in done.commands.values() if command.type not in paused]
        held = [command for command in done.commands.values() if command.type in paused]
        await _insert_commands(connection, sent, int(handed_out), due_at)
        await _insert_commands(connection, held, 0, done.now)
    await _write_timers(connection, done)
    if done.history:
        await connection.execute(_INSERT_HISTORY, history_columns(done.history))
    if done.waiting:
        await connection.execute(_INSERT_INPUTS, _columns([*[texts] * 5, blobs], done.waiting))
    if done.deliveries:
        await delivery_store.insert(connection, done.deliveries, done.now)


async def _insert_commands(connection: Connection, commands: Sequence[PendingCommand], tries: int, due_at: datetime) -> None:
    if commands:
        await connection.execute(_INSERT_COMMANDS, (tries, due_at, *command_columns(commands)))


async def _write_timers(connection: Connection, done: Round) -> None:
    columns = timer_columns(done)
    ended, due, gone = columns[:3], columns[3:8], columns[8:]
    if done.ended:
        await connection.execute(_CLEAR_TIMERS, ended)
    if done.timers:
        await connection.execute(_SET_TIMERS, due)
        await connection.execute(_CANCEL_TIMERS, gone)


# Rows as columns, in the order in which the statements take them


def answered_columns(answers: Iterable[CommandResult | CommandIdTaken]) -> list[Packed]:
    """The names of the commands that have an answer: 5 columns."""
    rows = [(*it.command.key, it.command.step, it.command.command_id) for it in answers]
    return _columns([texts, texts, texts, texts, uuids], rows)


def process_columns(processes: Iterable[Process]) -> list[Packed]:
    """Processes: 17 columns."""
    rows = [
        (
            it.tenant,
            it.type,
            it.process_id,
            it.state,
            it.schema,
            it.status,
            it.trouble,
            it.attention,
            it.phase,
            it.correlation_id,
            it.causation_id,
            it.on_behalf_of,
            it.traceparent,
            it.attempts,
            it.entries,
            it.started_at,
            it.moved_at,
        )
        for it in processes
    ]
    return _columns([*[texts] * 4, int4s, *[texts] * 9, int4s, timestamps, timestamps], rows)


def command_columns(commands: Iterable[PendingCommand]) -> list[Packed]:
    """Commands without their tries: 11 columns."""
    packs = [texts, texts, texts, texts, int4s, uuids, texts, blobs, texts, texts, texts]
    return _columns(packs, [command[:11] for command in commands])


def timer_columns(done: Round) -> list[Packed]:
    """The processes whose timers are all deleted, then the timers to set, then those to cancel: 3, 5 and 4 columns."""
    due = [(*key, name, due_at) for (key, name), due_at in done.timers.items() if due_at is not None]
    gone = [(*key, name) for (key, name), due_at in done.timers.items() if due_at is None]
    return [
        *_columns([texts, texts, texts], done.ended),
        *_columns([texts, texts, texts, texts, timestamps], due),
        *_columns([texts, texts, texts, texts], gone),
    ]


def history_columns(history: Iterable[HistoryEntry]) -> list[Packed]:
    """Entries of histories: 14 columns."""
    packs = [texts, texts, texts, int4s, timestamps, texts, texts, texts, texts, int8s, int4s, blobs, texts, texts]
    return _columns(packs, history)


# What is due


async def due_timers(connection: Connection, now: datetime, limit: int, paused: Collection[str]) -> list[DueTimer]:
    """Timers that are due, the oldest first; none of `paused` types."""
    cursor = await connection.execute(_DUE_TIMERS, (now, list(paused), limit))
    return [DueTimer(*row) for row in await cursor.fetchall()]


async def reclaim(connection: Connection, now: datetime) -> None:
    """Makes commands due whose last try has no answer in our tables: an earlier leader may have died while it waited."""
    await connection.execute(_RECLAIM, (now, now))


async def claim(
    connection: Connection, now: datetime, asked_again_at: datetime, limit: int, paused: Collection[str]
) -> list[PendingCommand]:
    """Commands that are due, none of `paused` types.

    Their rows count the try before it is made, so a sent command never looks like an unsent one.
    """
    cursor = await connection.execute(_CLAIM, (asked_again_at, now, list(paused), limit))
    return [PendingCommand(*row) for row in await cursor.fetchall()]


class NextDue(NamedTuple):
    """When the next command and the next timer are due, and the types that are paused, which are left out."""

    command: datetime | None
    timer: datetime | None
    paused: Mapping[str, Any]


async def next_due(connection: Connection, name: str, shard: int) -> NextDue:
    """What is due next for the runner with this checkpoint, which must exist."""
    cursor = await connection.execute(_NEXT_DUE, (name, shard))
    row = await cursor.fetchone()
    assert row is not None  # the runner's own row
    return NextDue(*row)


def _columns(packs: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[Packed]:
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * len(packs)
    return [pack(column) for pack, column in zip(packs, columns, strict=True)]
