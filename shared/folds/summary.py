"""What a summary is made of: the rows that it shows, the message of each, and the orders and filters of its list.

A summary is plain data and pure functions. `shared.projections.summary` answers its Get and List RPCs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from operator import attrgetter
from typing import Any, Generic, NamedTuple, get_type_hints

from google.protobuf.message import Message

from foldline.v1 import range_pb2
from shared.folds.table import Row, Table


class Condition(NamedTuple):
    """What a row must be: `sql` about a row `p`, with {} for the value, and the same about a row in memory.

    Several texts are alternatives, of which a row meets one at the most: a page is then merged from a query for each.
    `bound`: the column that it bounds, and whether from above.
    """

    sql: tuple[str, ...]
    value: Any
    holds: Callable[[Any], bool]
    bound: tuple[str, bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a field of a list's filter asks of the row.

    `columns` are those of the row that it asks about; the type of each is one of `kinds`. `given` is the type of the field, as
    its `.proto` has it. `texts`: what the values of an enum are in the column, all but that which is unspecified.
    """

    columns: tuple[str, ...]
    kinds: tuple[Any, ...]
    given: str
    conditions: Callable[[Any], Sequence[Condition]]
    """The conditions for the field's value; none for an empty field.

    The first value is part of the page token: a token belongs to the values it was made for.
    """
    texts: Mapping[Any, str] | None = None


AggregateName = tuple[str, str]
"""An aggregate of the row's tenant: category and id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Generic[Row]):
    """The rows that a summary shows: those of a table (`rows_of`), or made of several.

    `sql` is what follows FROM, with the table as `p`; the row's fields are its columns. `of_tables` makes the row of an id of the
    rows of the group's tables that begin with tenant and id, by the table's name, each table's in the order of its keys; None if
    there is no such row.
    """

    row: type[Row]
    sql: str
    of_tables: Callable[[Mapping[str, Sequence[Any]]], Row | None]


def rows_of(table: Table[Row]) -> Source[Row]:
    """The rows of one table."""
    return Source(row=table.row, sql=f"{table.name} p", of_tables=lambda tables: next(iter(tables[table.name]), None))


@dataclass(frozen=True, slots=True)
class History:
    """Which events make the row of an id, so that it can be folded again as of any time.

    They are those of the aggregate of `category` with the id, and of the aggregates that `names` reads from these: of them the
    events behind the first of the id's own, up to the first of its own that is one of `ends`.
    """

    category: str
    names: Mapping[type[Message], Callable[[Any], Iterable[AggregateName]]] = field(default_factory=dict)
    ends: Collection[type[Message]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Generic[Row]):
    """The rows of one table as a Get and a List RPC show them. Raises TypeError if it names a column that its rows do not have.

    `name` names the id's column and the refusal: `account` has `account_id` and ACCOUNT_NOT_FOUND. `orders` has the column
    for each name that `order_by` may have, with or without ` desc`; the first is the default. `filters` has a filter for
    each field of the List request's filter; one that indexes serve in some orders alone has those in `only_in`. `apart` has
    each two filters that no index serves together, with a third that has so few rows that all of them go together. `show` fills
    an empty message, `shown`, whose type it names, from a row: so a row of a list is put straight into the answer. `history`
    says which events make a row.
    """

    name: str
    source: Source[Row]
    show: Callable[[Row, Any], None]
    history: History
    orders: Mapping[str, str]
    filters: Mapping[str, Filter]
    only_in: Mapping[str, Sequence[str]] = field(default_factory=dict)
    apart: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(f"{self.name}_id", (str,), "shows")
        for column in self.orders.values():
            self._check(column, (str, int, datetime), "orders by")
        for each in self.filters.values():
            for column in each.columns:
                self._check(column, each.kinds, "filters by")
        by, orders = set(self.filters), set(self.orders)
        served = {order for names in self.only_in.values() for order in names}
        if not (set(self.only_in) <= by and served <= orders):
            raise TypeError(f"{self.name}: only_in names other filters or orders")
        if not by.issuperset(each for pair, with_too in self.apart.items() for each in (*pair, with_too)):
            raise TypeError(f"{self.name}: apart names other filters")

    def _check(self, column: str, kinds: tuple[Any, ...], does: str) -> None:
        kind = get_type_hints(self.source.row).get(column)
        if kind not in kinds:
            raise TypeError(f"{self.name} {does} {column}, which is {kind or 'no column'}")

    @property
    def message(self) -> type[Message]:
        """The type of the messages that rows are shown in."""
        return _shown_in(self.show)

    def view(self, row: Row) -> Any:
        """A row as it is shown."""
        shown = self.message()
        self.show(row, shown)
        return shown


@cache
def _shown_in(show: Callable[..., None]) -> type[Message]:
    return get_type_hints(show)["shown"]  # type: ignore[no-any-return]


def equals(column: str, texts: Mapping[Any, str] | None = None) -> Filter:
    """Rows whose column has the field's text; of an enum, the text that `texts` has for its value."""
    get = attrgetter(column)

    def conditions(given: Any) -> Sequence[Condition]:
        if not (value := given if texts is None else texts.get(given)):
            return []
        return [Condition((f"p.{column} = {{}}",), value, lambda row: bool(get(row) == value))]

    given = "string" if texts is None else "enum"
    return Filter(columns=(column,), kinds=(str,), given=given, conditions=conditions, texts=texts)


