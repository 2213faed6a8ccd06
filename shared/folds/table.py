"""Descriptions of query tables: columns, their types, the primary key and indexes.

The migrations make the tables, as `Table.definition` says; the projector needs only the description. SQLAlchemy's descriptions
would do, but importing SQLAlchemy takes a second of every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

Row = TypeVar("Row", bound=tuple[Any, ...])


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


@dataclass(frozen=True, slots=True)
class Index:
    """An index by some columns: the tenant, these, and the rest of the primary key. `only`: of the rows that this is true of."""

    columns: tuple[str, ...]
    only: str = ""


def by(*columns: str, only: str = "") -> Index:
    """`by("status", "opened_at")` gives the rows of a status in the order of opening."""
    return Index(columns, only)


class Table(Generic[Row]):
    """A table whose columns are the fields of a named tuple: `accounts = Table("accounts", AccountRow, keys=2)`.

    Texts, whole numbers of 64 bits and moments are `text`, `bigint` and `timestamptz`; for other types a field is annotated:
    `Int32`, for one. A field that may be None is a column that may be null. The first `keys` columns are the primary key, and
    the first of them is the tenant. `filled` is how much of a page inserts fill, in percent: a row whose indexed columns do not
    change is updated within its page, if there is room. Raises TypeError for another first column, and an index by no column.
    """

    def __init__(self, name: str, row: type[Row], *, keys: int, indexes: Sequence[Index] = (), filled: int = 100) -> None:
        hints = get_type_hints(row, include_extras=True)
        self.name = name
        self.row = row
        self.columns: Sequence[Column] = [_column(field, hint, nth < keys) for nth, (field, hint) in enumerate(hints.items())]
        self.indexes = indexes
        self.filled = filled
        if next(iter(hints), "") != "tenant" or keys < 1:
            raise TypeError(f"{name} must begin with its primary key, and that with the tenant")
        if unknown := {each for index in indexes for each in index.columns} - hints.keys():
            raise TypeError(f"{name} has indexes by {sorted(unknown)}, which are no columns")

    @property
    def primary_key(self) -> list[Column]:
        """The columns of the primary key, in the table's order."""
        return [column for column in self.columns if column.primary_key]

    def indexed(self, index: Index) -> str:
        """What an index is by, as its definition in SQL has it behind USING btree."""
        tenant, *rest = (column.name for column in self.primary_key)
        columns = ", ".join((tenant, *index.columns, *(each for each in rest if each not in index.columns)))
        return f"({columns}) WHERE ({index.only})" if index.only else f"({columns})"

    def definition(self) -> str:
        """The statements that make the table, for a migration; `secure_query_table` then gives it policies and grants."""
        columns = [f"  {it.name} {it.type.value}{'' if it.nullable else ' NOT NULL'}," for it in self.columns]
        keys = ", ".join(column.name for column in self.primary_key)
        options = f" WITH (fillfactor = {self.filled})" if self.filled < 100 else ""
        lines = [f"CREATE TABLE {self.name} (", *columns, f"  PRIMARY KEY ({keys})", f"){options};"]
        for index in self.indexes:
            name = "_".join((self.name, "by", *index.columns, *(["only"] if index.only else [])))
            lines.append(f"CREATE INDEX {name[:63]} ON {self.name} {self.indexed(index)};")
        return "\n".join(lines)


Code = Annotated[str, Type.TEXT_C]
"""A column of ids, names of states and the like, which are compared byte by byte."""
Int32 = Annotated[int, Type.INTEGER]
BigNumber = Annotated[int, Type.NUMERIC]
"""A column of whole numbers that may be beyond 64 bits."""

_TYPES = {str: Type.TEXT, int: Type.BIGINT, datetime: Type.TIMESTAMP}


def _column(name: str, hint: Any, is_key: bool) -> Column:
    nullable = NoneType in get_args(hint)
    kind = get_args(hint)[0] if nullable else hint
    return Column(name, get_args(kind)[1] if get_origin(kind) is Annotated else _TYPES[kind], is_key, nullable)
