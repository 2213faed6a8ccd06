"""A projection's description is checked where it is made."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import pytest

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Projection, on, recorded_at, storable
from shared.folds.table import BigNumber, Code, Column, Int32, Table, Type
from shared.projections.rows import Rows


def test_times_keep_their_microseconds() -> None:
    """The envelope's time becomes a datetime in UTC, also before 1970."""
    for seconds, nanos, text in (
        (1_700_000_000, 123_456_000, "2023-11-14T22:13:20.123456+00:00"),
        (-1, 0, "1969-12-31T23:59:59+00:00"),
    ):
        envelope = EventEnvelope()
        envelope.recorded_at.seconds, envelope.recorded_at.nanos = seconds, nanos
        assert recorded_at(envelope).isoformat() == text


def test_only_nul_is_replaced() -> None:
    """Every other text is stored as it is."""
    assert storable("a\0b\U0001f600") == "a\ufffdb\U0001f600"
    assert storable("plain") == "plain"


class EveryKind(NamedTuple):
    """A row with each type of column."""

    tenant: Code
    id: Code
    name: str
    accounts: Int32
    balance: int
    total: BigNumber
    ended_at: datetime | None


TABLE = Table("t", EveryKind, keys=2)


def test_a_table_is_described_by_its_row() -> None:
    """One declaration says columns, types, the primary key and what may be null."""
    assert TABLE.columns == [
        Column("tenant", Type.TEXT_C, primary_key=True),
        Column("id", Type.TEXT_C, primary_key=True),
        Column("name", Type.TEXT),
        Column("accounts", Type.INTEGER),
        Column("balance", Type.BIGINT),
        Column("total", Type.NUMERIC),
        Column("ended_at", Type.TIMESTAMP, nullable=True),
    ]


def test_a_key_begins_with_the_tenant() -> None:
    """A table whose key does not begin with the tenant would let two tenants meet in a row."""

    class Row(NamedTuple):
        id: str
        tenant: str

    for row, keys in ((Row, 2), (EveryKind, 0)):
        with pytest.raises(TypeError, match="t must begin with its primary key, and that with the tenant"):
            Table("t", row, keys=keys)


def test_a_column_of_every_type_can_be_written() -> None:
    """A type without a packed form would be told at the start, not in the first batch."""
    assert {column.type for column in TABLE.columns} == set(Type)
    Rows(Projection(table=TABLE, key=lambda event, _: (event.id,), on=[]))


def test_an_event_has_one_fold_of_a_table() -> None:
    """Of two the projector would know one alone."""

    def fold(row: EveryKind | None, _: EventEnvelope, __: EventEnvelope) -> EveryKind | None:
        return row

    with pytest.raises(TypeError, match="t has two folds of an event"):
        Projection(table=TABLE, key=lambda event, _: (event.id,), on=[on(EventEnvelope, fold), on(EventEnvelope, fold)])
