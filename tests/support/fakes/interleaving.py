"""The write domain, a network and the runner's rounds, all in memory, so that their steps can happen in any order.

`Domain` decides commands as the write service does, each command id once. `Saga` keeps the saga service's tables as
dictionaries and uses the runner's own folds. A round can be rolled back, and a try can be lost, doubled or late.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope, EventMetadata
from shared.commands.decide import Command, Outcome, Sender, decide
from shared.commands.log import CommandKey
from shared.commands.registry import CommandRegistry
from shared.commands.states import Versioned
from shared.folds.errors import InternalError
from shared.folds.process import CANCELLED_BY_OPERATOR, ProcessDefinition
from shared.line.event_store import AggregateKey
from shared.platform.identity import Role
from shared.processes.inputs import Inputs
from shared.processes.records import (
    COMMAND_FAILED,
    FOLD_FAILED,
    CommandResult,
    DeliveryFailure,
    DueTimer,
    PendingCommand,
    Process,
    ProcessKey,
    ProcessStatus,
    WaitingInput,
)
from shared.processes.round import Round
from shared.processes.runner import ProcessRunner
from shared.rpc.status import to_status
from shared.rpc.validation import refuse_invalid

TENANT = "acme"
BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass(slots=True)
class Clock:
    """The clock that all parts share."""

    now: datetime = BEGIN

    @property
    def now_ms(self) -> int:
        return int(self.now.timestamp() * 1000)


@dataclass(slots=True)
class Domain:
    """The write service in memory: a line of events, and the first answer to every command id."""

    bus: CommandRegistry
    clock: Clock
    line: list[EventEnvelope] = field(default_factory=list)
    states: dict[AggregateKey, Versioned] = field(default_factory=dict)
    answers: dict[CommandKey, tuple[bytes, Outcome]] = field(default_factory=dict)

    def state(self, category: str, id_: str) -> Any:
        """An aggregate as it is now."""
        return self._lookup((TENANT, category, id_)).state

    def ask(self, content: Any) -> Outcome:
        """A user's command, of the domain's struct."""
        codec = self.bus.codecs.of(content)
        return self._carry_out(str(uuid4()), codec.type_name, content, codec.encode(content), Role.USER)

    def carry_out(self, command: PendingCommand) -> Outcome:
        """A process's command, as SendBatch brings it."""
        route = self.bus.route(command.command_type)
        assert route is not None, command
        request: Any = route.codec.message.FromString(command.payload)
        refuse_invalid(request)
        assert request.options.command_id == str(command.command_id)
        return self._carry_out(
            str(command.command_id), command.command_type, route.codec.decode(request), command.payload, Role.PROCESS
        )

    def _carry_out(self, id_: str, type_: str, content: Any, payload: bytes, role: Role) -> Outcome:
        key = (TENANT, id_)
        if key in self.answers:
            first, outcome = self.answers[key]
            assert first == payload, "the same id with another content"
            return outcome
        route = self.bus.route(type_)
        assert route is not None
        command = Command(
            key=key,
            route=route,
            aggregate=(TENANT, route.aggregate.category, route.id(content)),
            content=content,
            payload=payload,
            expected_version=None,
            correlation_id=id_,
            sender=Sender(
                tenant=TENANT,
                user_id="alice",
                on_behalf_of="",
                roles=frozenset({role}),
                causation_id=None,
                traceparent="",
            ),
            received_at=self.clock.now,
        )
        plan = decide(self.bus, [[command]], self._lookup, self.clock.now)
        assert not plan.missing
        outcome = plan.outcomes[key]
        assert not isinstance(outcome.refusal, InternalError), f"{type_} met a defect"
        self.answers[key] = (payload, outcome)
        self.states |= plan.states
        for event in plan.batch.events:
            envelope = EventEnvelope(
                position=len(self.line) + 1,
                event_id=str(event.event_id),
                tenant=event.key[0],
                aggregate_type=event.key[1],
                aggregate_id=event.key[2],
                version=event.version,
                type=event.type,
                payload=event.payload,
                metadata=EventMetadata.FromString(event.metadata),
            )
            envelope.recorded_at.FromDatetime(self.clock.now)
            self.line.append(envelope)
        return outcome

    def _lookup(self, key: AggregateKey) -> Versioned:
        return self.states.get(key) or Versioned(0, self.bus.aggregate_of(key[1]).initial)


@dataclass(slots=True)
class Row:
    """An outgoing command, as its row has it."""

    command: PendingCommand
    answered: int = 0
    given_up: bool = False

    @property
    def may_have_happened(self) -> bool:
        return self.command.tries > self.answered


