"""What operators see of processes, and how they let them go on: retry, cancel; after a restore, accept the new history.

Each action is a turn (`shared/processes/turn.py`). An action that is repeated finds nothing to do, or sends the same commands
again under the same ids. What takes more than one person or concerns a whole type is in `shared/processes/steering.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from shared.folds.delivery import Announcements
from shared.folds.errors import Code, Refusal, Rejected
from shared.folds.process import CANCELLED_BY_OPERATOR, ProcessDefinition
from shared.folds.upcasting import NONE, Upcasters
from shared.line import checkpoint as checkpoints
from shared.line import forgotten
from shared.line.follower import Line
from shared.line.standing import State
from shared.platform.clock import utc_now
from shared.platform.packing import texts, timestamps
from shared.platform.postgres import Reads, take_time
from shared.processes import delivery_backlog, history, parked, pending, runners, store, switches
from shared.processes.delivery_backlog import Backlog
from shared.processes.diagram import Arrow, explore
from shared.processes.history import Revision
from shared.processes.pending import Acknowledgement, Pending
from shared.processes.process_type import process_types
from shared.processes.records import FOLD_FAILED, CommandResult, HistoryEntry, Process, ProcessKey, ProcessStatus
from shared.processes.round import NO_ANNOUNCEMENTS, Round
from shared.processes.runner import CHECKPOINT
from shared.processes.runners import Runner
from shared.processes.turn import Turns, process_by_id, process_of, retry
from shared.rpc.status import to_status

_UNIX = datetime(1970, 1, 1, tzinfo=UTC)

_LIST = """
SELECT p.tenant, p.type, p.process_id, p.state, p.schema, p.status, p.trouble, p.attention, p.phase, p.correlation_id,
  p.causation_id, p.on_behalf_of, p.traceparent, p.attempts, p.entries, p.started_at, p.moved_at
FROM processes p
WHERE (p.started_at, p.tenant, p.type, p.process_id) < (%(at)s, %(tenant_at)s, %(type_at)s, %(id_at)s)
  AND (%(tenant)s = '' OR p.tenant = %(tenant)s) AND (%(type)s = '' OR p.type = %(type)s)
  AND (%(status)s = '' OR p.status = %(status)s) AND (%(trouble)s = '' OR p.trouble = %(trouble)s)
"""
_LIST_OPEN = " AND (p.status <> 'ended' OR p.trouble <> '' OR p.attention <> '')"
_LIST_ATTENTION = """
  AND (p.trouble <> '' OR p.attention <> '' OR p.status = 'running' AND EXISTS (
    SELECT FROM unnest(%(kinds)s::text[], %(before)s::timestamptz[]) AS k (type, before)
    WHERE k.type = p.type AND p.moved_at < k.before))
"""
_LIST_ACKNOWLEDGED = """
  AND (p.tenant, p.type, p.process_id) IN (
    SELECT h.tenant, h.type, h.process_id FROM process_history h WHERE h.kind = 'operator' AND h.name = 'confirm')
