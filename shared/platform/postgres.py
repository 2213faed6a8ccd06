"""PostgreSQL: safe connections, the check of roles at start-up, and statements for the hot path."""

from __future__ import annotations

import asyncio
import math
import select
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, LiteralString
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from psycopg import generators
from psycopg.errors import (
    InvalidSqlStatementName,
    LockNotAvailable,
    QueryCanceled,
    UndefinedColumn,
    UndefinedFunction,
    UndefinedTable,
    error_from_result,
)
from psycopg.pq import ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from shared.folds.errors import Unavailable
from shared.platform.cancellation import cancellations, heed_cancellation
from shared.platform.instruments import Labels
from shared.platform.metrics import Metrics
from shared.platform.packing import Packed, PackedDumper
from shared.platform.telemetry import logger
from shared.platform.versions import postgres_too_old

log = logger(__name__)

Connection = psycopg.AsyncConnection[Any]

_LACKS = (UndefinedTable, UndefinedColumn, UndefinedFunction)
"""What a database says that the bootstrap of this release was not run on."""

CONNECT_TIMEOUT_S = 3
ANSWER_TIMEOUT_S = 1.0
REPEAT_LOG_S = 10.0
IDLE_S = 1.0
"""A connection that was used a shorter time ago is taken for a living one, unless something has come on it."""
LOCK_TIMEOUT = "500ms"
"""For reads alone. What holds a table for longer is a migration, which must not hold up queries on other tables."""


class UnsafeDatabase(Exception):
    """The database or its role is such that a promise of Foldline could be broken."""


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
    "cursor_factory": _BinaryCursor,
}

# Every query here looks rows up by key. A plan made while a table was empty, and kept, would read all of it; and since one
# plan serves all parameters, none is made again for every call, as PostgreSQL does where there are arrays.
#
# Told by a statement rather than when connecting: a pooler refuses `options`, or drops them without a word. A pooler that
# hands a connection to another client after each transaction takes the settings along, to clients of the same role, who
# want the same; one that was never told has them from its role (`deploy/bootstrap.py`).
SETTINGS: Mapping[str, str] = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
_SET: LiteralString = "SELECT pg_backend_pid(), set_config(k, v, false) FROM unnest(%s::text[], %s::text[]) AS s (k, v)"


async def connect(url: str, *, application_name: str) -> Connection:
    """An autocommitting connection with binary results. Raises psycopg.OperationalError if the database does not answer."""
    connection = await psycopg.AsyncConnection.connect(url, application_name=application_name, **_PARAMETERS)
    try:
        await _prepare(connection)
    except BaseException:
        await connection.close()
        raise
    return connection


async def _prepare(connection: Connection, settings: Mapping[str, str] = SETTINGS) -> None:
    connection.adapters.register_dumper(Packed, PackedDumper)
    cursor = await connection.execute(_SET, (list(settings), list(settings.values())), prepare=False)
    pid, _ = (await cursor.fetchall())[0]
    # A pooler may run each transaction on another server connection, which does not have the statements of the one before.
    connection.prepare_threshold = 0 if pid == connection.info.backend_pid else None


async def refuse_pooler(connection: Connection) -> None:
    """Raises UnsafeDatabase if there is a pooler between us and the server: a lock of the session would not be ours.

    A pooler cannot know which server process it will give us, so it names none, or one of its own.
    """
    (pid,) = await one(connection, "SELECT pg_backend_pid()")
    if pid != connection.info.backend_pid:
        raise UnsafeDatabase(
            "this connection holds a lock of its session, so it must lead to PostgreSQL itself: a pooler answered"
        )


