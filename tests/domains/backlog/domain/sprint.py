"""A sprint, and the points that its items take up."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from tests.domains.backlog.domain.backlog_item_types import BacklogItemCommitted
from tests.domains.backlog.domain.sprint_types import ItemTakenOn, PlanSprint, SprintEvent, SprintPlanned

# State


class Sprint(Struct, frozen=True, kw_only=True):
    capacity: int = 0
    taken: int = 0


# Decisions


def plan(sprint: Sprint, command: PlanSprint, meta: Meta) -> list[SprintEvent]:
    """Refusals: SPRINT_ALREADY_PLANNED."""
    if sprint.capacity:
        raise AlreadyExists("SPRINT_ALREADY_PLANNED", "there is a sprint with this id")
    return [SprintPlanned(sprint_id=command.sprint_id, capacity=command.capacity)]


def take_on(sprint: Sprint, event: BacklogItemCommitted, meta: Meta) -> list[SprintEvent]:
    """Follows the commitment of an item, in its transaction. Refusals: SPRINT_NOT_FOUND, OVER_CAPACITY."""
    if not sprint.capacity:
        raise NotFound("SPRINT_NOT_FOUND", "there is no sprint with this id")
    if sprint.taken + event.points > sprint.capacity:
        raise Rejected("OVER_CAPACITY", "the item does not fit into the sprint", free=sprint.capacity - sprint.taken)
    return [ItemTakenOn(sprint_id=event.sprint_id, backlog_item_id=event.backlog_item_id, points=event.points)]


# Evolve


def evolve(sprint: Sprint, event: SprintEvent) -> Sprint:
    """The sprint after the event."""
    match event:
        case SprintPlanned():
            return replace(sprint, capacity=event.capacity)
        case ItemTakenOn():
            return replace(sprint, taken=sprint.taken + event.points)
        case _:
            assert_never(event)


SPRINT = Aggregate(category="sprint", initial=Sprint(), evolve=evolve)
