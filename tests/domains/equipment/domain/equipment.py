"""A piece of equipment."""

from __future__ import annotations

from msgspec import Struct

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists
from tests.domains.equipment.domain.equipment_types import CreateEquipment, EquipmentCreated, EquipmentEvent

# State


class Equipment(Struct, frozen=True, kw_only=True):
    created: bool = False


# Decisions


def create(equipment: Equipment, command: CreateEquipment, meta: Meta) -> list[EquipmentEvent]:
    """Refusals: EQUIPMENT_ALREADY_CREATED; then those of reserving the item."""
    if equipment.created:
        raise AlreadyExists("EQUIPMENT_ALREADY_CREATED", "there is equipment with this id")
    return [EquipmentCreated(equipment_id=command.equipment_id, inventory_id=command.inventory_id, name=command.name)]


# Evolve


def evolve(equipment: Equipment, event: EquipmentEvent) -> Equipment:
    """The equipment after the event, of which there is one kind."""
    return Equipment(created=True)


EQUIPMENT = Aggregate(category="equipment", initial=Equipment(), evolve=evolve)
