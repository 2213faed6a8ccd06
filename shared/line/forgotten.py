"""How many rows of a tenant that is gone a consumer has deleted, by table, for the certificate of the purge.

Counted up in the transactions that delete: killed anywhere, each row is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import LiteralString

from shared.platform.packing import int8s, texts
from shared.platform.postgres import Connection

_COUNT: LiteralString = """
INSERT INTO forgotten_tenants AS f (shard, tenant, table_name, rows)
SELECT %s, %s, t.name, t.rows FROM unnest(%s, %s) AS t(name, rows)
ON CONFLICT (shard, tenant, table_name) DO UPDATE SET rows = f.rows + excluded.rows
"""


async def count(connection: Connection, shard: int, tenant: str, gone: Mapping[str, int]) -> None:
    """Adds what a transaction has deleted, inside of it; also a table of which nothing was."""
    await connection.execute(_COUNT, (shard, tenant, texts(list(gone)), int8s(list(gone.values()))))


async def read(connection: Connection, shard: int, tenant: str) -> dict[str, int]:
    """How many rows have gone, by table; empty if the tenant's end was not met yet."""
    cursor = await connection.execute(
        "SELECT table_name, rows FROM forgotten_tenants WHERE shard = %s AND tenant = %s", (shard, tenant)
    )
    return dict(await cursor.fetchall())
