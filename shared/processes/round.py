"""What a round of inputs comes to, in memory: processes as they shall be, and all that is to be written with them.

A round takes events, answers, timers and an operator's word in any number and order, asks the processes, and gathers
what they ask for. It does no I/O, so the same inputs give the same result, and a round that is rolled back has done
nothing. A process whose fold raises is parked: this input and all later ones wait for it in their order, and no other
process notices.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from pydantic import TypeAdapter

from foldline.v1.command_pb2 import CommandOptions
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Announcements, Notice
from shared.folds.ids import step_id
from shared.folds.process import Answer, ProcessDefinition, Step
from shared.platform.telemetry import logger
from shared.processes.announce import Cause, NewDelivery, of_notice

ProcessKey = tuple[str, str, str]
"""Names a process: tenant, type, id."""

FOLD_FAILED = "FOLD_FAILED"
COMMAND_FAILED = "COMMAND_FAILED"

NO_ANNOUNCEMENTS = Announcements()

log = logger(__name__)


class ProcessStatus(StrEnum):
    """Whether a process goes on by itself."""

    RUNNING = "running"
    ENDED = "ended"
    PARKED = "parked"
    # What began it is gone from the line: for the line it never was. It begins anew if that comes again.
    UNDONE = "undone"


@dataclass(slots=True)
class Process:
    """A process as its row has it; the fields are the row's columns, in their order."""

    tenant: str
    type: str
    process_id: str
    state: str
    schema: int
    status: str
    # Why it is parked, in the runner's words; empty if it is not.
    trouble: str
    # Why an operator should look at it, in its own words.
    attention: str
    phase: str
    correlation_id: str
    # The event that moved it last.
    causation_id: str
    on_behalf_of: str
    traceparent: str
    # The attempt of each step that has had more than one, as JSON.
    attempts: str
    # How many lines its history has.
    entries: int
    started_at: datetime
    moved_at: datetime

    @property
    def key(self) -> ProcessKey:
        """Its name."""
        return self.tenant, self.type, self.process_id


class PendingCommand(NamedTuple):
    """A command on its way."""

    tenant: str
    type: str
    process_id: str
    step: str
    attempt: int
    command_id: UUID
    command_type: str
    # The request with its options.
    payload: bytes
    causation_id: str
    on_behalf_of: str
    traceparent: str
    # How often it was handed out, this time included, and how often it met a defect.
    tries: int
    failures: int

    @property
    def key(self) -> ProcessKey:
        """The process it belongs to."""
        return self.tenant, self.type, self.process_id


class CommandResult(NamedTuple):
    """The final word on a command: accepted if there is no error."""

    command: PendingCommand
    error: status_pb2.Status | None
    reason: str


class CommandIdTaken(NamedTuple):
    """A client's command is in the log under the id of ours, which therefore never happened, whatever became of earlier tries.

    Only ids that an earlier release has made, and which are not of version 8, can be taken.
    """

    command: PendingCommand


class DeliveryFailure(NamedTuple):
    """There is no final word on a command yet."""

    command: PendingCommand
    error: str
    # Certainly not carried out by this try.
    undone: bool
    # By a defect of the other side, rather than for a while.
    failed: bool
    # Why nobody tries any more; empty if it is tried again when due.
    given_up: str
    due_at: datetime


class Entry(NamedTuple):
    """A line of a process's history, in the order of its columns."""

    tenant: str
    type: str
    process_id: str
    number: int
    happened_at: datetime
    kind: str
    name: str
    step: str
    id: str
    position: int
    attempts: int
    error: bytes | None
    phase: str


class Waiting(NamedTuple):
    """An input of a process that can take none now, in the order of its columns."""

    tenant: str
    type: str
    process_id: str
    kind: str
    name: str
    content: bytes


