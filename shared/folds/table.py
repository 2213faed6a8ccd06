"""Descriptions of query tables: columns, their types, and the primary key.

The migrations make the tables; the projector needs only this description. SQLAlchemy's descriptions would do, but importing
SQLAlchemy takes a second of every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints


class Type(Enum):
    """The type of a column, by its name in PostgreSQL."""

    TEXT = "text"
    # Ordered and compared by its bytes.
    TEXT_C = 'text COLLATE "C"'
    BIGINT = "bigint"
    INTEGER = "integer"
    TIMESTAMP = "timestamptz"
    NUMERIC = "numeric"

    @property
    def element(self) -> str:
        """The type as an element of an array."""
        return self.value.partition(" ")[0]


@dataclass(frozen=True, slots=True)
class Column:
    """A column."""

    name: str
    type: Type
    primary_key: bool = False
    nullable: bool = False


class Table:
    """A table: `Table("accounts", Column("tenant", Type.TEXT, primary_key=True), ...)`."""

    def __init__(self, name: str, *columns: Column) -> None:
        self.name = name
        self.columns: Sequence[Column] = columns

    @property
    def primary_key(self) -> list[Column]:
        """The columns of the primary key, in the table's order."""
        return [column for column in self.columns if column.primary_key]


Code = Annotated[str, Type.TEXT_C]
"""A column of ids, names of states and the like, which are compared byte by byte."""
Int32 = Annotated[int, Type.INTEGER]
BigNumber = Annotated[int, Type.NUMERIC]
"""A column of whole numbers that may be beyond 64 bits."""

_TYPES = {str: Type.TEXT, int: Type.BIGINT, datetime: Type.TIMESTAMP}


def table_of(name: str, row: type[tuple[Any, ...]], *, keys: int) -> Table:
    """The table whose columns are the fields of a named tuple; its first `keys` are the primary key.

    Texts, whole numbers of 64 bits and moments are `text`, `bigint` and `timestamptz`; for other types a field is
    annotated: `Int32`, for one. A field that may be None is a column that may be null.
    """
    hints = get_type_hints(row, include_extras=True)
    return Table(name, *(_column(field, hint, nth < keys) for nth, (field, hint) in enumerate(hints.items())))


def _column(name: str, hint: Any, is_key: bool) -> Column:
    nullable = NoneType in get_args(hint)
    kind = get_args(hint)[0] if nullable else hint
    return Column(name, get_args(kind)[1] if get_origin(kind) is Annotated else _TYPES[kind], is_key, nullable)
