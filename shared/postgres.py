"""What every use of PostgreSQL here shares: safe connections, refused roles, and arrays packed in binary."""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, TypeVar
from uuid import UUID
from weakref import WeakSet

import psycopg
import uuid_utils
from psycopg import generators
from psycopg.adapt import Buffer, Dumper
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult
from psycopg_pool import AsyncConnectionPool

from shared.errors import Unavailable

Connection = psycopg.AsyncConnection[Any]
T = TypeVar("T")

CONNECT_TIMEOUT_S = 3


class UnsafeDatabase(Exception):
    """The database, or the role it was opened with, would allow what Foldline promises cannot happen."""


class _BinaryCursor(psycopg.AsyncCursor[Any]):
    """Asks for results in binary, which the driver reads several times faster than text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.format = Format.BINARY


# A cut network is noticed within seconds, in both directions.
_PARAMETERS: dict[str, Any] = {
    "autocommit": True,
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 5_000,
    # Every query here looks rows up by key. A plan made while a table was empty, and kept, would read all of it; and
    # since one plan serves all parameters, none is made again for every call, as PostgreSQL does where there are arrays.
    "options": "-c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off -c jit=off"
    " -c plan_cache_mode=force_generic_plan",
    "cursor_factory": _BinaryCursor,
}


async def connect(url: str, *, application_name: str) -> Connection:
    """An autocommitting connection with binary results; raises psycopg.OperationalError if there is none to be had."""
    connection = await psycopg.AsyncConnection.connect(url, application_name=application_name, **_PARAMETERS)
    await _prepare(connection)
    return connection


async def _prepare(connection: Connection) -> None:
    connection.prepare_threshold = 0
    connection.adapters.register_dumper(Packed, _PackedDumper)


class Reads:
    """A few connections for reads that are not on the hot path, opened when they are needed.

    After a restart of the server every pooled connection is dead, and looks alive: each is tried before it is lent.
    """

    def __init__(self, url: str, *, application_name: str, size_max: int = 8) -> None:
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            kwargs={"application_name": application_name, **_PARAMETERS},
            min_size=0,
            max_size=size_max,
            open=False,
            timeout=CONNECT_TIMEOUT_S,
            configure=_prepare,
            check=AsyncConnectionPool.check_connection,
            # A try that failed is not followed by ever slower ones behind the caller's back: the caller tries again.
            reconnect_timeout=CONNECT_TIMEOUT_S,
        )

    async def open(self) -> None:
        """Makes the pool ready. Does not wait for the database."""
        await self._pool.open()

    async def close(self) -> None:
        """Closes all connections."""
        await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends a connection. Raises Unavailable (DATABASE_UNAVAILABLE) if there is none, or if it is lost in use."""
        try:
            async with self._pool.connection() as connection:
                yield connection
        except psycopg.OperationalError as error:
            raise database_unavailable() from error


def database_unavailable() -> Unavailable:
    """The database is away, or was lost on the way."""
    return Unavailable("DATABASE_UNAVAILABLE", "the database is away; the same call may be made again")


