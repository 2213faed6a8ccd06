"""Commands for later: the log keeps them as `scheduled`, and the scheduler sends them when they are due.

A scheduled command is a row of the command log under its own id. When it is due it goes to the committer like any other,
under the identity that scheduled it, and the append puts the row of its outcome in place of the waiting row. That outcome
is the claim: of two replicas that fire a command at once, or of a firing and a cancellation, exactly one finds the waiting
row. Killed before the append: the row still waits, and is fired again. Killed after it: there is nothing left to fire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, LiteralString

from google.protobuf.message import DecodeError

from shared.commands.closed import refused_if_closed
from shared.commands.committer import Committer
from shared.commands.cron import MISSED_AFTER, Away
from shared.commands.decide import Command, Sender
from shared.commands.due import FIRST, DueCommand, Place, next_due_in_s, read_due, turns_of_commands
from shared.commands.firing import release_due, turns_of_schedules
from shared.commands.intake import PendingReply
from shared.commands.log import CommandKey, StoredCommand, read_commands
from shared.folds.errors import Code, Forbidden, InternalError, Invalid, NotFound, OverLimit, Refusal, Rejected, ReleaseTooOld
from shared.platform.identity import Identity, Role
from shared.platform.metrics import Metrics
from shared.platform.packing import texts
from shared.platform.postgres import Connection, Reads, is_trouble, one
from shared.platform.probe import DatabaseProbe
from shared.platform.rounds import Hindrances, rounds
from shared.platform.telemetry import logger
from shared.platform.watched import Values, watch
from shared.rpc.status import to_status
from shared.rpc.validation import unknown_fields

POLL_S = 0.1
"""How often the scheduler looks for what other replicas have scheduled. It knows of nothing sooner."""

RETRY_S = 0.25
BATCH_MAX = 256
PENDING_PER_TENANT_MAX = 1_000_000
ALLOWANCES_MAX = 10_000
NEWER_WAITS_S = 3600.0
"""For so long a due command waits whose type or fields this release does not know: another replica may be of a newer one."""
NEWER_MAX = 1000
"""Of so many such commands it is known when they were met first. Others are met again and again, and end when these have."""

ADMINS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR})

log = logger(__name__)


class _OfNewerRelease(Exception):
    """The type of a due command, or one of its fields, is not known: a replica of a newer release took it."""


class Schedule:
    """Writes what waits: each call is one statement that changes one row."""

    def __init__(self, database: Reads, *, pending_max: int = PENDING_PER_TENANT_MAX) -> None:
        self._database = database
        self._pending_max = pending_max
        # How many commands each tenant may schedule before it is counted again.
        self._allowances: dict[str, int] = {}

    async def add(self, command: Command, due_at: datetime) -> StoredCommand:
        """Schedules a command; returns its row. A repeat changes nothing and returns the row that is there.

        Raises Invalid (HOLDS_A_SECRET, COMMAND_ID_REUSED), OverLimit (TOO_MANY_SCHEDULED) or Rejected (TENANT_CLOSED).
        """
        refuse_secret(command)
        sender = command.sender
        async with self._database.connection() as connection:
            await self._refuse_if_full(connection, sender.tenant)
            with refused_if_closed():
                await connection.execute(
                    "SELECT schedule_command(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                    (
                        *(sender.tenant, command.key[1], command.type, command.aggregate[1], command.aggregate[2]),
                        *(command.fingerprint, command.payload, sender.user_id, sender.on_behalf_of),
                        *(command.correlation_id, sender.causation_id, sender.traceparent, command.received_at, due_at),
                        *(texts(sorted(sender.roles)), command.expected_version),
                    ),
                )
            row = await _row(connection, command.key)
        if row.fingerprint != command.fingerprint:
            raise Invalid("COMMAND_ID_REUSED", "this command id was used for another content")
        return row

    async def move(self, identity: Identity, command_id: str, due_at: datetime) -> StoredCommand:
        """Puts a scheduled command at another time; returns its row. Raises NotFound or Rejected (NOT_SCHEDULED)."""
        key = (identity.tenant, command_id)
        async with self._database.connection() as connection:
            await _refuse_unless_theirs(connection, identity, key)
            await connection.execute("SELECT reschedule_command(%s, %s, %s)", (*key, due_at))
            row = await _row(connection, key)
        if row.status != "scheduled":
            raise _not_scheduled(row)
        return row

    async def cancel(self, identity: Identity, command_id: str) -> StoredCommand:
        """Cancels a scheduled command; returns its row, also if it was cancelled already.

        Raises NotFound (COMMAND_NOT_FOUND) or Rejected (NOT_SCHEDULED), also if it has just run.
        """
        key = (identity.tenant, command_id)
        async with self._database.connection() as connection:
            await _refuse_unless_theirs(connection, identity, key)
            await cancel_waiting(connection, key, identity)
            row = await _row(connection, key)
        if row.status != "cancelled":
            raise _not_scheduled(row)
        return row

    async def _refuse_if_full(self, connection: Connection, tenant: str) -> None:
        """Counts a tenant's pending commands once in a hundredth of the limit, since that reads as many index entries.

        With several replicas a tenant can exceed the limit by a hundredth for each.
        """
        left = self._allowances.pop(tenant, 0)
        if left == 0:
            cursor = await connection.execute(
                """SELECT count(*) FROM (SELECT FROM commands WHERE tenant = %s AND status = 'scheduled' LIMIT %s) AS pending""",
                (tenant, self._pending_max),
            )
            [(pending,)] = await cursor.fetchall()
            if pending >= self._pending_max:
                raise OverLimit("TOO_MANY_SCHEDULED", f"{self._pending_max} commands of this tenant are scheduled already")
            left = min(self._pending_max - pending, max(self._pending_max // 100, 1))
        self._allowances[tenant] = left - 1
        while len(self._allowances) > ALLOWANCES_MAX:
            del self._allowances[next(iter(self._allowances))]


SEEN_EVERY_S = 5.0
"""So often a scheduler says that it is at work."""


class Scheduler:
    """Sends what is due to a committer, until cancelled.

    Several may run at once: it costs them conflicts, but each command runs once.
    """

    def __init__(self, database: Reads, committer: Committer) -> None:
        self._database = database
        self._committer = committer
        self._turns = turns_of_commands()
        self._turns_of_schedules = turns_of_schedules()
        # When a scheduler was last away, as far as it is known, and when this one last said that it is there.
        self._away: Away | None = None
        self._seen_at = float("-inf")
        # The due commands of a newer release, by when they were met first, as time.monotonic() tells.
        self._newer: dict[CommandKey, float] = {}
        # Behind which due command the next look begins, while more wait for a newer release than are remembered.
        self._behind: Place | None = None

    async def run(self) -> None:
        """Fires due commands in the order of their times. While the database is away it tries again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(rounds(Hindrances("scheduler_unseen"), self._be_seen, SEEN_EVERY_S))
            group.create_task(self._run())

    async def _run(self) -> None:
        pause_s = RETRY_S

        async def one_round() -> None:
            nonlocal pause_s
            pause_s = RETRY_S
            pause_s = await self._fire()

        await rounds(Hindrances("scheduler_waits"), one_round, lambda: pause_s)

    async def _fire(self) -> float:
        """Sends the next commands that are due and waits for them; returns how long there is nothing to do.

        Firings of recurring schedules that are due are released first, so that they are among these. An idle round asks one
        question in place of four: a system without load spent a fifth of its processor time on them.
        """
        async with self._database.connection() as connection:
            if (idle_s := await next_due_in_s(connection)) > 0:
                self._behind = None
                return min(idle_s, POLL_S)
            look_in_s = await self._release(connection)
            behind, self._behind = self._behind, None
            turns = self._turns if behind is None else None
            due, next_in_s = await read_due(connection, BATCH_MAX, turns, besides=self._waiting(), behind=behind)
        if not due:
            return min(next_in_s, look_in_s, POLL_S) if behind is None else RETRY_S
        commands: list[Command] = []
        passed_over = 0
        for row in due:
            try:
                commands.append(self._command(row))
            except Refusal as refusal:
                await self._end(row, "rejected", refusal)
            except _OfNewerRelease:
                passed_over += not await self._wait_or_end(row)
            except (DecodeError, ValueError):
                await self._end(row, "failed", InternalError())
        pause_s = 0.0
        for command, why, status in await self._submit(commands):
            if isinstance(why, ReleaseTooOld):
                passed_over += not self._defer(command.key)
            elif why.code is Code.UNAVAILABLE or why.retry_after_s is not None:
                pause_s = RETRY_S  # it was not decided, so its row still waits
            else:
                await self._end(command, status, why)
        if passed_over and len(due) == BATCH_MAX:
            self._behind = FIRST if behind is None else due[-1].place
        elif passed_over:
            pause_s = RETRY_S
        return pause_s

    def _waiting(self) -> set[CommandKey]:
        """The due commands that wait for a newer release."""
        since = time.monotonic() - NEWER_WAITS_S
        return {key for key, met_at in self._newer.items() if met_at > since}

    async def _wait_or_end(self, row: DueCommand) -> bool:
        """Ends a command that this release does not know if it has waited for long, else leaves it as `_defer` does."""
        if self._newer.pop(row.key, None) is not None:
            await self._end(row, "failed", Invalid("UNKNOWN_COMMAND", "no release knew the command within an hour of its time"))
            return True
        if remembered := self._defer(row.key):
            log.warning("scheduled_command_of_newer_release", command_id=row.command_id, tenant=row.tenant, type=row.type)
        return remembered

    def _defer(self, key: CommandKey) -> bool:
        """Leaves a command to a replica of a newer release; false if so many are left that this one is not remembered."""
        now = time.monotonic()
        self._newer.pop(key, None)
        if len(self._newer) >= NEWER_MAX:
            oldest = next(iter(self._newer))
            if now - self._newer[oldest] < 2 * NEWER_WAITS_S:
                return False
            del self._newer[oldest]  # it is due no more, or it would have been met again
        self._newer[key] = now
        return True

    async def _be_seen(self) -> None:
        async with self._database.connection() as connection:
            await self._seen(connection)

    async def _seen(self, connection: Connection) -> None:
        """Says that a scheduler is at work, and learns since when none was."""
        before, now = await one(connection, "SELECT * FROM scheduler_seen(%s)", (self._committer.shard,))
        if before is not None and (self._away is None or now - before > MISSED_AFTER):
            self._away = Away(before, now)
        self._seen_at = time.monotonic()

    async def _release(self, connection: Connection) -> float:
        """Releases firings; returns in how many seconds to look again. A defect in it holds up no other command."""
        try:
            # Who was stopped, or had no database, must know it before anything fires.
            if time.monotonic() - self._seen_at > 2 * SEEN_EVERY_S:
                await self._seen(connection)
            look_in_s = await release_due(connection, self._turns_of_schedules, self._away)
        except Exception as error:
            if is_trouble(error):
                raise
            log.error("firings_not_released", error=type(error).__name__)  # noqa: TRY400 - its text may hold a payload
            return RETRY_S
        return POLL_S if look_in_s is None else look_in_s

    async def _submit(self, commands: Sequence[Command]) -> list[tuple[Command, Refusal, str]]:
        """Sends commands in order; returns those without an outcome in the log, each with why and the status to give it.

        Each is submitted by itself: a tenant over its quota delays its own commands alone.
        """
        without: list[tuple[Command, Refusal, str]] = []
        replies: list[tuple[Command, PendingReply]] = []
        for command in commands:
            try:
                replies.append((command, self._committer.submit([[command]])))
            except Refusal as refusal:
                without.append((command, refusal, "rejected"))
        for command, reply in replies:
            [[outcome]] = await reply
            # An outcome in the log has the head it rests on; what only a newer release can decide has none.
            if outcome.refusal is not None and (not outcome.head or outcome.refusal.code is Code.UNAVAILABLE):
                without.append((command, outcome.refusal, outcome.status))
        return without

    def _command(self, row: DueCommand) -> Command:
        """The command as its sender would send it now.

        Raises Forbidden if its roles no longer suffice, and _OfNewerRelease.
        """
        route = self._committer.registry.route(row.type)
        if route is None:
            raise _OfNewerRelease
        roles = frozenset(Role(role) for role in row.roles)
        if route.roles.isdisjoint(roles):
            needed = ", ".join(sorted(route.roles))
            raise Forbidden("ROLE_MISSING", f"this needs one of the roles: {needed}", roles=needed)
        request = route.codec.message.FromString(row.payload)
        if any(unknown_fields(request)):
            raise _OfNewerRelease
        content: Any = route.codec.decode(request)
        return Command(
            key=(row.tenant, row.command_id),
            route=route,
            aggregate=(row.tenant, route.aggregate.category, route.id(content)),
            content=content,
            payload=row.payload,
            expected_version=row.expected_version,
            correlation_id=row.correlation_id,
            sender=Sender(row.tenant, row.user_id, row.on_behalf_of, roles, row.causation_id, row.traceparent),
            received_at=row.received_at,
            due_at=row.due_at,
        )

    async def _end(self, row: DueCommand | Command, status: str, refusal: Refusal) -> None:
        """Writes an outcome that no append has written, so that the command is not fired for ever."""
        key = row.key
        log.warning("scheduled_command_ended", command_id=key[1], tenant=key[0], status=status, reason=refusal.reason)
        async with self._database.connection() as connection:
            await _end(connection, key, status, refusal)


