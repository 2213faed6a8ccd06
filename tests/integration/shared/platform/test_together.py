"""Statements that are sent together: one transaction, whatever becomes of it, on connections that are used again."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from typing import Any
from weakref import ref

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from deploy.bootstrap import Database
from shared.platform import together
from shared.platform.postgres import Connection, connect
from shared.platform.together import rows_of_last
from tests.support.system.waiting import eventually

LOCALLY = "SELECT set_config('app.tenant', %(tenant)s, true)"
TENANT = "SELECT current_setting('app.tenant', true)"


@pytest.fixture
async def connection(read_db: Database) -> AsyncIterator[Connection]:
    """A connection of the query role."""
    assert read_db.query is not None
    async with await connect(read_db.query, application_name="test-together") as made:
        yield made


async def prepared(connection: Connection) -> int:
    """How many statements the server keeps for us."""
    cursor = await connection.execute(
        "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'together%%'", (), prepare=False
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def rows(connection: Connection, query: str, **values: Any) -> Sequence[tuple[Any, ...]]:
    """The rows of one query, behind one that names a tenant."""
    return await rows_of_last(connection, (LOCALLY, {"tenant": "acme"}), (query, values))


async def test_what_one_statement_sets_holds_for_the_next_and_no_longer(connection: Connection) -> None:
    """They are one transaction, which is over when they are answered."""
    assert await rows(connection, TENANT) == [("acme",)]
    assert connection.info.transaction_status == TransactionStatus.IDLE
    assert await rows_of_last(connection, (TENANT, {})) == [("",)]


async def test_values_go_by_name_and_come_back_as_they_were(connection: Connection) -> None:
    """A name may stand in a query twice; the same query takes values of other types; there may be no row at all."""
    query = "SELECT %(b)s::bigint, %(a)s::text, %(b)s::bigint + 1"
    for given in (1, 2**40):
        assert await rows(connection, query, a="ä", b=given) == [(given, "ä", given + 1)]
    assert await rows(connection, "SELECT 1 WHERE false") == []


async def test_a_statement_that_fails_ends_the_others_and_leaves_nothing_behind(connection: Connection) -> None:
    """The error is that of the first one. A connection on which all were prepared serves on, without the tenant."""
    divided = "SELECT 1 / %(by)s::int"
    assert await rows(connection, divided, by=1) == [(1,)]
    with pytest.raises(psycopg.errors.DivisionByZero):
        await rows_of_last(connection, (LOCALLY, {"tenant": "acme"}), (divided, {"by": 0}), (TENANT, {}))
    assert connection.closed  # the last one was new: it is not known whether it was prepared


async def test_a_statement_that_is_known_may_fail(connection: Connection) -> None:
    """The connection serves on, and takes no tenant along."""
    divided = "SELECT 1 / %(by)s::int"
    for by in (1, 0, 1):
        if by:
            assert await rows(connection, divided, by=by) == [(1,)]
        else:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await rows(connection, divided, by=by)
        assert connection.info.transaction_status == TransactionStatus.IDLE
    assert await rows_of_last(connection, (TENANT, {})) == [("",)]


async def test_a_call_that_is_cancelled_ends_its_statement(connection: Connection, read_db: Database) -> None:
    """Nobody waits for it any more, the server included, and the connection serves the next."""
    sleep = "SELECT pg_sleep(%(seconds)s)"
    await rows(connection, sleep, seconds=0)
    waiting = asyncio.create_task(rows(connection, sleep, seconds=60))
    async with await psycopg.AsyncConnection.connect(read_db.admin, autocommit=True) as admin:

        async def sleeping() -> bool:
            asked = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND application_name = 'test-together'"
            return (await (await admin.execute(asked)).fetchone()) is not None

        await eventually(sleeping)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not await sleeping()
    assert connection.info.transaction_status == TransactionStatus.IDLE
    assert await rows(connection, TENANT) == [("acme",)]


async def test_a_connection_that_is_lost_is_told(connection: Connection) -> None:
    """As an error of the driver, and the connection is closed."""
    ending = "SELECT pg_terminate_backend(pg_backend_pid()) FROM (SELECT %(nth)s) AS n"
    with pytest.raises(psycopg.OperationalError):
        await rows(connection, ending, nth=1)
    assert connection.closed


async def test_the_statements_of_a_connection_are_bounded(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ones are forgotten, by the server too, and prepared again if they are wanted again."""
    monkeypatch.setattr(together, "PREPARED_MAX", 5)
    for _ in range(2):
        for nth in range(12):
            assert await rows(connection, f"SELECT {nth} + %(one)s::int", one=1) == [(nth + 1,)]
            assert await prepared(connection) <= 7  # and the two of a call, before the next one
    assert await prepared(connection) >= 5


