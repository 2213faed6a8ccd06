"""What runs otherwise for single tenants, in one place: `foldline overrides` lists and switches it.

What the saga service announces to them is in `saga_service/overrides.py`, and named here to be switched.
"""

from __future__ import annotations

from shared.commands.overrides import add_switches
from shared.commands.registry import CommandRegistry
from shared.platform.identity import Role
from write_service.codec import person_codec
from write_service.domain import person
from write_service.domain.person import PERSON

UMBRELLA = "umbrella"


def add_overrides(registry: CommandRegistry) -> None:
    """Each row names its tenant, and itself: that is the name by which it is switched."""
    on = registry.rows_of(PERSON)
    on.override(person_codec.RENAME_PERSON, person.refuse_renaming, tenant=UMBRELLA, name="renaming-disabled")
    registry.announcement(
        UMBRELLA,
        "large-transfer-notice",
        about="transfer/transfer_completed",
        description="Tells the owner of every transfer of more than 10,000.00 USD, by e-mail.",
    )
    add_switches(registry, roles=frozenset({Role.TENANT_ADMIN, Role.OPERATOR}))