async def _row(connection: Connection, key: CommandKey) -> StoredCommand:
    found = await read_commands(connection, [key])
    if key not in found:
        raise _not_found()
    return found[key]


async def _end(connection: Connection, key: CommandKey, status: str, refusal: Refusal) -> None:
    error = to_status(refusal).SerializeToString()
    await connection.execute("SELECT end_scheduled_command(%s, %s, %s, %s)", (*key, status, error))


async def cancel_waiting(connection: Connection, key: CommandKey, identity: Identity) -> None:
    """Cancels a command that waits for its time; one that has run, or runs just now, stays what it is."""
    why = Rejected("COMMAND_CANCELLED", "the command was cancelled before its time", cancelled_by=identity.user_id)
    await _end(connection, key, "cancelled", why)


def refuse_secret(command: Command) -> None:
    """Raises Invalid (HOLDS_A_SECRET) for a command that the log does not keep whole."""
    if command.route.prepare is not None or command.route.codec.redacted:
        text = "a command with a secret cannot be scheduled: the log does not keep the secret"
        raise Invalid("HOLDS_A_SECRET", text, violations=(("command.type_url", "names a command with a secret"),))


async def _refuse_unless_theirs(connection: Connection, identity: Identity, key: CommandKey) -> None:
    if not may_see(identity, await _row(connection, key)):
        raise _not_found()


