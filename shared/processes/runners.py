"""Whether the runners of processes go on, which types are paused, and whether work waits that nobody takes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, LiteralString, NamedTuple

from shared.line.standing import Standing, read_standings
from shared.line.standing import readiness_check as standing_check
from shared.platform.leader import LockClass
from shared.platform.metrics import Metrics
from shared.platform.postgres import Connection
from shared.platform.probe import DatabaseProbe
from shared.platform.watched import Values, watch
from shared.processes.runner import CHECKPOINT

STUCK_AFTER = timedelta(seconds=60)
"""A runner takes due commands and timers within a second, and more than it can send within a few. One that leaves them for
this long is stuck: it hangs, or the write service takes far less than it is sent."""

_READ: LiteralString = """
SELECT c.shard, c.paused,
  (SELECT count(*) FROM (SELECT DISTINCT tenant, aggregate_type, aggregate_id FROM parked_events p WHERE p.shard = c.shard) AS s),
  (SELECT min(due_at) FROM process_commands WHERE NOT given_up AND NOT jsonb_exists(c.paused, type)),
  (SELECT min(due_at) FROM process_timers WHERE NOT jsonb_exists(c.paused, type))
FROM checkpoints c WHERE c.name = %s
"""


class PausedType(NamedTuple):
    """A type of process that is paused: nothing is sent for it, and its timers do not fire."""

    type: str
    reason: str
    user_id: str
    paused_at: datetime


class Work(NamedTuple):
    """What a runner has to do."""

    paused: Sequence[PausedType] = ()
    # So many streams wait behind an event that cannot be routed.
    parked_streams: int = 0
    # When the oldest command and the oldest timer that wait were due; None if none is due.
    command_due: datetime | None = None
    timer_due: datetime | None = None
    stuck: bool = False

    @property
    def due_since(self) -> datetime | None:
        """When the oldest work that waits was due; None if nothing is due."""
        return min((it for it in (self.command_due, self.timer_due) if it is not None), default=None)

    @property
    def trouble(self) -> str:
        """Why it is not done, or not all of it; empty if it is."""
        if self.stuck:
            return "stuck"
        return f"paused {', '.join(it.type for it in self.paused)}" if self.paused else ""


class Runner(NamedTuple):
    """The runner of a shard."""

    standing: Standing
    work: Work


async def read(connection: Connection, shard: int, now: datetime) -> list[Runner]:
    """The runner of `shard`, even if it never ran, and those of other shards that ran."""
    standings = await read_standings(connection, LockClass.SAGA, shard, (CHECKPOINT,))
    cursor = await connection.execute(_READ, (CHECKPOINT,))
    works = {row[0]: _work(now, *row[1:]) for row in await cursor.fetchall()}
    return [Runner(standing, works.get(standing.shard, Work())) for standing in standings]


def readiness_check(probe: DatabaseProbe, shard: int, clock: Callable[[], datetime]) -> Callable[[], Coroutine[Any, Any, str]]:
    """A readiness check that fails for a runner of the shard that does not go on, is stuck, or has a paused type."""
    goes_on = standing_check(probe, LockClass.SAGA, shard, (CHECKPOINT,))

    async def check() -> str:
        if trouble := await goes_on():
            return trouble
        works = [_work(clock(), *row[1:]) for row in await probe.rows(_READ, (CHECKPOINT,)) if row[0] == shard]
        return "; ".join(f"{CHECKPOINT}: {work.trouble}" for work in works if work.trouble)

    return check


METRICS = {
    "foldline.processes": ("1", "Processes that have not ended, by type and status: running or parked."),
    "foldline.process.attention": ("1", "Ended processes that an operator must look at, by type."),
    "foldline.process.streams.parked": ("1", "Streams that wait behind an event that cannot be routed."),
    "foldline.process.overdue": ("s", "For how long the oldest due command, and the oldest due timer, has waited."),
    "foldline.process.types.paused": ("1", "Types that an operator has paused."),
}
_COUNT: LiteralString = """
SELECT type, status, count(*) FILTER (WHERE attention <> ''), count(*) FROM processes
WHERE status <> 'ended' OR trouble <> '' OR attention <> '' GROUP BY 1, 2
"""


def watch_processes(
    metrics: Metrics, probe: DatabaseProbe, shard: int, clock: Callable[[], datetime], types: Sequence[str]
) -> None:
    """Makes gauges of the processes and of what their runner has to do. Of these types it is also told that there are none."""

    async def ask() -> Values:
        under_way = {(type_, status): 0 for type_ in types for status in ("running", "parked")}
        asking = dict.fromkeys(types, 0)
        for type_, status, asks, count in await probe.rows(_COUNT):
            if status != "ended":
                under_way[type_, status] = count
            asking[type_] = asking.get(type_, 0) + asks
        works = [_work(clock(), *row[1:]) for row in await probe.rows(_READ, (CHECKPOINT,)) if row[0] == shard]
        now = clock()
        overdue = [
            ((now - due).total_seconds() if due else 0.0, {"foldline.process.work": kind})
            for work in works
            for kind, due in (("commands", work.command_due), ("timers", work.timer_due))
        ]
        return {
            "foldline.processes": [
                (count, {"foldline.process.type": type_, "foldline.process.status": status})
                for (type_, status), count in under_way.items()
            ],
            "foldline.process.attention": [(count, {"foldline.process.type": type_}) for type_, count in asking.items()],
            "foldline.process.streams.parked": [(work.parked_streams, {}) for work in works],
            "foldline.process.overdue": overdue,
            "foldline.process.types.paused": [(len(work.paused), {}) for work in works],
        }

    watch(metrics, METRICS, ask)


def paused_type(name: str, fields: Mapping[str, str]) -> PausedType:
    """A field of the column `paused`."""
    return PausedType(name, fields["reason"], fields["user_id"], datetime.fromisoformat(fields["paused_at"]))


def _work(
    now: datetime,
    paused: Mapping[str, Mapping[str, str]],
    parked_streams: int,
    command_due: datetime | None,
    timer_due: datetime | None,
) -> Work:
    command_due, timer_due = (it if it is not None and it <= now else None for it in (command_due, timer_due))
    stuck = any(it is not None and now - it > STUCK_AFTER for it in (command_due, timer_due))
    return Work([paused_type(*it) for it in sorted(paused.items())], parked_streams, command_due, timer_due, stuck)
