"""Replays what a process in flight has gone through with this release's folds, before the release is deployed.

The history of a process names its inputs, in order, and what each of them caused. The inputs are folded from the beginning:
events as the line has them, answers and timers as the history has them. What the folds do now is held against what they did:
the same commands and timers at each input, and at the end the same state and the same commands and timers that wait.

A difference need not be a defect: a release that sends another command in the middle is meant to differ for processes that are
past it. They go on from where they are (`compatibility.py`), but are not where the new release would have brought them.
Notices are not compared: which of them become deliveries was said by the switches of that time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from google.protobuf.message import Message
from google.rpc import status_pb2

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.process import Send, Step
from shared.line.event_store import PURGED
from shared.processes.compatibility import FOLD_FAILED, Case, Mismatch, PastEntry
from shared.processes.history import ACCEPT_HISTORY, PARKED
from shared.processes.inputs import Input, TimerInput, call_fold, from_row
from shared.processes.process_type import ProcessType
from shared.processes.records import CommandResult, PendingCommand, Process, WaitingInput
from shared.rpc.status import from_status

HISTORY_UNREADABLE = "HISTORY_UNREADABLE"
INPUT_IGNORED = "INPUT_IGNORED"
COMMANDS_DIFFER = "COMMANDS_DIFFER"
TIMERS_DIFFER = "TIMERS_DIFFER"
ENDS_EARLIER = "ENDS_EARLIER"
STATE_DIFFERS = "STATE_DIFFERS"

_INPUTS = ("event", "answer", "timer_fired")


def positions(case: Case) -> list[int]:
    """Where on the line the events are that a replay needs."""
    return [entry.position for entry in _since_begin(case.history or ()) if entry.kind == "event"]


def replay(kinds: Mapping[str, ProcessType], case: Case, events: Mapping[int, EventEnvelope]) -> Mismatch | None:
    """The first difference between what a process has done and what it would do now; None if there is none.

    `events` has the events of `positions`. A process whose event was purged is not replayed: it goes with its tenant.
    """
    kind = kinds[case.process.type]
    entries = _since_begin(case.history or ())
    if not any(entry.kind == "event" for entry in entries):
        return Mismatch(HISTORY_UNREADABLE, "it does not say what began the process")
    if any(entry.kind == "event" and _is_purged(events.get(entry.position)) for entry in entries):
        return None
    attempts, now = _attempts(case.history or ()), _Replayed(kind, kind.manager.initial)
    for entry, caused in _grouped(entries):
        if entry.kind not in _INPUTS:
            now.sent_again(caused)
            continue
        where = f"{entry.kind.replace('_', ' ')} {kind.manager.current(entry.step) or entry.name}"
        try:
            given = _input(kind, case.process, entry, attempts, events)
        except LookupError as error:
            return Mismatch(HISTORY_UNREADABLE, f"{where}: {error}")
        try:
            found = now.take(given, caused)
        except Exception as error:  # noqa: BLE001 (whatever a fold raises is what is looked for)
            return Mismatch(FOLD_FAILED, f"replayed {where}: {type(error).__name__}")
        if found is not None:
            return Mismatch(found.what, f"{where}: {found.where}")
    return now.compare(case)


@dataclass(slots=True)
class _Replayed:
    """A process as it is replayed so far."""

    kind: ProcessType
    state: Any
    # What waits for an answer, by step, with its command id then.
    commands: dict[str, tuple[str, Message]] = field(default_factory=dict)
    timers: dict[str, datetime] = field(default_factory=dict)

    def take(self, given: Input, caused: Sequence[PastEntry]) -> Mismatch | None:
        """Folds an input. Returns how what it causes differs from what it caused. Raises whatever the fold raises."""
        if isinstance(given, CommandResult):
            self.commands.pop(self.kind.manager.current(given.command.step), None)
        elif isinstance(given, TimerInput):
            self.timers.pop(given.name, None)
        step: Step[Any] | None = call_fold(self.kind, self.state, given)
        if step is None:
            return Mismatch(INPUT_IGNORED, "it changes nothing now")
        if step.ended:
            return Mismatch(ENDS_EARLIER, "the process ends now")
        self.kind.dump(step.state)
        self.state = step.state
        first, again = self._split(caused, step.send)
        was = [(self.kind.manager.current(entry.step), entry.name) for entry in first]
        becomes = [(send.step, send.command.DESCRIPTOR.full_name) for send in step.send]
        if was != becomes:
            return Mismatch(COMMANDS_DIFFER, f"sent {_listed(was)}, now {_listed(becomes)}")
        for entry, send in zip(first, step.send, strict=True):
            self.commands.setdefault(send.step, (entry.id, send.command))
        self.sent_again(again)
        set_then = [entry.name for entry in caused if entry.kind == "timer_set"]
        if set_then != (set_now := [timer.name for timer in step.timers]):
            return Mismatch(TIMERS_DIFFER, f"set {', '.join(set_then) or 'none'}, now {', '.join(set_now) or 'none'}")
        for name in step.cancel_timers:
            self.timers.pop(name, None)
        self.timers.update((timer.name, timer.due_at) for timer in step.timers)
        return None

    def _split(self, caused: Sequence[PastEntry], sends: Sequence[Send]) -> tuple[list[PastEntry], list[PastEntry]]:
        """The commands that a fold sent, and those that the runner sent again behind them, under other ids."""
        first: list[PastEntry] = []
        again: list[PastEntry] = []
        ids = {step: id_ for step, (id_, _) in self.commands.items()}
        for entry in caused:
            if entry.kind == "command":
                step = self.kind.manager.current(entry.step)
                (first if ids.setdefault(step, entry.id) == entry.id else again).append(entry)
        return first, again

    def sent_again(self, entries: Sequence[PastEntry]) -> None:
        """Takes the new ids of commands that were sent again."""
        for entry in entries:
            step = self.kind.manager.current(entry.step)
            if entry.kind == "command" and step in self.commands:
                self.commands[step] = entry.id, self.commands[step][1]

    def compare(self, case: Case) -> Mismatch | None:
        """How the process that is stored differs from this one."""
        stored, replayed = (orjson.loads(self.kind.dump(state)) for state in (self.kind.load(case.process), self.state))
        if stored != replayed:
            return Mismatch(STATE_DIFFERS, _differing(stored, replayed))
        waiting = {self.kind.manager.current(it.step): it for it in case.commands}
        if waiting.keys() != self.commands.keys():
            was, now = ", ".join(sorted(waiting)) or "nothing", ", ".join(sorted(self.commands)) or "nothing"
            return Mismatch(COMMANDS_DIFFER, f"waits for {was}, now {now}")
        for step, (_, command) in self.commands.items():
            sent = type(command).FromString(waiting[step].payload)
            sent.ClearField("options")
            if sent != command:
                return Mismatch(COMMANDS_DIFFER, f"{step}: {_differing(_fields(sent), _fields(command))}")
        for name, due_at in case.timers.items():
            if self.timers.get(name) != due_at:
                return Mismatch(TIMERS_DIFFER, f"{name} is due at another time, or not set")
        for name, due_at in self.timers.items():
            # One that was due may have fired without a trace, if the fold had nothing to do.
            if name not in case.timers and due_at > case.now:
                return Mismatch(TIMERS_DIFFER, f"{name} was not set, or cancelled")
        return None


def _since_begin(history: Sequence[PastEntry]) -> Sequence[PastEntry]:
    """The entries since the process began, or began anew after a restore of the line."""
    for place in range(len(history) - 1, -1, -1):
        entry = history[place]
        if entry.kind == "operator" and entry.name == ACCEPT_HISTORY and entry.note != PARKED:
            return history[place + 1 :]
    return history


def _grouped(entries: Sequence[PastEntry]) -> Iterator[tuple[PastEntry, Sequence[PastEntry]]]:
    """Each input, or other entry that is caused by nothing, with what it caused."""
    begin = 0
    for place in range(1, len(entries) + 1):
        if place == len(entries) or entries[place].kind not in ("command", "timer_set", "notice"):
            yield entries[begin], entries[begin + 1 : place]
            begin = place


def _attempts(history: Sequence[PastEntry]) -> dict[str, int]:
    """The attempt that each command id stands for: each attempt of a step has an id of its own."""
    attempts: dict[str, int] = {}
    made: dict[str, int] = {}
    for entry in history:
        if entry.kind == "command" and entry.id not in attempts:
            attempts[entry.id] = made[entry.step] = made.get(entry.step, 0) + 1
    return attempts


def _input(
    kind: ProcessType, process: Process, entry: PastEntry, attempts: Mapping[str, int], events: Mapping[int, EventEnvelope]
) -> Input:
    """The input that an entry names. Raises LookupError if it is not to be had any more."""
    if entry.kind == "event":
        envelope = events.get(entry.position)
        if envelope is None or envelope.event_id != entry.id:
            raise LookupError(f"the line has another event at position {entry.position}, or none")
        return from_row(WaitingInput(*process.key, "event", envelope.type, envelope.SerializeToString()), kind)
    if entry.kind == "timer_fired":
        return TimerInput(entry.name)
    error = None if entry.error is None else status_pb2.Status.FromString(entry.error)
    attempt = attempts.get(entry.id, 1)
    command = PendingCommand(*process.key, entry.step, attempt, UUID(entry.id), entry.name, b"", "", "", "", 1, 0)
    return CommandResult(command, error, "" if error is None else from_status(error).reason)


def _is_purged(envelope: EventEnvelope | None) -> bool:
    return envelope is not None and envelope.type == PURGED


def _listed(commands: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{step} ({type_})" for step, type_ in commands) or "nothing"


def _fields(message: Message) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields if field.name != "options"}


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The names of the fields that differ. Their values may be nobody's business."""
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
