"""Recurring schedules as their owners steer them: create, pause, resume, end, look at.

Every call changes one row. Pausing and ending then cancel, one by one, the firings that still wait, rescheduled ones among
them: each runs or is cancelled, never both (`shared/commands/schedule.py`). Killed between two of them, the schedule stands
still and the rest may run; the same call again cancels it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, LiteralString

from msgspec import Struct

from shared.commands.closed import refused_if_closed
from shared.commands.cron import first_time, read_cron
from shared.commands.decide import Command
from shared.commands.firing import change
from shared.commands.log import LISTED_BYTES_MAX, CommandKey, StoredCommand, read_commands
from shared.commands.schedule import ADMINS, cancel_waiting, refuse_secret
from shared.folds.errors import Invalid, NotFound, OverLimit, Rejected
from shared.folds.ids import firing_id
from shared.platform.identity import Identity
from shared.platform.packing import texts
from shared.platform.postgres import Connection, Reads, one
from shared.rpc.bounds import rules_broken

PER_TENANT_MAX = 1000
"""How many schedules of a tenant may fire or be paused at the same time."""


class StoredSchedule(Struct, frozen=True):
    """A row of the table. `due_at` is the time of the next firing, `fired_at` that of the last."""

    tenant: str
    schedule_id: str
    cron: str
    time_zone: str
    catch_up: str
    status: str
    due_at: datetime | None
    fired_at: datetime | None
    type: str
    category: str
    aggregate_id: str
    fingerprint: bytes
    payload: bytes
    user_id: str
    correlation_id: str
    created_at: datetime
    changed_at: datetime
    changed_by: str
    problem: str


_COLUMNS: LiteralString = """s.tenant, s.schedule_id::text, s.cron, s.time_zone, s.catch_up, s.status, s.due_at, s.fired_at,
  s.type, s.category, s.aggregate_id, s.fingerprint, {payload}, s.user_id, s.correlation_id::text, s.created_at, s.changed_at,
  s.changed_by, s.problem"""


class Recurring:
    """Writes and reads the schedules of callers' tenants."""

    def __init__(self, database: Reads, *, live_max: int = PER_TENANT_MAX) -> None:
        self._database = database
        self._live_max = live_max

    async def add(self, command: Command, cron: str, time_zone: str, catch_up: str) -> StoredSchedule:
        """Creates a schedule under the command's id; returns its row. A repeat changes nothing.

        Raises Invalid (HOLDS_A_SECRET, TIME_ZONE_UNKNOWN, CRON_INVALID, CRON_NEVER_FIRES, SCHEDULE_ID_REUSED, INVALID_REQUEST)
        OverLimit (TOO_MANY_SCHEDULES) or Rejected (TENANT_CLOSED).
        """
        refuse_secret(command)
        if command.expected_version is not None:
            raise rules_broken(("command.options.expected_version", "must not be set: the firings change the version"))
        times, sender = read_cron(cron, time_zone), command.sender
        async with self._database.connection() as connection:
            first = first_time(times, await _now(connection))
            with refused_if_closed():
                (is_there,) = await one(
                    connection,
                    "SELECT create_schedule(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s::integer)",
                    (
                        *(sender.tenant, command.key[1], times.expression, time_zone, catch_up, first),
                        *(command.type, command.aggregate[1], command.aggregate[2], command.fingerprint, command.payload),
                        *(
                            sender.user_id,
                            texts(sorted(sender.roles)),
                            command.correlation_id,
                            sender.traceparent,
                            self._live_max,
                        ),
                    ),
                )
            if not is_there:
                raise OverLimit("TOO_MANY_SCHEDULES", f"this tenant has {self._live_max} schedules already")
            row = await read_schedule(connection, command.key)
        asked = (command.fingerprint, times.expression, time_zone, catch_up)
        if (row.fingerprint, row.cron, row.time_zone, row.catch_up) != asked:
            raise Invalid("SCHEDULE_ID_REUSED", "this id is that of a schedule with another content")
        return row

    async def get(self, identity: Identity, schedule_id: str) -> StoredSchedule:
        """A schedule of the caller's. Raises NotFound (SCHEDULE_NOT_FOUND)."""
        async with self._database.connection() as connection:
            return await _theirs(connection, identity, schedule_id)

    async def pause(self, identity: Identity, schedule_id: str) -> StoredSchedule:
        """Stops a schedule until it is resumed, and cancels the firings that wait; returns its row.

        Raises NotFound (SCHEDULE_NOT_FOUND) or Rejected (SCHEDULE_ENDED).
        """
        return await self._stop(identity, schedule_id, "paused")

    async def end(self, identity: Identity, schedule_id: str) -> StoredSchedule:
        """Ends a schedule for good, and cancels the firings that wait; returns its row. Raises NotFound (SCHEDULE_NOT_FOUND)."""
        return await self._stop(identity, schedule_id, "ended")

    async def resume(self, identity: Identity, schedule_id: str) -> StoredSchedule:
        """Goes on with the first time from now on; returns the row.

        Raises NotFound (SCHEDULE_NOT_FOUND), Rejected (SCHEDULE_ENDED) or Invalid, if this release does not understand the
        expression or the zone.
        """
        async with self._database.connection() as connection:
            row = await _theirs(connection, identity, schedule_id)
            due_at = first_time(read_cron(row.cron, row.time_zone), await _now(connection))
            await change(connection, (row.tenant, row.schedule_id), "active", due_at=due_at, by=identity.user_id)
            return await _standing(connection, (row.tenant, row.schedule_id), "active")

    async def page(
        self, identity: Identity, *, ended: bool, hidden: Sequence[str], after: tuple[datetime, str] | None, limit: int
    ) -> list[StoredSchedule]:
        """Up to `limit` schedules of the caller's, the newest first, without those of `hidden` categories."""
        query, parameters = listing(
            identity.tenant, "" if _is_admin(identity) else identity.user_id, ended=ended, hidden=hidden, after=after, limit=limit
        )
        async with self._database.connection() as connection:
            cursor = await connection.execute(query, parameters)
            return [StoredSchedule(*row) for row in await cursor.fetchall()]

    async def last_firings(self, rows: Sequence[StoredSchedule]) -> Mapping[CommandKey, StoredCommand]:
        """The last firings of schedules as the log has them, by tenant and schedule id, as far as it keeps them."""
        ids = {
            (row.tenant, firing_id(row.schedule_id, row.fired_at)): (row.tenant, row.schedule_id) for row in rows if row.fired_at
        }
        if not ids:
            return {}
        async with self._database.connection() as connection:
            return {ids[key]: found for key, found in (await read_commands(connection, list(ids))).items()}

    async def _stop(self, identity: Identity, schedule_id: str, status: str) -> StoredSchedule:
        async with self._database.connection() as connection:
            row = await _theirs(connection, identity, schedule_id)
            key = row.tenant, row.schedule_id
            await change(connection, key, status, by=identity.user_id)
            row = await _standing(connection, key, status)
            cursor = await connection.execute(WAITING, key)
            waiting = [command_id for (command_id,) in await cursor.fetchall()]
            for command_id in waiting:
                await cancel_waiting(connection, (row.tenant, command_id), identity)
            return row


