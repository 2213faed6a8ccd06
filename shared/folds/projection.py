"""What a projection consists of: a table, and for each event the key of the row that it changes and a fold.

A fold is `project(row, event, envelope) -> row`: pure, no I/O and no clock. It gets the current row, or None, and returns
the new row, or None for no row. It may run again on the same event, but its result is saved only once. If it raises, the
key is parked: this event and the later ones of the key wait until an operator retries or discards them, and all else goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from foldline.v1 import archive_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.table import Row, Table
from shared.folds.upcasting import NONE, Upcasters

RowKey = tuple[Any, ...]

Event = TypeVar("Event", bound=Message)
Fold = Callable[[Row | None, Any, EventEnvelope], Row | None]
"""`project(row, event, envelope) -> row`."""


def on(event: type[Event], fold: Callable[[Row | None, Event, EventEnvelope], Row | None]) -> tuple[type[Message], Fold[Row]]:
    """An event and the fold that takes it; mypy refuses a fold of another event or of another row."""
    return event, fold


class Making(Generic[Row]):
    """A fold of `making`."""

    def __init__(self, make: Callable[[Any, EventEnvelope], Row]) -> None:
        self._make = make

    def __call__(self, _: Row | None, event: Any, envelope: EventEnvelope) -> Row:
        return self._make(event, envelope)


def making(event: type[Event], make: Callable[[Event, EventEnvelope], Row]) -> tuple[type[Message], Fold[Row]]:
    """An event that makes its row, whatever was there: the row is not read. mypy refuses a function of another event or row.

    For events that are the first of their key: reading that there is nothing yet takes longer than writing the row.
    """
    return event, Making(make)


MARKS = (archive_pb2.AggregateBoxed, archive_pb2.AggregateUnboxed)
"""Events of the archive, which aggregates of any category may have. They raise the version and say where the events are."""

_UNIX = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Purge(Generic[Row]):
    """What becomes of a table's rows when an aggregate of a category is purged: of those that have its id in a column.

    They are deleted; or `fold` gives each without what it had from the aggregate's events. A rebuild, which reads none of these
    events, must come to the same rows. `fold` may run again on what it has given. The rows are read in pages, in the order of
    `order`, a column that is never null and that no `fold` changes, and of their keys: the table needs an index of the tenant,
    `column`, `order` and the rest of the key, so that a page costs the same however many rows there are.
    """

    category: str
    column: str
    fold: Callable[[Row], Row] | None = None
    order: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection(Generic[Row]):
    """A table and how events change it. Raises TypeError for two folds of an event, and a purge by no column.

    A row is a named tuple, because making a frozen dataclass takes seven times as long, and a fold mostly makes rows.

    Every key begins with the tenant; `key(event, envelope)` gives the other columns of the primary key, in the table's
    order, or None if the event does not concern the table after all. `on` has a fold for each event that changes the table:
    `on=[on(MoneyDeposited, deposited)]`. With `append_only` every event makes a new row, so nothing is read, and a row that is
    there already is refused by the database: nothing of the batch is written, and it is tried again. `purges` has a row for each
    category of aggregates that may be purged and whose events the folds take.
    """

    table: Table[Row]
    key: Callable[[Any, EventEnvelope], RowKey | None]
    on: Sequence[tuple[type[Message], Fold[Row]]]
    append_only: bool = False
    purges: Sequence[Purge[Row]] = ()

    def __post_init__(self) -> None:
        names = [column.name for column in self.table.columns]
        if len({event for event, _ in self.on}) < len(self.on):
            raise TypeError(f"{self.table.name} has two folds of an event")
        for purge in self.purges:
            wrong = purge.order not in names[1:] or self.append_only if purge.fold is not None else purge.order != ""
            if purge.column not in names[1:] or wrong:
                raise TypeError(f"{self.table.name} cannot purge a {purge.category} by {purge.column}")


@dataclass(frozen=True, slots=True)
class Group:
    """Tables that share one checkpoint, and so are always at the same position of the line.

    An event that `upcasters` does not know parks its aggregate; one that it knows and no projection has a fold for is skipped.
    `version` is raised with every change of a fold, a key or a table that makes other rows of the same events. The first
    projector of such a release fills new tables beside those that serve, and switches; until then the new folds go on with the
    old rows.
    """

    name: str
    projections: Sequence[Projection[Any]]
    upcasters: Upcasters = NONE
    version: int = 1


def key_of(category: str, key: Callable[[Any], str]) -> Callable[[Any, EventEnvelope], RowKey | None]:
    """The key of a table with a row for each aggregate of a category, whose id `key` reads from an event.

    A mark of the archive concerns the aggregate that was boxed or unboxed, if that is of this category.
    """

    def found(event: Any, envelope: EventEnvelope) -> RowKey | None:
        if not isinstance(event, MARKS):
            return (key(event),)
        return (envelope.aggregate_id,) if envelope.aggregate_type == category else None

    return found


def existing(row: Row | None) -> Row:
    """The row, for an event that cannot be the first of its key. Raises ValueError if there is none."""
    if row is None:
        raise ValueError("the event changes a row that is not there")
    return row


def boxed_at(envelope: EventEnvelope) -> datetime | None:
    """From an event of the archive: since when the aggregate is boxed; None if it is not any more."""
    return recorded_at(envelope) if envelope.type == archive_pb2.AggregateBoxed.DESCRIPTOR.full_name else None


def recorded_at(envelope: EventEnvelope) -> datetime:
    """When the event was appended, in UTC."""
    moment = envelope.recorded_at
    return _UNIX + timedelta(seconds=moment.seconds, microseconds=moment.nanos // 1000)


def storable(text: str) -> str:
    """The text without the character NUL, which protobuf allows and PostgreSQL does not, so one name cannot stop a projection."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text
