"""An item of a backlog."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from tests.domains.backlog.domain.backlog_item_types import (
    AddBacklogItem,
    BacklogItemAdded,
    BacklogItemCommitted,
    BacklogItemEvent,
    CommitBacklogItem,
)

# State


class BacklogItem(Struct, frozen=True, kw_only=True):
    added: bool = False
    points: int = 0
    sprint_id: str = ""


# Decisions


def add(item: BacklogItem, command: AddBacklogItem, meta: Meta) -> list[BacklogItemEvent]:
    """Refusals: BACKLOG_ITEM_ALREADY_ADDED."""
    if item.added:
        raise AlreadyExists("BACKLOG_ITEM_ALREADY_ADDED", "there is an item with this id")
    return [BacklogItemAdded(backlog_item_id=command.backlog_item_id, title=command.title, points=command.points)]


def commit(item: BacklogItem, command: CommitBacklogItem, meta: Meta) -> list[BacklogItemEvent]:
    """Refusals: BACKLOG_ITEM_NOT_FOUND, BACKLOG_ITEM_COMMITTED; then those of the sprint."""
    if not item.added:
        raise NotFound("BACKLOG_ITEM_NOT_FOUND", "there is no item with this id")
    if item.sprint_id:
        raise Rejected("BACKLOG_ITEM_COMMITTED", "the item is in a sprint already", sprint_id=item.sprint_id)
    return [BacklogItemCommitted(backlog_item_id=command.backlog_item_id, sprint_id=command.sprint_id, points=item.points)]


# Evolve


def evolve(item: BacklogItem, event: BacklogItemEvent) -> BacklogItem:
    """The item after the event."""
    match event:
        case BacklogItemAdded():
            return replace(item, added=True, points=event.points)
        case BacklogItemCommitted():
            return replace(item, sprint_id=event.sprint_id)
        case _:
            assert_never(event)


BACKLOG_ITEM = Aggregate(category="backlog_item", initial=BacklogItem(), evolve=evolve)
