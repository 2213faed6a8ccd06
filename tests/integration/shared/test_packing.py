"""What is packed by hand is what PostgreSQL reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import uuid_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.bootstrap import Database
from shared import packing
from shared.packing import Packed
from shared.postgres import Connection
from tests.support.history import connected

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


async def read(connection: Connection, packed: Packed) -> Any:
    """What PostgreSQL takes it for."""
    cursor = await connection.execute("SELECT %b", [packed])
    row = await cursor.fetchone()
    assert row is not None
    return row[0]


def alike(kind: str, value: Any) -> Any:
    """How the driver shows a value that was given."""
    return UUID(value) if kind.startswith("uuid of text") and value is not None else value


async def test_every_value_and_every_array_is_read_as_it_was_meant(write_db: Database) -> None:
    """None or many, alike or not, of one length or of several, there or not."""
    async with connected(write_db.app) as connection:

        async def arrays_of(kind: str, *samples: Sequence[Any]) -> None:
            one, many, _ = KINDS[kind]
            for values in samples:
                assert await read(connection, many(list(values))) == [alike(kind, value) for value in values]
            for value in samples[0]:
                if value is not None:
                    assert await read(connection, one(value)) == alike(kind, value)

        await arrays_of("text", ["", "a"], ["aa"] * 3, ["aa", "bb"], ["", "ø€\U0001f600", "bbb"], [])
        await arrays_of("bytea or null", [b"", b"a"], [b"aa", b"bb"], [None], [None, None], [b"a", None, b"bb"], [])
        await arrays_of("bigint", [2**63 - 1, -(2**63)], [5, 5, 5], [0], [])
        await arrays_of("integer", [2**31 - 1, -(2**31)], [5, 5, 5], [0], [])
        moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
        await arrays_of("timestamptz or null", [moment, moment + timedelta.resolution], [moment] * 2, [None, moment], [None], [])
        ids = [UUID(int=1), UUID(int=2**128 - 1)]
        await arrays_of("uuid", ids, ids[:1] * 3, [])
        await arrays_of("uuid of text or null", list(map(str, ids)), [str(ids[0]), None], [None] * 2, [])
        made = uuid_utils.uuid7()
        assert await read(connection, packing.uuids([made])) == [UUID(str(made))]
        assert (await read(connection, packing.boolean(True)), await read(connection, packing.boolean(False))) == (True, False)


async def test_any_array_is_read_as_it_was_meant(write_db: Database) -> None:
    """Whatever values come together."""
    async with connected(write_db.app) as connection:

        @given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        def draw(kind: str, data: st.DataObject) -> None:
            cases.append((kind, data.draw(st.lists(KINDS[kind][2], max_size=6))))

        cases: list[tuple[str, list[Any]]] = []
        draw()
        for kind, values in cases:
            assert await read(connection, KINDS[kind][1](values)) == [alike(kind, value) for value in values], (kind, values)
