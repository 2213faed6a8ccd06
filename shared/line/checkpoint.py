"""How far a consumer has followed the line, and the fence of everything it writes.

A checkpoint is (epoch, position, event id): the history it belongs to, the last event that is in the tables, and that
event's id, by which a store that was restored from an older backup is told from the one we followed.

The race it defeats: a leader is stopped (SIGSTOP, a long swap, a paused machine) between reading rows and writing them.
Its lock is given away, another leads and writes the same events, and then the first wakes up and finishes what it had
begun. So the **first** statement of every transaction that writes rows moves the checkpoint from exactly where the
writer believes it to be. The row's lock makes the two wait for each other; whoever comes second finds no such row any
more, rolls back and has written nothing.

Killed anywhere, what is left? The checkpoint and the rows change in one transaction, so both or neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.line.consistency import Reached
from shared.platform.postgres import Connection

STOPPED = "stopped"
DIVERGED = "HISTORY_DIVERGED"
"""How the reason begins of a consumer that stopped since the store does not hold the event at its checkpoint."""


class Fenced(Exception):
    """The checkpoint is not where we left it: somebody else leads. Roll back, load it again, go on from there."""


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


def move(name: str, shard: int, old: Checkpoint, new: Checkpoint) -> tuple[object, ...]:
    """The parameters of MOVE. Unless it changes exactly one row, the caller must roll back and raise Fenced."""
    return (new.epoch, new.position, new.event_id, name, shard, old.epoch, old.position, old.event_id)


async def load(connection: Connection, name: str, shard: int) -> Checkpoint:
    """Where the consumer stands; makes the row if it has never run."""
    await connection.execute("INSERT INTO checkpoints (name, shard) VALUES (%s, %s) ON CONFLICT DO NOTHING", (name, shard))
    cursor = await connection.execute(
        "SELECT epoch, position, event_id FROM checkpoints WHERE name = %s AND shard = %s", (name, shard)
    )
    row = await cursor.fetchone()
    if row is None:
        raise Fenced(f"the checkpoint of {name} was deleted")
    return Checkpoint(*row)


async def stop(connection: Connection, name: str, shard: int, at: Checkpoint, reason: str) -> None:
    """Says that the consumer has stopped itself, for an operator to see; raises Fenced if somebody else leads."""
    cursor = await connection.execute(
        """UPDATE checkpoints SET state = 'stopped', reason = %s
           WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s""",
        (reason, name, shard, at.epoch, at.position, at.event_id),
    )
    if cursor.rowcount != 1:
        raise Fenced(f"{name} is no longer at position {at.position}")


async def accept(connection: Connection, name: str, shard: int, at: Checkpoint, new: Checkpoint) -> bool:
    """Lets a consumer that diverged go on from elsewhere; False if it does not stand there any more, or is not diverged."""
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
    """Says what keeps a consumer that runs from going on; raises Fenced if somebody else leads. A move takes it back."""
    cursor = await connection.execute(
        """UPDATE checkpoints SET reason = %s
           WHERE name = %s AND shard = %s AND epoch = %s AND position = %s AND event_id = %s""",
        (reason, name, shard, at.epoch, at.position, at.event_id),
    )
    if cursor.rowcount != 1:
        raise Fenced(f"{name} is no longer at position {at.position}")


async def is_stopped(connection: Connection, name: str, shard: int, at: Checkpoint) -> bool:
    """Whether the consumer still stands where it stopped itself, and nobody has let it go on."""
    cursor = await connection.execute(
        "SELECT epoch, position, event_id FROM checkpoints WHERE name = %s AND shard = %s AND state = 'stopped'", (name, shard)
    )
    row = await cursor.fetchone()
    return row is not None and Checkpoint(*row) == at


async def read_reached(connection: Connection, name: str, shard: int) -> Reached:
    """How far the tables are; nowhere, if nothing has run yet."""
    cursor = await connection.execute(
        """SELECT epoch, position, state = 'stopped' AND starts_with(reason, %s) FROM checkpoints
           WHERE name = %s AND shard = %s""",
        (DIVERGED, name, shard),
    )
    row = await cursor.fetchone()
    return Reached("", 0) if row is None else Reached(*row)