def has(column: str) -> Filter:
    """Rows whose column is not null, if the field is true; an index on such rows alone can serve it."""
    get = attrgetter(column)

    def conditions(given: bool) -> Sequence[Condition]:
        if not given:
            return []
        return [Condition((f"p.{column} IS NOT NULL AND {{}}",), given, lambda row: get(row) is not None)]

    return Filter(columns=(column,), kinds=(datetime | None, int | None, str | None), given="bool", conditions=conditions)


def is_id(*columns: str) -> Filter:
    """Rows that have the id in one of the columns, whichever case the caller writes it in."""

    def conditions(given: str) -> Sequence[Condition]:
        # In each alternative the columns before are another's, so no row is found twice.
        others = ["".join(f" AND p.{column} <> {{0}}" for column in columns[:nth]) for nth in range(len(columns))]
        texts = tuple(f"p.{column} = {{0}}{other}" for column, other in zip(columns, others, strict=True))
        if not (value := given.lower()):
            return []
        return [Condition(texts, value, lambda row: any(getattr(row, column) == value for column in columns))]

    return Filter(columns=columns, kinds=(str,), given="string", conditions=conditions)


def begins_with(column: str, fold: Callable[[str], str]) -> Filter:
    """Rows whose column begins with the field as `fold` changes it; the column's collation is C."""
    get = attrgetter(column)

    def conditions(given: str) -> Sequence[Condition]:
        if not (prefix := fold(given)):
            return []
        found = [Condition((f"p.{column} >= {{}}",), prefix, lambda row: bool(get(row) >= prefix), (column, False))]
        if end := prefix_end(prefix):  # Python orders texts by code points, as PostgreSQL does by bytes
            found.append(Condition((f"p.{column} < {{}}",), end, lambda row: bool(get(row) < end), (column, True)))
        return found

    return Filter(columns=(column,), kinds=(str,), given="string", conditions=conditions)


def whole_between(column: str) -> Filter:
    """Rows whose column is a whole number in the field's foldline.v1.WholeRange."""
    get = attrgetter(column)

    def conditions(given: range_pb2.WholeRange) -> Sequence[Condition]:
        found = []
        if given.HasField("min"):
            least = given.min
            found.append(Condition((f"p.{column} >= {{}}",), least, lambda row: bool(get(row) >= least), (column, False)))
        if given.HasField("max"):
            most = given.max
            found.append(Condition((f"p.{column} <= {{}}",), most, lambda row: bool(get(row) <= most), (column, True)))
        return found

    return Filter(columns=(column,), kinds=(int,), given="foldline.v1.WholeRange", conditions=conditions)


def moment_between(column: str) -> Filter:
    """Rows whose column is a moment in the field's foldline.v1.TimeRange. Raises ValueError for what is no moment."""
    get = attrgetter(column)

    def conditions(given: range_pb2.TimeRange) -> Sequence[Condition]:
        found = []
        if given.HasField("since"):
            since = given.since.ToDatetime(tzinfo=UTC)
            found.append(Condition((f"p.{column} >= {{}}",), since, lambda row: bool(get(row) >= since), (column, False)))
        if given.HasField("before"):
            before = given.before.ToDatetime(tzinfo=UTC)
            found.append(Condition((f"p.{column} < {{}}",), before, lambda row: bool(get(row) < before), (column, True)))
        return found

    return Filter(columns=(column,), kinds=(datetime,), given="foldline.v1.TimeRange", conditions=conditions)


def prefix_end(prefix: str) -> str:
    """The first text, in byte order, behind all that begin with the prefix; empty if there is none."""
    while prefix:
        following = ord(prefix[-1]) + 1
        if following == 0xD800:  # the surrogates are no characters
            following = 0xE000
        if following <= 0x10FFFF:
            return prefix[:-1] + chr(following)
        prefix = prefix[:-1]
    return ""
