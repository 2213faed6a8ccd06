"""What is packed by hand is what PostgreSQL reads."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
import uuid_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.platform import packing
from shared.platform.packing import Packed
from tests.support.system.engines import Engines

INT4 = st.integers(-(2**31), 2**31 - 1)
INT8 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
MOMENT = st.datetimes(timezones=st.just(UTC))
BYTES = st.binary(max_size=5)

KINDS: dict[str, tuple[Callable[[Any], Packed], Callable[[Any], Packed], st.SearchStrategy[Any]]] = {
    "text": (packing.text, packing.texts, TEXT),
    "bytea": (packing.blob, packing.blobs, BYTES),
    "bytea or null": (packing.blob, packing.blobs, BYTES | st.none()),
    "bigint": (packing.int8, packing.int8s, INT8),
    "integer": (packing.int4, packing.int4s, INT4),
    "timestamptz": (packing.timestamptz, packing.timestamps, MOMENT),
    "timestamptz or null": (packing.timestamptz, packing.timestamps, MOMENT | st.none()),
    "uuid": (packing.uuid, packing.uuids, st.uuids()),
    "uuid of text": (packing.uuid_text, packing.uuid_texts, st.uuids().map(str)),
    "uuid of text or null": (packing.uuid_text, packing.uuid_texts, st.uuids().map(str) | st.none()),
}


@pytest.fixture(scope="module")
def connection(engines: Engines) -> Iterator[psycopg.Connection[Any]]:
    """One connection for all examples."""
    database = engines.clone("write")
    with psycopg.connect(database.app, autocommit=True) as connection:
        connection.adapters.register_dumper(Packed, packing.PackedDumper)
        yield connection
    engines.drop(database)


def read(connection: psycopg.Connection[Any], packed: Packed) -> Any:
    """What PostgreSQL takes it for."""
    row = connection.execute("SELECT %b", [packed], binary=True).fetchone()
    assert row is not None
    return row[0]


def alike(kind: str, value: Any) -> Any:
    """How the driver shows a value that was given."""
    return UUID(value) if kind.startswith("uuid of text") and value is not None else value


MOMENT_1 = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
ID_1, ID_2 = UUID(int=1), UUID(int=2**128 - 1)
SAMPLES: dict[str, list[list[Any]]] = {
    "text": [["", "a"], ["aa"] * 3, ["aa", "bb"], ["", "ø€\U0001f600", "bbb"], []],
    "bytea or null": [[b"", b"a"], [b"aa", b"bb"], [None], [None, None], [b"a", None, b"bb"], []],
    "bigint": [[2**63 - 1, -(2**63)], [5, 5, 5], [0], []],
    "integer": [[2**31 - 1, -(2**31)], [5, 5, 5], [0], []],
    "timestamptz or null": [[MOMENT_1, MOMENT_1 + timedelta.resolution], [MOMENT_1] * 2, [None, MOMENT_1], [None], []],
    "uuid": [[ID_1, ID_2], [ID_1] * 3, []],
    "uuid of text or null": [[str(ID_1), str(ID_2)], [str(ID_1), None], [None] * 2, []],
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_value_and_every_array_is_read_as_it_was_meant(connection: psycopg.Connection[Any], kind: str) -> None:
    """None or many, alike or not, of one length or of several, there or not."""
    one, many, _ = KINDS[kind]
    for values in SAMPLES[kind]:
        assert read(connection, many(values)) == [alike(kind, value) for value in values]
    for value in SAMPLES[kind][0]:
        assert read(connection, one(value)) == alike(kind, value)


def test_what_has_one_form_alone_is_read_as_it_was_meant(connection: psycopg.Connection[Any]) -> None:
    """Truth values, and the library's own UUIDs."""
    assert (read(connection, packing.boolean(True)), read(connection, packing.boolean(False))) == (True, False)
    made = uuid_utils.uuid7()
    assert read(connection, packing.uuids([made])) == [UUID(str(made))]


@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_array_is_read_as_it_was_meant(connection: psycopg.Connection[Any], kind: str, data: st.DataObject) -> None:
    """Whatever values come together."""
    _, many, values = KINDS[kind]
    given_ = data.draw(st.lists(values, max_size=6))
    assert read(connection, many(given_)) == [alike(kind, value) for value in given_]


@pytest.mark.parametrize("values", [[None], [None, None], [None, 1]], ids=str)
@pytest.mark.parametrize("pack", [packing.texts, packing.int4s, packing.int8s, packing.uuids])
def test_where_nothing_may_be_missing_nothing_is(pack: Callable[[Any], Packed], values: list[Any]) -> None:
    """It is refused here and not passed on as NULL, for which a comparison holds that should not."""
    with pytest.raises((AttributeError, struct.error)):
        pack(values)


@pytest.mark.parametrize("values", [["1", "234"], [str(ID_1)[1:], str(ID_1) + "0"], ["0" * 72, ""]], ids=str)
def test_what_is_no_uuid_is_refused(values: list[str]) -> None:
    """It would take digits from its neighbours, which are other callers' commands."""
    with pytest.raises(ValueError, match="not a UUID"):
        packing.uuid_texts(values)
