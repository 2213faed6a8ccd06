"""Checkpoints: how far a consumer has followed the line, and the fence for everything that it writes.

A checkpoint is (epoch, position, event id): the history it belongs to, the last event that is in the tables, and that
event's id. The id shows whether the event store was restored from an older backup.

The race that this defeats: a leader is stopped (SIGSTOP, a long swap, a paused machine) between reading rows and writing
them. Another process gets its lock, leads, and writes the same events. Then the first wakes up and continues its write. So
the **first** statement of every transaction that writes rows moves the checkpoint from the exact place where the writer
believes it to be. The row lock orders the two writers; the second finds no matching row, rolls back and writes nothing.

Some writers change rows without moving the checkpoint: an operator's replay, the end of a tenant. Each raises the checkpoint's
`generation` (`rewrite`), and a projector's fence has the generation of which it read or cached its rows.

The processes' checkpoint may stand still while answers are taken. So whoever begins to lead them raises its `term`, which their
fence looks at: one that was paused and replaced writes nothing, though its successor has written nothing either (`Replaced`).

Killed anywhere, what is left? The checkpoint and the rows change in one transaction, so both or neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.line.consistency import Reached
from shared.platform.packing import Packed, int4, int8, text
from shared.platform.postgres import Connection

STOPPED = "stopped"
DIVERGED = "HISTORY_DIVERGED"
"""The first word of the reason when a consumer stopped because the store does not hold the event at its checkpoint."""


class Fenced(Exception):
    """The checkpoint is not where we left it, so another process leads. Roll back, load the checkpoint and go on from there."""


class Replaced(Fenced):
    """Another has taken over since, perhaps at the same checkpoint: this one leads no more, and is about to learn of it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every event up to `position` of the history `epoch` is in the tables; at position 0 there is no event id."""

    epoch: str = ""
    position: int = 0
    event_id: str = ""


MOVE = """
UPDATE checkpoints SET epoch = %s, position = %s, event_id = %s, state = 'running', reason = '', moved_at = clock_timestamp()
WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s
"""


MOVE_AND_KEEP_REASON = MOVE.replace(" reason = '',", "")
"""As MOVE; the reason that `note` saved stays. For a consumer that follows the line and is in trouble all the same."""


def move_or_fail(*parts: str) -> str:
    """MOVE of one generation. The statement fails unless it changes a row (DivisionByZero), and so does what is sent behind it.

    `parts` are statements that write, each with a name: `rows AS (INSERT …)`. They are carried out with the move, or not at all.
    """
    moved = f"moved AS ({MOVE.strip()} AND generation = %s RETURNING 1)"
    return f"WITH {', '.join((moved, *parts))} SELECT 1 / count(*) FROM moved"  # noqa: S608


MOVE_OR_FAIL = move_or_fail()


def move(name: str, shard: int, old: Checkpoint, new: Checkpoint) -> tuple[Packed, ...]:
    """The parameters of MOVE. Unless it changes exactly one row, the caller must roll back and raise Fenced."""
    return (*_places(new), text(name), int4(shard), *_places(old))


def move_of(name: str, shard: int, old: Checkpoint, new: Checkpoint, generation: int) -> tuple[Packed, ...]:
    """The parameters of MOVE_OR_FAIL."""
    return (*move(name, shard, old, new), int8(generation))


def _places(at: Checkpoint) -> tuple[Packed, Packed, Packed]:
    return text(at.epoch), int8(at.position), text(at.event_id)


async def load(connection: Connection, name: str, shard: int) -> Checkpoint:
    """The consumer's checkpoint. Makes its row if the consumer has never run."""
    await connection.execute("INSERT INTO checkpoints (name, shard) VALUES (%s, %s) ON CONFLICT DO NOTHING", (name, shard))
    cursor = await connection.execute(
        "SELECT epoch, position, event_id FROM checkpoints WHERE name = %s AND shard = %s", (name, shard)
    )
    row = await cursor.fetchone()
    if row is None:
        raise Fenced(f"the checkpoint of {name} was deleted")
    return Checkpoint(*row)


