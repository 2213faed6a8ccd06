"""A facility gives each task its priority before it is saved, and cancels all that are open when it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.bootstrap import Database
from foldline.v1 import command_pb2
from tests.domains.facility import facility_pb2_grpc
from tests.domains.facility.domain.facility import TASKS_MAX
from tests.domains.facility.facility_pb2 import (
    PRIORITY_HIGH,
    PRIORITY_LOW,
    CloseFacilityRequest,
    FinishTaskRequest,
    OpenFacilityRequest,
    PlanTaskRequest,
    TaskPrioritized,
)
from tests.domains.facility.registry import build_registry
from tests.domains.facility.servicers import COMMANDS, add_command_services
from tests.domains.service import Service, serving
from tests.support.checks.history import check_line
from tests.support.clients.bank import new_id

COMPLETED = command_pb2.COMMAND_STATUS_COMPLETED


@pytest.fixture
async def service(write_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """The service over a fresh database."""
    async with serving(write_db, tmp_path, build_registry(), COMMANDS, add_command_services) as service:
        yield service


class Works:
    """The two stubs."""

    def __init__(self, service: Service) -> None:
        self.service = service
        facilities = facility_pb2_grpc.FacilityServiceStub(service.channel)
        tasks = facility_pb2_grpc.TaskServiceStub(service.channel)
        self.open, self.close = facilities.OpenFacility, facilities.CloseFacility
        self.plan, self.finish = tasks.PlanTask, tasks.FinishTask

    async def opened(self, *, critical: bool = False) -> str:
        """The id of a new facility."""
        facility_id = new_id()
        await self.service.send(self.open, OpenFacilityRequest(facility_id=facility_id, critical=critical))
        return facility_id

    async def planned(self, facility_id: str) -> str:
        """The id of a new task."""
        return (await self.service.send(self.plan, sweep(facility_id))).aggregate_id


def sweep(facility_id: str) -> PlanTaskRequest:
    """The floor of a facility is to be swept."""
    return PlanTaskRequest(task_id=new_id(), facility_id=facility_id, title="sweep the floor")


async def test_a_task_gets_its_priority_before_it_is_saved(service: Service, write_db: Database) -> None:
    """It is planned, added to the facility and prioritized in one transaction: nobody ever sees it without."""
    works = Works(service)
    for critical, expected in ((False, PRIORITY_LOW), (True, PRIORITY_HIGH)):
        facility_id = await works.opened(critical=critical)
        receipt = await service.send(works.plan, sweep(facility_id))
        planned, prioritized = await service.stream("task", receipt.aggregate_id)
        assert TaskPrioritized.FromString(prioritized.payload).priority == expected
        assert planned.metadata.command_id == prioritized.metadata.command_id == receipt.command_id
        assert (receipt.version, receipt.events_appended, receipt.position) == (2, 3, prioritized.position)
        assert await service.names("facility", facility_id) == ["FacilityOpened", "TaskAdded"]
    assert len(await check_line(write_db)) == 8


async def test_closing_a_facility_cancels_its_open_tasks(service: Service, write_db: Database) -> None:
    """Those that are done stay done, those of another facility go on."""
    works = Works(service)
    here, there = await works.opened(), await works.opened()
    first, second, third = [await works.planned(here) for _ in range(3)]
    other = await works.planned(there)
    await service.send(works.finish, FinishTaskRequest(task_id=second))
    closed = await service.send(works.close, CloseFacilityRequest(facility_id=here))
    assert closed.events_appended == 3
    for task, last in ((first, "TaskCancelled"), (second, "TaskFinished"), (third, "TaskCancelled"), (other, "TaskPrioritized")):
        assert (await service.names("task", task))[-1] == last
    assert (await service.stream("task", third))[-1].position == closed.position
    assert await service.refusal(works.finish, FinishTaskRequest(task_id=first)) == "TASK_CANCELLED"
    refused = sweep(here)
    assert await service.refusal(works.plan, refused) == "FACILITY_CLOSED"
    assert await service.names("task", refused.task_id) == []
    assert (await service.send(works.close, CloseFacilityRequest(facility_id=here))).events_appended == 0
    await check_line(write_db)


async def test_closing_while_tasks_are_planned_and_finished(service: Service, write_db: Database) -> None:
    """Whatever comes first: no task of a closed facility is left open, and none is both finished and cancelled."""
    works = Works(service)
    for _ in range(5):
        facility_id = await works.opened()
        tasks = [await works.planned(facility_id) for _ in range(4)]
        late = [sweep(facility_id) for _ in range(4)]
        told = await asyncio.gather(
            *[service.refusal(works.plan, request) for request in late[:2]],
            *[service.refusal(works.finish, FinishTaskRequest(task_id=task)) for task in tasks[:2]],
            service.refusal(works.close, CloseFacilityRequest(facility_id=facility_id)),
            *[service.refusal(works.plan, request) for request in late[2:]],
        )
        assert set(told) <= {"", "FACILITY_CLOSED", "TASK_CANCELLED"}
        for task in (*tasks, *[request.task_id for request in late]):
            names = await service.names("task", task)
            ends = [name for name in names if name in ("TaskFinished", "TaskCancelled")]
            assert len(ends) == (1 if names else 0)
    await check_line(write_db)


async def test_as_many_tasks_as_there_may_be_are_cancelled_at_once(service: Service, write_db: Database) -> None:
    """A thousand; one more cannot be planned."""
    works = Works(service)
    facility_id = await works.opened()
    for _ in range(TASKS_MAX // 250):
        receipts = await service.batch(*[sweep(facility_id) for _ in range(250)])
        assert {receipt.status for receipt in receipts} == {COMPLETED}
    assert await service.refusal(works.plan, sweep(facility_id)) == "TOO_MANY_TASKS"
    closed = await service.send(works.close, CloseFacilityRequest(facility_id=facility_id))
    assert closed.events_appended == 1001
    assert len(await check_line(write_db)) == 1 + 3000 + 1001


async def test_what_is_not_there_is_refused(service: Service) -> None:
    """Neither the facility nor the task, and each of them once."""
    works = Works(service)
    facility_id, nowhere = await works.opened(), new_id()
    assert await service.refusal(works.open, OpenFacilityRequest(facility_id=facility_id)) == "FACILITY_ALREADY_OPEN"
    assert await service.refusal(works.close, CloseFacilityRequest(facility_id=nowhere)) == "FACILITY_NOT_FOUND"
    assert await service.refusal(works.plan, sweep(nowhere)) == "FACILITY_NOT_FOUND"
    assert await service.refusal(works.finish, FinishTaskRequest(task_id=nowhere)) == "TASK_NOT_FOUND"
    request = sweep(facility_id)
    assert [await service.refusal(works.plan, request) for _ in range(2)] == ["", "TASK_ALREADY_PLANNED"]
