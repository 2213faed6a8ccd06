"""Tenants by turns: where more is due than is read at a time, the first rows of each tenant are read besides the earliest.

So a tenant with any number of due rows delays another by a bounded time. One read looks at TENANTS_MAX tenants, in the order of
their names, and the next one goes on behind them.
"""

from __future__ import annotations

from typing import Any, LiteralString

from shared.platform.postgres import Connection

TENANTS_MAX = 64

_TURN: LiteralString = """
WITH RECURSIVE t (tenant, nth) AS (
  (SELECT tenant, 1 FROM {table} WHERE status = '{status}' AND tenant > %(after)s ORDER BY tenant LIMIT 1)
  UNION ALL
  SELECT (SELECT o.tenant FROM {table} o WHERE o.status = '{status}' AND o.tenant > t.tenant ORDER BY o.tenant LIMIT 1), nth + 1
  FROM t WHERE t.tenant IS NOT NULL AND nth < %(tenants)s)
SELECT t.tenant, d.* FROM t LEFT JOIN LATERAL (
  SELECT {columns} FROM {table} s
  WHERE s.status = '{status}' AND s.tenant = t.tenant AND s.due_at <= clock_timestamp()
    AND NOT EXISTS (SELECT FROM tenant_purges p WHERE p.tenant = t.tenant)
  ORDER BY s.due_at, s.{second} LIMIT %(each)s) AS d ON true
WHERE t.tenant IS NOT NULL
"""


class TenantTurns:
    """Reads due rows of tenants in turns from one table; remembers whose turn it is."""

    def __init__(self, table: LiteralString, status: LiteralString, columns: LiteralString, second: LiteralString) -> None:
        self.query = _TURN.format(table=table, status=status, columns=columns, second=second)
        self._after = ""

    async def read(self, connection: Connection, each: int) -> list[tuple[Any, ...]]:
        """The first `each` due rows of each of the next tenants, in the order of their times within a tenant."""
        cursor = await connection.execute(self.query, {"after": self._after, "tenants": TENANTS_MAX, "each": each})
        rows = await cursor.fetchall()
        tenants = {row[0] for row in rows}
        self._after = max(tenants) if len(tenants) == TENANTS_MAX else ""
        return [row[1:] for row in rows if row[1] is not None]
