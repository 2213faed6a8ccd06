"""What the read service keeps and shows, on one screen. Each table's file says which events change it, and how it is shown."""

from __future__ import annotations

from typing import Any

from bank.v1 import account_query_pb2, person_query_pb2, transfer_query_pb2, user_query_pb2
from bank.v1.account_query_pb2_grpc import add_AccountQueryServiceServicer_to_server
from bank.v1.person_query_pb2_grpc import add_PersonQueryServiceServicer_to_server
from bank.v1.transfer_query_pb2_grpc import add_TransferQueryServiceServicer_to_server
from bank.v1.user_query_pb2_grpc import add_UserQueryServiceServicer_to_server
from read_service.projections.accounts import ACCOUNT, ACCOUNTS, MOVEMENTS
from read_service.projections.people import PEOPLE, PERSON, PERSON_TOTALS
from read_service.projections.transfers import TRANSFER, TRANSFERS
from read_service.projections.users import USER, USERS
from shared.folds.projection import Group
from shared.platform.identity import Role
from shared.projections.summary import SummaryRpcs

CALLERS = frozenset({Role.USER, Role.TENANT_ADMIN, Role.OPERATOR})
ADMINISTRATORS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR})

SUMMARIES = Group("summaries", (PEOPLE, PERSON_TOTALS, ACCOUNTS, MOVEMENTS, TRANSFERS, USERS))
"""Tables that share a checkpoint, and so are always at the same position of the line."""

GROUPS = (SUMMARIES,)

RPCS: tuple[SummaryRpcs[Any], ...] = (
    SummaryRpcs(PERSON, person_query_pb2, add_PersonQueryServiceServicer_to_server, CALLERS),
    SummaryRpcs(ACCOUNT, account_query_pb2, add_AccountQueryServiceServicer_to_server, CALLERS),
    SummaryRpcs(TRANSFER, transfer_query_pb2, add_TransferQueryServiceServicer_to_server, CALLERS),
    SummaryRpcs(USER, user_query_pb2, add_UserQueryServiceServicer_to_server, ADMINISTRATORS),
)
"""What is shown, by which service, to which roles."""
