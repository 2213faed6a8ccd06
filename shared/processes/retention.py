"""Deletes processes that ended long ago, with their histories.

A process leaves if it has ended, waits for nothing, and nobody need look at it: money in suspense stays until it is acknowledged.
Its event lies behind the checkpoint, so it never begins anew. One that was undone after a restore leaves as well, looked at or
not: its state is gone already, and if its event is appended again after all, it begins as if it had never been.

With an archive (`history_archive.py`) they are written there first, and read back; what cannot be written is not deleted.
Without one, a process stays whose attention two people have acknowledged: its history is the only record of what they settled.

Killed anywhere, what is left? A whole process, or nothing of it; in the archive perhaps a copy of one that is still there, and
is written again. Two at once: the lock on the runner's checkpoint orders them. It also orders this and a round that notes a
late answer; one that was noted since the copy was taken keeps the process for the next sweep.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, LiteralString

import psycopg
from msgspec import Raw

from shared.folds.errors import Refusal
from shared.platform.packing import int4s, texts
from shared.platform.postgres import Connection, describe
from shared.platform.telemetry import logger
from shared.processes import store
from shared.processes.history_archive import HistoryArchive, PastProcess
from shared.processes.records import ProcessKey
from shared.processes.runner import CHECKPOINT

log = logger(__name__)

EVERY_S = 60.0
# So many in one transaction, during which no round runs.
FORGET_MAX = 200

ENTRIES_MAX = 20_000
"""So many lines of histories are archived in one sweep, unless a single process has more."""
WRITES_AT_ONCE = 8

# Each has an index of its own.
_ENDED: LiteralString = "p.status = 'ended' AND p.trouble = '' AND p.attention = ''"
_UNDONE: LiteralString = "p.status = 'undone'"
_WAITS_FOR_NOTHING: LiteralString = """
  AND p.moved_at < %s AND NOT EXISTS (
    SELECT FROM process_commands c WHERE c.tenant = p.tenant AND c.type = p.type AND c.process_id = p.process_id)
"""
_NOT_ACKNOWLEDGED: LiteralString = """
  AND NOT EXISTS (
    SELECT FROM process_history h WHERE h.tenant = p.tenant AND h.type = p.type AND h.process_id = p.process_id
      AND h.kind = 'operator' AND h.name = 'confirm')
"""
# Those of which a copy was taken, and nothing has been added to their history since.
_COPIED: LiteralString = f"""
SELECT p.tenant, p.type, p.process_id
FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[]) AS k (tenant, type, process_id, entries)
JOIN processes p USING (tenant, type, process_id, entries) WHERE ({_ENDED} OR {_UNDONE}) {_WAITS_FOR_NOTHING}
"""  # noqa: S608 (ours)
_DELETE: LiteralString = """
told AS (
  DELETE FROM process_history h USING old o WHERE h.tenant = o.tenant AND h.type = o.type AND h.process_id = o.process_id),
asked AS (
  DELETE FROM process_acknowledgements a USING old o
  WHERE a.tenant = o.tenant AND a.type = o.type AND a.process_id = o.process_id)
DELETE FROM processes p USING old o WHERE p.tenant = o.tenant AND p.type = o.type AND p.process_id = o.process_id
RETURNING p.tenant, p.type
"""
_PROCESSES: LiteralString = """
SELECT p.tenant, p.type, p.process_id, p.state, p.schema, p.phase, p.correlation_id, p.causation_id, p.on_behalf_of,
  p.traceparent, p.entries, p.started_at, p.moved_at
FROM processes p WHERE
"""
_HISTORIES: LiteralString = """
SELECT h.tenant, h.type, h.process_id, h.number, h.happened_at, h.kind, h.name, h.step, h.id, h.position, h.attempts, h.error,
  h.phase, h.note
