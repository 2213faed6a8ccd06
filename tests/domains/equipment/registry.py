"""What the service can do, on one screen."""

from __future__ import annotations

from shared.commands.registry import CommandRegistry
from shared.platform.identity import Role
from tests.domains.equipment.codec import equipment_codec, inventory_codec
from tests.domains.equipment.domain import equipment, inventory
from tests.domains.equipment.domain.equipment import EQUIPMENT
from tests.domains.equipment.domain.equipment_types import EquipmentCreated
from tests.domains.equipment.domain.inventory import INVENTORY

USERS = frozenset({Role.USER})


def build_registry() -> CommandRegistry:
    """Equipment, and the inventory that it is made from."""
    registry = CommandRegistry()
    on = registry.aggregate(EQUIPMENT, equipment_codec.EVENTS)
    on.command(equipment_codec.CREATE_EQUIPMENT, equipment.create, id=lambda c: c.equipment_id, roles=USERS)
    of_inventory = registry.aggregate(INVENTORY, inventory_codec.EVENTS)
    of_inventory.command(inventory_codec.ADD_STOCK, inventory.add_stock, id=lambda c: c.inventory_id, roles=USERS)
    of_inventory.react(EquipmentCreated, inventory.reserve, id=lambda e: e.inventory_id)
    return registry
