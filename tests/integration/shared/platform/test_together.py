"""Statements that are sent together: one transaction, whatever becomes of it, on connections that are used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

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


async def test_nothing_is_prepared_where_a_pooler_may_be_in_between(connection: Connection) -> None:
    """The driver takes over there, with the same rows."""
    connection.prepare_threshold = None
    assert await rows(connection, "SELECT %(a)s::text, current_setting('app.tenant')", a="x") == [("x", "acme")]
    assert await rows_of_last(connection, (TENANT, {})) == [("",)]
    assert await prepared(connection) == 0