class Reads:
    """A few connections for reads that are not on the hot path, opened when they are needed.

    After a restart of the server every pooled connection is dead, and looks alive. So one that has been idle, or on which
    something has come unasked, as the server's last word does, is tried before it is lent. Trying all cost a third of a query.
    A table that somebody has locked is not waited for long, so that it does not take the connections from the others.
    """

    def __init__(self, url: str, *, application_name: str, size_max: int = 8) -> None:
        self._name = application_name
        self._size_max = size_max
        self._lent = 0
        self._told_at = -math.inf
        self._used_at: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            kwargs={"application_name": application_name, **_PARAMETERS},
            min_size=0,
            max_size=size_max,
            open=False,
            timeout=CONNECT_TIMEOUT_S,
            configure=lambda connection: _prepare(connection, {**SETTINGS, "lock_timeout": LOCK_TIMEOUT}),
            # A try that failed is not followed by ever slower ones behind the caller's back: the caller tries again.
            reconnect_timeout=CONNECT_TIMEOUT_S,
        )

    async def open(self) -> None:
        """Makes the pool ready. Does not wait for the database."""
        await self._pool.open()

    async def close(self) -> None:
        """Closes all connections."""
        await self._pool.close()

    def measure(self, metrics: Metrics) -> None:
        """Makes metrics of the pool's use, under the names of OpenTelemetry's conventions for databases."""
        pool = {"db.client.connection.pool.name": self._name}

        def counts() -> list[tuple[float, Labels]]:
            stats = self._pool.get_stats()
            idle = stats["pool_available"]
            states = {"idle": idle, "used": max(stats["pool_size"] - idle, 0)}
            return [(count, {**pool, "db.client.connection.state": state}) for state, count in states.items()]

        metrics.gauge("db.client.connection.count", "Connections of the pool, in use and idle.", counts)
        metrics.gauge("db.client.connection.max", "The most connections that the pool makes.", lambda: [(self._size_max, pool)])
        metrics.gauge(
            "db.client.connection.pending_requests",
            "Calls that wait for a connection.",
            lambda: [(self._pool.get_stats()["requests_waiting"], pool)],
        )

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lends a connection. Raises Unavailable for all that the database cannot do now; see `unavailable`."""
        try:
            async with AsyncExitStack() as lent:
                connection = await lent.enter_async_context(self._living())
                try:
                    yield connection
                except psycopg.Error as error:
                    # What it remembers of the database may be what is wrong (a plan, a role's rights): the pool drops it.
                    if is_trouble(error):
                        await connection.close()
                    raise
        except PoolTimeout as error:
            raise (_busy() if self._lent >= self._size_max else unavailable(error)) from error
        except psycopg.Error as error:
            if isinstance(error, _LACKS) and time.monotonic() - self._told_at > REPEAT_LOG_S:
                self._told_at = time.monotonic()
                log.warning("schema_too_old", error=describe(error))  # callers are not told what is missing
            if is_trouble(error):
                raise unavailable(error) from error
            raise

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[Connection]:
        """A connection that answers. Dead ones are dropped on the way, without the pauses that the pool would make."""
        for _ in range(self._size_max + 1):
            asked = cancellations()
            async with self._pool.connection() as connection:
                heed_cancellation(asked)
                idle_s = time.monotonic() - self._used_at.get(connection, -IDLE_S)
                if (idle_s < IDLE_S and not _readable(connection)) or await _answers(connection):
                    self._lent += 1
                    try:
                        yield connection
                    finally:
                        self._lent -= 1
                        self._used_at[connection] = time.monotonic()
                    return
        raise psycopg.OperationalError("every connection is lost as soon as it is made")


def _readable(connection: Connection) -> bool:
    """Whether something has come on a connection that asked for nothing."""
    poll = select.poll()
    poll.register(connection.pgconn.socket, select.POLLIN)
    return bool(poll.poll(0))


async def _answers(connection: Connection) -> bool:
    """Whether the server answers on this connection. Closes the connection if not."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await connection.execute("")
    except (psycopg.Error, TimeoutError):
        await connection.close()
        return False
    return True


# Classes of errors that speak of a statement's values rather than of the database: data exceptions, integrity
# constraints, check options, limits of size, and what a function of ours raises.
_OF_THE_VALUES = ("22", "23", "44", "54", "P0")


