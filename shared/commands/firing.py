"""Recurring schedules whose time has come: their firings become commands of the log that are due.

A firing is a row of the command log that waits, written in the transaction that moves its schedule to the next time; from there
on the scheduler sends it like any other (`shared/commands/schedule.py`). Its id is derived from the schedule and the time that
it was due, so a time fires once, whatever several replicas believe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import LiteralString

from msgspec import Struct

from shared.commands.cron import CATCH_UP_MAX, Away, Firings, firings, read_cron
from shared.commands.turns import TenantTurns
from shared.folds.errors import Invalid
from shared.folds.ids import firing_id
from shared.platform.packing import texts, timestamps, uuid_texts
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger

RELEASED_MAX = 256
"""How many schedules, and how many firings, are released at a time: as many as the scheduler then sends at a time."""

log = logger(__name__)


class DueSchedule(Struct, frozen=True):
    """An active schedule whose next time, `due_at`, has come, at the database's `now`."""

    tenant: str
    schedule_id: str
    cron: str
    time_zone: str
    catch_up: str
    due_at: datetime
    now: datetime


# Those of a closed tenant are never released: among the due they would be in the way of others.
_COLUMNS: LiteralString = "tenant, schedule_id::text, cron, time_zone, catch_up, due_at, clock_timestamp()"
_DUE: LiteralString = """
SELECT {columns} FROM schedules s
WHERE status = 'active' AND due_at <= clock_timestamp()
  AND NOT EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = s.tenant)
ORDER BY due_at, tenant, schedule_id LIMIT %s
"""
_NEXT: LiteralString = """
SELECT extract(epoch FROM due_at - clock_timestamp())::float8 FROM schedules s
WHERE status = 'active' AND NOT EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = s.tenant)
ORDER BY due_at LIMIT 1
"""


def turns_of_schedules() -> TenantTurns:
    """What `read_due` takes tenants in turns by."""
    return TenantTurns("schedules", "active", _COLUMNS, "schedule_id")


async def release_due(connection: Connection, turns: TenantTurns | None = None, away: Away | None = None) -> float | None:
    """Releases firings that are due, tenants by turns; returns in how many seconds the next are, None if that is unknown."""
    due = await read_due(connection, turns=turns)
    if due:
        return 0.0 if await release(connection, due, away) else None  # None: somebody else has them
    cursor = await connection.execute(_NEXT)
    following = await cursor.fetchall()
    return max(0.0, following[0][0]) if following else None


async def read_due(connection: Connection, limit: int = RELEASED_MAX, *, turns: TenantTurns | None = None) -> list[DueSchedule]:
    """Schedules whose next time has come, by the database's clock: the earliest of each tenant, then the second, and so on.

    If there are more than `limit`, so that tenants could be missing, the first ones of the tenants whose turn it is come before.
    """
    cursor = await connection.execute(_DUE.format(columns=_COLUMNS), (limit,))
    due = [DueSchedule(*row) for row in await cursor.fetchall()]
    first = []
    if turns is not None and len(due) == limit:
        first = [DueSchedule(*row) for row in await turns.read(connection, 1)]
    known = {(row.tenant, row.schedule_id) for row in first}
    nth: Counter[str] = Counter()
    ranked: list[tuple[int, DueSchedule]] = []
    for row in due:
        if (row.tenant, row.schedule_id) not in known:
            ranked.append((nth[row.tenant], row))
            nth[row.tenant] += 1
    return [*first, *(row for _, row in sorted(ranked, key=lambda it: it[0]))][:limit]


async def release(connection: Connection, due: Sequence[DueSchedule], away: Away | None = None) -> int:
    """Releases the firings of schedules, RELEASED_MAX of them at the most; returns how many were new.

    A schedule that this release does not understand is paused, with the reason in its row: the others go on.
    """
    found: list[tuple[DueSchedule, Firings]] = []
    room = RELEASED_MAX
    each = max(1, min(CATCH_UP_MAX, RELEASED_MAX // max(1, len({schedule.tenant for schedule in due}))))
    for schedule in due:
        if room <= 0:
            break
        try:
            times = read_cron(schedule.cron, schedule.time_zone)
        except Invalid as refusal:
            log.warning("schedule_paused", schedule_id=schedule.schedule_id, tenant=schedule.tenant, reason=refusal.reason)
            await change(connection, (schedule.tenant, schedule.schedule_id), "paused", problem=refusal.reason)
            continue
        fired = firings(times, schedule.catch_up, schedule.due_at, schedule.now, min(each, room), away)
        _tell_of_missed(schedule, fired)
        found.append((schedule, fired))
        room -= len(fired.due)
    schedules = [schedule for schedule, _ in found]
    times_of = [(schedule, due_at) for schedule, fired in found for due_at in fired.due]
    cursor = await connection.execute(
        "SELECT release_firings(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            texts([schedule.tenant for schedule in schedules]),
            uuid_texts([schedule.schedule_id for schedule in schedules]),
            timestamps([schedule.due_at for schedule in schedules]),
            timestamps([fired.next for _, fired in found]),
            timestamps([fired.due[-1] if fired.due else None for _, fired in found]),
            texts([schedule.tenant for schedule, _ in times_of]),
            uuid_texts([schedule.schedule_id for schedule, _ in times_of]),
            uuid_texts([firing_id(schedule.schedule_id, due_at) for schedule, due_at in times_of]),
            timestamps([due_at for _, due_at in times_of]),
        ),
    )
    [(released,)] = await cursor.fetchall()
    return int(released)


async def change(
    connection: Connection,
    key: tuple[str, str],
    status: str,
    *,
    due_at: datetime | None = None,
    by: str = "",
    problem: str = "",
) -> None:
    """Gives a schedule another status, unless it has it or has ended. `due_at`: its next time, if it is to be active."""
    await connection.execute("SELECT change_schedule(%s, %s, %s, %s, %s, %s)", (*key, status, due_at, by, problem))


def _tell_of_missed(schedule: DueSchedule, fired: Firings) -> None:
    """Logs that times were passed over, which the schedule's rule for catching up says."""
    if not fired.due or fired.due[0] != schedule.due_at:
        until = fired.due[0] if fired.due else schedule.now
        log.warning(
            "firings_missed",
            schedule_id=schedule.schedule_id,
            tenant=schedule.tenant,
            since=schedule.due_at.isoformat(),
            late_s=round((until - schedule.due_at) / timedelta(seconds=1), 1),
        )
