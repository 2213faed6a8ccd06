"""Parameters and answers in PostgreSQL's binary form, packed by hand: above all arrays, a column of a batch each.

The driver converts a list element by element, which costs more than the insert itself.
Format: https://www.postgresql.org/docs/current/protocol-overview.html and src/backend/utils/adt/arrayfuncs.c
(array_recv): dimensions, has-null flag, element type, length, lower bound, then each element behind its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from struct import Struct as Layout
from typing import Any
from uuid import UUID

import uuid_utils
from msgspec import Struct
from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

_HEAD = Layout("!IIIII")
_LENGTH = Layout("!i")
_INT4 = Layout("!ii")
_INT8 = Layout("!iq")
_INT8_ALONE = Layout("!q")
_NULL = _LENGTH.pack(-1)
_UUID_LENGTH = "00000010"
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

BOOL, BYTEA, INT8, INT4, TEXT, TIMESTAMPTZ, UUID_OID = 16, 17, 20, 23, 25, 1184, 2950
_ARRAY_OIDS = {BYTEA: 1001, INT8: 1016, INT4: 1007, TEXT: 1009, TIMESTAMPTZ: 1185, UUID_OID: 2951}


class Packed(Struct, eq=False):
    """A parameter in PostgreSQL's binary form, most often an array. `oid` is its type; no `data` is NULL."""

    oid: int
    data: bytes | None


class PackedDumper(Dumper):
    """Hands the packed bytes to the driver as they are."""

    format = Format.BINARY

    def get_key(self, obj: Packed, format: Any) -> Any:  # noqa: A002 - the driver's name for it
        return (self.cls, obj.oid)

    def upgrade(self, obj: Packed, format: Any) -> Dumper:  # noqa: A002 - here as well
        dumper = PackedDumper(self.cls, None)
        dumper.oid = obj.oid
        return dumper

    def dump(self, obj: Packed) -> Buffer | None:
        return obj.data


_EMPTY = {oid: Packed(array_oid, Layout("!III").pack(0, 0, oid)) for oid, array_oid in _ARRAY_OIDS.items()}


# One value


def boolean(value: bool) -> Packed:
    """A truth value."""
    return Packed(BOOL, b"\x01" if value else b"\x00")


def int4(value: int) -> Packed:
    """An integer."""
    return Packed(INT4, _LENGTH.pack(value))


def int8(value: int) -> Packed:
    """A bigint."""
    return Packed(INT8, _INT8_ALONE.pack(value))


def text(value: str | None) -> Packed:
    """A text; None is NULL."""
    return Packed(TEXT, None if value is None else value.encode())


def blob(value: bytes) -> Packed:
    """A bytea."""
    return Packed(BYTEA, value)


def uuid(value: UUID | uuid_utils.UUID) -> Packed:
    """A uuid."""
    return Packed(UUID_OID, value.bytes)


def uuid_text(value: str | None) -> Packed:
    """A uuid, from a UUID in its canonical form."""
    return Packed(UUID_OID, None if value is None else bytes.fromhex(value.replace("-", "")))


def timestamptz(value: datetime) -> Packed:
    """A timestamptz, from a datetime with a time zone."""
    return Packed(TIMESTAMPTZ, _INT8_ALONE.pack(_microseconds(value)))


# Many


def texts_or_null(values: Sequence[str | None]) -> Packed:
    """text[], in which some may be NULL"""
    return _array(TEXT, values, lambda some: _sized([value.encode() for value in some]), nulls=True)


def texts(values: Sequence[str]) -> Packed:
    """text[]"""
    return _array(TEXT, values, lambda some: _sized([value.encode() for value in some]))


def blobs(values: Sequence[bytes | None]) -> Packed:
    """bytea[]"""
    return _array(BYTEA, values, _sized, nulls=True)


def uuids(values: Sequence[UUID | uuid_utils.UUID]) -> Packed:
    """uuid[]"""
    return _array(UUID_OID, [value.bytes for value in values], _sized)


def uuid_texts(values: Sequence[str | None]) -> Packed:
    """uuid[], from UUIDs in their canonical form"""
    return _array(UUID_OID, values, _uuid_texts, nulls=True)


def int4s(values: Sequence[int]) -> Packed:
    """integer[]"""
    return _array(INT4, values, lambda some: b"".join(map(partial(_INT4.pack, 4), some)))


def int8s(values: Sequence[int]) -> Packed:
    """bigint[]"""
    return _array(INT8, values, lambda some: b"".join(map(partial(_INT8.pack, 8), some)))


def timestamps(values: Sequence[datetime | None]) -> Packed:
    """timestamptz[], from datetimes with a time zone"""
    return _array(TIMESTAMPTZ, values, lambda some: b"".join([_INT8.pack(8, _microseconds(value)) for value in some]), nulls=True)


def _array(oid: int, values: Sequence[Any], elements: Callable[[Any], bytes], *, nulls: bool = False) -> Packed:
    """`elements` makes the bytes of values that are there, each behind its length. `nulls`: some may not be there."""
    length = len(values)
    if not length:
        return _EMPTY[oid]
    first = values[0]
    if length > 1 and values.count(first) == length:  # as in most columns of a batch: tenant, type, status, moment
        nulls = nulls and first is None
        data = (_NULL if nulls else elements(values[:1])) * length
    elif nulls and None in values:
        data = b"".join([_NULL if value is None else elements((value,)) for value in values])
    else:
        nulls, data = False, elements(values)
    return Packed(_ARRAY_OIDS[oid], _HEAD.pack(1, int(nulls), oid, length, 1) + data)


def _sized(values: Sequence[bytes]) -> bytes:
    """Each behind its length. If all have the same, as ids, hashes and most messages of a kind do, it goes between them."""
    lengths = set(map(len, values))
    if len(lengths) == 1:
        length = _LENGTH.pack(lengths.pop())
        return length + length.join(values)
    pack = _LENGTH.pack
    return b"".join([pack(len(value)) + value for value in values])


def _uuid_texts(values: Sequence[str]) -> bytes:
    """The same, of UUIDs as text: all become bytes at once, and their lengths with them."""
    if set(map(len, values)) != {36}:
        raise ValueError("not a UUID in its canonical form")  # it would shift its neighbours
    return bytes.fromhex((_UUID_LENGTH + _UUID_LENGTH.join(values)).replace("-", ""))


def _microseconds(value: datetime) -> int:
    gap = value - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


# Answers


def read_int8(data: bytes | None) -> int:
    """The bigint of an answer."""
    assert data is not None  # only read where the statement gives one
    value: int = _INT8_ALONE.unpack(data)[0]
    return value


def read_timestamptz(data: bytes | None) -> datetime:
    """The timestamptz of an answer."""
    return _EPOCH + timedelta(microseconds=read_int8(data))
