"""What a tenant has in all: numbers by status, and sums by currency, from the tables of the summaries.

Nothing is kept for it, so it costs the projector nothing. Each part reads one index, COUNTED_MAX entries of it at the most, and
all parts are one statement, which sees all tables at one moment.
"""

from __future__ import annotations

from typing import Any

from bank.v1 import totals_query_pb2, totals_query_pb2_grpc
from read_service.projections import accounts, people, transfers
from read_service.registry import ADMINISTRATORS
from shared.line.consistency import ConsistencyGate
from shared.platform.postgres import Reads
from shared.projections.summary import in_tenant, tell_stale, tenant

ROLES = {"bank.v1.TotalsQueryService/GetTenantTotals": ADMINISTRATORS}

COUNTED_MAX = 50_000
"""Of each status, and accounts in all for the sums. Index entries of so many rows are read in 10 ms."""

_STATUSES = {
    "people": {"active_persons": people.ACTIVE, "closed_persons": people.CLOSED},
    "accounts": {
        "active_accounts": accounts.ACTIVE,
        "frozen_accounts": accounts.FROZEN,
        "closed_accounts": accounts.CLOSED,
    },
    "transfers": {
        "started_transfers": transfers.STARTED,
        "completed_transfers": transfers.COMPLETED,
        "failed_transfers": transfers.FAILED,
    },
}
COUNTED = frozenset(_STATUSES)
"""The tables that are counted."""
_NAMES = [name for statuses in _STATUSES.values() for name in statuses]
_COUNTS = [
    f"(SELECT count(*) FROM (SELECT FROM {table} WHERE tenant = %(tenant)s AND status = '{status}' LIMIT %(limit)s) x)"  # noqa: S608 - names of ours
    for table, statuses in _STATUSES.items()
    for status in statuses.values()
]
# In the order of an index by currency and balance, so that the table itself need not be read.
_SUMS = """
SELECT coalesce(json_agg(json_build_array(currency, accounts, total::text) ORDER BY currency), '[]') FROM (
  SELECT currency, count(*) AS accounts, sum(balance_minor) AS total FROM (
    SELECT currency, balance_minor FROM accounts WHERE tenant = %(tenant)s ORDER BY currency, balance_minor LIMIT %(limit)s
  ) x GROUP BY currency) y
"""
_STALE = "EXISTS (SELECT FROM parked_keys WHERE tenant = %(tenant)s AND serves)"
TOTALS = f"SELECT {_STALE}, ({_SUMS}), {', '.join(_COUNTS)}"


class TotalsQueryService(totals_query_pb2_grpc.TotalsQueryServiceServicer):
    """bank.v1.TotalsQueryService."""

    def __init__(self, reads: Reads, *gates: ConsistencyGate) -> None:
        """`gates` are those of the groups of tables that are read."""
        self._reads = reads
        self._gates = gates

    async def GetTenantTotals(
        self, request: totals_query_pb2.GetTenantTotalsRequest, context: Any
    ) -> totals_query_pb2.GetTenantTotalsResponse:
        for gate in self._gates:
            await gate.wait(request.consistency_token, tenant(), context.time_remaining())
        [(stale, sums, *counts)] = await in_tenant(self._reads, tenant(), TOTALS, {"limit": COUNTED_MAX + 1})
        totals = totals_query_pb2.TenantTotals(stale=stale)
        for name, count in zip(_NAMES, counts, strict=True):
            getattr(totals, name).count = min(count, COUNTED_MAX)
            getattr(totals, name).more = count > COUNTED_MAX
        if sum(number for _, number, _ in sums) > COUNTED_MAX:
            totals.balances_left_out = True
        else:
            for currency, number, total in sums:
                totals.balances.add(currency=currency, accounts=number, total_minor=total)
        if stale:
            tell_stale(context)
        return totals_query_pb2.GetTenantTotalsResponse(totals=totals)
