"""Runs processes in rounds. A round takes all events, answers and due timers that have arrived, in one transaction.

    1. The fence: the checkpoint moves on, or is found unmoved.
    2. One query reads the processes that the round changes. Answered commands and fired timers are deleted; an answer or
       a timer whose row is gone already is ignored.
    3. The folds run in memory.
    4. Processes, commands, timers, histories and deliveries are written, with one statement for each table; commit.
    5. The dispatcher sends the new commands. Their answers belong to a later round.

A round of events and answers begins with 3, on processes that the runner remembers, and does all the rest in one statement
(`one_statement.py`). If that finds the memory wrong, nothing is saved, and the round begins again with 1.

Inputs that arrive while a round is written wait for the next round. So under load rounds grow, and each input costs less.

Killed anywhere, what is left? The whole round, or nothing of it. The next leader sends a command that was under way again,
under the same id, and gets its first answer. Two at once: the fence orders them, and refuses whoever leads no more, by the
number that each leader raises before it begins (`term`). Should both believe to lead, each input counts once all the same: the
checkpoint has moved, or the rows of answers and timers are deleted. The same input again: the event is not behind the
checkpoint, and the answer or timer has no row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from shared.folds.delivery import Announcements, SwitchedOff
from shared.folds.process import ProcessDefinition
from shared.folds.upcasting import NONE, Upcasters
from shared.line import checkpoint as checkpoints
from shared.line.checkpoint import Checkpoint, Fenced, Replaced
from shared.line.consumer import Consumer, ConsumerFailed, must_follow
from shared.line.ends import closed_in, is_end, purged_in
from shared.line.follower import EventBatch
from shared.platform.clock import utc_now
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger, trace_id
from shared.processes import forget, one_statement, parked, store, switches
from shared.processes.announce import of_event
from shared.processes.dispatcher import Dispatcher, Told
from shared.processes.history_archive import HistoryArchive
from shared.processes.inputs import Inputs, refused_mandatory
from shared.processes.one_statement import Memory, Stale
from shared.processes.parked import ParkedEvent, ParkedStreams, Unroutable, stream_of
from shared.processes.process_type import process_types
from shared.processes.records import CommandIdTaken, CommandResult, DeliveryFailure, PendingCommand, ProcessKey
from shared.processes.round import NO_ANNOUNCEMENTS, Round
from shared.processes.routes import Routes
from shared.processes.spans import round_of
from shared.processes.switches import OVERRIDE_SWITCHED, after, switched

log = logger(__name__)

CHECKPOINT = "processes"
TENANT_CLOSED = "TENANT_CLOSED"
"""What commands for a tenant that is gone are refused as."""

# A command that the dispatcher has not answered is sent again after this time.
ASKED_AGAIN_S = 60.0
# How often the runner looks for commands that somebody else made due, for example an operator.
LOOK_S = 1.0
# How often the runner checks whether the clock was set to another time.
CLOCK_CHECK_S = 0.2
TIMERS_MAX = 500
# While this many commands wait for the dispatcher, the runner takes no further events.
BACKLOG_MAX = 1000
# More processes and streams than this, parked within a minute, mean a bad release: the runner stops.
PARKED_MAX = 20

# The fence also reads what operators ordered, and who leads. The runner itself says when its trouble is over, see `_look`.
_MOVE = f"{checkpoints.MOVE_AND_KEEP_REASON.rstrip()} RETURNING paused, parked, term"
# A round from memory looks at the counter `parked` alone: it is raised as well, so that an earlier leader comes to read the term.
_BEGIN_TERM = _MOVE.replace("SET ", "SET term = term + 1, parked = parked + 1, ", 1)

There = dict[tuple[ProcessKey, UUID], bool]
"""The commands of a round's answers and failures that have a row, and whether the answer un-parks the process.

