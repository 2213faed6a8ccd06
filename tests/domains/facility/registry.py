"""What the service can do, on one screen."""

from __future__ import annotations

from shared.commands.registry import CommandRegistry
from shared.platform.identity import Role
from tests.domains.facility.codec import facility_codec, task_codec
from tests.domains.facility.domain import facility, task
from tests.domains.facility.domain.facility import FACILITY
from tests.domains.facility.domain.facility_types import FacilityClosed, TaskAdded
from tests.domains.facility.domain.task import TASK
from tests.domains.facility.domain.task_types import TaskFinished, TaskPlanned

USERS = frozenset({Role.USER})


def build_registry() -> CommandRegistry:
    """Facilities and their tasks: each has reactions to the other's events."""
    registry = CommandRegistry()
    facilities = registry.aggregate(FACILITY, facility_codec.EVENTS)
    facilities.command(facility_codec.OPEN_FACILITY, facility.open_facility, id=lambda c: c.facility_id, roles=USERS)
    facilities.command(facility_codec.CLOSE_FACILITY, facility.close, id=lambda c: c.facility_id, roles=USERS)
    facilities.react(TaskPlanned, facility.add_task, id=lambda e: e.facility_id)
    facilities.react(TaskFinished, facility.remove_task, id=lambda e: e.facility_id)

    tasks = registry.aggregate(TASK, task_codec.EVENTS)
    tasks.command(task_codec.PLAN_TASK, task.plan, id=lambda c: c.task_id, roles=USERS)
    tasks.command(task_codec.FINISH_TASK, task.finish, id=lambda c: c.task_id, roles=USERS)
    tasks.react(TaskAdded, task.prioritize, id=lambda e: e.task_id)
    tasks.react_each(FacilityClosed, task.cancel, ids=lambda e: e.task_ids)
    return registry
