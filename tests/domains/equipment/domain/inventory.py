"""An inventory: a number of items, some of which are reserved."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import NotFound, Rejected
from tests.domains.equipment.domain.equipment_types import EquipmentCreated
from tests.domains.equipment.domain.inventory_types import AddStock, InventoryEvent, ItemReserved, StockAdded

# State


class Inventory(Struct, frozen=True, kw_only=True):
    known: bool = False
    free: int = 0


# Decisions


def add_stock(inventory: Inventory, command: AddStock, meta: Meta) -> list[InventoryEvent]:
    """Any number of times."""
    return [StockAdded(inventory_id=command.inventory_id, items=command.items)]


def reserve(inventory: Inventory, event: EquipmentCreated, meta: Meta) -> list[InventoryEvent]:
    """Follows the creation of equipment, in its transaction. Refusals: INVENTORY_NOT_FOUND, OUT_OF_STOCK."""
    if not inventory.known:
        raise NotFound("INVENTORY_NOT_FOUND", "there is no inventory with this id")
    if not inventory.free:
        raise Rejected("OUT_OF_STOCK", "no item is free")
    return [ItemReserved(inventory_id=event.inventory_id, equipment_id=event.equipment_id)]


# Evolve


def evolve(inventory: Inventory, event: InventoryEvent) -> Inventory:
    """The inventory after the event."""
    match event:
        case StockAdded():
            return Inventory(known=True, free=inventory.free + event.items)
        case ItemReserved():
            return replace(inventory, free=inventory.free - 1)
        case _:
            assert_never(event)


INVENTORY = Aggregate(category="inventory", initial=Inventory(), evolve=evolve)
