"""What a process consists of: a state, and folds that say what it does next on an event, an answer or a timer.

    TRANSFER = ProcessDefinition(type="transfer", initial=Transfer(), key={TransferStarted: attrgetter("transfer_id")}, ...)

The folds are pure: no I/O, no clock, no randomness. An event starts a process; after that, the answers to its own commands
advance it. Every command gets an answer, if only a refusal, so no process waits for an event that cannot come. An input may
be folded again after a rollback, but its result is saved only once.

The runner does the rest: it derives the commands' ids, saves a whole step in one transaction, and sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Notice

CANCELLED_BY_OPERATOR = "CANCELLED_BY_OPERATOR"
"""The reason of a refusal that an operator made: the command was cancelled before it was carried out.

A mandatory step is sent again when an operator cancels it, as the same step.
"""

S = TypeVar("S")
ProcessKeys = Mapping[type[Message], Callable[[Any], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """A command to send: a request message without options. `step` is its fixed name within the process.

    A step that is sent a second time is the same command: it is not carried out again and gives its first answer.
    """

    step: str
    command: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """Calls `on_timer` with the name, once, at `due_at` or later. A timer set again under the same name moves."""

    name: str
    due_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The final answer to a command: accepted, with or without events, or refused for a reason."""

    step: str
    attempt: int
    accepted: bool
    # The reason of the refusal, for example INSUFFICIENT_FUNDS; empty if the command was accepted.
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Generic[S]):
    """What a process does on an input. All of it is saved, or nothing."""

    state: S
    send: tuple[Send, ...] = ()
    timers: tuple[Timer, ...] = ()
    cancel_timers: tuple[str, ...] = ()
    # Passed to the announcement folds that are registered for them (shared/folds/delivery.py), if there are any.
    notify: tuple[Notice, ...] = ()
    # Why an operator should look at the process, as an UPPER_SNAKE word. Empty clears an earlier one.
    attention: str = ""
    # The process gets no more inputs, and its timers are deleted. Waiting commands are still sent; their answers are only noted.
    ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessDefinition(Generic[S]):
    """A type of process. Its state is a frozen, flat dataclass of ids, numbers and words, without personal data.

    `key` has a row for each event that the process reacts to: a function from the event to the process's id, a UUID.
    `react` gets `initial` if the process does not exist yet; it returns None for an event that does not concern the
    process. `on_answer` always returns a step, possibly with the same state. A fold that raises parks its own process only.
    """

    type: str
    initial: S
    key: ProcessKeys
    react: Callable[[S, Any, EventEnvelope], Step[S] | None]
    on_answer: Callable[[S, Answer], Step[S]]
    on_timer: Callable[[S, str], Step[S] | None]
    # A word for operators that says what the process does now.
    phase: Callable[[S], str]
    # Mandatory steps: the process cannot end without them. If one is refused, except by an operator, the fold does not get the
    # answer: the process is parked with COMMAND_REFUSED, and Retry sends the step again under a new id.
    mandatory: frozenset[str] = frozenset()
    # Steps that an operator may skip: the process then goes on as if the step had been carried out.
    skippable: frozenset[str] = frozenset()
    # The version of the state's fields. It is raised when a field is renamed or removed, or means something else. A field that is
    # only added has a default instead.
    schema: int = 1
    # For schema n, the function from a state's fields at n to those at n + 1. States are migrated when they are read.
    migrations: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    # Steps that an earlier release sent under another name, old name to new. Their answers come under the new name.
    renamed: Mapping[str, str] = field(default_factory=dict)
    # The category of the aggregates whose ids its processes have: a process goes when its aggregate is purged. Empty: none do.
    aggregate: str = ""
    # Events that its diagram and the check of its folds begin with, and try in every state. None: an empty one of each in `key`.
    examples: tuple[Message, ...] = ()
    # A running process that has not moved for this long is shown as stuck.
    stuck_after: timedelta = timedelta(minutes=1)

    def __post_init__(self) -> None:
        if not is_dataclass(self.initial) or not type(self.initial).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(f"the state of {self.type} must be a frozen dataclass")
        if not self.key:
            raise TypeError(f"{self.type} reacts to no event, so none would ever begin")
        if self.migrations and set(self.migrations) != set(range(min(self.migrations), self.schema)):
            raise TypeError(f"the migrations of {self.type} do not lead to schema {self.schema} without a gap")

    def current(self, step: str) -> str:
        """The present name of a step that an earlier release may have sent."""
        return self.renamed.get(step, step)