def is_trouble(error: BaseException) -> bool:
    """Whether the database cannot now what it could before, so that the same may be tried again on a fresh connection.

    All but a refusal of the values: it is away, full, ending, recovering, read-only, locked, a right is missing, a plan
    does not fit a table that was changed. The driver's exceptions are no tree of PostgreSQL's classes of errors, so the
    class is read from the code. https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:  # the driver's own: a connection that was lost, or a call that makes no sense
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate[:2] not in _OF_THE_VALUES


def unavailable(error: BaseException) -> Unavailable:
    """The refusal for a caller when the database fails: DATABASE_BUSY, SCHEMA_TOO_OLD, or unavailable."""
    if isinstance(error, LockNotAvailable | QueryCanceled):
        return _busy()
    if isinstance(error, _LACKS):
        return Unavailable("SCHEMA_TOO_OLD", "the database lacks a table, column or function: run this release's bootstrap on it")
    return Unavailable("DATABASE_UNAVAILABLE", "the database is away or cannot answer now; the same call may be made again")


def _busy() -> Unavailable:
    return Unavailable("DATABASE_BUSY", "the database did not get to it in time; the same call may be made again")


def describe(error: BaseException) -> str:
    """The database's error, for a log or an operator, without values of rows."""
    name = type(error).__name__
    if not isinstance(error, psycopg.Error) or not is_trouble(error):
        return f"{getattr(error, 'sqlstate', None) or ''} {name}".strip()
    return f"{error.sqlstate or ''} {name}: {error.diag.message_primary or str(error)}".strip()


def refuse_old(connection: Connection) -> None:
    """Raises UnsafeDatabase if the server is too old, whatever is or is not in its database."""
    if too_old := postgres_too_old(connection.info.server_version):
        raise UnsafeDatabase(too_old)


async def refuse_unsafe(connection: Connection, *, tables: Iterable[str]) -> None:
    """Raises UnsafeDatabase if the role could change `tables` past their function, a commit is not durable or the server too old.

    Checked at start-up, because every promise rests on it and a wrong setting shows only in the next crash. What the
    role could do after SET ROLE counts, and so does owning a table: an owner can give itself every right.
    """
    refuse_old(connection)
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
        """`query` has $1, $2 …, or %s in their place; then % itself is %%."""
        begin, *following = query.split("%s")
        if following:
            query = begin + "".join(f"${nth}{part}" for nth, part in enumerate(following, 1)).replace("%%", "%")
        self._query = query.encode()
        self._name = b"foldline_%08x" % zlib.crc32(self._query)
        self._prepared: WeakSet[Connection] = WeakSet()
        self._formats: list[int] = []

    async def row(self, connection: Connection, parameters: Sequence[Packed]) -> list[bytes | None]:
        """The columns of the first row of the answer, as PostgreSQL sends them: see `read_int8` and its like.

        Raises psycopg.Error. Cancelled, it cancels the statement, as the driver does.
        """
        async with connection.lock:
            if connection in self._prepared:
                try:
                    return await self._executed(connection, parameters)
                except InvalidSqlStatementName:  # after a rollback the driver drops all that is prepared
                    if connection.info.transaction_status != TransactionStatus.IDLE:
                        raise
            connection.pgconn.send_prepare(self._name, self._query, [each.oid for each in parameters])
            await self._answer(connection)
            self._prepared.add(connection)
            self._formats = [Format.BINARY] * len(parameters)
            return await self._executed(connection, parameters)

    async def _executed(self, connection: Connection, parameters: Sequence[Packed]) -> list[bytes | None]:
        values = [each.data for each in parameters]
        connection.pgconn.send_query_prepared(self._name, values, self._formats, Format.BINARY)
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


# PostgreSQL keeps the limit with which a transaction began until it is set to 0.
_TAKE_TIME: LiteralString = "SELECT set_config('transaction_timeout', '0', true), set_config('transaction_timeout', %s, true)"


async def take_time(connection: Connection, seconds: int) -> None:
    """Raises the time limit of the present transaction; 0: none. That of a role is for work that takes milliseconds."""
    await connection.execute(_TAKE_TIME, (f"{seconds}s",))
