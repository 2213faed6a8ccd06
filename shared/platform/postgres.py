"""What every use of PostgreSQL here shares: safe connections, refused roles, and statements for the hot path."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, LiteralString
from weakref import WeakSet

import psycopg
from psycopg import generators
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult
from psycopg_pool import AsyncConnectionPool

from shared.folds.errors import Unavailable
from shared.platform.packing import Packed, PackedDumper

Connection = psycopg.AsyncConnection[Any]

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
    connection.adapters.register_dumper(Packed, PackedDumper)


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
