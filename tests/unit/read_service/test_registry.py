"""Summaries against the contracts: what does not fit stops the service at its start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bank.v1 import account_query_pb2, person_query_pb2
from read_service.api import ROLES
from read_service.projections.accounts import ACCOUNT
from read_service.projections.users import show as show_a_user
from read_service.registry import ACCOUNT_TABLES, ADMINISTRATORS, CALLERS, RPCS
from shared.folds.summary import equals
from shared.projections.summary_rpcs import SummaryRpcs, roles_of


def add(servicer: Any, server: Any) -> None:
    """Adds nothing."""


def test_a_summary_fits_its_contract() -> None:
    """The row of accounts, for one; the others are made when the registry is imported."""
    SummaryRpcs(ACCOUNT, ACCOUNT_TABLES, account_query_pb2, add, CALLERS)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "person"}, "AccountQueryService has no GetPerson"),
        ({"show": show_a_user}, "GetAccountResponse has no UserSummary"),
        ({"filters": {**ACCOUNT.filters, "name": equals("name")}}, "filters by"),
        ({"filters": {"owner_id": equals("owner_id")}}, "filters by"),
        ({"orders": {"opened_at": "opened_at"}}, "is ordered by"),
        ({"orders": {**ACCOUNT.orders, "name": "name"}}, "is ordered by"),
        ({"only_in": {"owner_id": ["name"]}}, "other filters or orders"),
        ({"apart": {("status", "name"): "owner_id"}}, "apart names other filters"),
    ],
)
def test_what_does_not_fit_raises(changed: dict[str, Any], told: str) -> None:
    """A field or order that the contract has and the summary has not would fail at the first call, or show nothing."""
    with pytest.raises(TypeError, match=told):
        SummaryRpcs(replace(ACCOUNT, **changed), ACCOUNT_TABLES, account_query_pb2, add, CALLERS)


def test_a_summary_of_another_contract_raises() -> None:
    """Its service has neither RPC."""
    with pytest.raises(TypeError, match="PersonQueryService has no GetAccount"):
        SummaryRpcs(ACCOUNT, ACCOUNT_TABLES, person_query_pb2, add, CALLERS)


def test_the_roles_of_a_summary_are_those_of_its_row() -> None:
    """Names and e-mail addresses of users are for administrators alone."""
    roles = roles_of(RPCS)
    assert set(roles).isdisjoint(ROLES)
    assert roles["bank.v1.UserQueryService/GetUser"] == roles["bank.v1.UserQueryService/ListUsers"] == ADMINISTRATORS
    assert len(roles) == 5 * len(RPCS)
