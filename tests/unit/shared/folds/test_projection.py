"""A projection's description is checked where it is made."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from sqlalchemy import Boolean, Column, MetaData, Table, Text

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Projection, recorded_at, storable
from shared.projections.rows import Rows


class PairRow(NamedTuple):
    """A row."""

    tenant: str
    id: str
    note: str


def projection(*columns: Column[Any], row: type[Any] = PairRow) -> Projection[Any]:
    """A projection of a table with these columns."""
    table = Table("pairs", MetaData(), *columns)
    return Projection(table=table, row=row, key=lambda event, _: (event.id,), on={})


TENANT, ID = Column("tenant", Text, primary_key=True), Column("id", Text, primary_key=True)


def copy(*columns: Column[Any]) -> list[Column[Any]]:
    """Columns for another table: each belongs to one."""
    return [column._copy() for column in columns]


def test_a_row_has_the_columns_of_its_table() -> None:
    """A forgotten, surplus or misplaced field is told at import."""
    projection(*copy(TENANT, ID, Column("note", Text)))
    for columns in (copy(TENANT, ID), copy(TENANT, ID, Column("other", Text)), copy(ID, TENANT, Column("note", Text))):
        with pytest.raises(TypeError, match="differ"):
            projection(*columns)


def test_a_key_begins_with_the_tenant() -> None:
    """A table whose key does not begin with the tenant would let two tenants meet in a row."""

    class Row(NamedTuple):
        id: str
        tenant: str

    with pytest.raises(TypeError, match="tenant"):
        projection(*copy(ID, TENANT), row=Row)


def test_a_type_that_cannot_be_packed_is_told_at_once() -> None:
    """Not in the first batch."""
    with pytest.raises(TypeError, match=r"pairs\.note"):
        Rows(projection(*copy(TENANT, ID, Column("note", Boolean))))


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
