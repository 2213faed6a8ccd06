"""Fills the tables of a group anew beside those that serve, compares both, and switches.

The new version has tables and a checkpoint of its own (`accounts__v2`, `accounts@2`) and follows the line from its begin like any
other group, while the old one goes on and answers. When it has caught up, rows are compared at one position of the line; then
one transaction renames the tables and lets the new checkpoint serve, at a place that is not behind the old one. So a query is
answered from either version, whole, and never from an older place of the line than before. The old tables are kept as
`accounts__old` until an operator drops them. Where a key is parked in the new tables alone, so that their rows lack events, an
operator decides. Tables that have stopped are passed without being compared.

Killed anywhere, what is left? Each step is one transaction of a function of the database, which checks the rebuild's state; the
next leader reads the state and goes on from there. Whatever still runs of the old version finds its checkpoint gone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from psycopg.errors import LockNotAvailable

from shared.folds.projection import Group
from shared.platform.postgres import Connection, take_time
from shared.platform.telemetry import logger
from shared.projections.projector import Projector
from shared.projections.tables import Tables

log = logger(__name__)

LOOK_S = 0.5
"""How often a leader looks whether a rebuild was asked for; `STEP_S` while there is one."""
STEP_S = 0.05
DIFFERENCES_SHOWN_MAX = 10
COMPARE_S = 600

Connect = Callable[[], Awaitable[Connection]]

_SERVING = "SELECT name FROM checkpoints WHERE group_name = %s AND shard = %s AND serves"
_ASKED = "SELECT version, state, only_if_same, rows_differing FROM projection_rebuilds WHERE group_name = %s AND shard = %s"
_PLACES = """
SELECT epoch, position, state = 'stopped' FROM checkpoints
WHERE shard = %s AND (name = %s OR group_name = %s AND serves) ORDER BY serves
"""
_COMPARED = """
UPDATE projection_rebuilds SET compared_at = %s, rows_before = %s, rows_after = %s, rows_differing = %s, differences = %s
WHERE group_name = %s AND shard = %s AND version = %s
"""
_WAIT = """
UPDATE projection_rebuilds SET state = 'waiting'
WHERE group_name = %s AND shard = %s AND version = %s AND state = 'filling'
"""


async def serving(connection: Connection, group: str, shard: int) -> str:
    """The name of the checkpoint of the tables that serve; the group's before anything was filled."""
    row = await (await connection.execute(_SERVING, (group, shard))).fetchone()
    return group if row is None else str(row[0])


@dataclass(frozen=True, slots=True)
class _Rebuild:
    version: int
    state: str
    only_if_same: bool
    differing: int | None


