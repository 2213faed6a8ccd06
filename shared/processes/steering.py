"""How operators steer processes beyond retry and cancel: pause a type, skip a step, acknowledge, retry many, parked streams.

Each action is a turn (`shared/processes/turn.py`), so two at once run one after the other, and a repeated one finds that there is
nothing left to do and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import LiteralString, NamedTuple

import orjson

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.errors import NotFound, Rejected
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger
from shared.processes import parked, pending, store
from shared.processes.parked import ParkedStream, StreamKey, Unroutable
from shared.processes.pending import Acknowledgement
from shared.processes.records import FOLD_FAILED, CommandResult, Process, ProcessKey, ProcessStatus
from shared.processes.round import Round
from shared.processes.routes import RoutedEvent, Routes
from shared.processes.runner import CHECKPOINT
from shared.processes.runners import PausedType, paused_type
from shared.processes.turn import Turns, retry

log = logger(__name__)

RETRIED_MAX = 25
"""So many processes are retried in one turn, during which the runner waits."""

_PAUSED: LiteralString = "SELECT paused -> %s FROM checkpoints WHERE name = %s AND shard = %s"
_PAUSE: LiteralString = "UPDATE checkpoints SET paused = paused || %s::jsonb WHERE name = %s AND shard = %s"
_RESUME: LiteralString = "UPDATE checkpoints SET paused = paused - %s WHERE name = %s AND shard = %s"
_MAKE: LiteralString = "INSERT INTO checkpoints (name, shard) VALUES (%s, %s) ON CONFLICT DO NOTHING"


class Replayed(NamedTuple):
    """What became of a parked stream."""

    # So many events were routed, or given up.
    events: int
    # The stream with the event that is first now; None if nothing of it is parked any more.
    stream: ParkedStream | None


class Steering:
    """Carries out operators' actions, beside the leader or anywhere else."""

    def __init__(self, turns: Turns, *, wake: Callable[[], None] = lambda: None) -> None:
        """`wake` is called when there is something to do; a leader in another instance finds it within a second."""
        self._turns = turns
        self._wake = wake
        self._routes = Routes(turns.kinds.values())

    # Types

    async def pause(self, type_: str, reason: str, user_id: str) -> PausedType:
        """Pauses a type of process: nothing is sent for it, and its timers do not fire. Events and answers are still taken.

        A command that was sent before is carried out. Raises NotFound (PROCESS_TYPE_NOT_FOUND), Rejected (ALREADY_PAUSED).
        """
        if type_ not in self._turns.kinds:
            raise NotFound("PROCESS_TYPE_NOT_FOUND", f"there are no processes of type {type_}")
        fields = {"reason": reason, "user_id": user_id, "paused_at": self._turns.clock().isoformat()}
        async with self._turns.reads.connection() as connection:
            # The runner of this shard may never have run: there is its row then to be locked.
            await connection.execute(_MAKE, (CHECKPOINT, self._turns.shard))
        async with self._turns.many(()) as (connection, _):
            if (before := await self._paused(connection, type_)) is not None:
                raise Rejected("ALREADY_PAUSED", f"{before.user_id} has paused it", paused_by=before.user_id)
            await connection.execute(_PAUSE, (orjson.dumps({type_: fields}).decode(), CHECKPOINT, self._turns.shard))
        self._wake()
        return paused_type(type_, fields)

    async def resume(self, type_: str) -> PausedType:
        """Lets a paused type go on; returns how it was paused. Raises Rejected (NOT_PAUSED)."""
        async with self._turns.many(()) as (connection, _):
            before = await self._paused(connection, type_)
            if before is None:
                raise Rejected("NOT_PAUSED", f"processes of type {type_} are not paused")
            await connection.execute(_RESUME, (type_, CHECKPOINT, self._turns.shard))
        self._wake()
        return before

    async def _paused(self, connection: Connection, type_: str) -> PausedType | None:
        cursor = await connection.execute(_PAUSED, (type_, CHECKPOINT, self._turns.shard))
        row = await cursor.fetchone()
        return None if row is None or row[0] is None else paused_type(type_, row[0])

    # Processes

    async def skip(self, key: ProcessKey, step: str, reason: str, user_id: str) -> Process:
        """Lets a process go on as if a step had been carried out; its command is not sent again. Returns the process.

        A command that was sent before may still be carried out. Raises NotFound (PROCESS_NOT_FOUND), Rejected (PROCESS_ENDED,
        STEP_NOT_SKIPPABLE, STEP_NOT_WAITING).
        """
        async with self._turns.one(key) as (connection, process, commands, done):
            if process.status == ProcessStatus.ENDED:
                raise Rejected("PROCESS_ENDED", "the process has ended")
            kind = self._turns.kinds.get(process.type)
            skippable = kind.manager.skippable if kind is not None else frozenset()
            if kind is None or kind.manager.current(step) not in skippable:
                allowed = ", ".join(sorted(skippable))
                raise Rejected("STEP_NOT_SKIPPABLE", "the process cannot go on as if this step had been done", skippable=allowed)
            found = next((it for it in commands if it.command.step == step), None)
            if found is None:
                waiting = ", ".join(it.command.step for it in commands)
                raise Rejected("STEP_NOT_WAITING", "the process does not wait for this step", waiting=waiting)
            done.operator(process, "skip", user_id, step=step, note=reason)
            await pending.delete_command(connection, found.command)
            others = any(it.given_up for it in commands if it is not found)
            done.answer(CommandResult(found.command, None, ""), relieved=found.given_up and not others)
        self._wake()
        return process

    async def ask(self, key: ProcessKey, attention: str, resolution: str, user_id: str) -> Acknowledgement:
        """Asks for the acknowledgement of what a process says (`attention`), with how it was settled.

        Raises NotFound (PROCESS_NOT_FOUND), Rejected (NOTHING_TO_ACKNOWLEDGE, ATTENTION_CHANGED, ALREADY_ASKED).
        """
        async with self._turns.one(key) as (connection, process, _, done):
            if not process.attention:
                raise Rejected("NOTHING_TO_ACKNOWLEDGE", "the process says nothing that would have to be acknowledged")
            if attention != process.attention:
                raise Rejected("ATTENTION_CHANGED", "the process says something else", attention=process.attention)
            before = await pending.acknowledgement_of(connection, key)
            if before is not None and before.attention == attention:
                raise Rejected("ALREADY_ASKED", f"{before.asked_by} has asked for it", asked_by=before.asked_by)
            asked = Acknowledgement(attention, resolution, user_id, self._turns.clock())
            await pending.ask(connection, key, asked)
            done.operator(process, "ask", user_id, note=f"{attention}: {resolution}")
        return asked

    async def confirm(self, key: ProcessKey, user_id: str) -> Process:
        """Acknowledges what another person has asked for. Returns the process.

        Raises NotFound (PROCESS_NOT_FOUND), Rejected (NOT_ASKED, SAME_PERSON, ATTENTION_CHANGED).
        """
        async with self._turns.one(key) as (connection, process, _, done):
            asked = await self._asked(connection, key)
            if asked.asked_by == user_id:
                raise Rejected("SAME_PERSON", "another person than the one who asked must confirm it")
            if asked.attention != process.attention:
                raise Rejected("ATTENTION_CHANGED", "the process says something else", attention=process.attention)
            await pending.delete_acknowledgement(connection, key)
            done.operator(process, "confirm", user_id, note=f"{asked.attention}: {asked.resolution}")
            process.attention = ""
        return process

    async def reject(self, key: ProcessKey, reason: str, user_id: str) -> Process:
        """Drops what was asked for; whoever asked may do so too. Returns the process.

        Raises NotFound (PROCESS_NOT_FOUND), Rejected (NOT_ASKED).
        """
        async with self._turns.one(key) as (connection, process, _, done):
            await self._asked(connection, key)
            await pending.delete_acknowledgement(connection, key)
            done.operator(process, "reject", user_id, note=reason)
        return process

    async def _asked(self, connection: Connection, key: ProcessKey) -> Acknowledgement:
        asked = await pending.acknowledgement_of(connection, key)
        if asked is None:
            raise Rejected("NOT_ASKED", "nobody has asked for an acknowledgement")
        return asked

    async def retry_all(self, keys: Sequence[ProcessKey], user_id: str) -> tuple[int, int]:
        """Retries processes as far as they are parked; returns how many, and how many of them were parked again at once."""
        retried = parked_again = 0
        for start in range(0, len(keys), RETRIED_MAX):
            async with self._turns.many(keys[start : start + RETRIED_MAX]) as (connection, done):
                for process in list(done.processes.values()):
                    commands = await pending.commands_of(connection, process.key)
                    if process.status != ProcessStatus.PARKED or (not commands and process.trouble != FOLD_FAILED):
                        continue
                    await retry(connection, done, process, commands, user_id)
                    retried += 1
                    parked_again += process.status == ProcessStatus.PARKED
            self._wake()
        return retried, parked_again

    # Parked streams

    async def find_parked(self, limit: int, after: StreamKey, tenant: str) -> list[ParkedStream]:
        """Parked streams behind `after`, in the order of their names."""
        async with self._turns.reads.connection() as connection:
            return await parked.find(connection, self._turns.shard, limit, after, tenant)

    async def retry_parked(self, stream: StreamKey) -> Replayed:
        """Routes the events of a parked stream, in order, up to the first that cannot be routed still.

        Raises NotFound (PARKED_NOT_FOUND).
        """
        return await self._replay(stream, None)

    async def discard_parked(self, stream: StreamKey, position: int, user_id: str) -> Replayed:
        """Gives up the first event of a parked stream, for processes for ever, and routes the later ones.

        Raises NotFound (PARKED_NOT_FOUND), Rejected (PARKED_CHANGED) if another event is first now.
        """
        return await self._replay(stream, position, user_id)

    async def _replay(self, stream: StreamKey, discarded: int | None, user_id: str = "") -> Replayed:
        count, more = 0, True
        while more:
            async with self._turns.many(()) as (connection, done):
                events = await parked.events_of(connection, self._turns.shard, stream)
                if not events and not count:
                    raise _not_parked(stream)
                if discarded is not None and not count and events[0][0] != discarded:
                    raise Rejected("PARKED_CHANGED", "another event is first now", position=str(events[0][0]))
                over, failed = await self._route(connection, done, events, discarded)
                count += len(over)
                if over:
                    await parked.delete_until(connection, CHECKPOINT, self._turns.shard, stream, over[-1])
                if failed is not None:
                    await parked.set_reason(connection, self._turns.shard, stream, *failed, done.now)
                left = await parked.get(connection, self._turns.shard, stream)
            more = left is not None and failed is None
            self._wake()
        if discarded is not None:
            tenant, type_, id_ = stream
            facts = {"tenant": tenant, "aggregate_type": type_, "aggregate_id": id_, "position": discarded}
            log.warning("parked_event_discarded", user_id=user_id, **facts)
        return Replayed(count, left)

    async def _route(
        self, connection: Connection, done: Round, events: Sequence[tuple[int, EventEnvelope]], discarded: int | None
    ) -> tuple[list[int], tuple[int, str] | None]:
        """The positions that are over, and the position that cannot be routed, with the reason."""
        over: list[int] = []
        routed: list[RoutedEvent] = []
        failed = None
        for position, envelope in events:
            try:
                routed += () if position == discarded else self._routes.route(envelope)
            except Unroutable as error:
                failed = position, str(error)
                break
            over.append(position)
        if keys := {(it.envelope.tenant, it.kind.manager.type, it.process_id) for it in routed}:
            done.processes.update(await store.read(await store.select(connection, keys)))
        for it in routed:
            done.event(*it)
        return over, failed


def _not_parked(stream: StreamKey) -> NotFound:
    tenant, type_, id_ = stream
    return NotFound("PARKED_NOT_FOUND", f"no event of {type_} {id_} in tenant {tenant} is parked")