class Saga:
    """The saga service in memory, and the network between it and the domain."""

    def __init__(self, managers: Sequence[ProcessDefinition[Any]], domain: Domain) -> None:
        self.domain = domain
        never: Any = None  # connects to nothing, follows nothing
        self._runner = ProcessRunner(managers, 1, follow=never, connect=never, dispatcher=never)
        self._kinds = self._runner.kinds
        self.position = 0
        self.processes: dict[ProcessKey, Process] = {}
        self.rows: dict[tuple[ProcessKey, str], Row] = {}
        self.timers: dict[tuple[ProcessKey, str], datetime] = {}
        self.waiting: list[WaitingInput] = []
        # Under way to the write service, and back.
        self.tries: list[PendingCommand] = []
        self.told: list[CommandResult | DeliveryFailure] = []
        self.answers_given: list[CommandResult] = []
        self.cancelled: set[ProcessKey] = set()

    # What the runner does

    def follow(self, count: int, *, rolled_back: bool = False) -> None:
        """Folds the next events of the line, and moves the checkpoint behind them."""
        events = self.domain.line[self.position : self.position + count]
        self._round(Inputs(events=self._route(events)), rolled_back=rolled_back)
        if not rolled_back:
            self.position += len(events)

    def repeat(self, event: EventEnvelope) -> None:
        """Folds an event a second time, which no runner does."""
        self._round(Inputs(events=self._route([event])))

    def take(self, told: Sequence[CommandResult | DeliveryFailure], *, rolled_back: bool = False) -> None:
        """Takes answers and troubles."""
        inputs = Inputs()
        for each in told:
            if isinstance(each, CommandResult):
                inputs.answers.append(each)
            else:
                inputs.troubles.append(each)
        self._round(inputs, rolled_back=rolled_back)

    def fire(self, *, rolled_back: bool = False) -> None:
        """Takes the timers that are due."""
        due = [DueTimer(*key, name, at) for (key, name), at in self.timers.items() if at <= self.domain.clock.now]
        self._round(Inputs(timers=due), rolled_back=rolled_back)

    def _route(self, events: Sequence[EventEnvelope]) -> Any:
        inputs = Inputs(batch=events)
        self._runner._route(inputs)
        assert not inputs.parked
        return inputs.events

    def _round(self, inputs: Inputs, *, rolled_back: bool = False) -> None:
        processes = {key: self.processes[key] for key in inputs.keys() if key in self.processes}  # noqa: SIM118 (no dictionary)
        done = self._begin(processes)
        answered = {_name(it.command) for it in inputs.answers if self._is_there(it.command)}
        # As the statements of the runner's transaction do: what is answered is gone before troubles are looked at.
        troubled = {_name(it.command) for it in inputs.troubles if self._is_there(it.command)} - answered
        timers = [(*it.key, it.name) for it in inputs.timers if self.timers.get((it.key, it.name)) == it.due_at]
        there = dict.fromkeys(troubled, False)
        given_up = {_name(row.command) for row in self.rows.values() if row.given_up}
        for key, id_ in answered:
            left = any(owner == key for owner, _ in given_up - answered)
            there[key, id_] = (key, id_) in given_up and not left
        self._runner._fold(done, inputs, there, timers)
        if rolled_back:
            return
        for it in inputs.answers:
            if _name(it.command) in answered:
                del self.rows[it.command.key, it.command.step]
                answered.discard(_name(it.command))
                assert isinstance(it, CommandResult)  # nobody takes ids in these trials
                self.answers_given.append(it)
        for trouble in inputs.troubles:
            if _name(trouble.command) in troubled:
                row = self.rows[trouble.command.key, trouble.command.step]
                row.answered += trouble.undone
                row.given_up = row.given_up or bool(trouble.given_up)
                troubled.discard(_name(trouble.command))
        for key, name in ((it.key, it.name) for it in inputs.timers):
            if (*key, name) in timers:
                self.timers.pop((key, name), None)
        self._write(done, handed_out=True)

    def _is_there(self, command: PendingCommand) -> bool:
        row = self.rows.get((command.key, command.step))
        return row is not None and row.command.command_id == command.command_id

    def _begin(self, processes: dict[ProcessKey, Process]) -> Round:
        return Round(self._kinds, self.domain.clock.now, {key: dataclasses.replace(it) for key, it in processes.items()})

    def _write(self, done: Round, *, handed_out: bool) -> None:
        self.processes |= done.changed
        for command in done.commands.values():
            if (command.key, command.step) not in self.rows:
                row = self.rows[command.key, command.step] = Row(command._replace(tries=int(handed_out)))
                if handed_out:
                    self.tries.append(row.command)
        self.timers = {place: due_at for place, due_at in self.timers.items() if place[0] not in done.ended}
        for place, due_at in done.timers.items():
            if due_at is None:
                self.timers.pop(place, None)
            else:
                self.timers[place] = due_at
        self.waiting += done.waiting

    # What the network does

    def send_again(self, row: Row) -> None:
        """Sends a command again, whatever its state."""
        if not row.given_up:
            row.command = row.command._replace(tries=row.command.tries + 1)
            self.tries.append(row.command)

    def arrive(self, command: PendingCommand) -> None:
        """A try reaches the write service, and its answer sets out."""
        outcome = self.domain.carry_out(command)
        if outcome.refusal is None:
            self.told.append(CommandResult(command, None, ""))
        else:
            self.told.append(CommandResult(command, to_status(outcome.refusal), outcome.refusal.reason))

    def fail(self, command: PendingCommand, *, given_up: bool) -> None:
        """A try reaches the write service and meets a defect there, so nothing happens."""
        if (TENANT, str(command.command_id)) in self.domain.answers:
            self.arrive(command)  # what was answered once is answered so again
        else:
            reason = COMMAND_FAILED if given_up else ""
            self.told.append(DeliveryFailure(command, "INTERNAL: a defect", True, True, reason, self.domain.clock.now))

    # What an operator does

    def cancel(self, key: ProcessKey) -> bool:
        """ProcessService.CancelProcess; whether it was done."""
        rows = [row for (owner, _), row in self.rows.items() if owner == key]
        process = self.processes[key]
        if process.status == ProcessStatus.ENDED or not rows or any(row.may_have_happened for row in rows):
            return False
        done = self._begin({key: process})
        process = done.processes[key]
        done.operator(process, "cancel", "olga")
        if process.trouble != FOLD_FAILED:
            process.trouble, process.status = "", ProcessStatus.RUNNING
        for row in rows:
            del self.rows[key, row.command.step]
            done.answer(CommandResult(row.command, to_status(InternalError()), CANCELLED_BY_OPERATOR))
        self._write(done, handed_out=False)
        self.cancelled.add(key)
        return True

    def retry(self, key: ProcessKey) -> None:
        """ProcessService.RetryProcess."""
        rows = [row for (owner, _), row in self.rows.items() if owner == key]
        done = self._begin({key: self.processes[key]})
        process = done.processes[key]
        done.operator(process, "retry", "olga")
        for row in rows:
            if row.given_up and not row.may_have_happened:
                row.command, row.answered = done.again(process, row.command)._replace(tries=0), 0
            row.given_up = False
        mine = [it for it in self.waiting if it[:3] == key]
        self.waiting = [it for it in self.waiting if it[:3] != key]
        done.replay(process, mine)
        self._write(done, handed_out=False)

    # In the end

    def settle(self) -> None:
        """Runs all remaining steps without further faults. Each process must end."""
        for _ in range(100):
            self.follow(len(self.domain.line))
            for key, process in list(self.processes.items()):
                if process.status == ProcessStatus.PARKED:
                    self.retry(key)
            for row in self.rows.values():
                self.send_again(row)
            tries, self.tries = self.tries, []
            for command in tries:
                self.arrive(command)
            told, self.told = self.told, []
            self.take(told)
            if not (self.rows or self.tries or self.told or self.position < len(self.domain.line)):
                return
        raise AssertionError(f"these do not end: {self.unended()}")

    def unended(self) -> list[Process]:
        """The processes that go on, or should."""
        return [it for it in self.processes.values() if it.status != ProcessStatus.ENDED]

    # What is always true of any processes that send one command at a time

    def check(self) -> None:
        """Each process that runs waits for exactly one command, and one that has ended for nothing."""
        for key, process in self.processes.items():
            rows = [row for (owner, _), row in self.rows.items() if owner == key]
            timers = [name for owner, name in self.timers if owner == key]
            assert process.trouble != FOLD_FAILED, process
            if process.status == ProcessStatus.ENDED:
                assert (rows, timers) == ([], []), process
            else:
                assert len(rows) == 1, process
                assert rows[0].given_up == (process.status == ProcessStatus.PARKED), process


def _name(command: PendingCommand) -> tuple[ProcessKey, UUID]:
    """The name of a command: its process and id, because two tenants may have the same ids."""
    return command.key, command.command_id


def message_of(envelope: EventEnvelope, *kinds: type[Message]) -> Any:
    """The event in an envelope, if it is of one of these kinds; else None."""
    for kind in kinds:
        if kind.DESCRIPTOR.full_name == envelope.type:
            return kind.FromString(envelope.payload)
    return None


def later(seconds: float) -> timedelta:
    """So many seconds."""
    return timedelta(seconds=seconds)