# Whatever their time is now: a firing may have been rescheduled. Read from the index of causes, of which the log keeps as many
# as the schedule has fired.
WAITING: LiteralString = """
SELECT command_id::text FROM commands
WHERE tenant = %s AND causation_id = %s::uuid AND status || '' = 'scheduled'
ORDER BY received_at
"""
_LISTED_PAYLOAD: LiteralString = f"CASE WHEN octet_length(s.payload) <= {LISTED_BYTES_MAX} THEN s.payload ELSE '' END"
_LIVE: LiteralString = "s.status <> 'ended'"
_ENDED: LiteralString = "s.status = 'ended'"


def listing(
    tenant: str, user_id: str, *, ended: bool, hidden: Sequence[str], after: tuple[datetime, str] | None, limit: int
) -> tuple[LiteralString, dict[str, Any]]:
    """The query of a list and its parameters: one read of one index, from the newest row on. `user_id`: only that user's.

    A payload above LISTED_BYTES_MAX is empty, as in the list of commands.
    """
    parameters: dict[str, Any] = {"tenant": tenant, "limit": limit}
    conditions: list[LiteralString] = ["s.tenant = %(tenant)s", _ENDED if ended else _LIVE]
    if user_id:
        conditions.append("s.user_id = %(user_id)s")
        parameters["user_id"] = user_id
    if hidden:
        conditions.append("s.category <> ALL(%(hidden)s)")
        parameters["hidden"] = list(hidden)
    if after is not None:
        conditions.append("(s.created_at, s.schedule_id) < (%(after_at)s, %(after_id)s::uuid)")
        parameters["after_at"], parameters["after_id"] = after
    columns = _COLUMNS.format(payload=_LISTED_PAYLOAD)
    query: LiteralString = (
        f"SELECT {columns} FROM schedules s WHERE {' AND '.join(conditions)}"  # noqa: S608 - of literals alone
        " ORDER BY s.created_at DESC, s.schedule_id DESC LIMIT %(limit)s"
    )
    return query, parameters


