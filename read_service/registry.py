"""What the read service keeps and shows, on one screen. Each table's file says which events change it, and how it is shown."""

from __future__ import annotations

from typing import Any

from read_service.projections.accounts import ACCOUNT, ACCOUNTS, MOVEMENTS
from read_service.projections.people import PEOPLE, PERSON, PERSON_TOTALS
from read_service.projections.transfers import TRANSFER, TRANSFERS
from read_service.projections.users import USER, USERS
from shared.folds.projection import Group
from shared.platform.identity import Role
from shared.projections.summary_rpcs import SummaryRpcs, groups_of
from upcasters import UPCASTERS

CALLERS = frozenset({Role.USER, Role.TENANT_ADMIN, Role.OPERATOR})
ADMINISTRATORS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR})

RPCS: tuple[SummaryRpcs[Any], ...] = (
    SummaryRpcs(PERSON, Group("people", (PEOPLE, PERSON_TOTALS), UPCASTERS, version=2), CALLERS),
    SummaryRpcs(ACCOUNT, Group("accounts", (ACCOUNTS, MOVEMENTS), UPCASTERS, version=2), CALLERS),
    SummaryRpcs(TRANSFER, Group("transfers", (TRANSFERS,), UPCASTERS), CALLERS),
    SummaryRpcs(USER, Group("users", (USERS,), UPCASTERS), ADMINISTRATORS),
)
"""What is shown, from which tables, and to which roles; by the RPCs of the `.proto` that declares the summary's message."""

GROUPS = tuple(groups_of(RPCS).values())
"""Each follows the line on its own, with a checkpoint; a slow or stopped one holds up no other."""
