"""What the read service keeps, on one screen. Each table's file says which events change it, and how."""

from __future__ import annotations

from read_service.projections.accounts import ACCOUNTS, MOVEMENTS
from read_service.projections.people import PEOPLE, PERSON_TOTALS
from read_service.projections.transfers import TRANSFERS
from read_service.projections.users import USERS
from shared.folds.projection import Group

SUMMARIES = Group("summaries", (PEOPLE, PERSON_TOTALS, ACCOUNTS, MOVEMENTS, TRANSFERS, USERS))
"""Tables that share a checkpoint, and so are always at the same position of the line."""

GROUPS = (SUMMARIES,)