async def list_tenant(connection: Connection, tenant: str, *, after: str, limit: int) -> list[StoredSchedule]:
    """Up to `limit` schedules of a tenant by id, behind `after` if that is given. A payload above LISTED_BYTES_MAX is empty."""
    columns = _COLUMNS.format(payload=_LISTED_PAYLOAD)
    behind: LiteralString = "AND s.schedule_id > %s::uuid" if after else ""
    query: LiteralString = (
        f"SELECT {columns} FROM schedules s WHERE s.tenant = %s {behind}"  # noqa: S608 - of literals alone
        " ORDER BY s.schedule_id LIMIT %s"
    )
    cursor = await connection.execute(query, (tenant, *filter(None, (after,)), limit))
    return [StoredSchedule(*row) for row in await cursor.fetchall()]


async def read_schedule(connection: Connection, key: CommandKey) -> StoredSchedule:
    """A schedule. Raises NotFound (SCHEDULE_NOT_FOUND)."""
    query: LiteralString = "SELECT {} FROM schedules s WHERE s.tenant = %s AND s.schedule_id = %s::uuid"
    cursor = await connection.execute(query.format(_COLUMNS.format(payload="s.payload")), key)
    rows = await cursor.fetchall()
    if not rows:
        raise _not_found()
    return StoredSchedule(*rows[0])


async def _theirs(connection: Connection, identity: Identity, schedule_id: str) -> StoredSchedule:
    """A schedule of the caller's tenant that the caller may see. Raises NotFound."""
    row = await read_schedule(connection, (identity.tenant, schedule_id))
    if not _is_admin(identity) and row.user_id != identity.user_id:
        raise _not_found()
    return row


async def _standing(connection: Connection, key: CommandKey, status: str) -> StoredSchedule:
    """The row behind a change. Raises Rejected (SCHEDULE_ENDED) if it has ended and was to have another status."""
    row = await read_schedule(connection, key)
    if row.status == "ended" and status != "ended":
        raise Rejected("SCHEDULE_ENDED", "the schedule has ended")
    return row


async def _now(connection: Connection) -> datetime:
    """The database's time, by which firings are released."""
    now: datetime
    (now,) = await one(connection, "SELECT clock_timestamp()")
    return now


def _is_admin(identity: Identity) -> bool:
    return not ADMINS.isdisjoint(identity.roles)


def _not_found() -> NotFound:
    return NotFound("SCHEDULE_NOT_FOUND", "there is no schedule with this id")
