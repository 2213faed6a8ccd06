"""Empties the tables of a group, so that they are filled anew from the begin of the line."""

from __future__ import annotations

from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint
from shared.platform.postgres import Connection, take_time
from shared.projections import changes, parking
from shared.projections.rows import lock
from shared.projections.tables import LONG_S, Tables


async def empty(tables: Tables, connection: Connection, shard: int, at: Checkpoint) -> bool:
    """Deletes all rows and sets the checkpoint to the begin, in one transaction. False if the group is not diverged there.

    Killed anywhere: the rows are there, and the checkpoint still says that they follow a lost history. Two at once: one
    moves the checkpoint, the other finds it moved.
    """
    async with connection.transaction():
        await take_time(connection, LONG_S)
        await lock(connection, tables.rows)
        if not await checkpoints.accept(connection, tables.consumer, shard, at, Checkpoint()):
            return False
        await _delete_all(tables, connection, shard)
        await connection.execute(
            "UPDATE checkpoints SET refill_asked = false WHERE name = %s AND shard = %s", (tables.consumer, shard)
        )
    return True


async def clear_unaccounted(tables: Tables, connection: Connection, shard: int, at: Checkpoint) -> bool:
    """Deletes rows that are there although the checkpoint is at the begin, as after it was reset. False if there are none.

    Folded a second time, they would be wrong. Raises Fenced.
    """
    async with connection.transaction():
        await take_time(connection, LONG_S)
        await tables.rewrite(connection, shard, at)
        found = [await rows.any_there(connection) for rows in tables.rows]
        if not any(found):
            return False
        await _delete_all(tables, connection, shard)
    return True


async def _delete_all(tables: Tables, connection: Connection, shard: int) -> None:
    for rows in tables.rows:
        await rows.delete_all(connection)
    await parking.delete_all(connection, tables.consumer, shard)
    await changes.write(connection, tables.group.name, shard, None)
