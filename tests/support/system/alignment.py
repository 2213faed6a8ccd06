"""Brings processes to different steps at the same time: one round then decides the steps of all, and one call sends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from uuid import UUID

from shared.line.checkpoint import Checkpoint
from shared.line.follower import EventBatch
from shared.processes.dispatcher import Told
from shared.processes.records import CommandResult, PendingCommand


class Alignment:
    """Keeps back the command before each process's own step, and its answer, until the others are as far.

    It stands between runner, dispatcher and follower. Nothing is changed, made or dropped: commands, answers and events come
    later, as if the write service had been slower. Of a process whose own step is its first, the event that
    begins it is kept back.
    """

    def __init__(self, before: Mapping[str, str]) -> None:
        """`before` maps a process's id to the step before its own, empty if its own is the first. Some must be empty."""
        self._before = {id_: step for id_, step in before.items() if step}
        self._first = {id_ for id_, step in before.items() if not step}
        self._held: dict[UUID, PendingCommand] = {}
        self._answers: dict[UUID, CommandResult] = {}
        self._answered = asyncio.Event()
        self._begun = False
        self.reached = False
        """Whether the commands before all processes' own steps are there to be sent."""

    def send(self, commands: Iterable[PendingCommand]) -> list[PendingCommand]:
        """The commands to be sent now."""
        if self.reached:
            return list(commands)
        now = [command for command in commands if self._before.get(command.process_id) != command.step]
        self._held |= {command.command_id: command for command in commands if command not in now}
        self.reached = len(self._held) == len(self._before)
        return [*now, *self._held.values()] if self.reached else now

    def take(self, told: Iterable[Told]) -> list[Told]:
        """The results to be taken now."""
        passed: list[Told] = []
        for it in told:
            if isinstance(it, CommandResult) and it.command.command_id in self._held and not self._begun:
                self._answers[it.command.command_id] = it
            else:
                passed.append(it)
        if len(self._answers) == len(self._before):
            self._answered.set()
        if self._begun:
            passed += self._answers.values()
            self._answers.clear()
        return passed

    async def follow(self, at: Checkpoint, batches: AsyncGenerator[EventBatch, None]) -> AsyncGenerator[EventBatch, None]:
        """The batches behind a checkpoint; the events that begin processes come in one batch, and with the answers."""
        kept: list[EventBatch] = []
        missing = set(self._first)
        async with aclosing(batches):
            async for batch in batches:
                if self._begun or not (kept or any(event.aggregate_id in missing for event in batch.events)):
                    yield batch
                    at = batch.after
                    continue
                if kept:
                    kept.append(batch)
                else:
                    # The head even if it is empty: a runner sends nothing before it was shown a batch.
                    head, rest = _split(at, batch, missing)
                    kept.append(rest)
                    yield head
                missing -= {event.aggregate_id for event in batch.events}
                if not missing:
                    await self._answered.wait()
                    self._begun = True
                    yield EventBatch([event for each in kept for event in each.events], kept[-1].after)


def _split(at: Checkpoint, batch: EventBatch, beginning: set[str]) -> tuple[EventBatch, EventBatch]:
    """The events before the first that begins one of the processes, and the rest."""
    count = next(number for number, event in enumerate(batch.events) if event.aggregate_id in beginning)
    position, event_id = at.position, at.event_id
    if count:
        position, event_id = batch.events[count - 1].position, batch.events[count - 1].event_id
    head = EventBatch(batch.events[:count], Checkpoint(batch.after.epoch, position, event_id))
    return head, EventBatch(batch.events[count:], batch.after)
