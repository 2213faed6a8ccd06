"""The inputs of a round; the inputs of a process, as one union, and how they are kept while their process is parked.

A round matches on the input: each fold is called from one line, where a debugger can stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, assert_never
from uuid import UUID

import orjson
from google.protobuf.message import Message
from google.rpc import status_pb2

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.process import Answer, Step
from shared.processes.announce import NewDelivery
from shared.processes.parked import ParkedEvent
from shared.processes.process_type import ProcessType
from shared.processes.records import (
    COMMAND_REFUSED,
    CommandIdTaken,
    CommandResult,
    DeliveryFailure,
    DueTimer,
    PendingCommand,
    ProcessKey,
    WaitingInput,
)
from shared.processes.routes import RoutedEvent
from shared.processes.switches import Switched


@dataclass(slots=True)
class Inputs:
    """The inputs of the next round."""

    # As they came from the line; those of a process are in `events`, those that cannot be routed in `parked`.
    batch: Sequence[EventEnvelope] = ()
    events: list[RoutedEvent] = field(default_factory=list)
    parked: list[ParkedEvent] = field(default_factory=list)
    answers: list[CommandResult | CommandIdTaken] = field(default_factory=list)
    troubles: list[DeliveryFailure] = field(default_factory=list)
    timers: list[DueTimer] = field(default_factory=list)
    # Deliveries that events cause directly, without a process.
    deliveries: list[NewDelivery] = field(default_factory=list)
    # Announcements that the batch switches on or off.
    switches: list[Switched] = field(default_factory=list)

    def __bool__(self) -> bool:
        inputs = (self.events, self.parked, self.answers, self.troubles, self.timers, self.deliveries, self.switches)
        return any(inputs)

    def keys(self) -> dict[ProcessKey, None]:
        """The processes that the inputs belong to."""
        keys: dict[ProcessKey, None] = {}
        for routed in self.events:
            keys[routed.envelope.tenant, routed.kind.manager.type, routed.process_id] = None
        for answer in self.answers:
            keys[answer.command.key] = None
        for trouble in self.troubles:
            keys[trouble.command.key] = None
        for timer in self.timers:
            keys[timer.key] = None
        return keys


class EventInput(NamedTuple):
    """An event that belongs to the process."""

    event: Message
    envelope: EventEnvelope


class TimerInput(NamedTuple):
    """A timer of the process that was due."""

    name: str


Input = EventInput | CommandResult | TimerInput


def call_fold(kind: ProcessType, state: Any, given: Input) -> Step[Any] | None:
    """What the process does next; None if the input does not concern it. Raises whatever the fold raises."""
    match given:
        case EventInput(event, envelope):
            return kind.manager.react(state, event, envelope)
        case CommandResult(command, error, reason):
            step = kind.manager.current(command.step)
            answer = Answer(step=step, attempt=command.attempt, accepted=error is None, reason=reason)
            return kind.manager.on_answer(state, answer)
        case TimerInput(name):
            return kind.manager.on_timer(state, name)
        case _:
            assert_never(given)


def refused_mandatory(result: CommandResult, kind: ProcessType | None, now: datetime) -> DeliveryFailure | None:
    """The failure that the refusal of a mandatory step is, instead of an answer; None for any other answer."""
    command, error = result.command, result.error
    if error is None or kind is None or kind.manager.current(command.step) not in kind.manager.mandatory:
        return None
    text = f"{result.reason}: {error.message}"
    return DeliveryFailure(command, text, undone=True, failed=False, given_up=COMMAND_REFUSED, due_at=now)


def to_row(key: ProcessKey, given: Input) -> WaitingInput:
    """The row that keeps an input until its process goes on."""
    match given:
        case EventInput(_, envelope):
            return WaitingInput(*key, "event", envelope.type, envelope.SerializeToString())
        case CommandResult(command):
            return WaitingInput(*key, "answer", command.step, _dump_result(given))
        case TimerInput(name):
            return WaitingInput(*key, "timer", name, b"")
        case _:
            assert_never(given)


def from_row(row: WaitingInput, kind: ProcessType | None) -> Input:
    """The input that a row keeps. Raises LookupError for an event that this release does not know."""
    if row.kind == "event":
        envelope = EventEnvelope.FromString(row.content)
        if kind is not None:  # the event may have become an old one while it waited
            try:
                envelope = kind.upcasters.today(envelope)
            except Exception as error:
                raise LookupError(f"this release cannot upcast {envelope.type}") from error
        for message in kind.manager.key if kind is not None else ():
            if message.DESCRIPTOR.full_name == envelope.type:
                return EventInput(message.FromString(envelope.payload), envelope)
        raise LookupError(f"this release knows no event {envelope.type} of {row.type}")
    if row.kind == "answer":
        return _load_result((row.tenant, row.type, row.process_id), row.content)
    return TimerInput(row.name)


def _dump_result(result: CommandResult) -> bytes:
    command = result.command
    return orjson.dumps(
        {
            "step": command.step,
            "attempt": command.attempt,
            "command_id": str(command.command_id),
            "command_type": command.command_type,
            "tries": command.tries,
            "reason": result.reason,
            "error": None if result.error is None else result.error.SerializeToString().hex(),
        }
    )


def _load_result(key: ProcessKey, content: bytes) -> CommandResult:
    it = orjson.loads(content)
    command_id = UUID(it["command_id"])
    command = PendingCommand(*key, it["step"], it["attempt"], command_id, it["command_type"], b"", "", "", "", it["tries"], 0)
    error = None if it["error"] is None else status_pb2.Status.FromString(bytes.fromhex(it["error"]))
    return CommandResult(command, error, it["reason"])
