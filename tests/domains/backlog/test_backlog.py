"""Committing an item to a sprint is handled by the sprint before the save; an atomic batch is published once, or never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from foldline.v1 import command_pb2
from shared.line import broker
from shared.line.broker_access import Broker, connect
from tests.domains.backlog import backlog_pb2_grpc
from tests.domains.backlog.backlog_pb2 import AddBacklogItemRequest, CommitBacklogItemRequest, PlanSprintRequest
from tests.domains.backlog.registry import build_registry
from tests.domains.backlog.servicers import COMMANDS, add_command_services
from tests.domains.service import Service, serving
from tests.support.checks.history import check_line, events_of
from tests.support.clients.bank import new_id, read_status
from tests.support.fakes.relaying import in_step, relaying

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
        backlog = backlog_pb2_grpc.BacklogServiceStub(service.channel)
        self.add, self.commit = backlog.AddBacklogItem, backlog.CommitBacklogItem
        self.plan = backlog_pb2_grpc.SprintServiceStub(service.channel).PlanSprint

    async def planned(self, capacity: int) -> str:
        """The id of a new sprint."""
        receipt = await self.service.send(self.plan, PlanSprintRequest(sprint_id=new_id(), capacity=capacity))
        return receipt.aggregate_id

    async def added(self, points: int) -> str:
        """The id of a new item."""
        request = AddBacklogItemRequest(backlog_item_id=new_id(), title="do it", points=points)
        return (await self.service.send(self.add, request)).aggregate_id


def committing(item: str, sprint: str) -> CommitBacklogItemRequest:
    """An item is to be done in a sprint."""
    return CommitBacklogItemRequest(backlog_item_id=item, sprint_id=sprint)


async def test_a_commitment_is_taken_on_by_the_sprint_before_it_is_saved(service: Service, write_db: Database) -> None:
    """Both or neither: what does not fit leaves the item as it was."""
    works = Works(service)
    sprint = await works.planned(8)
    fits, too_much = await works.added(5), await works.added(4)
    receipt = await service.send(works.commit, committing(fits, sprint))
    assert (receipt.version, receipt.events_appended) == (2, 2)
    assert await service.refusal(works.commit, committing(too_much, sprint)) == "OVER_CAPACITY"
    assert await service.refusal(works.commit, committing(too_much, new_id())) == "SPRINT_NOT_FOUND"
    assert await service.refusal(works.commit, committing(fits, sprint)) == "BACKLOG_ITEM_COMMITTED"
    assert await service.refusal(works.commit, committing(new_id(), sprint)) == "BACKLOG_ITEM_NOT_FOUND"
    assert await service.names("backlog_item", fits) == ["BacklogItemAdded", "BacklogItemCommitted"]
    assert await service.names("backlog_item", too_much) == ["BacklogItemAdded"]
    assert await service.names("sprint", sprint) == ["SprintPlanned", "ItemTakenOn"]
    await check_line(write_db)


async def test_of_many_at_once_a_sprint_takes_what_fits(service: Service, write_db: Database) -> None:
    """Ten of three points want into ten: three get in."""
    works = Works(service)
    sprint = await works.planned(10)
    items = [await works.added(3) for _ in range(10)]
    told = await asyncio.gather(*[service.refusal(works.commit, committing(item, sprint)) for item in items])
    assert sorted(told) == [""] * 3 + ["OVER_CAPACITY"] * 7
    await check_line(write_db)


async def test_an_atomic_batch_is_published_once_and_never_if_it_is_undone(
    service: Service, write_db: Database, nats_server: Nats
) -> None:
    """Two saves in one transaction. The last of the other batch does not fit, so nothing of it is saved or told."""
    works = Works(service)
    sprint = await works.planned(10)
    one, two, three, four = [await works.added(points) for points in (5, 3, 1, 8)]
    before = len(await events_of(write_db))
    client = await connect(Broker(nats_server.url), "test")
    try:
        async with relaying(write_db, nats_server.url):
            await in_step(client.jetstream(), write_db)
            undone = await service.batch(
                committing(three, sprint), committing(four, sprint), committing(two, sprint), atomic=True
            )
            told = [read_status(receipt.error).reason for receipt in undone]
            assert told == ["ATOMIC_BATCH_REFUSED", "ATOMIC_BATCH_REFUSED", "OVER_CAPACITY"]
            done = await service.batch(committing(one, sprint), committing(two, sprint), atomic=True)
            assert {receipt.status for receipt in done} == {COMPLETED}
            copy = await in_step(client.jetstream(), write_db)
    finally:
        await client.close()
    published = [copy.messages[position] for position in range(before + 1, copy.end + 1)]
    types = [(message.headers or {})["ce-type"] for message in published]
    assert types == ["backlog.v1.BacklogItemCommitted", "backlog.v1.ItemTakenOn"] * 2
    ids = [(message.headers or {})[broker.ID] for message in published]
    assert len(set(ids)) == 4
    for item in (three, four):
        assert await service.names("backlog_item", item) == ["BacklogItemAdded"]
    await check_line(write_db)