async def roll_back(connection: Connection) -> None:
    """Has the driver drop all that is prepared, ours included, as it does at a rollback once it has prepared something itself."""
    await connection.execute("SELECT 1")
    async with connection.transaction(force_rollback=True):
        await connection.execute("SELECT 1")
    assert await prepared(connection) == 0


async def test_what_a_rollback_has_dropped_is_prepared_again(connection: Connection) -> None:
    """The caller notices nothing, whether its own query is new or known, and the tenant goes with the transaction as ever."""
    for query in ("SELECT 1, current_setting('app.tenant')", "SELECT 2, current_setting('app.tenant')"):
        for _ in range(2):
            assert (await rows(connection, query))[0][1] == "acme"
            await roll_back(connection)
    assert await rows_of_last(connection, (TENANT, {})) == [("",)]
    assert connection.info.transaction_status == TransactionStatus.IDLE


async def test_a_statement_prepared_before_one_that_a_rollback_has_dropped_is_not_left_behind(connection: Connection) -> None:
    """The server keeps no statement that will not be executed again."""
    await rows(connection, TENANT)
    await roll_back(connection)
    assert await rows_of_last(connection, ("SELECT 1", {}), (TENANT, {})) == [("",)]
    assert await prepared(connection) == 2


async def test_the_oldest_statements_may_be_gone_when_they_are_forgotten(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback has dropped them before; what follows is answered."""
    for nth in range(8):
        await rows(connection, f"SELECT {nth}")
    await roll_back(connection)
    monkeypatch.setattr(together, "PREPARED_MAX", 5)
    assert await rows(connection, "SELECT 7") == [(7,)]
    assert await prepared(connection) == 2


@pytest.mark.parametrize("pooler", [False, True])
async def test_a_value_that_cannot_be_sent_is_told_as_such(connection: Connection, pooler: bool) -> None:
    """As the driver's DataError, which is no failure of the database; nothing was sent, and the connection serves on."""
    if pooler:
        connection.prepare_threshold = None
    text = "SELECT %(a)s::text"
    for _ in range(2):
        with pytest.raises(psycopg.DataError):
            await rows(connection, text, a="\0")
        assert connection.info.transaction_status == TransactionStatus.IDLE
        assert await rows_of_last(connection, (TENANT, {})) != [("acme",)]
        assert await rows(connection, text, a="x") == [("x",)]


async def test_a_connection_that_was_closed_is_forgotten(read_db: Database) -> None:
    """A pool replaces its connections for ever; what was known of one goes with it."""
    assert read_db.query is not None
    made = await connect(read_db.query, application_name="test-together")
    assert await rows(made, TENANT) == [("acme",)]
    await made.close()
    closed = ref(made)
    del made
    gc.collect()
    assert closed() is None


async def test_nothing_is_prepared_where_a_pooler_may_be_in_between(connection: Connection) -> None:
    """The driver takes over there, with the same rows."""
    connection.prepare_threshold = None
    assert await rows(connection, "SELECT %(a)s::text, current_setting('app.tenant')", a="x") == [("x", "acme")]
    assert await rows_of_last(connection, (TENANT, {})) == [("",)]
    assert await prepared(connection) == 0
