"""Whether the consumers of the line go on, for operators, readiness and exit codes.

Both facts come from the database. A consumer that stopped writes only the reason in its checkpoint's row. A consumer that is
not running writes nothing; the lock that elects the leader shows that nobody leads.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, LiteralString

from shared.line.checkpoint import DIVERGED, STOPPED, Checkpoint
from shared.platform.leader import LockClass
from shared.platform.parts import PART_KEY
from shared.platform.postgres import Connection
from shared.platform.probe import DatabaseProbe


class State(StrEnum):
    """Whether a consumer goes on."""

    RUNNING = "running"
    """The consumer follows the line; if it has a reason, it meets errors and tries again."""
    STOPPED = "stopped"
    """The consumer stopped itself, because a fold failed."""
    DIVERGED = "diverged"
    """The consumer stopped itself, because the store does not have the history that it followed."""
    AWAY = "away"
    """No instance leads."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A consumer: its checkpoint, whether it goes on, and why not."""

    name: str
    shard: int
    checkpoint: Checkpoint
    state: State
    reason: str
    # None if it has never run.
    moved_at: datetime | None

    @property
    def trouble(self) -> str:
        """Why the consumer does not go on, in a few words without contents of events; empty if it goes on."""
        if self.state is State.RUNNING and not self.reason:
            return ""
        return " ".join(filter(None, (self.state, self.reason.partition(":")[0])))


_PART = PART_KEY.format(name="split_part(w.name, '@', 1)", shard="w.shard")
# A session lock of two keys has objsubid 2. Everybody may read pg_locks. A consumer is led by who has its part, a group of tables
# whatever version of it serves, or the whole alone; who leads or stands by for parts has the whole in shared mode.
_READ: LiteralString = f"""
SELECT w.name, w.shard, coalesce(c.epoch, ''), coalesce(c.position, 0), coalesce(c.event_id, ''), coalesce(c.state, ''),
  coalesce(c.reason, ''), c.moved_at,
  EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted AND l.mode = 'ExclusiveLock'
          AND (l.classid = %s::int::oid AND l.objid = w.shard::oid
            OR l.classid = %s::int::oid AND l.objid = ({_PART})::oid)
          AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))
FROM (SELECT u.name, %s::int AS shard FROM unnest(%s::text[]) AS u (name)
      UNION SELECT k.name, k.shard::int FROM checkpoints k WHERE k.name = ANY (%s::text[])) AS w
LEFT JOIN checkpoints c ON c.name = w.name AND c.shard = w.shard
ORDER BY 1, 2
"""  # noqa: S608 (of ours)


async def read_standings(connection: Connection, lock_class: LockClass, shard: int, names: Iterable[str]) -> list[Standing]:
    """The consumers with these names: those of `shard`, even if they never ran, and those of other shards that ran."""
    cursor = await connection.execute(_READ, _parameters(lock_class, shard, names))
    return [_standing(*row) for row in await cursor.fetchall()]


async def ask_standings(probe: DatabaseProbe, lock_class: LockClass, shard: int, names: Iterable[str]) -> list[Standing]:
    """The same, over a probe's connection."""
    return [_standing(*row) for row in await probe.rows(_READ, _parameters(lock_class, shard, names))]


def readiness_check(
    probe: DatabaseProbe, lock_class: LockClass, shard: int, names: Iterable[str]
) -> Callable[[], Coroutine[Any, Any, str]]:
    """A readiness check that fails for a consumer of the shard that does not go on, whichever instance leads."""
    wanted = tuple(names)

    async def check() -> str:
        standings = await ask_standings(probe, lock_class, shard, wanted)
        return "; ".join(f"{it.name}: {it.trouble}" for it in standings if it.shard == shard and it.trouble)

    return check


def _parameters(lock_class: LockClass, shard: int, names: Iterable[str]) -> tuple[Any, ...]:
    wanted = list(names)
    return int(lock_class), int(LockClass.PART), shard, wanted, wanted


def _standing(
    name: str,
    shard: int,
    epoch: str,
    position: int,
    event_id: str,
    state: str,
    reason: str,
    moved_at: datetime | None,
    led: bool,
) -> Standing:
    found = State.RUNNING if led else State.AWAY
    # A consumer that stopped itself stays stopped, running or not: after a restart it tries again and stops again.
    if state == STOPPED:
        found = State.DIVERGED if reason.startswith(DIVERGED) else State.STOPPED
    return Standing(name, shard, Checkpoint(epoch, position, event_id), found, reason, moved_at)
