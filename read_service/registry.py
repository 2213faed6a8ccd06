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
from shared.projections.summary_rpcs import SummaryRpcs
from upcasters import UPCASTERS

CALLERS = frozenset({Role.USER, Role.TENANT_ADMIN, Role.OPERATOR})
ADMINISTRATORS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR})

PERSON_TABLES = Group("people", (PEOPLE, PERSON_TOTALS), UPCASTERS, version=2)
ACCOUNT_TABLES = Group("accounts", (ACCOUNTS, MOVEMENTS), UPCASTERS, version=2)
TRANSFER_TABLES = Group("transfers", (TRANSFERS,), UPCASTERS)
USER_TABLES = Group("users", (USERS,), UPCASTERS)

GROUPS = (PERSON_TABLES, ACCOUNT_TABLES, TRANSFER_TABLES, USER_TABLES)
"""Each follows the line on its own, with a checkpoint; a slow or stopped one holds up no other."""

RPCS: tuple[SummaryRpcs[Any], ...] = (
    SummaryRpcs(PERSON, PERSON_TABLES, person_query_pb2, add_PersonQueryServiceServicer_to_server, CALLERS),
    SummaryRpcs(ACCOUNT, ACCOUNT_TABLES, account_query_pb2, add_AccountQueryServiceServicer_to_server, CALLERS),
    SummaryRpcs(TRANSFER, TRANSFER_TABLES, transfer_query_pb2, add_TransferQueryServiceServicer_to_server, CALLERS),
    SummaryRpcs(USER, USER_TABLES, user_query_pb2, add_UserQueryServiceServicer_to_server, ADMINISTRATORS),
)
"""What is shown, from which tables, by which service, to which roles."""