def is_trouble(error: Exception) -> bool:
    """Whether the server says that it cannot now: it is full, ending, recovering, read-only, or was told to stop.

    The driver's exceptions are no tree of PostgreSQL's classes of errors, so the class is read from the code.
    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    code = error.sqlstate or "" if isinstance(error, psycopg.Error) else ""
    return code[:2] in ("53", "57", "58") or code == "25006"


async def refuse_unsafe(connection: Connection, *, tables: Iterable[str]) -> None:
    """Raises UnsafeDatabase if the role could change `tables` past their function, or if a commit is not durable.

    Checked at start-up, because every promise rests on it and a wrong setting shows only in the next crash. What the
    role could do after SET ROLE counts, and so does owning a table: an owner can give itself every right.
    """
    cursor = await connection.execute(
        """SELECT bool_or(rolsuper), bool_or(rolbypassrls), bool_or(rolcreaterole),
                  current_setting('fsync'), current_setting('synchronous_commit'),
                  current_setting('full_page_writes'), current_setting('default_transaction_isolation')
           FROM pg_roles WHERE pg_has_role(oid, 'MEMBER')"""
    )
    row = await cursor.fetchone()
    assert row is not None  # the current user is a role
    is_super, bypasses, creates_roles, fsync, synchronous_commit, full_page_writes, isolation = row
    reasons = []
    if is_super or bypasses or creates_roles:
        reasons.append("the role is a superuser, bypasses row-level security or creates roles")
    if fsync != "on" or full_page_writes != "on" or synchronous_commit in ("off", "local"):
        reasons.append(f"fsync={fsync}, full_page_writes={full_page_writes}, synchronous_commit={synchronous_commit}")
    if isolation != "read committed":
        reasons.append(f"default_transaction_isolation={isolation}")
    cursor = await connection.execute(
        """SELECT t FROM unnest(%s::text[]) AS t JOIN pg_class AS c ON c.oid = t::regclass
           WHERE EXISTS (SELECT FROM pg_roles AS r WHERE pg_has_role(r.oid, 'MEMBER') AND (
                 c.relowner = r.oid
              OR has_table_privilege(r.oid, t, 'INSERT') OR has_table_privilege(r.oid, t, 'UPDATE')
              OR has_table_privilege(r.oid, t, 'DELETE') OR has_table_privilege(r.oid, t, 'TRUNCATE')
              OR has_any_column_privilege(r.oid, t, 'INSERT') OR has_any_column_privilege(r.oid, t, 'UPDATE')))""",
        [list(tables)],
    )
    if writable := [name for (name,) in await cursor.fetchall()]:
        reasons.append(f"the role may write {', '.join(writable)}")
    if reasons:
        raise UnsafeDatabase("; ".join(reasons))


# Arrays, packed by hand: the driver converts a list element by element, which costs more than the insert itself.
# Format: https://www.postgresql.org/docs/current/protocol-overview.html and src/backend/utils/adt/arrayfuncs.c
# (array_recv): dimensions, has-null flag, element type, length, lower bound, then each element behind its length.

_HEAD = struct.Struct("!IIIII")
_LENGTH = struct.Struct("!i")
_INT4 = struct.Struct("!ii")
_INT8 = struct.Struct("!iq")
_INT8_ALONE = struct.Struct("!q")
_NULL = _LENGTH.pack(-1)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

BOOL, BYTEA, INT8, INT4, TEXT, TIMESTAMPTZ, UUID_OID = 16, 17, 20, 23, 25, 1184, 2950
_ARRAY_OIDS = {BYTEA: 1001, INT8: 1016, INT4: 1007, TEXT: 1009, TIMESTAMPTZ: 1185, UUID_OID: 2951}


class Packed:
    """A parameter in PostgreSQL's binary form, most often an array. `oid` is its type; no `data` is NULL."""

    __slots__ = ("data", "oid")

    def __init__(self, oid: int, data: bytes | None) -> None:
        self.oid = oid
        self.data = data


class _PackedDumper(Dumper):
    """Hands the packed bytes to the driver as they are."""

    format = Format.BINARY

    def get_key(self, obj: Packed, format: Any) -> Any:  # noqa: A002 - the driver's name for it
        return (self.cls, obj.oid)

    def upgrade(self, obj: Packed, format: Any) -> Dumper:  # noqa: A002
        dumper = _PackedDumper(self.cls, None)
        dumper.oid = obj.oid
        return dumper

    def dump(self, obj: Packed) -> Buffer | None:
        return obj.data


_EMPTY = {oid: Packed(array_oid, struct.pack("!III", 0, 0, oid)) for oid, array_oid in _ARRAY_OIDS.items()}


def _pack(
    element_oid: int, values: Sequence[T], elements: Callable[[Sequence[T]], Iterable[bytes]], *, nulls: bool = False
) -> Packed:
    """`elements` makes each value's length and bytes. `nulls`: there may be some."""
    length = len(values)
    if not length:
        return _EMPTY[element_oid]
    if length > 1 and values.count(values[0]) == length:  # as in most columns of a batch: tenant, type, status, moment
        data, nulls = b"".join(elements(values[:1])) * length, values[0] is None
    else:
        data, nulls = b"".join(elements(values)), nulls and None in values
    return Packed(_ARRAY_OIDS[element_oid], _HEAD.pack(1, int(nulls), element_oid, length, 1) + data)


def _sized(values: Sequence[bytes | None]) -> Iterable[bytes]:
    pack = _LENGTH.pack
    return [_NULL if value is None else pack(len(value)) + value for value in values]


def int4(value: int) -> Packed:
    """An integer."""
    return Packed(INT4, _LENGTH.pack(value))


def boolean(value: bool) -> Packed:
    """A truth value."""
    return Packed(BOOL, b"\x01" if value else b"\x00")


def int8(value: int) -> Packed:
    """A bigint."""
    return Packed(INT8, _INT8_ALONE.pack(value))


def text(value: str) -> Packed:
    """A text."""
    return Packed(TEXT, value.encode())


