"""Group commit: while one batch of commands is being committed, the next one is decided.

Killed anywhere, a batch is in the database as a whole or not at all, and only commands that are in it were answered. Two
committers at once (two replicas): the append function admits one after the other; if the first changed what the second
decided on, the second gets an AppendConflict. The same command again: the command log has its outcome, which is returned.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime

from shared.commands import append as appending
from shared.commands import log as command_log
from shared.commands import states
from shared.commands.append import AppendConflict, Appended
from shared.commands.batch import CommandBatch, keys_of
from shared.commands.cache import Cache
from shared.commands.closed import closed_among, tenant_closed
from shared.commands.decide import BatchDecider, Command, Plan
from shared.commands.intake import CommandGroup, Intake, Limits, PendingReply
from shared.commands.observer import CommitObserver, Stopwatch
from shared.commands.registry import CommandRegistry
from shared.commands.states import Versioned
from shared.folds.errors import InternalError, Unavailable
from shared.line import event_store
from shared.line.event_store import AggregateKey
from shared.platform import postgres
from shared.platform.fairness import FairQueue
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger

# Target batch size: at 32 commands the cost of a commit per command is small, and of 64 callers one half is decided while
# the other half is committed. Below GATHER_MIN, waiting does not pay.
GATHER_TARGET, GATHER_MIN = 32, 3
GATHER_WAIT_S_EACH = 0.0005
EPOCH_LOOK_S = 1.0
# Commands of one tenant before it is another one's turn.
QUANTUM = 8
# While several tenants send, a batch takes at most SHARED_MAX commands, and SHARED_LATE of them are chosen when the batch
# before it is durable: a command that comes alone then waits for one short batch before its own. Batches are as large as
# they may be again SHARED_S after the last batch of several tenants (`make bench ARGS=fairness`).
SHARED_MAX, SHARED_LATE, SHARED_S = 32, 16, 1.0

log = logger(__name__)


class Committer:
    """Takes commands for one shard and answers each when it is durable."""

    def __init__(
        self,
        database_url: str,
        registry: CommandRegistry,
        *,
        shard: int,
        clock: Callable[[], datetime],
        committed: Callable[[int], None] = lambda head: None,
        limits: Limits | None = None,
    ) -> None:
        self.shard = shard
        self.epoch = ""
        self._look_at = 0.0
        self.registry = registry
        self._database_url = database_url
        self._clock = clock
        self._committed = committed
        self._limits = limits or Limits()
        self._intake = Intake(self._limits)
        self._connection: Connection | None = None
        self._cache = Cache(self._limits.cached_aggregates_max)
        # Waiting commands are in the next batch, decided, or behind it in the queue, undecided.
        self._next: CommandBatch | None = None
        self._queue: FairQueue[CommandGroup] = FairQueue(QUANTUM)
        self._shared_until = 0.0
        self._waiting = 0
        self._arrived = asyncio.Event()
        self._enough = asyncio.Event()
        self._wanted = 0
        self._closing = False
        # Tenants that are known to be closed; of another one the append finds out.
        self._closed: frozenset[str] = frozenset()
        self.observer = CommitObserver()

    # What callers see

    def waiting(self, tenant: str) -> int:
        """How many commands of a tenant wait for their outcomes."""
        return self._intake.waiting(tenant)

    def submit(self, groups: Sequence[list[Command]]) -> PendingReply:
        """An awaitable for the outcomes of groups of commands, each group all or nothing; it ends when they are durable.

        Raises OverLimit (QUEUE_FULL, TENANT_OVER_QUOTA) or Unavailable (SHUTTING_DOWN) before any command was accepted.
        Accepted commands are carried out even if the caller cancels or forgets the wait.
        """
        if self._closing:
            raise Unavailable("SHUTTING_DOWN", "the service is shutting down")
        self._intake.refuse_if_full(groups)
        reply = PendingReply(asyncio.get_running_loop().create_future(), groups)
        for commands in groups:
            if self._closed and any(command.key[0] in self._closed for command in commands):
                group, is_new = self._intake.refused(commands, tenant_closed())
            else:
                group, is_new = self._intake.admit(commands)
            reply.taken.append(group)
            if is_new:
                self._queue.put(group.tenant, group, len(group.commands))
                self._waiting += len(group.commands)
            if not group.settled:
                reply.remaining += 1
                group.replies.append(reply)
        self._decide_ahead()
        reply.one_done()
        self._arrived.set()
        if self._waiting >= self._wanted:
            self._enough.set()
        return reply

    def announced(self, tenant: str, count: int) -> AbstractContextManager[None]:
        """Within the block so many commands count as waiting: for work before `submit`. Raises as that does."""
        if self._closing:
            raise Unavailable("SHUTTING_DOWN", "the service is shutting down")
        return self._intake.announced(tenant, count)

    def is_cached(self, key: AggregateKey) -> bool:
        """Whether the state of an aggregate is in memory. It may be stale, which the next append finds out."""
        return key in self._cache

    def close(self) -> None:
        """Accepts no further command; `run` ends when every accepted command is answered."""
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
        """True when there is a batch to commit; False when the committer is closed and every command is answered.

        An idle committer commits at once. Under load it waits for about as many commands as the last batch had (at most
        GATHER_TARGET), because their callers are about to send again. The wait grows while commands keep arriving and
        never exceeds gather_wait_s_max. Commands that arrive meanwhile are decided meanwhile.
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

    def _take_batch(self) -> CommandBatch:
        """The groups that are decided ahead, and as many of the queue as fit beside them, fairly between tenants."""
        batch, self._next = self._next or self._batch(), None
        now = time.monotonic()
        if len(batch.tenants | self._queue.tenants) > 1:
            self._shared_until = now + SHARED_S
        commands_max, bytes_max = self._limits.batch_commands_max, self._limits.batch_bytes_max
        if now < self._shared_until:
            # A batch that was decided ahead for one tenant may be full: the others are let in all the same.
            commands_max = max(min(commands_max, SHARED_MAX), batch.commands + SHARED_LATE)
        while self._queue and batch.has_room(self._queue.first(), commands_max, bytes_max):
            batch.add(self._queue.pop())
        self._waiting -= batch.commands
        self._wanted = batch.commands
        return batch

    def _batch(self, groups: Sequence[CommandGroup] = (), *, after: Plan | None = None) -> CommandBatch:
        """A batch to be decided on the cached states and on the states that the plan before it leads to."""
        cache, states = self._cache, after.states if after else {}

        def lookup(key: AggregateKey) -> Versioned | None:
            return states.get(key) or cache.get(key)

        batch = CommandBatch(BatchDecider(self.registry, lookup), cache)
        for group in groups:
            batch.add(group)
        return batch

    def _decide_ahead(self) -> None:
        """Decides waiting groups in order until the next batch is full or needs a state that is not loaded.

        Starts only when `decide_ahead_min` commands wait: single decisions between two calls run on cold CPU caches.
        """
        batch = self._next
        if batch is None or self._waiting - batch.commands < self._limits.decide_ahead_min:
            return
        now = self._clock()
        commands_max, bytes_max = self._limits.batch_commands_max, self._limits.batch_bytes_max
        if time.monotonic() < self._shared_until:
            commands_max = min(commands_max, SHARED_MAX - SHARED_LATE)
        while self._queue and batch.has_room(self._queue.first(), commands_max, bytes_max) and not batch.deciding.plan.missing:
            if len(batch.deciding.plan.batch.events) >= self._limits.batch_events_max:
                return
            if batch.deciding.take(self._queue.first().open(), now):
                batch.add(self._queue.pop())
                batch.decided += 1

    def _discard_ahead(self) -> None:
        """Puts the groups that were decided ahead back into the queue: the plan that they build on was not committed.

        The callers of such a batch are answered at different times, so the next batch does not wait for them.
        """
        self._wanted = 0
        if self._next is not None:
            self._put_back(self._next.groups)
            self._next = None

    def _put_back(self, groups: Sequence[CommandGroup]) -> None:
        self._queue.put_back([(group.tenant, group, len(group.commands)) for group in groups])

    async def _commit(self, batch: CommandBatch, *, ahead: bool = False, again: bool = False) -> None:
        """Decides the rest of a batch, appends it, answers its callers; never raises. `again`: the second try after a loss."""
        connection, watch = None, self.observer.start()
        try:
            async with asyncio.timeout(self._limits.commit_timeout_s):
                connection = await self._connected()
                if batch.cache is not self._cache:
                    batch = self._batch(batch.groups)
                try:
                    # 1. Decide on the cached states; load the others in one query. Append.
                    plan, groups = await self._plan(connection, batch, watch), batch.groups
                    if ahead:
                        self._next = self._batch(after=plan)
                        if self._queue:
                            asyncio.get_running_loop().call_soon(self._decide_ahead)  # once the statement is sent
                    appended = await appending.append(connection, self.shard, plan.batch)
                except AppendConflict:
                    # 2. Another committer has written. Again, with the lock taken first, under which nothing can conflict.
                    self.observer.conflicts += 1
                    self._discard_ahead()
                    groups, plan, appended = await self._commit_locked(connection, batch, watch)
        except Exception as error:  # noqa: BLE001 - every caller gets an answer, whatever the error is
            self.observer.failures += 1
            self._discard_ahead()
            await self._recover(batch.groups, connection, error, again=again)
            return
        # 3. The batch is durable. Only now the cache changes and the callers are answered.
        if plan.learned:
            self._cache.put(plan.learned)  # those that were only read
        self._cache.put(plan.states)
        self._intake.settle(groups, plan.outcomes_at(appended.head))
        if plan.batch.events:
            self._committed(appended.head)
        self.observer.committed(groups, plan, watch, appended.head)

    async def _plan(self, connection: Connection, batch: CommandBatch, watch: Stopwatch) -> Plan:
        """The plan of a batch; loads missing states, one query a round. Raises AppendConflict.

        Groups for whose events the batch has no room are taken out of it, and are the first of the next.
        """
        while missing := batch.decide(self._clock(), self._limits.batch_events_max):
            watch.loaded += len(missing)
            batch.deciding.learn(await states.load(connection, self.registry, missing))
        if batch.decided < len(batch.groups):
            batch.groups, late = batch.groups[: batch.decided], batch.groups[batch.decided :]
            self._put_back(late)
            self._waiting += sum([len(group.commands) for group in late])
        plan = batch.deciding.plan
        # append_batch detects repeats only for commands that it inserts. Outcomes that are not logged are looked up here;
        # if one is known already, decide again under the lock: later commands of its group would see its effect twice.
        if len(plan.outcomes) > len(plan.batch.commands):
            # A scheduled command that this release cannot decide waits on.
            waiting = {("scheduled", one.key) for group in batch.groups for one in group.commands if one.due_at is not None}
            unlogged = plan.outcomes.keys() - {(row.tenant, row.command_id) for row in plan.batch.commands}
            stored = await command_log.read_commands(connection, list(unlogged))
            if any(row.status != "failed" and (row.status, key) not in waiting for key, row in stored.items()):
                raise AppendConflict
        watch.decided()
        return plan

    async def _commit_locked(
        self, connection: Connection, conflicting: CommandBatch, watch: Stopwatch
    ) -> tuple[list[CommandGroup], Plan, Appended]:
        """Locks, loads, decides and appends in one transaction. Returns the groups that had no outcome yet."""
        self._cache.drop(list(conflicting.deciding.plan.batch.reads))
        async with connection.transaction():
            await appending.lock(connection, self.shard)
            stored = await command_log.read_commands(connection, keys_of(conflicting.groups))
            groups = await self._refuse_closed(connection, self._intake.settle_known(conflicting.groups, stored))
            if not groups:
                return [], Plan(), Appended(0, self._clock())
            batch = CommandBatch(BatchDecider(self.registry, lambda key: None), self._cache, groups)
            try:
                plan = await self._plan(connection, batch, watch)
                groups = conflicting.groups = batch.groups
                appended = await appending.append(connection, self.shard, plan.batch, again=True)
            except AppendConflict as conflict:
                raise RuntimeError("a conflict under the lock: something writes without append_batch") from conflict
        return groups, plan, appended

    async def _refuse_closed(self, connection: Connection, groups: list[CommandGroup]) -> list[CommandGroup]:
        """Refuses what is for a tenant that is closed, now and from now on; returns the other groups."""
        tenants = {command.key[0] for group in groups for command in group.commands}
        if not (closed := await closed_among(connection, tenants)):
            return groups
        self._closed |= closed
        refused = [group for group in groups if any(command.key[0] in closed for command in group.commands)]
        self._intake.refuse(refused, tenant_closed())
        return [group for group in groups if not group.settled]

    # Failures

    async def _recover(self, groups: list[CommandGroup], connection: Connection | None, error: Exception, *, again: bool) -> None:
        """Answers the callers of a batch that failed. An unreachable database is UNAVAILABLE; a refused row is INTERNAL.

        After a lost connection the batch is tried once more if the database is back, so a short restart causes no error.
        If the server commits the lost statement after all, the retry finds its commands in the log, or the reverse.
        """
        if connection is None or connection.closed or isinstance(error, TimeoutError) or postgres.is_trouble(error):
            log.warning("database_lost", error=type(error).__name__, commands=len(keys_of(groups)))
            left = await self._answer_after_loss(groups)
            if left and not again and self._connection is not None:
                await self._commit(self._batch(left), again=True)
            else:
                self._intake.refuse(left, postgres.unavailable(error))
        elif len(groups) > 1:
            log.warning("batch_failed", error=type(error).__name__, commands=len(keys_of(groups)))
            for group in groups:
                await self._commit(self._batch([group]))
        else:
            log.error("command_failed", error=type(error).__name__, command_id=groups[0].commands[0].key[1])
            self._cache.drop([command.aggregate for command in groups[0].commands])
            self._intake.refuse(groups, InternalError())

    async def _answer_after_loss(self, groups: list[CommandGroup]) -> list[CommandGroup]:
        """Answers what the log shows as committed after a lost connection; returns the other groups.

        The batch is in the log as a whole or not at all. The shard's lock is taken before the log is read, so that a
        statement that the server is still executing ends first. Returns all groups if the database cannot be reached.
        """
        try:
            async with asyncio.timeout(self._limits.commit_timeout_s):
                await self._disconnect()
                connection = await self._connected()
                async with connection.transaction():
                    await appending.lock(connection, self.shard)
                    stored = await command_log.read_commands(connection, keys_of(groups))
                return self._intake.settle_known(groups, stored)
        except Exception as error:  # noqa: BLE001 - still unreachable; _recover answers the callers
            log.warning("database_unavailable", error=type(error).__name__)
            await self._disconnect()
        return groups

    async def _connected(self) -> Connection:
        """The connection; a new one, with an empty cache, if the last was lost or the history is another one.

        The server may be another one or restored from a backup: the append detects states that are too old, but not
        states that are newer than the restored database. Nor does it know the epoch that receipts tell, which an operator
        may change at any time: it is looked at once in EPOCH_LOOK_S.
        """
        if self._connection is not None and not self._connection.closed and time.monotonic() >= self._look_at:
            if (await event_store.read_head(self._connection)).epoch != self.epoch:
                await self._disconnect()
            self._look_at = time.monotonic() + EPOCH_LOOK_S
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
            self._closed = frozenset()
            self.epoch = head.epoch
            self._look_at = time.monotonic() + EPOCH_LOOK_S
            self._connection = connection
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
