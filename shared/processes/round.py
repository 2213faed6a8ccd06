"""The result of a round of inputs, in memory: the new states of processes, and everything that is written with them.

A round takes any number of events, answers, timers and operator's actions, in any order. It calls the folds of the
processes and collects their commands, timers and notices. It does no I/O, so the same inputs give the same result, and a
round that is rolled back has no effect. If a fold raises, its process is parked: this input and all later ones of the
process wait in their order. Other processes are not affected.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, assert_never
from uuid import UUID

import orjson
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from foldline.v1.command_pb2 import CommandOptions
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Announcements, Notice
from shared.folds.ids import step_id
from shared.folds.process import Step
from shared.platform.telemetry import logger
from shared.processes.announce import Cause, NewDelivery, of_notice
from shared.processes.inputs import EventInput, Input, TimerInput, call_fold, from_row, to_row
from shared.processes.process_type import ProcessType
from shared.processes.records import (
    COMMAND_FAILED,
    COMMAND_REFUSED,
    COMMAND_UNKNOWN,
    FOLD_FAILED,
    CommandResult,
    DeliveryFailure,
    HistoryEntry,
    PendingCommand,
    Process,
    ProcessKey,
    ProcessStatus,
    WaitingInput,
)

NO_ANNOUNCEMENTS = Announcements()

log = logger(__name__)


def with_options(payload: bytes, command_id: UUID, correlation_id: str) -> bytes:
    """The request with these options, which override the ones that it has.

    Options are field 1 of every command, and protobuf merges a field that comes twice, so the request is not parsed.
    """
    options = CommandOptions(command_id=str(command_id), correlation_id=correlation_id).SerializeToString()
    return payload + bytes((0x0A, len(options))) + options


class Defect(NamedTuple):
    """A fold that raised. The text of the exception may hold personal data, so it is not here."""

    key: ProcessKey
    error: str
    where: list[str]


@dataclass(slots=True)
class Round:
    """One round. All fields behind `announcements` are the result, which the store writes."""

    kinds: Mapping[str, ProcessType]
    now: datetime
    processes: dict[ProcessKey, Process]
    announcements: Announcements = NO_ANNOUNCEMENTS
    changed: dict[ProcessKey, Process] = field(default_factory=dict)
    commands: dict[tuple[ProcessKey, str], PendingCommand] = field(default_factory=dict)
    # None deletes a timer.
    timers: dict[tuple[ProcessKey, str], datetime | None] = field(default_factory=dict)
    # All timers of these processes are deleted.
    ended: dict[ProcessKey, None] = field(default_factory=dict)
    history: list[HistoryEntry] = field(default_factory=list)
    waiting: list[WaitingInput] = field(default_factory=list)
    deliveries: list[NewDelivery] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    """One for each process that the round parked because its fold raised."""

    # Inputs

    def event(self, kind: ProcessType, process_id: str, event: Message, envelope: EventEnvelope) -> None:
        """Takes an event that belongs to a process. It begins the process if there is none."""
        key = (envelope.tenant, kind.manager.type, process_id)
        process = self.processes.get(key) or self._fresh(key, envelope)
        if process.status == ProcessStatus.UNDONE:
            # The numbers of the history go on, and steps keep the attempts that they had reached.
            before, process = process, self._fresh(key, envelope)
            process.entries, process.attempts, process.started_at = before.entries, before.attempts, before.started_at
        if process.status != ProcessStatus.ENDED:
            self._take(process, EventInput(event, envelope))

    def answer(self, result: CommandResult, *, relieved: bool = False) -> None:
        """Takes the answer to a command whose row existed; the transaction has deleted it.

        A late answer can arrive for a command that was given up. If that was the last such command of its process, the
        process is `relieved`: it is parked no longer.
        """
        process = self.processes.get(result.command.key)
        if process is None:
            return
        if relieved:
            self._relieve(process)
        if process.status == ProcessStatus.ENDED:
            self._note_input(process, result)
            self.changed[process.key] = process
        else:
            self._take(process, result)

    def timer(self, key: ProcessKey, name: str) -> None:
        """Takes a timer that was due; the transaction has deleted it. A timer that this round cancels does not fire."""
        process = self.processes.get(key)
        if process is None or process.status == ProcessStatus.ENDED or ((key, name) in self.timers):
            return
        self._take(process, TimerInput(name))

    def trouble(self, failure: DeliveryFailure) -> None:
        """Parks the process of a command that was given up, until an operator lets the command be sent again."""
        command = failure.command
        process = self.processes.get(command.key)
        if process is None or not failure.given_up:
            return
        if process.trouble != FOLD_FAILED:
            process.trouble = failure.given_up
        if process.status == ProcessStatus.RUNNING:
            process.status = ProcessStatus.PARKED
        error = status_pb2.Status(code=code_pb2.INTERNAL, message=failure.error)
        self._note(
            process,
            "parked",
            failure.given_up,
            step=command.step,
            id=str(command.command_id),
            attempts=command.tries,
            error=error.SerializeToString(),
        )
        self.changed[process.key] = process
        log.error("process_parked", process=command.key, reason=failure.given_up, step=command.step, error=failure.error)

    def taken(self, command: PendingCommand, *, relieved: bool = False) -> None:
        """Gives a command another attempt, because its id belongs to a client's command. The transaction deleted its row."""
        process = self.processes.get(command.key)
        if process is None:
            return
        if relieved:
            self._relieve(process)
        log.warning("command_id_taken", process=command.key, step=command.step, command_id=str(command.command_id))
        self.commands[command.key, command.step] = self.again(process, command)._replace(tries=1, failures=0)
        self.changed[process.key] = process

    def _relieve(self, process: Process) -> None:
        """Un-parks a process whose last given-up command has its answer."""
        if process.trouble in (COMMAND_FAILED, COMMAND_UNKNOWN, COMMAND_REFUSED):
            process.trouble = ""
            if process.status == ProcessStatus.PARKED:
                process.status = ProcessStatus.RUNNING
            self.changed[process.key] = process

    def operator(self, process: Process, action: str, by: str, *, step: str = "", note: str = "") -> None:
        """Notes an operator's action in the history, with the user and what they said."""
        self._note(process, "operator", action, step=step, id=by, note=note)
        self.changed[process.key] = process

    def again(self, process: Process, before: PendingCommand) -> PendingCommand:
        """The next attempt of a command, with a new id."""
        attempts = orjson.loads(process.attempts) if process.attempts else {}
        attempts[before.step] = attempt = before.attempt + 1
        process.attempts = orjson.dumps(attempts).decode()
        command_id = step_id(process.type, process.process_id, before.step, attempt)
        payload = with_options(before.payload, command_id, process.correlation_id)
        self._note(process, "command", before.command_type, step=before.step, id=str(command_id))
        return before._replace(attempt=attempt, command_id=command_id, payload=payload)

    def replay(self, process: Process, inputs: Sequence[WaitingInput]) -> None:
        """Lets a parked process go on, and gives it the inputs that waited, in order. One of them may park it again."""
        process.trouble = ""
        if process.status == ProcessStatus.PARKED:
            process.status = ProcessStatus.RUNNING
        self.changed[process.key] = process
        kind = self.kinds.get(process.type)
        for row in inputs:
            if process.trouble:
                self.waiting.append(row)
                continue
            try:
                given = from_row(row, kind)
            except LookupError as unknown:  # this release does not know the event: it waits for one that does
                self._park(process, row, unknown)
                continue
            match given:
                case EventInput(event, envelope):
                    assert kind is not None  # an event of an unknown type of process is an unknown event
                    self.event(kind, process.process_id, event, envelope)
                case CommandResult():
                    self.answer(given)
                case TimerInput(name):
                    self.timer(process.key, name)
                case _:
                    assert_never(given)

    # Results

    def log_defects(self) -> None:
        """Logs the folds that raised. A round that is given up, and taken again, logs nothing."""
        for key, error, where in self.defects:
            log.error("process_parked", process=key, reason=FOLD_FAILED, error=error, where=where)

    def _fresh(self, key: ProcessKey, envelope: EventEnvelope) -> Process:
        metadata = envelope.metadata
        return Process(
            *key,
            state="",
            schema=1,
            status=ProcessStatus.RUNNING,
            trouble="",
            attention="",
            phase="",
            correlation_id=metadata.correlation_id,
            causation_id=envelope.event_id,
            on_behalf_of=metadata.on_behalf_of or metadata.user_id,
            traceparent=metadata.traceparent,
            attempts="",
            entries=0,
            started_at=self.now,
            moved_at=self.now,
        )

    def _take(self, process: Process, given: Input) -> None:
        """Calls the fold and takes its step as a whole. If that fails, parks the process and leaves it as it was."""
        if process.trouble == FOLD_FAILED:
            self.waiting.append(to_row(process.key, given))
            return
        try:
            kind = self.kinds.get(process.type)
            if kind is None:
                raise LookupError("this release does not know this type of process")
            step = call_fold(kind, kind.load(process), given)
            if step is None:
                return
            state, phase = kind.dump(step.state), kind.manager.phase(step.state)
            commands = [self._command(process, send.step, send.command) for send in step.send]
            deliveries = self._deliveries_of(process, step.notify)
        except Exception as defect:  # noqa: BLE001 (whatever a fold raises concerns its own process alone)
            self._park(process, to_row(process.key, given), defect)
            return
        process.state, process.schema, process.phase = state, kind.manager.schema, phase
        process.attention, process.moved_at = step.attention, self.now
        self.processes[process.key] = self.changed[process.key] = process
        self._note_input(process, given)
        self.deliveries += deliveries
        for delivery in deliveries:
            self._note(process, "notice", delivery.name, id=str(delivery.delivery_id))
        for command in commands:
            self.commands[process.key, command.step] = command._replace(causation_id=process.causation_id)
            self._note(process, "command", command.command_type, step=command.step, id=str(command.command_id))
        self._set_timers(process, step)

    def _note_input(self, process: Process, given: Input) -> None:
        """Adds the input to the history. An event also becomes the cause of the commands that follow it."""
        match given:
            case EventInput(_, envelope):
                process.causation_id = envelope.event_id
                self._note(process, "event", envelope.type, id=envelope.event_id, position=envelope.position)
            case CommandResult(command, error, _):
                self._note(
                    process,
                    "answer",
                    command.command_type,
                    step=command.step,
                    id=str(command.command_id),
                    attempts=command.tries,
                    error=None if error is None else error.SerializeToString(),
                )
            case TimerInput(name):
                self._note(process, "timer_fired", name)
            case _:
                assert_never(given)

    def _deliveries_of(self, process: Process, notices: Sequence[Notice]) -> list[NewDelivery]:
        """The deliveries that the notices of a step cause.

        Their ids follow from the number of history entries, which no two steps share: every step adds an entry.
        """
        found: list[NewDelivery] = []
        for place, notice in enumerate(notices):
            parts = ("notice", *process.key, str(process.entries), str(place))
            cause = Cause(parts, process.tenant, process.process_id, process.correlation_id, process.traceparent)
            found += of_notice(self.announcements, cause, process.type, notice)
        return found

    def _set_timers(self, process: Process, step: Step[Any]) -> None:
        for name in step.cancel_timers:
            self.timers[process.key, name] = None
        for timer in step.timers:
            self.timers[process.key, timer.name] = timer.due_at
            self._note(process, "timer_set", timer.name)
        if step.ended:
            process.status = ProcessStatus.ENDED
            self.ended[process.key] = None
            for place in [place for place in self.timers if place[0] == process.key]:
                del self.timers[place]

    def _command(self, process: Process, step: str, command: Message) -> PendingCommand:
        if command.HasField("options"):
            raise TypeError(f"the command of {step} has options: only the runner sets them")
        attempt = orjson.loads(process.attempts).get(step, 1) if process.attempts else 1
        command_id = step_id(process.type, process.process_id, step, attempt)
        payload = with_options(command.SerializeToString(), command_id, process.correlation_id)
        name = command.DESCRIPTOR.full_name
        return PendingCommand(
            *process.key, step, attempt, command_id, name, payload, "", process.on_behalf_of, process.traceparent, 1, 0
        )

    def _park(self, process: Process, waiting: WaitingInput, defect: Exception) -> None:
        what = type(defect).__name__
        self.defects.append(Defect(process.key, what, _where(defect)))
        process.trouble, process.status = FOLD_FAILED, ProcessStatus.PARKED
        self.processes[process.key] = self.changed[process.key] = process
        self.waiting.append(waiting)
        error = status_pb2.Status(code=code_pb2.INTERNAL, message=f"{waiting.kind} {waiting.name}: {what}")
        self._note(process, "parked", FOLD_FAILED, error=error.SerializeToString())

    def _note(
        self,
        process: Process,
        kind: str,
        name: str,
        *,
        step: str = "",
        id: str = "",  # noqa: A002 (the column's name)
        position: int = 0,
        attempts: int = 0,
        error: bytes | None = None,
        note: str = "",
    ) -> None:
        process.entries += 1
        where = (*process.key, process.entries, self.now)
        self.history.append(HistoryEntry(*where, kind, name, step, id, position, attempts, error, process.phase, note))


def _where(defect: Exception) -> list[str]:
    return traceback.format_tb(defect.__traceback__)[-4:]