class Rebuilder:
    """Rebuilds the tables of one group when an operator asks, and when a release has a newer version of the group."""

    def __init__(self, group: Group, shard: int, connect: Connect, projector: Callable[[Tables], Projector]) -> None:
        """`projector` makes the one that fills the new tables."""
        self._group = group
        self._shard = shard
        self._connect = connect
        self._projector = projector

    async def until_replaced(self, consumer: str) -> None:
        """Rebuilds when asked to, or when this release is newer than the tables.

        Returns when other tables serve than those of `consumer`.
        """
        async with await self._connect() as connection, AsyncExitStack() as filling:
            filled: int | None = None
            behind = True
            while await serving(connection, self._group.name, self._shard) == consumer:
                behind = behind and await self._ask_for_release(connection)
                rebuild = await self._asked(connection)
                if rebuild is None or rebuild.state not in ("filling", "waiting", "switching") or rebuild.version != filled:
                    await filling.aclose()
                    filled = None
                if rebuild is None or rebuild.state == "switched":
                    await asyncio.sleep(LOOK_S)
                    continue
                place = (self._group.name, self._shard, rebuild.version)
                if rebuild.state == "asked":
                    tables = [projection.table.name for projection in self._group.projections]
                    await connection.execute("SELECT prepare_rebuild(%s, %s, %s, %s)", (*place, tables))
                    log.warning("rebuild_begins", projection=self._group.name, version=rebuild.version)
                elif rebuild.state in ("cancelling", "dropping"):
                    await connection.execute("SELECT end_rebuild(%s, %s, %s)", place)
                    log.warning("rebuild_ended", projection=self._group.name, version=rebuild.version, how=rebuild.state)
                else:
                    if filled is None:
                        if await self._renewed(connection, place):
                            continue
                        tables_ = Tables(self._group, consumer=f"{place[0]}@{place[2]}", suffix=f"__v{place[2]}")
                        await filling.enter_async_context(_running(self._projector(tables_).run()))
                        filled = rebuild.version
                    if await self._step(connection, rebuild, place):
                        return
                await asyncio.sleep(STEP_S)

    async def _ask_for_release(self, connection: Connection) -> bool:
        """Asks for a rebuild if the tables that serve are of older folds than this release's. Whether they are."""
        asked = (self._group.name, self._shard, self._group.version)
        row = await (await connection.execute("SELECT ask_release_rebuild(%s, %s, %s)", asked)).fetchone()
        answer = None if row is None else row[0]
        if answer not in ("NOT_NEEDED", "UNDER_WAY"):
            log.warning("release_rebuilds", projection=self._group.name, version=self._group.version, step=answer)
        return answer != "NOT_NEEDED"

    async def _asked(self, connection: Connection) -> _Rebuild | None:
        row = await (await connection.execute(_ASKED, (self._group.name, self._shard))).fetchone()
        return None if row is None else _Rebuild(*row)

    async def _renewed(self, connection: Connection, place: tuple[str, int, int]) -> bool:
        """Whether the rebuild begins anew, since a migration has changed the tables that serve."""
        row = await (await connection.execute("SELECT renew_rebuild(%s, %s, %s)", place)).fetchone()
        if renewed := row == (True,):
            log.warning("rebuild_renewed", projection=self._group.name, version=place[2])
        return renewed

    async def _step(self, connection: Connection, rebuild: _Rebuild, place: tuple[str, int, int]) -> bool:
        """Compares and switches if it is time to. Whether the new tables serve now."""
        if rebuild.state == "waiting":
            return False
        if rebuild.differing is None and not await self._compare(connection, rebuild, place):
            return False
        if rebuild.state == "filling" and rebuild.only_if_same and rebuild.differing != 0:
            await connection.execute(_WAIT, place)
            return False
        try:
            row = await (await connection.execute("SELECT switch_rebuild(%s, %s, %s)", place)).fetchone()
        except LockNotAvailable:  # queries hold the tables; they must not wait for us for long
            return False
        if row != (True,):
            return False
        log.warning("rebuild_switched", projection=self._group.name, version=rebuild.version)
        return True

    async def _compare(self, connection: Connection, rebuild: _Rebuild, place: tuple[str, int, int]) -> bool:
        """Compares all rows of both versions as of one position, if they are at one.

        True if they never will be: the tables that serve have stopped, and the new ones have passed them.
        """
        async with connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            name = f"{place[0]}@{place[2]}"
            places = await (await connection.execute(_PLACES, (self._shard, name, place[0]))).fetchall()
            if len(places) != 2:
                return False
            (epoch, position, _), (serving_epoch, serving_position, stopped) = places
            if (epoch, position) != (serving_epoch, serving_position):
                return bool(stopped and epoch == serving_epoch and position > serving_position)
            await take_time(connection, COMPARE_S)
            await connection.execute(
                """SELECT set_config(name, 'on', true) FROM pg_settings
                   WHERE name IN ('enable_seqscan', 'enable_hashjoin', 'enable_mergejoin')"""
            )
            before = after = differing = 0
            shown: list[dict[str, Any]] = []
            for projection in self._group.projections:
                counts, keys = await _differences(connection, projection.table.name, rebuild.version, [
                    column.name for column in projection.table.primary_key
                ])  # fmt: skip
                before, after, differing = before + counts[0], after + counts[1], differing + counts[2]
                shown += [{"table": projection.table.name, "key": list(map(str, key))} for key in keys]
            found = (position, before, after, differing, json.dumps(shown[:DIFFERENCES_SHOWN_MAX]))
        await connection.execute(_COMPARED, (*found, *place))
        log.warning("rebuild_compared", projection=place[0], version=place[2], rows_differing=differing)
        return False


async def _differences(
    connection: Connection, table: str, version: int, keys: list[str]
) -> tuple[tuple[int, int, int], list[tuple[Any, ...]]]:
    """How many rows both versions of a table have and how many differ, and the keys of the first that do."""
    both = f"{table} o FULL JOIN {table}__v{version} n USING ({', '.join(keys)})"
    # A text of the row, since rows have no order of types to be told apart by where one is missing.
    differ = "o::text IS DISTINCT FROM n::text"
    counts = f"SELECT count(o), count(n), count(*) FILTER (WHERE {differ}) FROM {both}"  # noqa: S608 - names of ours
    [found] = await (await connection.execute(counts)).fetchall()
    if not found[2]:
        return found, []
    first = f"SELECT {', '.join(keys)} FROM {both} WHERE {differ} ORDER BY {', '.join(keys)} LIMIT {DIFFERENCES_SHOWN_MAX}"  # noqa: S608
    return found, await (await connection.execute(first)).fetchall()


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None, None]:
    """The work beside the block, until its end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
