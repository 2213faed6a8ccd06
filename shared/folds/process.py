"""What a process is: a state, and what it does next on an event, on the answer to a command of its own, on a timer.

    TRANSFER = ProcessManager(type="transfer", initial=Transfer(), key={TransferStarted: attrgetter("transfer_id")}, ...)

All of it is pure: no I/O, no clock, no randomness. Events start a process; from then on the answers to its own commands
advance it, and every command is answered, if only by a refusal, so no process waits for an event that cannot come.
The same input may be folded again, after a roll-back, but never is its result kept twice.

The rest is the runner's: it names the commands' ids, saves all of a step in one transaction, and sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Notice

CANCELLED_BY_OPERATOR = "CANCELLED_BY_OPERATOR"
"""The reason of an answer that is an operator's: the command was taken back before it was carried out.

What must be done whoever says so is then sent again, as the same step.
"""

S = TypeVar("S")
ProcessKeys = Mapping[type[Message], Callable[[Any], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """A command to be sent: a request message without options. `step` names it within its process, once and for all.

    A step that is sent a second time is the same command: it is not carried out again, and answers as it did before.
    """

    step: str
    command: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """Calls `on_timer` with the name, once, when it is due or late. Set again under the same name, it moves."""

    name: str
    due_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a command: accepted, with or without events, or refused for a reason. Always final."""

    step: str
    attempt: int
    accepted: bool
    # Of the refusal, for example INSUFFICIENT_FUNDS; empty if the command was accepted.
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Generic[S]):
    """What follows from an input. All of it is saved, or nothing is."""

    state: S
    send: tuple[Send, ...] = ()
    timers: tuple[Timer, ...] = ()
    cancel_timers: tuple[str, ...] = ()
    # Heard by the announcements that are registered for them (shared/folds/delivery.py), if there are any.
    notify: tuple[Notice, ...] = ()
    # Why an operator should look at the process from now on, as an UPPER_SNAKE word; empty takes an earlier one back.
    attention: str = ""
    # Nothing is asked of it any more, its timers are gone. Commands that wait are sent still; nobody minds their answer.
    ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessDefinition(Generic[S]):
    """A kind of process. Its state is a frozen, flat dataclass of ids, numbers and words, without personal data.

    `key` has a row for each event it reacts to, with the id of the process that the event belongs to, a UUID. A process
    that is not there yet is asked with `initial`; `None` means that the event does not concern it, or it any more.
    An answer always gives a step, and be it the same state. A fold that raises parks its process, and no other.
    """

    type: str
    initial: S
    key: ProcessKeys
    react: Callable[[S, Any, EventEnvelope], Step[S] | None]
    on_answer: Callable[[S, Answer], Step[S]]
    on_timer: Callable[[S, str], Step[S] | None]
    # What it is doing, in a word, for operators.
    phase: Callable[[S], str]
    # Steps that must not be refused, since the process could not end without them. A refusal of one, but an operator's, is no
    # answer: the process is parked with COMMAND_REFUSED, and Retry asks again under an id of its own.
    mandatory: frozenset[str] = frozenset()
    # Of the state's fields. A state of an older schema must still be readable: new fields have defaults.
    schema: int = 1
    # A process that runs and has not moved for so long is shown as stuck.
    stuck_after: timedelta = timedelta(minutes=1)

    def __post_init__(self) -> None:
        if not is_dataclass(self.initial) or not type(self.initial).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(f"the state of {self.type} must be a frozen dataclass")
        if not self.key:
            raise TypeError(f"{self.type} reacts to no event, so none would ever begin")
