"""Statements that go to PostgreSQL together and are answered together: one round trip, one transaction.

The driver's pipeline waits for the rows and again for the end of the transaction, and costs three times as much of a processor:
with it GetAccount took 1.4 ms, and takes 1.1 (`make bench ARGS=get_vs_echo`). So these statements go straight to libpq. The
driver still converts their parameters and rows.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from psycopg import generators
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import InvalidSqlStatementName, error_from_result
from psycopg.pq import ConnStatus, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from shared.platform.postgres import Connection

Statement = tuple[str, Mapping[str, Any]]
"""A query with %(name)s for each value, and the values."""

PREPARED_MAX = 100
"""How many statements stay prepared on a connection: filters and orders can be combined in more ways than that."""

_PLACEHOLDER = re.compile(r"%\((\w+)\)s")
_FINE = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.PIPELINE_SYNC)


async def rows_of_last(connection: Connection, *statements: Statement) -> list[tuple[Any, ...]]:
    """The rows of the last of the statements, which are one transaction: what one sets locally holds for the next.

    The connection must be in no transaction. Raises psycopg.Error of the first statement that fails. Cancelled, it cancels the
    statement that runs.
    """
    if connection.prepare_threshold is None:  # a pooler may be in between, which loses what is prepared
        async with connection.pipeline():
            cursors = [await connection.execute(query, values) for query, values in statements]
        return await cursors[-1].fetchall()
    async with connection.lock:
        if (prepared := _prepared.get(connection)) is None:
            prepared = _prepared[connection] = _Prepared(connection)
        return await prepared.rows_of_last(connection, statements)


class _Dumped(NamedTuple):
    """A statement as libpq takes it."""

    query: bytes
    types: tuple[int, ...]
    parameters: Sequence[Buffer | None]
    formats: Sequence[int] | None


class _Prepared:
    """The statements that are prepared on one connection."""

    def __init__(self, connection: Connection) -> None:
        # Kept, because it looks for the way to convert each type once. It is not given the connection, which it would keep
        # alive, and this with it: so moments come in UTC, whatever the time zone of the session.
        self._convert = Transformer(connection.adapters)
        # By text and types of the parameters; the one that was used last is at the end.
        self._names: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._made = 0

    async def rows_of_last(self, connection: Connection, statements: Sequence[Statement]) -> list[tuple[Any, ...]]:
        """As above."""
        # All before the first is sent: a value that cannot be converted then leaves nothing that waits for its answer.
        dumped = [self._dumped(query, values) for query, values in statements]
        try:
            rows = await self._answered(connection, dumped, kept=PREPARED_MAX)
        except InvalidSqlStatementName:  # after a rollback the driver drops all that is prepared
            if connection.info.transaction_status != TransactionStatus.IDLE:
                raise
            rows = await self._answered(connection, dumped, kept=0)
        self._convert.set_pgresult(rows)
        return self._convert.load_rows(0, rows.ntuples, tuple)

    def _dumped(self, query: str, values: Mapping[str, Any]) -> _Dumped:
        text, names = _numbered(query)
        parameters = self._convert.dump_sequence([values[name] for name in names], [PyFormat.AUTO] * len(names))
        return _Dumped(text, self._convert.types or (), parameters, self._convert.formats)

    async def _answered(self, connection: Connection, statements: Sequence[_Dumped], *, kept: int) -> PGresult:
        """The answer to the last statement. Of those that are prepared already, the `kept` used last stay so."""
        server, made_before = connection.pgconn, self._made
        server.enter_pipeline_mode()
        try:
            expected = self._forget_oldest(server, kept)
            for statement in statements:
                expected += self._send(server, statement)
            server.pipeline_sync()
            answers = await connection.wait(_answers(server, expected + 1))
            for answer in answers:
                if answer.status not in _FINE:
                    raise error_from_result(answer)
        except InvalidSqlStatementName:  # the caller has all forgotten
            raise
        except BaseException:
            if self._made > made_before:  # perhaps prepared, perhaps not: the pool drops a closed connection
                server.finish()
            raise
        finally:
            if server.status == ConnStatus.OK:
                server.exit_pipeline_mode()
        return answers[-2]

    def _forget_oldest(self, server: PGconn, kept: int) -> int:
        """Sends what it takes to keep so many; returns the number of answers that it will have.

        Unlike DEALLOCATE, the protocol's own message does not fail for a statement that is gone.
        """
        count = max(len(self._names) - kept, 0)
        for key in list(self._names)[:count]:
            server.send_close_prepared(self._names.pop(key))
        return count

    def _send(self, server: PGconn, statement: _Dumped) -> int:
        """Sends a statement, and before it, if it is new, what prepares it; returns the number of answers that it will have."""
        key = statement.query, statement.types
        name = self._names.pop(key, None)
        count = 1
        if name is None:
            self._made += 1
            name = b"together_%d" % self._made
            server.send_prepare(name, statement.query, statement.types)
            count = 2
        self._names[key] = name
        server.send_query_prepared(name, statement.parameters, statement.formats, Format.BINARY)
        return count


_prepared: WeakKeyDictionary[Connection, _Prepared] = WeakKeyDictionary()


@lru_cache(maxsize=1024)
def _numbered(query: str) -> tuple[bytes, Sequence[str]]:
    """The query with $1, $2 … in place of the names, and the names in that order."""
    names = list(dict.fromkeys(_PLACEHOLDER.findall(query)))
    return _PLACEHOLDER.sub(lambda found: f"${names.index(found[1]) + 1}", query).encode(), names


def _answers(server: PGconn, count: int) -> Generator[Any, Any, list[PGresult]]:
    """For `Connection.wait`: sends what is not sent yet, then takes so many answers."""
    yield from generators.send(server)
    answers: list[PGresult] = []
    for _ in range(count):
        answers += yield from generators.fetch_many(server)
    return answers
