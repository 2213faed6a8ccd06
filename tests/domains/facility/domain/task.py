"""A task in a facility."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from tests.domains.facility.domain.facility_types import FacilityClosed, TaskAdded
from tests.domains.facility.domain.task_types import (
    FinishTask,
    PlanTask,
    TaskCancelled,
    TaskEvent,
    TaskFinished,
    TaskPlanned,
    TaskPrioritized,
)

# State


class Task(Struct, frozen=True, kw_only=True):
    facility_id: str = ""
    priority: int = 0
    finished: bool = False
    cancelled: bool = False


# Decisions


def plan(task: Task, command: PlanTask, meta: Meta) -> list[TaskEvent]:
    """Refusals: TASK_ALREADY_PLANNED; then those of the facility."""
    if task.facility_id:
        raise AlreadyExists("TASK_ALREADY_PLANNED", "a task with this id is planned")
    return [TaskPlanned(task_id=command.task_id, facility_id=command.facility_id, title=command.title)]


def finish(task: Task, command: FinishTask, meta: Meta) -> list[TaskEvent]:
    """Refusals: TASK_NOT_FOUND, TASK_CANCELLED."""
    if not task.facility_id:
        raise NotFound("TASK_NOT_FOUND", "there is no task with this id")
    if task.cancelled:
        raise Rejected("TASK_CANCELLED", "the task was cancelled")
    return [] if task.finished else [TaskFinished(task_id=command.task_id, facility_id=task.facility_id)]


def prioritize(task: Task, event: TaskAdded, meta: Meta) -> list[TaskEvent]:
    """Follows what the facility says of the task, in the transaction that plans it."""
    return [TaskPrioritized(task_id=event.task_id, priority=event.priority)]


def cancel(task: Task, event: FacilityClosed, meta: Meta) -> list[TaskEvent]:
    """Follows the closing of the facility, in its transaction."""
    return [] if task.finished or task.cancelled else [TaskCancelled(task_id=meta.aggregate_id)]


# Evolve


def evolve(task: Task, event: TaskEvent) -> Task:
    """The task after the event."""
    match event:
        case TaskPlanned():
            return replace(task, facility_id=event.facility_id)
        case TaskPrioritized():
            return replace(task, priority=event.priority)
        case TaskFinished():
            return replace(task, finished=True)
        case TaskCancelled():
            return replace(task, cancelled=True)
        case _:
            assert_never(event)


TASK = Aggregate(category="task", initial=Task(), evolve=evolve)