The process is part of the key, because two tenants may choose the same id for a process, and then command ids are equal.
"""


class ProcessesFailed(ConsumerFailed):
    """The runner stops, because going on would do more harm. Nothing of the round was written."""

    reason = "PROCESSES_FAILED"


class ProcessRunner(Consumer):
    """Follows the line for all processes of a shard, as long as it leads."""

    failed = ProcessesFailed

    def __init__(
        self,
        managers: Iterable[ProcessDefinition[Any]],
        shard: int,
        *,
        follow: Callable[[Checkpoint], AsyncGenerator[EventBatch, None]],
        connect: Callable[[], Awaitable[Connection]],
        dispatcher: Callable[[asyncio.Event], Dispatcher],
        clock: Callable[[], datetime] = utc_now,
        announcements: Announcements = NO_ANNOUNCEMENTS,
        upcasters: Upcasters = NONE,
        on_deliveries: Callable[[], None] = lambda: None,
        archive: HistoryArchive | None = None,
    ) -> None:
        """`dispatcher` makes a dispatcher that sets the given event when it has answers. There is one dispatcher at a time.

        `on_deliveries` is called when a round has written deliveries. Of a tenant that ends, what is in `archive` goes too.
        """
        super().__init__(CHECKPOINT, shard, connect)
        self._follow = follow
        self._make_dispatcher = dispatcher
        self._clock = clock
        # As registered; those that are off for a tenant are left out of `_announced`.
        self._announcements = announcements
        self._announced = announcements
        self._off: frozenset[SwitchedOff] = frozenset()
        self._on_deliveries = on_deliveries
        self._archive = archive
        self.follows = asyncio.Event()
        """Set while the event store is known to hold the history that our tables follow. Nothing is sent before that."""
        self.kinds = process_types(managers, upcasters)
        self._routes = Routes(self.kinds.values())
        # The types that an operator has paused, and the streams that wait behind an event that cannot be routed.
        self._paused: frozenset[str] = frozenset()
        self._parked = ParkedStreams(0, set())
        self._memory = Memory()
        # The number of our leadership; each that takes over raises it.
        self._term = 0
        self._news = asyncio.Event()
        self._recently = parked.Recently(PARKED_MAX)
        # Our position in the line. It is ahead of the checkpoint if no event since then belonged to a process.
        self._seen = Checkpoint()
        self._look_at = 0.0
        self._drift_s = 0.0
        # The reason in the checkpoint's row, that the write service refuses every call; None if it is not known yet.
        self._noted: str | None = None

    def wake(self) -> None:
        """Makes the runner look for due commands and timers now, rather than within LOOK_S."""
        self._look_at = 0.0
        self._news.set()

    async def _consume(self, connection: Connection) -> None:
        self._news, self._seen, self._look_at = asyncio.Event(), self.at, 0.0
        self._noted = None
        self._memory.clear()
        self._off = await switches.load(connection, self.shard)
        self._announced = self._announcements.without(self._off)
        dispatcher = self._make_dispatcher(self._news)
        async with aclosing(self._follow(self.at)) as batches:
            # Nothing is sent before the event store has shown that it holds the history that our processes follow.
            coming: asyncio.Future[EventBatch] = asyncio.ensure_future(anext(batches))
            sending: asyncio.Task[None] | None = None
            try:
                await asyncio.wait({coming})
                if not coming.exception():
                    await self._take_over(connection)
                    sending = asyncio.create_task(dispatcher.run())
                    self.follows.set()
                while True:
                    coming = await self._turn(connection, dispatcher, batches, coming)
                    if sending is not None and sending.done():
                        sending.result()
            finally:
                self.follows.clear()
                for task in (coming, sending):
                    if task is not None:
                        task.cancel()
                await asyncio.gather(*(task for task in (coming, sending) if task is not None), return_exceptions=True)

    async def _turn(
        self,
        connection: Connection,
        dispatcher: Dispatcher,
        batches: AsyncGenerator[EventBatch, None],
        coming: asyncio.Future[EventBatch],
    ) -> asyncio.Future[EventBatch]:
        """Waits for inputs and runs one round of all that have arrived. Returns the pending read of the line."""
        full = dispatcher.backlog >= BACKLOG_MAX
        await self._wait(None if full else coming)
        inputs = Inputs()
        came = coming.done() and not full
        if came:
            batch = coming.result()
            must_follow(batch, self._seen)
            inputs.batch = batch.events
            self._route(inputs)
            if self._announcements:
                self._announce(inputs)
            if (tenant := closed_in(batch.events)) is not None:
                await forget.forget(connection, self.name, self.shard, self.at, tenant, self._archive)
            elif (key := purged_in(batch.events)) is not None:
                types = [name for name, kind in self.kinds.items() if kind.manager.aggregate == key[1]]
                await forget.forget_aggregate(connection, self.name, self.shard, self.at, types, key, self._archive)
            if is_end(batch.events):
                self._parked = await parked.load(connection, self.name, self.shard)
                self._memory.clear()
            self._seen = batch.after
        for told in map(self._unless_refused, dispatcher.take()):
            if isinstance(told, CommandResult) and told.reason == TENANT_CLOSED:
                continue  # it goes with its process, at the event that ends the tenant
            if isinstance(told, DeliveryFailure):
                inputs.troubles.append(told)
                self._look_by(told.due_at)
            else:
                inputs.answers.append(told)
        looking = time.monotonic() >= self._look_at
        if looking:
            inputs.timers = await store.due_timers(connection, self._clock(), TIMERS_MAX, self._paused)
        if inputs or (looking and self._seen != self.at):
            with round_of(self.shard, [event.envelope for event in inputs.events], [it.command for it in inputs.answers]):
                commands = await self._round(connection, inputs)
            dispatcher.hold(self._paused)
            dispatcher.send(commands)
        if looking:
            await self._look(connection, dispatcher)
        # Asking for the next batch tells the follower that the last one was applied, so this comes after the round.
        return asyncio.ensure_future(anext(batches)) if came else coming

    def _unless_refused(self, told: Told) -> Told:
        """What was told; of a mandatory step that was refused, that it failed."""
        if not isinstance(told, CommandResult):
            return told
        return refused_mandatory(told, self.kinds.get(told.command.type), self._clock()) or told

    async def _wait(self, coming: asyncio.Future[EventBatch] | None) -> None:
        """Returns when there is an event or an answer, or when it is time to look for due commands and timers."""
        left_s = self._look_at - time.monotonic()
        if left_s > 0 and not self._news.is_set() and not (coming is not None and coming.done()):
            news = asyncio.ensure_future(self._news.wait())
            waiting: set[asyncio.Future[Any]] = {news} if coming is None else {news, coming}
            try:
                await asyncio.wait(waiting, timeout=min(left_s, CLOCK_CHECK_S), return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
        self._news.clear()
        # Waiting goes by the monotonic clock, the times of commands and timers by the other one, which may be set.
        drift_s = self._clock().timestamp() - time.monotonic()
        if abs(drift_s - self._drift_s) > CLOCK_CHECK_S / 2:
            self._drift_s, self._look_at = drift_s, 0.0

    def _route(self, inputs: Inputs) -> None:
        """Sorts the batch: events that belong to a process, and events to park. An event of another type is not decoded."""
        inputs.events, inputs.parked = [], []
        streams = self._parked.streams
        for envelope in inputs.batch:
            if not self._routes.concern(envelope):
                continue
            if streams and stream_of(envelope) in streams:
                inputs.parked.append(ParkedEvent(envelope, ""))
                continue
            try:
                inputs.events += self._routes.route(envelope)
            except Unroutable as error:
                inputs.parked.append(ParkedEvent(envelope, str(error)))
                streams.add(stream_of(envelope))

    def _announce(self, inputs: Inputs) -> None:
        """Adds the deliveries of the batch's events, each as announcements are switched at its place of the line."""
        for envelope in inputs.batch:
            if envelope.type == OVERRIDE_SWITCHED:
                inputs.switches.append(switch := switched(envelope))
                self._off = after(self._off, switch)
                self._announced = self._announcements.without(self._off)
            inputs.deliveries += of_event(self._announced, envelope)

    async def _round(self, connection: Connection, inputs: Inputs) -> list[PendingCommand]:
        """Takes the inputs, in one transaction; returns the commands to be sent. Raises Fenced or ProcessesFailed."""
        done = await self._from_memory(connection, inputs) or await self._from_tables(connection, inputs)
        self._moved(self._seen)
        self._memory.remember(done.changed.values())
        for timer_due_at in done.timers.values():
            if timer_due_at is not None:
                self._look_by(timer_due_at)
        done.log_defects()
        _tell(done, inputs.parked)
        if done.deliveries:
            self._on_deliveries()
        return [command for command in done.commands.values() if command.type not in self._paused]

    async def _from_memory(self, connection: Connection, inputs: Inputs) -> Round | None:
        """A round on the processes that we remember, saved in one statement; None if it has to read, and nothing was saved."""
        if inputs.parked or inputs.troubles or inputs.timers or inputs.switches or self._paused or self._noted:
            return None
        answers = {(it.command.key, it.command.command_id): it for it in inputs.answers if isinstance(it, CommandResult)}
        keys, known = inputs.keys(), self._memory.recall(inputs.keys())
        if len(answers) < len(inputs.answers) or any(it.command.key not in known for it in answers.values()):
            return None
        done = Round(self.kinds, self._clock(), known, self._announced)
        self._fold(done, inputs, dict.fromkeys(answers, False), [])
        # A process that did not change has no new history, which would prove that it is as we remember it. And a fold may have
        # raised only because of what we remember.
        if done.defects or any(key not in done.changed for key in keys):
            return None
        done.deliveries += inputs.deliveries
        due_at = done.now + timedelta(seconds=ASKED_AGAIN_S)
        place = self.name, self.shard, self._parked.version, self.at, self._seen
        try:
            await one_statement.save(connection, *place, done, list(answers.values()), due_at)
        except Stale:
            self._memory.forget(keys)
            return None
        return done

    async def _from_tables(self, connection: Connection, inputs: Inputs) -> Round:
        """A round on what the tables say: one step to read, one to write. Raises Fenced or ProcessesFailed."""
        while True:
            keys = inputs.keys()
            async with connection.pipeline():
                moved = await self._fence(connection)
                processes = await store.select(connection, keys) if keys else None
                answered = await store.delete_answered(connection, inputs.answers) if inputs.answers else None
                troubled = await store.update_troubled(connection, inputs.troubles) if inputs.troubles else None
                fired = await store.delete_fired(connection, inputs.timers) if inputs.timers else None
            paused, version = await self._check(moved)
            if version == self._parked.version and (paused == self._paused or not inputs.timers):
                break
            # An operator has changed what is parked or paused: the inputs are sorted again before anything is folded.
            await connection.execute("ROLLBACK")
            self._paused, self._parked = paused, await parked.load(connection, self.name, self.shard)
            self._route(inputs)
            inputs.timers = [timer for timer in inputs.timers if timer.type not in paused]
        self._paused = paused
        done = Round(self.kinds, self._clock(), {} if processes is None else await store.read(processes), self._announced)
        done.deliveries += inputs.deliveries
        # Each command once: an answer that arrives twice counts once.
        rows = [row for cursor in (answered, troubled) if cursor is not None for row in await cursor.fetchall()]
        there: There = {((tenant, type_, process_id), id_): relieved for tenant, type_, process_id, id_, relieved in rows}
        timers = [] if fired is None else await fired.fetchall()
        self._fold(done, inputs, there, timers)
        newly = len(done.defects) + sum(bool(it.reason) for it in inputs.parked)
        if self._recently.too_many(newly):
            done.log_defects()
            raise ProcessesFailed(f"more than {PARKED_MAX} processes or streams were parked within a minute")
        due_at = done.now + timedelta(seconds=ASKED_AGAIN_S)
        async with connection.pipeline():
            await store.write(connection, done, due_at=due_at, handed_out=True, paused=paused)
            if inputs.parked:
                await parked.insert(connection, self.shard, inputs.parked, done.now)
            await switches.save(connection, self.shard, inputs.switches)
            await connection.execute("COMMIT")
        self._recently.add(newly)
        return done

    def _fold(self, done: Round, inputs: Inputs, there: There, timers: list[tuple[str, str, str, str]]) -> None:
        for answer in inputs.answers:
            if (name := (answer.command.key, answer.command.command_id)) in there:
                relieved = there.pop(name)
                if isinstance(answer, CommandIdTaken):
                    done.taken(answer.command, relieved=relieved)
                else:
                    done.answer(answer, relieved=relieved)
        for trouble in inputs.troubles:
            if (name := (trouble.command.key, trouble.command.command_id)) in there:
                del there[name]
                done.trouble(trouble)
        for tenant, type_, process_id, timer in timers:
            done.timer((tenant, type_, process_id), timer)
        for kind, process_id, event, envelope in inputs.events:
            done.event(kind, process_id, event, envelope)

    async def _fence(self, connection: Connection, move: str = _MOVE) -> Any:
        """Begins a transaction and moves the checkpoint to our position; `_check` tells whether that succeeded.

        An exception between here and the commit ends `_consume`, which closes the connection, so nothing is written.
        """
        await connection.execute("BEGIN")
        return await connection.execute(move, checkpoints.move(self.name, self.shard, self.at, self._seen))

    async def _check(self, moved: Any, *, begins: bool = False) -> tuple[frozenset[str], int]:
        """The paused types, and the counter of what is parked. Raises Fenced if another process leads.

        One that leads and has written nothing yet has left the checkpoint where it was; it has raised the term.
        """
        row = await moved.fetchone()
        if row is None:
            raise Fenced(f"{self.name} is not at position {self.at.position}")
        if begins:
            self._term = row[2]
        elif row[2] != self._term:
            raise Replaced(f"{self.name} is led by another since")
        return frozenset(row[0]), row[1]

    async def _hand_out(self, connection: Connection, now: datetime, room: int) -> list[PendingCommand]:
        """The commands that are due. Their rows say that they were sent, before they are."""
        self._paused, _ = await self._check(await self._fence(connection))
        claimed = await store.claim(connection, now, now + timedelta(seconds=ASKED_AGAIN_S), room, self._paused)
        await connection.execute("COMMIT")
        self._moved(self._seen)
        return claimed

    async def _take_over(self, connection: Connection) -> None:
        """Begins a term. Makes the commands due at once that an earlier leader sent and that have no answer in our tables."""
        self._paused, _ = await self._check(await self._fence(connection, _BEGIN_TERM), begins=True)
        self._parked = await parked.load(connection, self.name, self.shard)
        await store.reclaim(connection, self._clock())
        await connection.execute("COMMIT")
        self._moved(self._seen)

    async def _look(self, connection: Connection, dispatcher: Dispatcher) -> None:
        """Sends due commands, as many as fit, notes if every call is refused, and computes when to look again."""
        now = self._clock()
        command_due, timer_due, paused = await store.next_due(connection, self.name, self.shard)
        self._paused = frozenset(paused)
        dispatcher.hold(self._paused)
        room = BACKLOG_MAX - dispatcher.backlog
        self._look_at = time.monotonic() + LOOK_S
        if command_due is not None and command_due <= now and room > 0:
            claimed = await self._hand_out(connection, now, room)
            dispatcher.send(claimed)
            command_due = now if len(claimed) == room else None
        for due_at in (command_due, timer_due):
            if due_at is not None and due_at > now:
                self._look_by(due_at)
        if timer_due is not None and timer_due <= now:
            self._look_at = 0.0
        if (standstill := dispatcher.standstill()) != self._noted:
            await checkpoints.note(connection, self.name, self.shard, self.at, standstill)
            self._noted = standstill

    def _look_by(self, due_at: datetime) -> None:
        left_s = (due_at - self._clock()).total_seconds()
        self._look_at = min(self._look_at, time.monotonic() + max(left_s, 0.0))


def _tell(done: Round, events: Iterable[ParkedEvent]) -> None:
    """Logs each process that began or ended, with its trace id, and each event that parked its stream."""
    for envelope, reason in events:
        if reason:
            facts = {"tenant": envelope.tenant, "event_id": envelope.event_id, "type": envelope.type}
            log.error("event_parked", reason=reason, position=envelope.position, **facts)
    for process in done.changed.values():
        facts = {"process": process.type, "process_id": process.process_id, "trace_id": trace_id(process.traceparent)}
        if process.started_at == done.now:
            log.info("process_began", tenant=process.tenant, **facts)
        if process.key in done.ended:
            log.info("process_ended", tenant=process.tenant, phase=process.phase, attention=process.attention, **facts)
