"""Whether processes in flight go on under this release's code, found on copies of them before the release is deployed.

A process is read with its state, the commands and timers that it waits for, and the inputs that wait for it. Each of them is
folded on the copy: every answer that may come, and from there the way to the end on which all is accepted. Nothing is written.
How a process came to its state is replayed in `replay.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from shared.folds.process import Answer, Step
from shared.processes.inputs import call_fold, from_row
from shared.processes.process_type import ProcessType
from shared.processes.records import Process, WaitingInput

PROBE = "PROBE"
"""The reason of a refusal that is only tried."""

STEPS_MAX = 64
"""A process that has not ended after so many accepted steps does not end."""

TYPE_UNKNOWN = "TYPE_UNKNOWN"
STATE_UNREADABLE = "STATE_UNREADABLE"
FOLD_FAILED = "FOLD_FAILED"
ANSWER_IGNORED = "ANSWER_IGNORED"
NEVER_ENDS = "NEVER_ENDS"


class Mismatch(NamedTuple):
    """Why a process would not go on: a word, and where."""

    what: str
    where: str


class WaitingCommand(NamedTuple):
    """A command without an answer: its step, its type, and the request with its options."""

    step: str
    type: str
    payload: bytes


class PastEntry(NamedTuple):
    """What a replay needs of a line of a process's history; the fields are the row's columns."""

    kind: str
    name: str
    step: str
    id: str
    position: int
    error: bytes | None
    note: str


@dataclass(slots=True)
class Case:
    """A copy of a process in flight, as it was at a moment, `now`."""

    process: Process
    now: datetime
    commands: list[WaitingCommand] = field(default_factory=list)
    # When each is due, by name.
    timers: dict[str, datetime] = field(default_factory=dict)
    inputs: list[WaitingInput] = field(default_factory=list)
    # In order; None if it was not read.
    history: list[PastEntry] | None = None


def check(kinds: Mapping[str, ProcessType], case: Case) -> Mismatch | None:
    """The first reason why a process would not go on; None if it would."""
    kind = kinds.get(case.process.type)
    if kind is None:
        return Mismatch(TYPE_UNKNOWN, "")
    try:
        state = kind.load(case.process)
    except Exception as error:  # noqa: BLE001 (whatever it raises is what is looked for)
        return Mismatch(STATE_UNREADABLE, f"schema {case.process.schema}: {type(error).__name__}")
    try:
        for row in case.inputs:
            where = f"waiting {row.kind} {row.name}"
            taken = call_fold(kind, state, from_row(row, kind))
            state = state if taken is None else dumped(kind, taken).state
        for name in case.timers:
            where = f"timer {name}"
            if (fired := kind.manager.on_timer(state, name)) is not None:
                dumped(kind, fired)
        for step in [command.step for command in case.commands]:
            for accepted in (True, False):
                if accepted or kind.manager.current(step) not in kind.manager.mandatory:
                    where = f"{step} {'accepted' if accepted else 'refused'}"
                    if (found := _follow(kind, state, kind.manager.current(step), accepted)) is not None:
                        return Mismatch(found, where)
    except Exception as error:  # noqa: BLE001 (as above)
        return Mismatch(FOLD_FAILED, f"{where}: {type(error).__name__}")
    return None


def _follow(kind: ProcessType, state: Any, step: str, accepted: bool) -> str | None:
    """Folds an answer, and then accepts all that the process sends, until it ends or waits for something else."""
    first = True
    waiting = [step]
    for _ in range(STEPS_MAX):
        name = waiting.pop(0)
        taken = dumped(kind, kind.manager.on_answer(state, answer(name, accepted=accepted)))
        if first and taken.state == state and not taken.send and not taken.ended:
            return ANSWER_IGNORED
        first, accepted, state = False, True, taken.state
        waiting += [send.step for send in taken.send]
        if taken.ended or not waiting:
            return None
    return NEVER_ENDS


def answer(step: str, *, accepted: bool, reason: str | None = None) -> Answer:
    """An answer to try on a fold; without a reason a refusal is a PROBE."""
    return Answer(step=step, attempt=1, accepted=accepted, reason="" if accepted else reason or PROBE)


def dumped(kind: ProcessType, step: Step[Any]) -> Step[Any]:
    """The step, after its state and phase were made as the runner makes them."""
    kind.dump(step.state)
    kind.manager.phase(step.state)
    return step
