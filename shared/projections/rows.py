"""Reads and writes the rows of a projection in bulk, with a few statements that are made once from the table's description.

Rows are sent as one packed array for each column, through `unnest`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg

from shared.folds.projection import Projection, RowKey
from shared.folds.table import Type
from shared.platform.packing import Packed, int4s, int8s, texts, timestamps
from shared.platform.postgres import Connection, is_trouble


def _numerics(values: Sequence[int]) -> Packed:
    return texts([str(value) for value in values])


_PACKS: dict[Type, Callable[[Any], Packed]] = {
    Type.TEXT: texts,
    Type.TEXT_C: texts,
    Type.BIGINT: int8s,
    Type.INTEGER: int4s,
    Type.TIMESTAMP: timestamps,
    Type.NUMERIC: _numerics,
}
"""How the values of a column are packed into one array."""


def refuses(error: BaseException) -> bool:
    """Whether an error says that a row cannot be stored as it is, however often it is tried: a value is out of range, for one."""
    if isinstance(error, psycopg.Error):
        return not is_trouble(error)
    return isinstance(error, struct.error | ArithmeticError | ValueError | TypeError)  # it cannot even be packed


class Rows:
    """The rows of one projection in the database."""

    def __init__(self, projection: Projection[Any], suffix: str = "") -> None:
        """`suffix` is behind the table's name while its rows are filled anew beside those that serve."""
        table = projection.table
        target = table.name + suffix
        names = [column.name for column in table.columns]
        keys = [column.name for column in table.primary_key]
        kinds = [(column.type.element, _PACKS[column.type]) for column in table.columns]
        self._make = table.row
        self._key_width = len(keys)
        self._packs = [pack for _, pack in kinds]
        self._numeric_at = [at for at, (kind, _) in enumerate(kinds) if kind == "numeric"]

        # A numeric is sent and read as text, because the driver has no int for it.
        arrays = [f"%s::{'text' if kind == 'numeric' else kind}[]" for kind, _ in kinds]
        read = [f"t.{name}::text" if kind == "numeric" else f"t.{name}" for name, (kind, _) in zip(names, kinds, strict=True)]
        write = [f"r.{name}::numeric" if kind == "numeric" else f"r.{name}" for name, (kind, _) in zip(names, kinds, strict=True)]
        wanted = f"unnest({', '.join(arrays[: len(keys)])}) AS k({', '.join(keys)})"
        same = " AND ".join(f"t.{key} = k.{key}" for key in keys)
        values = ", ".join(f"{name} = excluded.{name}" for name in names[len(keys) :])
        self._select = f"SELECT {', '.join(read)} FROM {wanted} JOIN {target} t ON {same}"  # noqa: S608 (names of ours)
        self._delete_all = f"DELETE FROM {target}"  # noqa: S608
        self._any = f"SELECT EXISTS (SELECT FROM {target})"  # noqa: S608
        self.table = target
        """The name of the table."""
        some = f"SELECT ctid FROM {target} WHERE tenant = %s LIMIT %s"  # noqa: S608
        self._forget = f"DELETE FROM {target} WHERE ctid = ANY (ARRAY({some}))"  # noqa: S608
        self._with = f"SELECT {', '.join(read)} FROM {target} t WHERE t.tenant = %s AND t.{{}} = %s"  # noqa: S608
        self._own = keys[1:]
        # The second column names the row to those who watch it.
        some = f"SELECT ctid FROM {target} WHERE tenant = %s AND {{}} = %s LIMIT %s"  # noqa: S608
        self._forget_with = f"DELETE FROM {target} WHERE ctid = ANY (ARRAY({some})) RETURNING {names[1]}"  # noqa: S608
        self._delete = f"DELETE FROM {target} t USING {wanted} WHERE {same}"  # noqa: S608
        self._upsert = (
            f"INSERT INTO {target} ({', '.join(names)}) SELECT {', '.join(write)} "  # noqa: S608
            f"FROM unnest({', '.join(arrays)}) AS r({', '.join(names)})"
        )
        if not projection.append_only:
            self._upsert += f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {values}"
        self.upsert_part = f"kept_{target} AS ({self._upsert})"
        """What `upsert` sends, as a part of a larger statement; its parameters are those of `pack`."""

    async def select(self, connection: Connection, keys: Sequence[RowKey]) -> Any:
        """Sends the query for the rows with these keys; `load` reads the answer."""
        return await connection.execute(self._select, self._pack_keys(keys))

    async def load(self, cursor: Any, into: dict[RowKey, Any]) -> None:
        """Adds the rows of a result to `into`, by key. A key without a row is left out."""
        make, width, numeric_at = self._make, self._key_width, self._numeric_at
        for answer in await cursor.fetchall():
            values = answer
            if numeric_at:
                values = list(answer)
                for at in numeric_at:
                    values[at] = int(values[at])
            into[answer[:width]] = make(*values)

    async def upsert(self, connection: Connection, rows: Iterable[Any]) -> None:
        """Sends the rows: new ones are inserted, others replaced."""
        await connection.execute(self._upsert, self.pack(rows))

    def pack(self, rows: Iterable[Any]) -> list[Packed]:
        """The rows as parameters of the upsert: an array for each column."""
        return [pack(column) for pack, column in zip(self._packs, zip(*rows, strict=True), strict=True)]

    async def delete(self, connection: Connection, keys: Sequence[RowKey]) -> None:
        """Sends the deletion of the rows with these keys."""
        await connection.execute(self._delete, self._pack_keys(keys))

    def _pack_keys(self, keys: Sequence[RowKey]) -> list[Packed]:
        return [pack(column) for pack, column in zip(self._packs, zip(*keys, strict=True), strict=False)]

    async def delete_all(self, connection: Connection) -> None:
        """Deletes every row, of all tenants."""
        await connection.execute(self._delete_all)

    async def forget(self, connection: Connection, tenant: str, limit: int) -> int:
        """Deletes rows of a tenant, up to `limit`; returns how many."""
        return (await connection.execute(self._forget, (tenant, limit))).rowcount

    async def forget_with(self, connection: Connection, tenant: str, column: str, value: str, limit: int) -> list[str]:
        """Deletes rows of a tenant with this value in a column, up to `limit`; returns their ids."""
        cursor = await connection.execute(self._forget_with.format(column), (tenant, value, limit))
        return [str(id_) for (id_,) in await cursor.fetchall()]

    def page_with(self, column: str, order: str, *, behind: bool) -> str:
        """The query for rows of a tenant with a value in a column, in the order of another column and then of their keys.

        Its values are the tenant and the column's; for rows behind another one, that one's `order` and its key without the
        tenant; and how many rows at most.
        """
        place = ", ".join(f"t.{name}" for name in (order, *self._own))
        after = f" AND ({place}) > ({', '.join(['%s'] * (1 + len(self._own)))})" if behind else ""
        return f"{self._with.format(column)}{after} ORDER BY {place} LIMIT %s"

    async def select_with(
        self, connection: Connection, tenant: str, column: str, value: str, order: str, after: Any | None, limit: int
    ) -> list[Any]:
        """The first rows of a tenant with this value in a column, behind the row `after`, in the order of `page_with`."""
        behind = () if after is None else (getattr(after, order), *after[1 : self._key_width])
        query = self.page_with(column, order, behind=after is not None)
        found: dict[RowKey, Any] = {}
        await self.load(await connection.execute(query, (tenant, value, *behind, limit)), found)
        return list(found.values())

    async def is_there(self, connection: Connection) -> bool:
        """Whether the table exists."""
        return await (await connection.execute("SELECT to_regclass(%s) IS NOT NULL", (self.table,))).fetchone() == (True,)

    async def any_there(self, connection: Connection) -> bool:
        """Whether there is a row, of any tenant."""
        return await (await connection.execute(self._any)).fetchone() == (True,)


async def lock(connection: Connection, tables: Iterable[Rows]) -> None:
    """Locks tables as a statement that writes them does, for a transaction of several; call it before that locks the checkpoint.

    The switch of a rebuild locks tables first, too. The other way around, both would wait for each other.
    """
    await connection.execute(f"LOCK TABLE {', '.join(rows.table for rows in tables)} IN ROW EXCLUSIVE MODE")
