"""Deletes the rows of a tenant that is gone, or of an aggregate that is purged, from the tables of a group.

It is done before the checkpoint passes the event that says so, a bounded number of rows in a transaction. Killed anywhere: the
next leader deletes the others. Rows of tables that a rebuild has replaced go too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from shared.folds.projection import Projection, Purge
from shared.line import checkpoint as checkpoints
from shared.line import forgotten
from shared.line.checkpoint import Checkpoint
from shared.line.event_store import AggregateKey
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger
from shared.projections import changes, parking
from shared.projections.rows import Rows
from shared.projections.tables import Tables

log = logger(__name__)

FORGET_MAX = 2000
"""Rows of each table that one transaction deletes or changes."""
FORMER = "__old"
"""What is behind the names of tables that a rebuild has replaced."""


async def forget_tenant(tables: Tables, connection: Connection, shard: int, at: Checkpoint, tenant: str) -> int:
    """Deletes all rows of a tenant whose last event is the next one; returns how many there were. Raises Fenced."""
    total = 0
    all_rows = [rows async for _, rows in _with_former(tables, connection)]
    # What a rebuild has begun to fill beside the tables that serve was there twice.
    counted = tables.announced
    while True:
        async with connection.transaction():
            await tables.rewrite(connection, shard, at, all_rows)
            by_table = {"parked": await parking.forget(connection, tables.consumer, shard, tenant, FORGET_MAX)}
            for rows in all_rows:
                by_table[rows.table] = await rows.forget(connection, tenant, FORGET_MAX)
            if counted:
                await forgotten.count(connection, shard, tenant, by_table)
            gone = sum(by_table.values())
            if not gone and tables.announced:
                await changes.forget(connection, tables.group.name, shard)
                await changes.write(connection, tables.group.name, shard, None)
        total += gone
        if not gone:
            break
    await tables.refresh(connection, shard)
    log.info("tenant_forgotten", projection=tables.consumer, tenant=tenant, rows=total)
    return total


async def forget_aggregate(tables: Tables, connection: Connection, shard: int, at: Checkpoint, key: AggregateKey) -> int:
    """Deletes or folds the rows that an aggregate has, as its projections say, and its events that wait at parked keys.

    Its last event is the next one. Returns how many rows and events it were. Raises Fenced.
    """
    total = 0
    async for projection, rows in _with_former(tables, connection):
        for purge in projection.purges:
            if purge.category == key[1]:
                work = _delete if purge.fold is None else _fold
                total += await work(tables, connection, shard, at, key, rows, purge)
    async for parked_id, positions in parking.waiting_of(connection, tables.consumer, shard, key):
        async with connection.transaction():
            await checkpoints.rewrite(connection, tables.consumer, shard, at)
            total += await parking.take_out(connection, parked_id, positions)
    async with connection.transaction():
        await checkpoints.rewrite(connection, tables.consumer, shard, at)
        await parking.release_empty(connection, tables.consumer, shard, key[0])
    await tables.refresh(connection, shard)
    log.info("aggregate_forgotten", projection=tables.consumer, tenant=key[0], category=key[1], aggregate_id=key[2], rows=total)
    return total


async def _with_former(tables: Tables, connection: Connection) -> AsyncIterator[tuple[Projection[Any], Rows]]:
    """The projections of a group with their rows, and with those that a rebuild has replaced."""
    for projection, rows in zip(tables.group.projections, tables.rows, strict=True):
        yield projection, rows
        if tables.announced and await (former := Rows(projection, FORMER)).is_there(connection):
            yield projection, former


async def _delete(
    tables: Tables, connection: Connection, shard: int, at: Checkpoint, key: AggregateKey, rows: Rows, purge: Purge[Any]
) -> int:
    total = 0
    while True:
        async with connection.transaction():
            await tables.rewrite(connection, shard, at, [rows])
            gone = await rows.forget_with(connection, key[0], purge.column, key[2], FORGET_MAX)
            if gone and tables.announced:
                await changes.write(connection, tables.group.name, shard, {(key[0], id_) for id_ in gone})
        if not gone:
            return total
        total += len(gone)


async def _fold(
    tables: Tables, connection: Connection, shard: int, at: Checkpoint, key: AggregateKey, rows: Rows, purge: Purge[Any]
) -> int:
    total, after = 0, None
    assert purge.fold is not None
    while True:
        async with connection.transaction():
            await tables.rewrite(connection, shard, at, [rows])
            found = await rows.select_with(connection, key[0], purge.column, key[2], purge.order, after, FORGET_MAX)
            changed = [new for old in found if (new := purge.fold(old)) != old]
            if changed:
                await rows.upsert(connection, changed)
            if changed and tables.announced:
                await changes.write(connection, tables.group.name, shard, {(row[0], str(row[1])) for row in changed})
        total += len(changed)
        if len(found) < FORGET_MAX:
            return total
        after = found[-1]