def blob(value: bytes) -> Packed:
    """A bytea."""
    return Packed(BYTEA, value)


def uuid_text(value: str | None) -> Packed:
    """A uuid, from a UUID in its canonical form."""
    return Packed(UUID_OID, None if value is None else bytes.fromhex(value.replace("-", "")))


def uuid(value: UUID | uuid_utils.UUID) -> Packed:
    """A uuid."""
    return Packed(UUID_OID, value.bytes)


def timestamptz(value: datetime) -> Packed:
    """A timestamptz, from a datetime with a time zone."""
    return Packed(TIMESTAMPTZ, _INT8_ALONE.pack(_microseconds(value)))


def texts(values: Sequence[str]) -> Packed:
    """text[]"""
    return _pack(TEXT, values, lambda some: _sized([value.encode() for value in some]))


def blobs(values: Sequence[bytes | None]) -> Packed:
    """bytea[]"""
    return _pack(BYTEA, values, _sized, nulls=True)


def uuids(values: Sequence[UUID | uuid_utils.UUID]) -> Packed:
    """uuid[]"""
    return _pack(UUID_OID, [value.bytes for value in values], _sized)


def uuid_texts(values: Sequence[str | None]) -> Packed:
    """uuid[], from UUIDs in their canonical form"""
    return _pack(UUID_OID, values, _uuid_texts, nulls=True)


def _uuid_texts(values: Sequence[str | None]) -> Iterable[bytes]:
    return _sized([None if value is None else bytes.fromhex(value.replace("-", "")) for value in values])


def int4s(values: Sequence[int]) -> Packed:
    """integer[]"""
    return _pack(INT4, values, lambda some: [_INT4.pack(4, value) for value in some])


def int8s(values: Sequence[int]) -> Packed:
    """bigint[]"""
    return _pack(INT8, values, lambda some: [_INT8.pack(8, value) for value in some])


def timestamps(values: Sequence[datetime | None]) -> Packed:
    """timestamptz[], from datetimes with a time zone"""
    return _pack(TIMESTAMPTZ, values, lambda some: [_timestamp(value) for value in some], nulls=True)


def _timestamp(value: datetime | None) -> bytes:
    return _NULL if value is None else _INT8.pack(8, _microseconds(value))


def _microseconds(value: datetime) -> int:
    gap = value - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


def read_int8(data: bytes | None) -> int:
    """The bigint of an answer."""
    assert data is not None  # only read where the statement gives one
    value: int = _INT8_ALONE.unpack(data)[0]
    return value


def read_timestamptz(data: bytes | None) -> datetime:
    """The timestamptz of an answer."""
    return _EPOCH + timedelta(microseconds=read_int8(data))


class Prepared:
    """A statement for the hot path: straight to libpq, with packed parameters only, in and out in binary.

    The driver looks for the way to convert each parameter, and each column of the answer, at every execution anew. With
    the 40 arrays of an append, which are packed already, that was half of the processor time of an append of one command.
    """

    def __init__(self, query: str) -> None:
        """`query` has $1, $2 …"""
        self._query = query.encode()
        self._name = b"foldline_%08x" % zlib.crc32(self._query)
        self._prepared: WeakSet[Connection] = WeakSet()
        self._formats: list[int] = []

    async def row(self, connection: Connection, parameters: Sequence[Packed]) -> list[bytes | None]:
        """The columns of the first row of the answer, as PostgreSQL sends them: see `read_int8` and its like.

        Raises psycopg.Error. Cancelled, it cancels the statement, as the driver does.
        """
        server = connection.pgconn
        async with connection.lock:
            if connection not in self._prepared:
                server.send_prepare(self._name, self._query, [each.oid for each in parameters])
                await self._answer(connection)
                self._prepared.add(connection)
                self._formats = [Format.BINARY] * len(parameters)
            server.send_query_prepared(self._name, [each.data for each in parameters], self._formats, Format.BINARY)
            answer = await self._answer(connection)
            return [answer.get_value(0, column) for column in range(answer.nfields)]

    async def _answer(self, connection: Connection) -> PGresult:
        result: PGresult = (await connection.wait(generators.execute(connection.pgconn)))[-1]
        if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            raise error_from_result(result)
        return result


async def one(connection: Connection, query: LiteralString, parameters: Sequence[Any] = ()) -> Any:
    """The one row of a query; raises LookupError if there is none."""
    cursor = await connection.execute(query, parameters)
    row = await cursor.fetchone()
    if row is None:
        raise LookupError(query)
    return row