def may_see(identity: Identity, row: StoredCommand) -> bool:
    """Whether a caller may see and steer this command of the caller's tenant: a user only the user's own."""
    return not ADMINS.isdisjoint(identity.roles) or identity.user_id in (row.user_id, row.on_behalf_of)


def _not_found() -> NotFound:
    return NotFound("COMMAND_NOT_FOUND", "there is no command with this id")


def _not_scheduled(row: StoredCommand) -> Rejected:
    return Rejected("NOT_SCHEDULED", f"the command waits no more: it is {row.status}", status=row.status)


METRICS = {
    "foldline.schedule.overdue": (
        "1",
        "Scheduled commands, and schedules, that are due and have not run yet; each counted up to a thousand.",
    ),
    "foldline.schedule.overdue.age": ("s", "For how long the oldest of them has been due."),
}
_OVERDUE: LiteralString = """
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(due_at)), 0)::float8 FROM (
  (SELECT due_at FROM commands WHERE status = 'scheduled' AND due_at <= clock_timestamp() ORDER BY due_at, received_at LIMIT 1000)
  UNION ALL
  (SELECT due_at FROM schedules WHERE status = 'active' AND due_at <= clock_timestamp() ORDER BY due_at LIMIT 1000)
) AS late
"""


def watch_schedule(metrics: Metrics, probe: DatabaseProbe) -> None:
    """Makes gauges of the commands that are late."""

    async def ask() -> Values:
        [(count, age_s)] = await probe.rows(_OVERDUE)
        return {"foldline.schedule.overdue": [(count, {})], "foldline.schedule.overdue.age": [(age_s, {})]}

    watch(metrics, METRICS, ask)
