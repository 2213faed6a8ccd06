"""How a query table is described: its columns, their types, and which of them are the primary key.

The migrations make the tables. This is what the projector needs to know of one, and takes no time to import; SQLAlchemy's
own description takes a second of every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


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