"""
_LIST_ORDER = " ORDER BY p.started_at DESC, p.tenant DESC, p.type DESC, p.process_id DESC LIMIT %(limit)s"


class _Cancelled(Refusal):
    """The answer that a process gets for a command that an operator cancelled."""

    code = Code.CANCELLED


class Place(NamedTuple):
    """The end of a page: start time of its last process, in microseconds since 1970, and its key."""

    started_us: int
    tenant: str
    type: str
    process_id: str


@dataclass(frozen=True, slots=True)
class Case:
    """A process with its history, its commands without an answer, its timers, and the acknowledgement that was asked for.

    `arrows` is the state diagram of its type, empty if that is not known.
    """

    process: Process
    history: Sequence[HistoryEntry]
    commands: Sequence[Pending]
    timers: Sequence[tuple[str, datetime]]
    acknowledgement: Acknowledgement | None
    arrows: Sequence[Arrow]


class ProcessAdmin:
    """Answers operators, beside the leader or anywhere else."""

    def __init__(
        self,
        reads: Reads,
        managers: Iterable[ProcessDefinition[Any]],
        shard: int,
        *,
        clock: Callable[[], datetime] = utc_now,
        wake: Callable[[], None] = lambda: None,
        announcements: Announcements = NO_ANNOUNCEMENTS,
        line: Line | None = None,
        upcasters: Upcasters = NONE,
    ) -> None:
        """`wake` is called when there is something to send; a leader in another instance finds it within a second.

        `line` is the event store, which `accept_history` reads.
        """
        self._reads = reads
        self._kinds = process_types(managers, upcasters)
        self._diagrams: dict[str, Sequence[Arrow]] = {}
        self._shard = shard
        self._clock = clock
        self._wake = wake
        self._announcements = announcements
        self._line = line
        self.turns = Turns(reads, self._kinds, shard, clock, announcements)

    def is_stuck(self, process: Process) -> bool:
        """Whether a process is running and has not moved for longer than `stuck_after` of its type."""
        kind = self._kinds.get(process.type)
        return (
            process.status == ProcessStatus.RUNNING
            and kind is not None
            and self._clock() - process.moved_at > kind.manager.stuck_after
        )

    def place(self, process: Process) -> Place:
        """The place of a process in the list."""
        return Place((process.started_at - _UNIX) // timedelta(microseconds=1), *process.key)

    async def find(
        self,
        limit: int,
        after: Place | None,
        *,
        tenant: str = "",
        type_: str = "",
        status: str = "",
        trouble: str = "",
        attention: bool = False,
        acknowledged: bool = False,
    ) -> Sequence[Process]:
        """Processes, newest first, behind `after`. With `attention`, only those that an operator should look at.

        With `acknowledged`, only those with something that two people have acknowledged. `trouble` is the reason why they
        are parked.
        """
        query = _LIST
        if attention or status in (ProcessStatus.RUNNING, ProcessStatus.PARKED):
            query += _LIST_OPEN
        if attention:
            query += _LIST_ATTENTION
        if acknowledged:
            query += _LIST_ACKNOWLEDGED
        now = self._clock()
        kinds = [(name, now - kind.manager.stuck_after) for name, kind in self._kinds.items()]
        parameters = {
            "at": datetime.max.replace(tzinfo=UTC) if after is None else _UNIX + timedelta(microseconds=after.started_us),
            "tenant_at": "" if after is None else after.tenant,
            "type_at": "" if after is None else after.type,
            "id_at": "" if after is None else after.process_id,
            "tenant": tenant,
            "type": type_,
            "status": status,
            "trouble": trouble,
            "kinds": texts([name for name, _ in kinds]),
            "before": timestamps([before for _, before in kinds]),
            "limit": limit,
        }
        async with self._reads.connection() as connection:
            cursor = await connection.execute(query + _LIST_ORDER, parameters)
            return [Process(*row) for row in await cursor.fetchall()]

    async def runners(self) -> list[Runner]:
        """How far the runner of each shard has followed the line, and whether it goes on."""
        async with self._reads.connection() as connection:
            return await runners.read(connection, self._shard, self._clock())

    async def backlog(self) -> Backlog:
        """The deliveries that have not arrived."""
        async with self._reads.connection() as connection:
            return await delivery_backlog.read(connection)

    async def forgotten(self, tenant: str) -> dict[str, int]:
        """How many rows of a closed tenant have gone, by table; empty if its end was not met yet."""
        async with self._reads.connection() as connection:
            return await forgotten.read(connection, self._shard, tenant)

    async def accept_history(self, user_id: str) -> Revision:
        """Lets a diverged runner go on with the line as it is now; see `shared/processes/history.py`.

        Raises Rejected (NOT_DIVERGED, CHECKPOINT_MOVED), Unavailable if the store cannot be read.
        """
        assert self._line is not None, "this desk knows no event store"
        [standing] = [it.standing for it in await self.runners() if it.standing.shard == self._shard]
        history.refuse_unless_diverged(standing.state is State.DIVERGED)
        before = standing.checkpoint
        async with self._reads.connection() as connection:
            found = await history.find(connection, self._line, before)
            async with connection.transaction():
                await take_time(connection, history.TRANSACTION_S)
                if not await checkpoints.accept(connection, CHECKPOINT, self._shard, before, found.common.at):
                    raise Rejected("CHECKPOINT_MOVED", "somebody else has let it go on meanwhile")
                processes = await store.read(await store.select(connection, found.entries)) if found.entries else {}
                await switches.delete_behind(connection, self._shard, found.common.at.position)
                off = await switches.load(connection, self._shard)
                done = Round(self._kinds, self._clock(), processes, self._announcements.without(off))
                revised, commands = await history.revise(connection, done, found, user_id)
                await parked.delete_behind(connection, CHECKPOINT, self._shard, found.common.at.position)
                await store.write(connection, done, due_at=done.now, handed_out=False)
        done.log_defects()
        self._wake()
        return Revision(before, found.common, revised, commands)

    async def get(self, key: ProcessKey) -> Case:
        """One process; without a type, the only one of the id.

        Raises NotFound (PROCESS_NOT_FOUND), Rejected (PROCESS_AMBIGUOUS).
        """
        async with self._reads.connection() as connection, connection.transaction():
            # One snapshot for all four queries, so that they agree if the process moves meanwhile.
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            process = await (process_of(connection, key) if key[1] else process_by_id(connection, key, self._kinds))
            key = process.key
            told, commands = await pending.history_of(connection, key), await pending.commands_of(connection, key)
            timers, asked = await pending.timers_of(connection, key), await pending.acknowledgement_of(connection, key)
            return Case(process, told, commands, timers, asked, self._arrows(process.type))

    def _arrows(self, type_: str) -> Sequence[Arrow]:
        """The state diagram of a type, found when it is first asked for."""
        if type_ in self._kinds and type_ not in self._diagrams:
            self._diagrams[type_] = explore(self._kinds[type_]).arrows
        return self._diagrams.get(type_, ())

    async def retry(self, key: ProcessKey, user_id: str) -> Process:
        """Lets a process go on: replays its waiting inputs and sends its commands at once; returns the process.

        A command that was given up gets a new attempt with a new id, if it was certainly never carried out; else it keeps
        its id, under which it cannot be carried out twice. Raises NotFound (PROCESS_NOT_FOUND), Rejected
        (NOTHING_TO_RETRY).
        """
        async with self.turns.one(key) as (connection, process, commands, done):
            await retry(connection, done, process, commands, user_id)
        self._wake()
        return process

    async def cancel(self, key: ProcessKey, user_id: str) -> Process:
        """Cancels the commands that wait; the process gets the refusal CANCELLED_BY_OPERATOR for each. Returns the process.

        Raises NotFound (PROCESS_NOT_FOUND), Rejected (PROCESS_ENDED, NOTHING_TO_CANCEL, MAY_HAVE_HAPPENED).
        """
        async with self.turns.one(key) as (connection, process, commands, done):
            if process.status == ProcessStatus.ENDED:
                raise Rejected("PROCESS_ENDED", "the process has ended")
            if not commands:
                raise Rejected("NOTHING_TO_CANCEL", "the process waits for no command")
            if sent := [it.command.step for it in commands if it.may_have_happened]:
                text = "a command that was sent and not answered may have been carried out; retry it until it is answered"
                raise Rejected("MAY_HAVE_HAPPENED", text, steps=", ".join(sent))
            done.operator(process, "cancel", user_id)
            if process.trouble != FOLD_FAILED:
                process.trouble, process.status = "", ProcessStatus.RUNNING
            error = to_status(_Cancelled(CANCELLED_BY_OPERATOR, "an operator took the command back"))
            for it in commands:
                await pending.delete_command(connection, it.command)
                done.answer(CommandResult(it.command, error, CANCELLED_BY_OPERATOR))
        self._wake()
        return process