async def hold(connection: Connection, name: str, shard: int, at: Checkpoint) -> None:
    """Locks the checkpoint where it is, for a transaction that writes rows without moving it. Raises Fenced.

    Nobody may rely on rows that were read before: whose memory is not proven by the rows themselves uses `rewrite`.
    """
    cursor = await connection.execute(
        """SELECT FROM checkpoints WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s
           FOR UPDATE""",
        (name, shard, *_parts(at)),
    )
    if cursor.rowcount != 1:
        raise Fenced(f"{name} is no longer at position {at.position}")


async def rewrite(connection: Connection, name: str, shard: int, at: Checkpoint) -> None:
    """As `hold`, and lets whoever has read rows before write nothing on them. Raises Fenced."""
    cursor = await connection.execute(
        """UPDATE checkpoints SET generation = generation + 1
           WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s""",
        (name, shard, *_parts(at)),
    )
    if cursor.rowcount != 1:
        raise Fenced(f"{name} is no longer at position {at.position}")


async def generation_of(connection: Connection, name: str, shard: int) -> int:
    """How often rows were rewritten. Ask before reading rows: then `move_of` proves that they are still as read."""
    cursor = await connection.execute("SELECT generation FROM checkpoints WHERE name = %s AND shard = %s", (name, shard))
    row = await cursor.fetchone()
    if row is None:
        raise Fenced(f"the checkpoint of {name} was deleted")
    return int(row[0])


async def stop(connection: Connection, name: str, shard: int, at: Checkpoint, reason: str) -> None:
    """Saves that the consumer has stopped itself, and why. Raises Fenced if another process leads."""
    cursor = await connection.execute(
        """UPDATE checkpoints SET state = 'stopped', reason = %s
           WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s""",
        (reason, name, shard, at.epoch, at.position, at.event_id),
    )
    if cursor.rowcount != 1:
        raise Fenced(f"{name} is no longer at position {at.position}")


async def accept(connection: Connection, name: str, shard: int, at: Checkpoint, new: Checkpoint) -> bool:
    """Lets a diverged consumer go on from another checkpoint. False if the consumer has moved or is not diverged."""
    cursor = await connection.execute(
        """UPDATE checkpoints SET epoch = %s, position = %s, event_id = %s, state = 'running', reason = '',
             moved_at = clock_timestamp()
           WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s
             AND state = 'stopped' AND starts_with(reason, %s)""",
        (*_parts(new), name, shard, *_parts(at), DIVERGED),
    )
    return cursor.rowcount == 1


def _parts(at: Checkpoint) -> tuple[str, int, str]:
    return at.epoch, at.position, at.event_id


async def note(connection: Connection, name: str, shard: int, at: Checkpoint, reason: str) -> None:
    """Saves why a running consumer makes no progress; its next MOVE clears that. Raises Fenced if another process leads."""
    cursor = await connection.execute(
        """UPDATE checkpoints SET reason = %s
           WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s""",
        (reason, name, shard, at.epoch, at.position, at.event_id),
    )
    if cursor.rowcount != 1:
        raise Fenced(f"{name} is no longer at position {at.position}")


async def is_stopped(connection: Connection, name: str, shard: int, at: Checkpoint) -> bool:
    """Whether the consumer is still stopped at this checkpoint; false after an operator let it go on."""
    cursor = await connection.execute(
        "SELECT epoch, position, event_id FROM checkpoints WHERE name = %s AND shard = %s AND state = 'stopped'", (name, shard)
    )
    row = await cursor.fetchone()
    return row is not None and Checkpoint(*row) == at


async def read_serving(connection: Connection, group: str, shard: int) -> Reached:
    """The checkpoint of the tables that answer queries of a group; position 0 if no consumer has run yet."""
    cursor = await connection.execute(
        """SELECT epoch, position, state = 'stopped' AND starts_with(reason, %s) FROM checkpoints
           WHERE group_name = %s AND shard = %s AND serves""",
        (DIVERGED, group, shard),
    )
    row = await cursor.fetchone()
    return Reached("", 0) if row is None else Reached(*row)
