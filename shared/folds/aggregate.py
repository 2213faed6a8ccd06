"""What the domain consists of: aggregates that evolve by events, and decisions that answer commands with events.

Everything here is plain data and pure functions. A domain module imports this one, the errors, and its own generated
commands and events. Commands, events and states are `msgspec.Struct`s, frozen and with keyword fields. They are like
dataclasses, but made in a tenth of the time, and every command makes three of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

from msgspec import Struct

State = TypeVar("State")
Event = TypeVar("Event")
Content = TypeVar("Content")


class Meta(Struct, frozen=True):
    """What a decision gets beside the state and the command: whose state it is, the caller, the tenant and the time.

    `aggregate_id` is that of the aggregate that decides: of a reaction, the one that its row of the table names. `now` is in
    UTC, and the same for the decision and its reactions, so a decision can be repeated with the same result.
    """

    command_id: str
    aggregate_id: str
    tenant: str
    user_id: str
    on_behalf_of: str
    roles: frozenset[str]
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate(Generic[State, Event]):
    """A kind of aggregate.

    `category` is its name in streams, subjects and queries. `evolve` folds one event into the state. `schema` is
    raised when the meaning of stored states changes: snapshots of another schema are then ignored, and a test
    (`tests/unit/write_service/test_state_schemas.py`) fails if it was forgotten.
    """

    category: str
    initial: State
    evolve: Callable[[State, Event], State]
    schema: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A password hash to save, or to delete if it is None.

    The append does it in the transaction of the events. A hash is never part of an event, a command or a message.
    """

    subject_id: str
    password_hash: str | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided(Generic[Event]):
    """What a decision returns if it saves more than events."""

    events: Sequence[Event]
    credentials: Sequence[Credential] = ()


Decision = Callable[[State, Content, Meta], Sequence[Event] | Decided[Event]]
"""`decide(state, command or event, meta)`: returns the new events, none if nothing changes; raises a Refusal to refuse."""