class ProcessType:
    """A kind of process, and how its states are read and written."""

    def __init__(self, manager: ProcessDefinition[Any]) -> None:
        self.manager = manager
        self._adapter: TypeAdapter[Any] = TypeAdapter(type(manager.initial))

    def load(self, process: Process) -> Any:
        """The state. Raises ValueError for one that was written by a newer release, or cannot be read."""
        if not process.state:
            return self.manager.initial
        if process.schema > self.manager.schema:
            raise ValueError(f"a state of schema {process.schema}, this release knows {self.manager.schema}")
        return self._adapter.validate_json(process.state)

    def dump(self, state: Any) -> str:
        """The state as JSON. Raises TypeError or ValueError for one that is not what its class says."""
        if type(state) is not type(self.manager.initial):
            raise TypeError(f"a state of {self.manager.type} is a {type(self.manager.initial).__name__}")
        return self._adapter.dump_json(state, warnings="error").decode()


def process_types(managers: Iterable[ProcessDefinition[Any]]) -> dict[str, ProcessType]:
    """The kinds by type; raises TypeError for a type that is given twice."""
    kinds: dict[str, ProcessType] = {}
    for manager in managers:
        if manager.type in kinds:
            raise TypeError(f"the process {manager.type} is registered twice")
        kinds[manager.type] = ProcessType(manager)
    return kinds


def with_options(payload: bytes, command_id: UUID, correlation_id: str) -> bytes:
    """The request with these options, which override those it has.

    Every command's options are its field 1, and protobuf merges what comes twice, so nothing need be read for it.
    """
    options = CommandOptions(command_id=str(command_id), correlation_id=correlation_id).SerializeToString()
    return payload + bytes((0x0A, len(options))) + options


