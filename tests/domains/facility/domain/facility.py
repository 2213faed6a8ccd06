"""A facility, and the tasks that are open there."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from tests.domains.facility.domain.facility_types import (
    CloseFacility,
    FacilityClosed,
    FacilityEvent,
    FacilityOpened,
    OpenFacility,
    Priority,
    TaskAdded,
    TaskRemoved,
)
from tests.domains.facility.domain.task_types import TaskFinished, TaskPlanned

TASKS_MAX = 1000
"""How many tasks may be open in one facility: closing it cancels them all."""


# State


class Facility(Struct, frozen=True, kw_only=True):
    opened: bool = False
    closed: bool = False
    critical: bool = False
    task_ids: tuple[str, ...] = ()


# Decisions


def open_facility(facility: Facility, command: OpenFacility, meta: Meta) -> list[FacilityEvent]:
    """Refusals: FACILITY_ALREADY_OPEN."""
    if facility.opened:
        raise AlreadyExists("FACILITY_ALREADY_OPEN", "a facility with this id is open")
    return [FacilityOpened(facility_id=command.facility_id, critical=command.critical)]


def close(facility: Facility, command: CloseFacility, meta: Meta) -> list[FacilityEvent]:
    """Names the open tasks: each is cancelled by a reaction. Refusals: FACILITY_NOT_FOUND."""
    _refuse_unless_opened(facility)
    return [] if facility.closed else [FacilityClosed(facility_id=command.facility_id, task_ids=facility.task_ids)]


def add_task(facility: Facility, event: TaskPlanned, meta: Meta) -> list[FacilityEvent]:
    """Follows the planning of a task, in its transaction, and says how much the task matters.

    Refusals, in order of precedence: FACILITY_NOT_FOUND, FACILITY_CLOSED, TOO_MANY_TASKS.
    """
    _refuse_unless_opened(facility)
    if facility.closed:
        raise Rejected("FACILITY_CLOSED", "the facility is closed")
    if len(facility.task_ids) >= TASKS_MAX:
        raise Rejected("TOO_MANY_TASKS", f"a facility may have {TASKS_MAX} open tasks")
    priority = Priority.HIGH if facility.critical else Priority.LOW
    return [TaskAdded(facility_id=event.facility_id, task_id=event.task_id, priority=priority)]


def remove_task(facility: Facility, event: TaskFinished, meta: Meta) -> list[FacilityEvent]:
    """Follows the end of a task, in its transaction."""
    return [TaskRemoved(facility_id=event.facility_id, task_id=event.task_id)]


def _refuse_unless_opened(facility: Facility) -> None:
    if not facility.opened:
        raise NotFound("FACILITY_NOT_FOUND", "there is no facility with this id")


# Evolve


def evolve(facility: Facility, event: FacilityEvent) -> Facility:
    """The facility after the event."""
    match event:
        case FacilityOpened():
            return replace(facility, opened=True, critical=event.critical)
        case TaskAdded():
            return replace(facility, task_ids=(*facility.task_ids, event.task_id))
        case TaskRemoved():
            return replace(facility, task_ids=tuple(each for each in facility.task_ids if each != event.task_id))
        case FacilityClosed():
            return replace(facility, closed=True, task_ids=())
        case _:
            assert_never(event)


FACILITY = Aggregate(category="facility", initial=Facility(), evolve=evolve)
