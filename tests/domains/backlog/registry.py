"""What the service can do, on one screen."""

from __future__ import annotations

from shared.commands.registry import CommandRegistry
from shared.platform.identity import Role
from tests.domains.backlog.codec import backlog_item_codec, sprint_codec
from tests.domains.backlog.domain import backlog_item, sprint
from tests.domains.backlog.domain.backlog_item import BACKLOG_ITEM
from tests.domains.backlog.domain.backlog_item_types import BacklogItemCommitted
from tests.domains.backlog.domain.sprint import SPRINT

USERS = frozenset({Role.USER})


def build_registry() -> CommandRegistry:
    """Items of a backlog, and the sprints that they are committed to."""
    registry = CommandRegistry()
    items = registry.aggregate(BACKLOG_ITEM, backlog_item_codec.EVENTS)
    items.command(backlog_item_codec.ADD_BACKLOG_ITEM, backlog_item.add, id=lambda c: c.backlog_item_id, roles=USERS)
    items.command(backlog_item_codec.COMMIT_BACKLOG_ITEM, backlog_item.commit, id=lambda c: c.backlog_item_id, roles=USERS)

    sprints = registry.aggregate(SPRINT, sprint_codec.EVENTS)
    sprints.command(sprint_codec.PLAN_SPRINT, sprint.plan, id=lambda c: c.sprint_id, roles=USERS)
    sprints.react(BacklogItemCommitted, sprint.take_on, id=lambda e: e.sprint_id)
    return registry
