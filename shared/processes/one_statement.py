"""Saves a round in one statement, the SQL function `save_round` (saga_service/migrations), when the runner knows its processes.

The runner remembers the processes that it saved last, and folds inputs on that memory before it asks the database anything.
Whether the memory is true is found out by the statement itself, which saves the whole round or nothing:

- Another leader has moved the checkpoint, or an operator has paused or parked something: the fence finds another row.
- An answered command has no row, or was given up: the answer came twice, or an operator was faster.
- An operator has changed a process: every change adds to its history, so the round's next entry of the history is there already.
- A process that was taken to be new is there: so is its first entry.

Then, and also if a fold raises, because the memory may be the cause, the runner takes the same inputs in two steps, reading
first. One statement takes half the time of the two steps (`make bench ARGS=lone_round`).

Killed anywhere, what is left? The whole round, or nothing of it. Two at once: the update of the checkpoint orders them, and
the second finds it moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from datetime import datetime

from psycopg.errors import SerializationFailure, UniqueViolation
from psycopg.pq import TransactionStatus

from shared.line.checkpoint import Checkpoint
from shared.platform.packing import Packed, int4, int8, text, timestamptz
from shared.platform.postgres import Connection, Prepared
from shared.processes import delivery_store, store
from shared.processes.records import CommandResult, Process, ProcessKey, ProcessStatus
from shared.processes.round import Round

REMEMBERED_MAX = 10_000
"""Of the processes that were saved last."""

_PARAMETERS = 69
_SAVE = Prepared(f"SELECT save_round({', '.join(f'${n}' for n in range(1, _PARAMETERS + 1))})")
_SAVE_WITH_MORE = f"SELECT save_round({', '.join(['%s'] * _PARAMETERS)})"
_VERSION = "process_history_pkey"


class Stale(Exception):
    """The round was decided on what is no longer true. Nothing was saved."""


class Memory:
    """Running processes as they were saved last."""

    def __init__(self, size_max: int = REMEMBERED_MAX) -> None:
        self._size_max = size_max
        self._processes: dict[ProcessKey, Process] = {}

    def recall(self, keys: Iterable[ProcessKey]) -> dict[ProcessKey, Process]:
        """Copies of the processes that are remembered."""
        known = self._processes
        return {key: copy(known[key]) for key in keys if key in known}

    def remember(self, processes: Iterable[Process]) -> None:
        """Takes processes as they were saved; those saved longest ago are forgotten.

        Only processes that run without trouble are remembered: the input of another one may change nothing but
        process_inputs, and then no history would prove that the process is as remembered.
        """
        known = self._processes
        for process in processes:
            known.pop(process.key, None)
            if process.status == ProcessStatus.RUNNING and not process.trouble:
                known[process.key] = process
        while len(known) > self._size_max:
            del known[next(iter(known))]

    def forget(self, keys: Iterable[ProcessKey]) -> None:
        """Drops processes that somebody else may have changed."""
        for key in keys:
            self._processes.pop(key, None)

    def clear(self) -> None:
        """Drops all."""
        self._processes.clear()


async def save(
    connection: Connection,
    name: str,
    shard: int,
    parked: int,
    before: Checkpoint,
    after: Checkpoint,
    done: Round,
    answers: Sequence[CommandResult],
    due_at: datetime,
) -> None:
    """Moves the checkpoint and saves a round without defects whose inputs were events and `answers`, each once. Raises Stale.

    `parked` is the counter of parked streams that the round knows. Commands count their first try, and are due again at `due_at`.
    """
    places = (before.epoch, before.position, before.event_id, after.epoch, after.position, after.event_id)
    parameters: list[Packed] = [text(name), int4(shard), int8(parked)]
    parameters += [int8(it) if isinstance(it, int) else text(it) for it in places]
    parameters += store.answered_columns(answers)
    parameters += store.process_columns(done.changed.values())
    parameters += [timestamptz(due_at), *store.command_columns(done.commands.values())]
    parameters += store.timer_columns(done)
    parameters += store.history_columns(done.history)
    try:
        if done.deliveries:
            async with connection.pipeline():
                await connection.execute("BEGIN")
                await connection.execute(_SAVE_WITH_MORE, parameters)
                await delivery_store.insert(connection, done.deliveries, done.now)
                await connection.execute("COMMIT")
        else:
            await _SAVE.row(connection, parameters)
    except (SerializationFailure, UniqueViolation) as error:
        if isinstance(error, UniqueViolation) and error.diag.constraint_name != _VERSION:
            raise
        if connection.info.transaction_status != TransactionStatus.IDLE:
            await connection.execute("ROLLBACK")
        raise Stale from error
