"""The tables that the migrations make are those that the projections' rows describe."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.bootstrap import Database
from read_service.registry import GROUPS
from shared.folds.table import Column, Table, Type
from tests.support.checks.history import connected

TABLES = [projection.table for group in GROUPS for projection in group.projections]

_COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), coalesce(collname, ''), NOT attnotnull
FROM pg_attribute LEFT JOIN pg_collation ON pg_collation.oid = attcollation
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_KEY = """
SELECT array_agg(attname::text ORDER BY nth) FROM pg_index, unnest(indkey) WITH ORDINALITY AS k(attnum, nth)
JOIN pg_attribute a USING (attnum) WHERE a.attrelid = indrelid AND indrelid = %s::regclass AND indisprimary
"""
_INDEXES = """
SELECT split_part(pg_get_indexdef(indexrelid), ' USING btree ', 2) FROM pg_index
WHERE indrelid = %s::regclass AND NOT indisprimary
"""
_ROOM = "SELECT reloptions FROM pg_class WHERE oid = %s::regclass"

COLLATIONS = {Type.TEXT: "default", Type.TEXT_C: "C"}


def described(column: Column) -> tuple[str, str, str, bool]:
    """Name, type, collation and whether it may be null, as PostgreSQL tells them."""
    kind = "timestamp with time zone" if column.type is Type.TIMESTAMP else column.type.element
    return column.name, kind, COLLATIONS.get(column.type, ""), column.nullable


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
async def test_a_migrated_table_is_the_one_that_is_described(read_db: Database, table: Table[Any]) -> None:
    """Its columns in their order, with types, collations and which may be null; its primary key, indexes and room for updates."""
    async with connected(read_db.owner) as owner:
        found = await (await owner.execute(_COLUMNS, [table.name])).fetchall()
        key = await (await owner.execute(_KEY, [table.name])).fetchone()
        indexes = await (await owner.execute(_INDEXES, [table.name])).fetchall()
        room = await (await owner.execute(_ROOM, [table.name])).fetchone()
    assert found == [described(column) for column in table.columns]
    assert key == ([column.name for column in table.primary_key],)
    assert sorted(indexes) == sorted((table.indexed(index),) for index in table.indexes)
    assert room == ([f"fillfactor={table.filled}"] if table.filled < 100 else None,)