FROM unnest(%s::text[], %s::text[], %s::text[]) AS k (tenant, type, process_id)
JOIN process_history h USING (tenant, type, process_id) ORDER BY h.number
"""
_ENTRY = ("number", "happened_at", "kind", "name", "step", "id", "position", "attempts", "error", "phase", "note")


class ProcessRetention:
    """Deletes what is past its date, for a shard, as long as it leads."""

    def __init__(
        self,
        shard: int,
        *,
        connect: Callable[[], Awaitable[Connection]],
        retention: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        archive: HistoryArchive | None = None,
    ) -> None:
        """`retention` is counted from the end of a process. Without an archive no copy is kept."""
        self._shard = shard
        self._connect = connect
        self._retention = retention
        self._clock = clock
        self._archive = archive

    async def run(self) -> None:
        """Deletes until cancelled. Whatever goes wrong is logged and tried again a minute later."""
        while True:
            try:
                async with await self._connect() as connection:
                    count = await self.forget(connection)
                    if count:
                        log.info("processes_forgotten", count=count)
            except psycopg.Error as error:
                log.warning("processes_not_forgotten", error=describe(error))
            except Refusal as refusal:
                log.warning("processes_not_archived", reason=refusal.reason, text=refusal.text)
            except Exception as defect:  # noqa: BLE001 (it must not end the processes that run beside it)
                where = traceback.format_tb(defect.__traceback__)[-4:]
                log.error("retention_defect", error=type(defect).__name__, where=where)  # noqa: TRY400
            await asyncio.sleep(EVERY_S)

    async def forget(self, connection: Connection) -> int:
        """Deletes all that is past its date, some at a time; returns how many.

        Raises Unavailable (ARCHIVE_UNAVAILABLE) or Rejected (ARCHIVE_DAMAGED) if there is an archive that does not take them.
        """
        return await self._forget(connection, _ENDED) + await self._forget(connection, _UNDONE)

    async def _forget(self, connection: Connection, over: LiteralString) -> int:
        before, total, more = self._clock() - self._retention, 0, True
        while more:
            if self._archive is None:
                count = len(await self._delete(connection, _old(over), [before, FORGET_MAX]))
                more = count == FORGET_MAX
            else:
                async with self._archive.sweeping:
                    count, more = await self._archive_some(connection, self._archive, over, before)
            total += count
            if more:
                # Rounds come first.
                await asyncio.sleep(0.05)
        return total

    async def _delete(self, connection: Connection, which: LiteralString, parameters: Sequence[Any]) -> list[tuple[str, str]]:
        """Deletes processes in one transaction; returns the tenant and type of each."""
        async with connection.transaction():
            await store.lock(connection, CHECKPOINT, self._shard)
            cursor = await connection.execute(f"WITH old AS MATERIALIZED ({which}), {_DELETE}", parameters)
            return list(await cursor.fetchall())

    async def _archive_some(
        self, connection: Connection, archive: HistoryArchive, over: LiteralString, before: datetime
    ) -> tuple[int, bool]:
        """Archives and deletes the oldest; returns how many were deleted, and whether there may be more.

        A sweep of which nothing was there to be deleted any more is taken back: its tenant may have ended.
        """
        copies, more = await _copy(connection, over, before)
        folders: dict[tuple[str, str], str] = {}
        kinds = list(copies)
        for start in range(0, len(kinds), WRITES_AT_ONCE):
            part = kinds[start : start + WRITES_AT_ONCE]
            written = await asyncio.gather(*(archive.write(*kind, [process for process, _ in copies[kind]]) for kind in part))
            folders.update(zip(part, written, strict=True))
        keys = [(*kind, it.process_id, entries) for kind, some in copies.items() for it, entries in some]
        if not keys:
            return 0, False
        names = [texts(list(map(itemgetter(place), keys))) for place in range(3)]
        gone = await self._delete(connection, _COPIED, [*names, int4s(list(map(itemgetter(3), keys))), before])
        for kind in folders.keys() - set(gone):
            await archive.delete(folders[kind])
        return len(gone), more and bool(gone)


def _old(over: LiteralString) -> LiteralString:
    """The oldest processes that may be deleted without a copy."""
    which: LiteralString = "SELECT p.tenant, p.type, p.process_id FROM processes p WHERE "
    return which + over + _WAITS_FOR_NOTHING + _NOT_ACKNOWLEDGED + " ORDER BY p.moved_at LIMIT %s"


async def _copy(
    connection: Connection, over: LiteralString, before: datetime
) -> tuple[dict[tuple[str, str], list[tuple[PastProcess, int]]], bool]:
    """The oldest processes that may leave, by tenant and type, with how long their histories are; and whether there are more."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        query = _PROCESSES + over + _WAITS_FOR_NOTHING + " ORDER BY p.moved_at LIMIT %s"
        cursor = await connection.execute(query, (before, FORGET_MAX))
        rows = await cursor.fetchall()
        taken, entries = 0, 0
        while taken < len(rows) and (taken == 0 or entries + rows[taken][10] <= ENTRIES_MAX):
            entries += rows[taken][10]
            taken += 1
        histories: dict[ProcessKey, list[dict[str, Any]]] = {row[:3]: [] for row in rows[:taken]}
        names = [texts([key[place] for key in histories]) for place in range(3)]
        cursor = await connection.execute(_HISTORIES, names)
        for row in await cursor.fetchall():
            histories[row[:3]].append(dict(zip(_ENTRY, row[3:], strict=True)))
    copies: dict[tuple[str, str], list[tuple[PastProcess, int]]] = {}
    for row in rows[:taken]:
        (
            tenant,
            type_,
            process_id,
            state,
            schema,
            phase,
            correlation_id,
            causation_id,
            on_behalf_of,
            traceparent,
            lines,
            *times,
        ) = row
        past = PastProcess(
            type=type_,
            process_id=process_id,
            state=Raw((state or "null").encode()),  # one that was undone has none
            schema=schema,
            phase=phase,
            correlation_id=correlation_id,
            causation_id=causation_id,
            on_behalf_of=on_behalf_of,
            traceparent=traceparent,
            started_at=times[0],
            ended_at=times[1],
            history=histories[tenant, type_, process_id],
        )
        copies.setdefault((tenant, type_), []).append((past, lines))
    return copies, taken < len(rows) or len(rows) == FORGET_MAX
