"""Which rows a transaction of a projection changed: written with the rows, read by those who watch them (`watch`).

The changes of a group have numbers without a gap. The last 512 are kept, so a reader that was away too long, or finds a change
without its rows, reads everything that it watches anew.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from msgspec import Struct

from shared.line.consistency import Token
from shared.platform.packing import Packed, int4, text
from shared.platform.postgres import Connection, one

ROWS_MAX = 4000
"""More rows of one transaction are not named: then all may have changed. A full batch of 2,000 events may name two for each. The
names take up to 140 KB of the database, and a group's ring 72 MB."""

BYTES_MAX = 1_000_000
"""More than that of named rows, some 20,000 of them, is not read at once: then all may have changed."""

RowId = tuple[str, str]
"""Tenant and id of a summary's row."""

PARTS = (
    """head AS (
  INSERT INTO row_change_heads AS h (group_name, shard, seq) VALUES (%s, %s, 1)
  ON CONFLICT (group_name, shard) DO UPDATE SET seq = h.seq + 1 RETURNING group_name, shard, seq)""",
    """ring AS (
  INSERT INTO row_changes (group_name, shard, slot, seq, changed)
  SELECT group_name, shard, seq %% 512, seq, %s::text FROM head
  ON CONFLICT (group_name, shard, slot) DO UPDATE SET seq = excluded.seq, changed = excluded.changed, mark = excluded.mark)""",
)
"""What `write` sends, as parts of a larger statement."""
_WRITE = f"WITH {', '.join(PARTS)} SELECT"

_SINCE = """
WITH found AS MATERIALIZED (SELECT seq, changed FROM row_changes_since(%s, %s, %s))
SELECT seq, CASE WHEN (SELECT sum(octet_length(changed)) FROM found) <= %s THEN changed END FROM found ORDER BY seq"""


def parameters(group: str, shard: int, rows: Collection[RowId] | None) -> tuple[Packed, Packed, Packed]:
    """The parameters of PARTS: what a transaction changed; None if that may be every row."""
    changed = None if rows is None or len(rows) > ROWS_MAX else json.dumps(list(rows))
    return text(group), int4(shard), text(changed)


async def write(connection: Connection, group: str, shard: int, rows: Collection[RowId] | None) -> None:
    """Sends what a transaction changed, inside of it; None if that may be every row."""
    await connection.execute(_WRITE, parameters(group, shard, rows))


async def forget(connection: Connection, group: str, shard: int) -> None:
    """Replaces what earlier transactions changed by "perhaps every row": their rows may be of a tenant that is gone."""
    await connection.execute("UPDATE row_changes SET changed = NULL WHERE group_name = %s AND shard = %s", (group, shard))


async def head(connection: Connection, group: str, shard: int) -> int:
    """The number of the last change; 0 if there was none."""
    cursor = await connection.execute("SELECT seq FROM row_change_heads WHERE group_name = %s AND shard = %s", (group, shard))
    row = await cursor.fetchone()
    return 0 if row is None else int(row[0])


async def since(connection: Connection, group: str, shard: int, seq: int) -> tuple[int, set[RowId] | None]:
    """The number of the last change, and the rows that changed behind `seq`; None if every row may have changed."""
    cursor = await connection.execute(_SINCE, (group, shard, seq, BYTES_MAX))
    found = await cursor.fetchall()
    if not found:
        return seq, set()
    last: int = found[-1][0]
    changed = [rows for _, rows in found]
    if len(found) != last - seq or None in changed:
        return last, None
    return last, {(tenant, id_) for rows in changed for tenant, id_ in json.loads(rows)}


class Place(Struct, frozen=True):
    """The last change of a group as a transaction sees it, with its mark, and where the group's tables are on the line."""

    seq: int
    mark: str
    at: Token


async def place(connection: Connection, group: str, shard: int) -> Place:
    """Where the group is."""
    seq, mark, position, epoch = await one(connection, "SELECT * FROM row_changes_place(%s, %s)", (group, shard))
    return Place(seq, mark, Token(shard, epoch, position))


async def of_tenant(connection: Connection, group: str, tenant: str, behind: Place) -> set[str] | None:
    """The ids of a tenant's rows that changed behind a place, up to now.

    None if that is not known: there were too many changes, one that did not name its rows, or the place is of another history,
    as after a restore of the read database.
    """
    asked = (group, behind.at.shard, tenant, behind.seq, behind.mark, BYTES_MAX)
    (ids,) = await one(connection, "SELECT row_changes_of(%s, %s, %s, %s, %s, %s)", asked)
    return None if ids is None else set(ids)
