"""given / when / then for decisions: literal events in, literal events or a refusal out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from typing import Any, Generic, TypeVar

import pytest

from shared.folds.aggregate import Aggregate, Credential, Decided, Decision, Meta
from shared.folds.errors import Refusal

State = TypeVar("State")
Event = TypeVar("Event")
Content = TypeVar("Content")

META = Meta(
    command_id="00000000-0000-4000-8000-000000000001",
    aggregate_id="",
    tenant="acme",
    user_id="alice",
    on_behalf_of="",
    roles=frozenset({"user"}),
    now=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)


@dataclass(frozen=True, slots=True)
class When(Generic[Event]):
    """A decision on a state and a command."""

    decided: Callable[[], Sequence[Event] | Decided[Event]]

    def then(self, *events: Event, credentials: Sequence[Credential] = ()) -> None:
        """Asserts that the decision returns exactly these events and credentials; none means that nothing changes."""
        decided = self.decided()
        if not isinstance(decided, Decided):
            decided = Decided(events=decided)
        assert (list(decided.events), list(decided.credentials)) == (list(events), list(credentials))

    def then_refused(self, reason: str, **facts: str) -> None:
        """Asserts that the decision is refused for this reason, with these facts."""
        with pytest.raises(Refusal) as refused:
            self.decided()
        assert (refused.value.reason, refused.value.facts) == (reason, facts)


@dataclass(frozen=True, slots=True)
class Given(Generic[State, Event]):
    """An aggregate with its past events."""

    aggregate: Aggregate[State, Event]
    events: tuple[Event, ...]

    @property
    def state(self) -> State:
        """The state after the events."""
        return reduce(self.aggregate.evolve, self.events, self.aggregate.initial)

    def when(self, decide: Decision[State, Content, Event], content: Content, meta: Meta = META) -> When[Event]:
        """The decision on a command, or on an event that the aggregate reacts to."""
        return When(lambda: decide(self.state, content, meta))


def given(aggregate: Aggregate[State, Any], *events: Any) -> Given[State, Any]:
    """An aggregate with these past events."""
    return Given(aggregate, events)
