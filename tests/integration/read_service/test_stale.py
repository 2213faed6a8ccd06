"""A row whose events are parked: whatever shows it says so, in a field and in the call's trailers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bank.v1 import account_query_pb2, totals_query_pb2
from deploy.bootstrap import Database
from shared.platform.identity import Role
from shared.projections.summary import STALE_TRAILER
from tests.integration.read_service.test_watch import following, serving
from tests.support.system.query_service import ALICE, BLUE, RED, Service, bank


@pytest.fixture
async def service(read_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """One over a fresh database."""
    async with serving(read_db, tmp_path) as (made, _):
        yield made


async def test_a_parked_row_is_told_by_every_query_that_shows_it(service: Service) -> None:
    """Get, the list and the statement with it, and the totals; not by those without it."""
    store = bank()
    store.deposit("acme", BLUE, ALICE, 9, 40).payload = b"\xff\xff"
    who, admin = service.of(), service.of("acme", Role.TENANT_ADMIN)

    async def told(call: Any) -> tuple[Any, bool]:
        return await call, STALE_TRAILER in tuple(await call.trailing_metadata())

    def get(account_id: str) -> Any:
        return service.accounts.GetAccount(account_query_pb2.GetAccountRequest(account_id=account_id), metadata=who)

    def lines(account_id: str) -> Any:
        return service.accounts.ListMovements(account_query_pb2.ListMovementsRequest(account_id=account_id), metadata=who)

    def some(status: Any) -> Any:
        request = account_query_pb2.ListAccountsRequest(filter=account_query_pb2.AccountFilter(status=status))
        return service.accounts.ListAccounts(request, metadata=who)

    async with following(service, store):
        one, in_trailers = await told(get(BLUE))
        assert (one.account.stale, one.account.version, in_trailers) == (True, 3, True)
        assert (await told(get(RED)))[1] is False
        listed, in_trailers = await told(some(account_query_pb2.ACCOUNT_STATUS_ACTIVE))
        assert ([it.stale for it in listed.accounts], in_trailers) == ([True], True)
        assert (await told(some(account_query_pb2.ACCOUNT_STATUS_FROZEN)))[1] is False
        assert (await told(lines(BLUE)))[1] is True
        assert (await told(lines(RED)))[1] is False
        for tenant, stale in (("acme", True), ("umbrella", False)):
            metadata = admin if tenant == "acme" else service.of(tenant, Role.TENANT_ADMIN)
            request = totals_query_pb2.GetTenantTotalsRequest()
            found, in_trailers = await told(service.totals.GetTenantTotals(request, metadata=metadata))
            assert (found.totals.stale, in_trailers) == (stale, stale)
