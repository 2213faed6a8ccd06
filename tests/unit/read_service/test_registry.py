"""Summaries against the contracts: what does not fit stops the service at its start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from read_service.api import ROLES
from read_service.projections.accounts import ACCOUNT
from read_service.projections.users import show as show_a_user
from read_service.registry import ADMINISTRATORS, CALLERS, RPCS
from shared.folds.summary import equals, has, is_id, moment_between
from shared.projections.summary_rpcs import SummaryRpcs, groups_of, roles_of
from tests.support.fakes.tables import ACCOUNT_TABLES


def test_a_summary_fits_its_contract() -> None:
    """The row of accounts, for one; the others are made when the registry is imported."""
    SummaryRpcs(ACCOUNT, ACCOUNT_TABLES, CALLERS)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "owner"}, "AccountQueryService has no GetOwner"),
        ({"name": "person"}, "shows person_id, which is no column"),
        ({"show": show_a_user}, "UserQueryService has no GetAccount"),
        ({"filters": {**ACCOUNT.filters, "name": equals("name")}}, "filters by"),
        ({"filters": {"owner_id": is_id("owner_id")}, "only_in": {}, "apart": {}}, "filters by"),
        ({"orders": {"opened_at": "opened_at"}, "only_in": {}}, "is ordered by"),
        ({"orders": {**ACCOUNT.orders, "name": "name"}}, "is ordered by"),
        ({"orders": {**ACCOUNT.orders, "opened_at": "opend_at"}}, "orders by opend_at, which is no column"),
        ({"orders": {**ACCOUNT.orders, "opened_at": "boxed_at"}}, "orders by boxed_at, which is datetime.datetime | None"),
        ({"filters": {**ACCOUNT.filters, "owner_id": is_id("owner_id", "ownr_id")}}, "filters by ownr_id, which is no column"),
        ({"filters": {**ACCOUNT.filters, "opened_at": moment_between("version")}}, "filters by version, which is <class 'int'>"),
        ({"filters": {**ACCOUNT.filters, "owner_id": has("boxed_at")}}, "owner_id is string, and the summary filters by bool"),
        ({"filters": {**ACCOUNT.filters, "status": equals("status")}}, "status is enum, and the summary filters by string"),
        (
            {"filters": {**ACCOUNT.filters, "status": equals("status", {1: "active"})}},
            "has no text for each bank.v1.AccountStatus",
        ),
        ({"only_in": {"owner_id": ["name"]}}, "other filters or orders"),
        ({"apart": {("status", "name"): "owner_id"}}, "apart names other filters"),
    ],
)
def test_what_does_not_fit_raises(changed: dict[str, Any], told: str) -> None:
    """A field or order that the contract has and the summary has not would fail at the first call, or show nothing."""
    with pytest.raises(TypeError, match=told):
        SummaryRpcs(replace(ACCOUNT, **changed), ACCOUNT_TABLES, CALLERS)


def test_the_roles_of_a_summary_are_those_of_its_row() -> None:
    """Names and e-mail addresses of users are for administrators alone."""
    roles = roles_of(RPCS)
    assert set(roles).isdisjoint(ROLES)
    assert roles["bank.v1.UserQueryService/GetUser"] == roles["bank.v1.UserQueryService/ListUsers"] == ADMINISTRATORS
    assert len(roles) == 5 * len(RPCS)


def test_a_group_that_several_summaries_show_is_followed_once() -> None:
    """Two projectors of one name would fence each other for ever. Two groups of one name are refused."""
    person, account, *_ = RPCS
    assert groups_of([person, account, replace(person, group=account.group)]) == {
        "people": person.group,
        "accounts": account.group,
    }
    with pytest.raises(TypeError, match="two groups of tables are named accounts"):
        groups_of([account, replace(person, group=replace(account.group, version=9))])
