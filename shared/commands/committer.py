"""Group commit: while one batch of commands is being committed, the next one is decided.

Killed anywhere, a batch is in the database as a whole or not at all, and nobody was answered who is not in it. Two
committers at once (two replicas): the append function lets one in after the other, and what the second decided on a
world that has moved collides. The same command again: its outcome is in the command log and is given again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime

import structlog
from msgspec import Struct

from shared.commands import append as appending
from shared.commands import log as command_log
from shared.commands import states
from shared.commands.append import AppendConflict, Appended
from shared.commands.cache import Cache
from shared.commands.decide import BatchDecider, Command, Outcome, Plan, decide
from shared.commands.intake import CommandGroup, Intake, Limits, PendingReply
from shared.commands.log import CommandKey
from shared.commands.registry import CommandRegistry
from shared.commands.states import Versioned
from shared.folds.errors import InternalError, Unavailable
from shared.line import event_store
from shared.line.event_store import AggregateKey
from shared.platform import postgres
from shared.platform.postgres import Connection

# So many share the fixed cost of a commit well enough: of a crowd of twice as many, one half is decided while the other is
# committed. Fewer than FEW are not worth waiting for.
GATHER_TARGET, GATHER_MIN = 32, 3
GATHER_WAIT_S_EACH = 0.0005

log = structlog.get_logger()


class _Batch(Struct, eq=False):
    """Units on their way into one append, the first `decided` of which are decided already."""

    deciding: BatchDecider
    # What was cached when deciding began: if that is given up, so are the decisions.
    cache: Cache
    units: list[CommandGroup] = []
    decided: int = 0
    commands: int = 0
    size: int = 0

    def add(self, unit: CommandGroup) -> None:
        self.units.append(unit)
        self.commands += len(unit.commands)
        self.size += unit.size

    def has_room(self, unit: CommandGroup, limits: Limits) -> bool:
        """One unit always has."""
        return not self.units or (
            self.commands + len(unit.commands) <= limits.batch_commands_max and self.size + unit.size <= limits.batch_bytes_max
        )

    def decide(self, now: datetime) -> set[AggregateKey]:
        """Decides what is left, in order, as far as it goes; returns what all the rest lacks."""
        while self.decided < len(self.units):
            if not self.deciding.take(self.units[self.decided].open(), now):
                rest = [unit.open() for unit in self.units[self.decided :]]
                return decide(self.deciding.bus, rest, self.deciding.at, now).missing
            self.decided += 1
        return set()


class Committer:
    """Takes commands for one shard and answers each when it is durable."""

    def __init__(
        self,
        database_url: str,
        bus: CommandRegistry,
        *,
        shard: int,
        clock: Callable[[], datetime],
        committed: Callable[[int], None] = lambda head: None,
        limits: Limits | None = None,
    ) -> None:
        self.shard = shard
        self.epoch = ""
        self.bus = bus
        self._database_url = database_url
        self._clock = clock
        self._committed = committed
        self._limits = limits or Limits()
        self._intake = Intake(self._limits)
        self._connection: Connection | None = None
        self._cache = Cache(self._limits.cached_aggregates_max)
        # Commands wait in the next batch, decided, or behind it in the queue.
        self._next: _Batch | None = None
        self._queue: deque[CommandGroup] = deque()
        self._waiting = 0
        self._arrived = asyncio.Event()
        self._enough = asyncio.Event()
        self._wanted = 0
        self._closing = False

    # What callers see

    def submit(self, units: Sequence[list[Command]]) -> PendingReply:
        """Takes units of commands, each unit all or nothing; to be awaited for their outcomes, once they are durable.

        Raises OverLimit (QUEUE_FULL, TENANT_OVER_QUOTA) or Unavailable (SHUTTING_DOWN) before anything was taken.
        Whoever cancels or forgets the wait, what was taken is carried out.
        """
        if self._closing:
            raise Unavailable("SHUTTING_DOWN", "the service is shutting down")
        self._intake.refuse_if_full(units)
        waiter = PendingReply(asyncio.get_running_loop().create_future(), units)
        for commands in units:
            unit, is_new = self._intake.admit(commands)
            waiter.taken.append(unit)
            if is_new:
                self._queue.append(unit)
                self._waiting += len(unit.commands)
            if not unit.settled:
                waiter.remaining += 1
                unit.waiters.append(waiter)
        self._decide_ahead()
        waiter.one_done()
        self._arrived.set()
        if self._waiting >= self._wanted:
            self._enough.set()
        return waiter

    def close(self) -> None:
        """Takes nothing more and lets `run` end once everything taken is answered."""
        self._closing = True
        self._arrived.set()
        self._enough.set()

    # The loop

    async def run(self) -> None:
        """Commits batch after batch until closed."""
        while await self._gather():
            await self._commit(self._take_batch(), ahead=True)
        if self._connection is not None:
            await self._connection.close()

    async def _gather(self) -> bool:
        """Waits until there is a batch; False when closed and all is done.

        A lone caller never waits. Under load the callers of the last batch, answered a moment ago, are about to come
        back: waiting for as many as there were, beside those who came meanwhile, makes one batch of what would else
        become several, up to where a commit is cheap enough for each. They are let in and decided meanwhile, so no
        processor idles; how long that takes goes by how many they are. As long as some are still coming in, a slow
        machine is waited for; who comes later than that, comes alone.
        """
        self._wanted = min(self._wanted + self._waiting, GATHER_TARGET)
        worth_s = min((self._wanted - GATHER_MIN) * GATHER_WAIT_S_EACH, self._limits.gather_wait_s_max)
        loop = asyncio.get_running_loop()
        until = loop.time() + worth_s
        at_most_until, before = loop.time() + self._limits.gather_wait_s_max, 0
        while not self._waiting:
            if self._closing:
                return False
            self._arrived.clear()
            await self._arrived.wait()
        while before < self._waiting < self._wanted and loop.time() < until and not self._closing:
            before = self._waiting
            self._enough.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._enough.wait()
            until = min(loop.time() + worth_s / 2, at_most_until)
        return True

    def _take_batch(self) -> _Batch:
        """What is decided, and as much as there is room for of what waits behind it."""
        batch, self._next = self._next or self._batch(), None
        while self._queue and batch.has_room(self._queue[0], self._limits):
            batch.add(self._queue.popleft())
        self._waiting -= batch.commands
        self._wanted = batch.commands
        return batch

    def _batch(self, units: Sequence[CommandGroup] = (), *, after: Plan | None = None) -> _Batch:
        """A batch to decide on what is cached, and on what the plan before it will have changed."""
        cache, states = self._cache, after.states if after else {}

        def lookup(key: AggregateKey) -> Versioned | None:
            return states.get(key) or cache.get(key)

        batch = _Batch(BatchDecider(self.bus, lookup), cache)
        for unit in units:
            batch.add(unit)
        return batch

    def _decide_ahead(self) -> None:
        """Decides what waits, in order, until the next batch is full or an aggregate is not at hand.

        Several at a time: one decision between two calls has none of what it takes in the processor's caches.
        """
        batch = self._next
        if batch is None or self._waiting - batch.commands < self._limits.decide_ahead_min:
            return
        now = self._clock()
        while self._queue and batch.has_room(self._queue[0], self._limits) and not batch.deciding.plan.missing:
            if batch.deciding.take(self._queue[0].open(), now):
                batch.add(self._queue.popleft())
                batch.decided += 1

    def _call_off(self) -> None:
        """What was decided ahead rests on a plan that was not carried out: it waits again, undecided.

        The callers of such a batch are answered at different times, so that there is no crowd to wait for.
        """
        self._wanted = 0
        if self._next is not None:
            self._queue.extendleft(reversed(self._next.units))
            self._next = None

    async def _commit(self, batch: _Batch, *, ahead: bool = False, again: bool = False) -> None:
        """Decides what is not, appends, answers, and never raises. `again`: it was tried once, and lost."""
        connection, units = None, batch.units
        try:
            async with asyncio.timeout(self._limits.commit_timeout_s):
                connection = await self._connected()
                if batch.cache is not self._cache:
                    batch = self._batch(units)
                try:
                    # 1. Decide on what is at hand; read in one query what is not. Append.
                    plan = await self._plan(connection, batch)
                    if ahead:
                        self._next = self._batch(after=plan)
                        if self._queue:
                            asyncio.get_running_loop().call_soon(self._decide_ahead)  # when the statement is on its way
                    appended = await appending.append(connection, self.shard, plan.batch)
                except AppendConflict:
                    # 2. Others have written. Once more with the lock taken first, which cannot clash again.
                    self._call_off()
                    units, plan, appended = await self._commit_locked(connection, batch)
        except Exception as error:  # noqa: BLE001 - whatever it was, every caller gets an answer
            self._call_off()
            await self._recover(units, connection, error, again=again)
            return
        # 3. Durable. Then, and only then, the cache is replaced and every caller is answered.
        self._cache.put(plan.states)
        self._intake.settle(units, _placed(plan, appended))
        if plan.batch.events:
            self._committed(appended.head)

    async def _plan(self, connection: Connection, batch: _Batch) -> Plan:
        """Decides all of a batch, loading what turns out to be needed: one query for each round. May raise Clash."""
        while missing := batch.decide(self._clock()):
            batch.deciding.learn(await states.load(connection, self.bus, missing))
        plan = batch.deciding.plan
        # An outcome that the log does not keep is not held against the log by the append either. One that is there
        # already must not be decided on again: those after it in its unit would see its effect twice.
        if len(plan.outcomes) > len(plan.batch.commands):
            unlogged = plan.outcomes.keys() - {(row.tenant, row.command_id) for row in plan.batch.commands}
            stored = await command_log.read_commands(connection, list(unlogged))
            if any(row.status != "failed" for row in stored.values()):
                raise AppendConflict
        return plan

    async def _commit_locked(self, connection: Connection, clashed: _Batch) -> tuple[list[CommandGroup], Plan, Appended]:
        """Lock, read, decide, append, in one transaction. Returns the units that were still to be carried out."""
        self._cache.drop(list(clashed.deciding.plan.batch.reads))
        async with connection.transaction():
            await appending.lock(connection, self.shard)
            stored = await command_log.read_commands(connection, _keys(clashed.units))
            units = self._intake.settle_known(clashed.units, stored)
            if not units:
                return [], Plan(), Appended(0, self._clock())
            batch = _Batch(BatchDecider(self.bus, lambda key: None), self._cache, units)
            try:
                plan = await self._plan(connection, batch)
                appended = await appending.append(connection, self.shard, plan.batch, again=True)
            except AppendConflict as clash:
                raise RuntimeError("a clash under the lock: somebody writes past append_batch") from clash
        return units, plan, appended

    # When something is wrong

    async def _recover(self, units: list[CommandGroup], connection: Connection | None, error: Exception, *, again: bool) -> None:
        """Answers a batch that failed. A database that is away is no defect of the commands; a row it refuses is.

        After a loss the batch is tried once more, if the database is back: a restart is then noticed by nobody. Should
        the lost statement be carried out after all, one of the two finds the other's commands in the log.
        """
        if connection is None or connection.closed or isinstance(error, TimeoutError) or postgres.is_trouble(error):
            log.warning("database_lost", error=type(error).__name__, commands=len(_keys(units)))
            left = await self._answer_after_loss(units)
            if left and not again and self._connection is not None:
                await self._commit(self._batch(left), again=True)
            else:
                self._intake.refuse(left, postgres.database_unavailable())
        elif len(units) > 1:
            log.warning("batch_failed", error=type(error).__name__, commands=len(_keys(units)))
            for unit in units:
                await self._commit(self._batch([unit]))
        else:
            log.error("command_failed", error=type(error).__name__, command_id=units[0].commands[0].key[1])
            self._cache.drop([command.aggregate for command in units[0].commands])
            self._intake.refuse(units, InternalError())

    async def _answer_after_loss(self, units: list[CommandGroup]) -> list[CommandGroup]:
        """The connection went while a batch was under way: it is there as a whole, or not at all. The log knows.

        The shard's lock is taken before looking, so that a statement that the server is still working on is waited
        for rather than missed. Returns the units that are not there, or of which it cannot be known yet.
        """
        try:
            async with asyncio.timeout(self._limits.commit_timeout_s):
                await self._disconnect()
                connection = await self._connected()
                async with connection.transaction():
                    await appending.lock(connection, self.shard)
                    stored = await command_log.read_commands(connection, _keys(units))
                return self._intake.settle_known(units, stored)
        except Exception as error:  # noqa: BLE001 - still away; the callers are told by ours
            log.warning("database_unavailable", error=type(error).__name__)
            await self._disconnect()
        return units

    async def _connected(self) -> Connection:
        """The connection, made anew if it was lost. Then nothing that was cached is believed any more.

        The server may be another one, or one that was restored: the append finds what has moved on, not what has gone
        back.
        """
        if self._connection is None or self._connection.closed:
            connection = await postgres.connect(self._database_url, application_name="foldline-committer")
            try:
                head = await event_store.read_head(connection)
                if head.shard != self.shard:
                    raise RuntimeError(f"this database is shard {head.shard}, not {self.shard}")
                await postgres.refuse_unsafe(connection, tables=event_store.TABLES)
            except BaseException:
                await connection.close()
                raise
            self._cache = Cache(self._limits.cached_aggregates_max)
            self.epoch = head.epoch
            self._connection = connection
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def _keys(units: Sequence[CommandGroup]) -> list[CommandKey]:
    return [command.key for unit in units for command in unit.commands]


def _placed(plan: Plan, appended: Appended) -> dict[CommandKey, Outcome]:
    """The plan's outcomes, with places in the batch turned into positions on the line."""
    before = appended.head - len(plan.batch.events)
    for outcome in plan.outcomes.values():
        outcome.head = appended.head
        if outcome.position:
            outcome.position += before
    return plan.outcomes