@dataclass(slots=True)
class Round:
    """One round. The fields but the first four are what is to be written."""

    kinds: Mapping[str, ProcessType]
    now: datetime
    processes: dict[ProcessKey, Process]
    announcements: Announcements = NO_ANNOUNCEMENTS
    changed: dict[ProcessKey, Process] = field(default_factory=dict)
    commands: dict[tuple[ProcessKey, str], PendingCommand] = field(default_factory=dict)
    # None takes a timer back.
    timers: dict[tuple[ProcessKey, str], datetime | None] = field(default_factory=dict)
    # Of these, all timers go.
    ended: dict[ProcessKey, None] = field(default_factory=dict)
    history: list[Entry] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    deliveries: list[NewDelivery] = field(default_factory=list)
    parked: int = 0

    # Inputs

    def event(self, kind: ProcessType, process_id: str, event: Message, envelope: EventEnvelope) -> None:
        """An event that belongs to a process, which it may begin."""
        key = (envelope.tenant, kind.manager.type, process_id)
        process = self.processes.get(key) or self._fresh(key, envelope)
        if process.status == ProcessStatus.UNDONE:
            # The lines of its history are numbered on, and steps keep the attempts that they had reached.
            before, process = process, self._fresh(key, envelope)
            process.entries, process.attempts, process.started_at = before.entries, before.attempts, before.started_at
        if process.status == ProcessStatus.ENDED:
            return

        def tell(to: Process) -> None:
            to.causation_id = envelope.event_id
            self._note(to, "event", envelope.type, id=envelope.event_id, position=envelope.position)

        self._input(
            process,
            lambda: Waiting(*key, "event", envelope.type, envelope.SerializeToString()),
            lambda state: kind.manager.react(state, event, envelope),
            tell,
        )

    def answer(self, answered: CommandResult, *, relieved: bool = False) -> None:
        """The answer to a command whose row was there, and is not any more.

        It may have been given up, and an earlier try of it be answered after all: then it is no trouble any more. If it
        was the last of its process that was given up, the process is `relieved`, and goes on by itself.
        """
        command = answered.command
        process = self.processes.get(command.key)
        if process is None:
            return
        if relieved:
            self._relieve(process)
        error = answered.error.SerializeToString() if answered.error is not None else None

        def tell(to: Process) -> None:
            self._note(
                to,
                "answer",
                command.command_type,
                step=command.step,
                id=str(command.command_id),
                attempts=command.tries,
                error=error,
            )

        if process.status == ProcessStatus.ENDED:
            tell(process)
            self.changed[process.key] = process
            return
        kind = self.kinds.get(process.type)
        accepted = answered.error is None
        answer = Answer(step=command.step, attempt=command.attempt, accepted=accepted, reason=answered.reason)
        self._input(
            process,
            lambda: Waiting(*process.key, "answer", command.step, _dump_answer(answered)),
            lambda state: _known(kind).manager.on_answer(state, answer),
            tell,
        )

    def timer(self, key: ProcessKey, name: str) -> None:
        """A timer that was due, and is not there any more. One that was taken back in the same round does not fire."""
        process = self.processes.get(key)
        if process is None or process.status == ProcessStatus.ENDED or ((key, name) in self.timers):
            return
        kind = self.kinds.get(process.type)
        self._input(
            process,
            lambda: Waiting(*key, "timer", name, b""),
            lambda state: _known(kind).manager.on_timer(state, name),
            lambda to: self._note(to, "timer_fired", name),
        )

    def trouble(self, troubled: DeliveryFailure) -> None:
        """A command that was given up parks its process until an operator lets it be sent again."""
        command = troubled.command
        process = self.processes.get(command.key)
        if process is None or not troubled.given_up:
            return
        if process.trouble != FOLD_FAILED:
            process.trouble = troubled.given_up
        if process.status == ProcessStatus.RUNNING:
            process.status = ProcessStatus.PARKED
        error = status_pb2.Status(code=code_pb2.INTERNAL, message=troubled.error)
        self._note(
            process,
            "parked",
            troubled.given_up,
            step=command.step,
            id=str(command.command_id),
            attempts=command.tries,
            error=error.SerializeToString(),
        )
        self.changed[process.key] = process
        log.error("process_parked", process=command.key, reason=troubled.given_up, step=command.step, error=troubled.error)

    def taken(self, command: PendingCommand, *, relieved: bool = False) -> None:
        """The id of a command, whose row was there and is not any more, is a client's: the command gets another attempt."""
        process = self.processes.get(command.key)
        if process is None:
            return
        if relieved:
            self._relieve(process)
        log.warning("command_id_taken", process=command.key, step=command.step, command_id=str(command.command_id))
        self.commands[command.key, command.step] = self.again(process, command)._replace(tries=1, failures=0)
        self.changed[process.key] = process

    def _relieve(self, process: Process) -> None:
        """The last command that was given up is out of the way: the process goes on by itself."""
        if process.trouble == COMMAND_FAILED:
            process.trouble = ""
            if process.status == ProcessStatus.PARKED:
                process.status = ProcessStatus.RUNNING
            self.changed[process.key] = process

    def operator(self, process: Process, action: str) -> None:
        """An operator's word, for the record."""
        self._note(process, "operator", action)
        self.changed[process.key] = process

    def again(self, process: Process, before: PendingCommand) -> PendingCommand:
        """The next attempt of a command that was given up, under an id of its own."""
        attempts = orjson.loads(process.attempts) if process.attempts else {}
        attempts[before.step] = attempt = before.attempt + 1
        process.attempts = orjson.dumps(attempts).decode()
        command_id = step_id(process.type, process.process_id, before.step, attempt)
        payload = with_options(before.payload, command_id, process.correlation_id)
        self._note(process, "command", before.command_type, step=before.step, id=str(command_id))
        return before._replace(attempt=attempt, command_id=command_id, payload=payload)

    def replay(self, process: Process, inputs: Sequence[Waiting]) -> None:
        """Takes a process out of its trouble and gives it what waited for it, in order. It may park again."""
        process.trouble = ""
        if process.status == ProcessStatus.PARKED:
            process.status = ProcessStatus.RUNNING
        self.changed[process.key] = process
        for waiting in inputs:
            if process.trouble:
                self.waiting.append(waiting)
            elif waiting.kind == "event":
                envelope = EventEnvelope.FromString(waiting.content)
                kind = self.kinds.get(process.type)
                message = (
                    next((it for it in kind.manager.key if it.DESCRIPTOR.full_name == envelope.type), None) if kind else None
                )
                if kind is None or message is None:  # a release that does not know it any more: nothing is lost
                    self._park(process, waiting, LookupError())
                else:
                    self.event(kind, process.process_id, message.FromString(envelope.payload), envelope)
            elif waiting.kind == "answer":
                self.answer(_load_answer(process.key, waiting.content))
            else:
                self.timer(process.key, waiting.name)

    # What comes of them

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

    def _input(
        self,
        process: Process,
        waiting: Callable[[], Waiting],
        ask: Callable[[Any], Step[Any] | None],
        tell: Callable[[Process], None],
    ) -> None:
        """Asks the process, and takes its step as a whole; or parks it, as it was."""
        if process.trouble == FOLD_FAILED:
            self.waiting.append(waiting())
            return
        try:
            kind = _known(self.kinds.get(process.type))
            step = ask(kind.load(process))
            if step is None:
                return
            state, phase = kind.dump(step.state), kind.manager.phase(step.state)
            outgoing = [self._outgoing(process, send.step, send.command) for send in step.send]
            deliveries = self._told(process, step.notify)
        except Exception as defect:  # noqa: BLE001 (a fold's defect is its own process's trouble alone)
            self._park(process, waiting(), defect)
            return
        process.state, process.schema, process.phase = state, kind.manager.schema, phase
        process.attention, process.moved_at = step.attention, self.now
        self.processes[process.key] = self.changed[process.key] = process
        tell(process)
        self.deliveries += deliveries
        for delivery in deliveries:
            self._note(process, "notice", delivery.name, id=str(delivery.delivery_id))
        for command in outgoing:
            self.commands[process.key, command.step] = command._replace(causation_id=process.causation_id)
            self._note(process, "command", command.command_type, step=command.step, id=str(command.command_id))
        self._set_timers(process, step)

    def _told(self, process: Process, notices: Sequence[Notice]) -> list[NewDelivery]:
        """The messages that the notices of a step cause. A step notes a line in the history, so its number is its own."""
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

    def _outgoing(self, process: Process, step: str, command: Message) -> PendingCommand:
        if command.HasField("options"):
            raise TypeError(f"the command of {step} has options: they are the runner's to set")
        attempt = orjson.loads(process.attempts).get(step, 1) if process.attempts else 1
        command_id = step_id(process.type, process.process_id, step, attempt)
        payload = with_options(command.SerializeToString(), command_id, process.correlation_id)
        name = command.DESCRIPTOR.full_name
        return PendingCommand(
            *process.key, step, attempt, command_id, name, payload, "", process.on_behalf_of, process.traceparent, 1, 0
        )

    def _park(self, process: Process, waiting: Waiting, defect: Exception) -> None:
        # The text of the exception may hold anything: its kind and its place are told.
        what = type(defect).__name__
        log.error("process_parked", process=process.key, reason=FOLD_FAILED, error=what, where=_where(defect))
        self.parked += 1
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
    ) -> None:
        process.entries += 1
        number, phase = process.entries, process.phase
        self.history.append(Entry(*process.key, number, self.now, kind, name, step, id, position, attempts, error, phase))


def _known(kind: ProcessType | None) -> ProcessType:
    if kind is None:
        raise LookupError("this release does not know this kind of process")
    return kind


def _where(defect: Exception) -> list[str]:
    return traceback.format_tb(defect.__traceback__)[-4:]


def _dump_answer(answered: CommandResult) -> bytes:
    command = answered.command
    return orjson.dumps(
        {
            "step": command.step,
            "attempt": command.attempt,
            "command_id": str(command.command_id),
            "command_type": command.command_type,
            "tries": command.tries,
            "reason": answered.reason,
            "error": None if answered.error is None else answered.error.SerializeToString().hex(),
        }
    )


def _load_answer(key: ProcessKey, content: bytes) -> CommandResult:
    it = orjson.loads(content)
    command_id = UUID(it["command_id"])
    command = PendingCommand(*key, it["step"], it["attempt"], command_id, it["command_type"], b"", "", "", "", it["tries"], 0)
    error = None if it["error"] is None else status_pb2.Status.FromString(bytes.fromhex(it["error"]))
    return CommandResult(command, error, it["reason"])
