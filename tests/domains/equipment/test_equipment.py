"""Equipment reserves an item of an inventory in the transaction that creates it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.bootstrap import Database
from tests.domains.equipment import equipment_pb2_grpc
from tests.domains.equipment.equipment_pb2 import AddStockRequest, CreateEquipmentRequest
from tests.domains.equipment.registry import build_registry
from tests.domains.equipment.servicers import COMMANDS, add_command_services
from tests.domains.service import Service, serving
from tests.support.checks.history import check_line
from tests.support.clients.bank import new_id


@pytest.fixture
async def service(write_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """The service over a fresh database."""
    async with serving(write_db, tmp_path, build_registry(), COMMANDS, add_command_services) as service:
        yield service


class Works:
    """The two stubs."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.add_stock = equipment_pb2_grpc.InventoryServiceStub(service.channel).AddStock
        self.create = equipment_pb2_grpc.EquipmentServiceStub(service.channel).CreateEquipment

    async def stocked(self, items: int) -> str:
        """The id of a new inventory."""
        inventory_id = new_id()
        await self.service.send(self.add_stock, AddStockRequest(inventory_id=inventory_id, items=items))
        return inventory_id


def drill(inventory_id: str, equipment_id: str = "") -> CreateEquipmentRequest:
    """A drill of an inventory."""
    return CreateEquipmentRequest(equipment_id=equipment_id or new_id(), inventory_id=inventory_id, name="drill")


async def test_creating_equipment_reserves_it(service: Service, write_db: Database) -> None:
    """Both events are of one command, at following positions."""
    works = Works(service)
    inventory_id = await works.stocked(2)
    receipt = await service.send(works.create, drill(inventory_id))
    assert receipt.events_appended == 2
    [created] = await service.stream("equipment", receipt.aggregate_id)
    _, reserved = await service.stream("inventory", inventory_id)
    assert (created.type, reserved.type) == ("equipment.v1.EquipmentCreated", "equipment.v1.ItemReserved")
    assert (created.position, reserved.position) == (receipt.position - 1, receipt.position)
    assert created.metadata.command_id == reserved.metadata.command_id == receipt.command_id
    assert len(await check_line(write_db)) == 3


async def test_a_failing_reservation_leaves_neither(service: Service, write_db: Database) -> None:
    """No item is left, or there is no such inventory; the refusal is the command's own."""
    works = Works(service)
    inventory_id = await works.stocked(1)
    await service.send(works.create, drill(inventory_id))
    for inventory, reason in ((inventory_id, "OUT_OF_STOCK"), (new_id(), "INVENTORY_NOT_FOUND")):
        refused = drill(inventory)
        assert await service.refusal(works.create, refused) == reason
        assert await service.names("equipment", refused.equipment_id) == []
    assert await service.names("inventory", inventory_id) == ["StockAdded", "ItemReserved"]
    assert len(await check_line(write_db)) == 3


async def test_of_many_at_once_as_many_succeed_as_there_are_items(service: Service, write_db: Database) -> None:
    """Twenty want five: the others leave nothing."""
    works = Works(service)
    inventory_id = await works.stocked(5)
    told = await asyncio.gather(*[service.refusal(works.create, drill(inventory_id)) for _ in range(20)])
    assert sorted(told) == [""] * 5 + ["OUT_OF_STOCK"] * 15
    assert await service.names("inventory", inventory_id) == ["StockAdded"] + ["ItemReserved"] * 5
    assert len(await check_line(write_db)) == 11


async def test_equipment_is_created_once(service: Service) -> None:
    """The second time no item is reserved; bad input reaches no decision."""
    works = Works(service)
    inventory_id, equipment_id = await works.stocked(5), new_id()
    await service.send(works.create, drill(inventory_id, equipment_id))
    assert await service.refusal(works.create, drill(inventory_id, equipment_id)) == "EQUIPMENT_ALREADY_CREATED"
    assert await service.refusal(works.create, drill("somewhere")) == "INVALID_REQUEST"
    assert await service.refusal(works.add_stock, AddStockRequest(inventory_id=inventory_id)) == "INVALID_REQUEST"
    assert await service.names("inventory", inventory_id) == ["StockAdded", "ItemReserved"]
