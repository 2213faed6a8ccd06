"""What a query table is made of: its description, the key of the row that an event changes, and the fold.

A fold is `project(row, event, envelope) -> row`: pure, no I/O and no clock. It is given the row as it is, or None, and
returns the row as it shall be, or None for no row. It may be run again on the same event, never with the result kept
twice. What it raises stops the projection: nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.table import Table

Row = TypeVar("Row", bound=tuple[Any, ...])
RowKey = tuple[Any, ...]

Fold = Callable[[Row | None, Any, EventEnvelope], Row | None]
"""`project(row, event, envelope) -> row`."""

_UNIX = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection(Generic[Row]):
    """A table and how events change it. Raises TypeError if its row is not a named tuple of the table's columns.

    A named tuple, because a frozen dataclass takes seven times as long to make, and making rows is most of a fold.

    Every key begins with the tenant; `key(event, envelope)` gives the other columns of the primary key, in the table's
    order, or None if the event does not concern the table after all. `on` has a fold for each event that changes the
    table. With `append_only` every event makes a new row, so nothing is read, and a row that is there already stops the
    projection.
    """

    table: Table
    row: type[Row]
    key: Callable[[Any, EventEnvelope], RowKey | None]
    on: Mapping[type[Message], Fold[Row]]
    append_only: bool = False

    def __post_init__(self) -> None:
        names = list(getattr(self.row, "_fields", ()))
        if names != [column.name for column in self.table.columns]:
            raise TypeError(f"{self.row.__name__} and the table {self.table.name} differ: {names}")
        keys = [column.name for column in self.table.primary_key]
        if not keys or keys != names[: len(keys)] or keys[0] != "tenant":
            raise TypeError(f"{self.table.name} must begin with its primary key, and that with the tenant")


@dataclass(frozen=True, slots=True)
class Group:
    """Tables that follow the line together, with one checkpoint."""

    name: str
    projections: Sequence[Projection[Any]]


def existing(row: Row | None) -> Row:
    """The row of an event that cannot be the first of its key; raises ValueError if there is none."""
    if row is None:
        raise ValueError("the event changes a row that is not there")
    return row


def recorded_at(envelope: EventEnvelope) -> datetime:
    """When the event was appended, in UTC."""
    moment = envelope.recorded_at
    return _UNIX + timedelta(seconds=moment.seconds, microseconds=moment.nanos // 1000)


def storable(text: str) -> str:
    """The text as PostgreSQL can hold it: without the character NUL, which protobuf lets pass. One name must not stop us."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text
