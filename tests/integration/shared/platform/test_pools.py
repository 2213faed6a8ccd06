"""The pool that reads go through: dead connections, locked tables, poolers in between."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg.errors import DivisionByZero, InFailedSqlTransaction

from deploy.bootstrap import Database
from shared.folds.errors import Unavailable
from shared.platform import postgres
from shared.platform.leader import LockClass, hold_lease
from shared.platform.metrics import Metrics
from shared.platform.packing import int4
from shared.platform.postgres import SETTINGS, Prepared, Reads, UnsafeDatabase, connect, one
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually

SIZE = 4


@asynccontextmanager
async def pool(url: str) -> AsyncIterator[Reads]:
    """A pool of SIZE connections."""
    reads = Reads(url, application_name="test-pool", size_max=SIZE)
    await reads.open()
    try:
        yield reads
    finally:
        await reads.close()


async def test_the_use_of_a_pool_is_told(write_db: Database) -> None:
    """Who holds a connection, who waits for one, and how many there may be."""
    metrics = Metrics("test")
    async with pool(write_db.app) as reads, contextlib.AsyncExitStack() as held:
        reads.measure(metrics)
        for _ in range(SIZE):
            await held.enter_async_context(reads.connection())
        waiting = asyncio.create_task(ask(reads))

        async def told() -> bool:
            _, page = await metrics.render()
            return {
                'db_client_connection_count{db_client_connection_pool_name="test-pool",db_client_connection_state="idle"} 0.0',
                'db_client_connection_count{db_client_connection_pool_name="test-pool",db_client_connection_state="used"} 4.0',
                'db_client_connection_max{db_client_connection_pool_name="test-pool"} 4.0',
                'db_client_connection_pending_requests{db_client_connection_pool_name="test-pool"} 1.0',
            } <= set(page.decode().splitlines())

        await eventually(told, 2, every_s=0.02)
        await held.aclose()
        await waiting


async def ask(reads: Reads, query: str = "SELECT pg_backend_pid()") -> object:
    """One query by itself."""
    async with reads.connection() as connection:
        cursor = await connection.execute(query)
        return await cursor.fetchone()


@pytest.mark.parametrize("turns", range(12))
async def test_who_is_cancelled_while_a_connection_is_lent_to_it_ends(write_db: Database, turns: int) -> None:
    """However many turns of the event loop lie between: a task that goes on for ever would keep its process from ending."""
    async with pool(write_db.app) as reads:
        for _ in range(5):
            async with contextlib.AsyncExitStack() as held:
                for _ in range(SIZE):
                    await held.enter_async_context(reads.connection())
                waiting = asyncio.create_task(for_ever(reads))
                await eventually(lambda: reads._pool.get_stats()["requests_waiting"] == 1)
                giving_back = asyncio.create_task(held.aclose())
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait_for(asyncio.wait({waiting}), 20)
                await giving_back


async def for_ever(reads: Reads) -> None:
    """Queries until cancelled, as work beside a service does."""
    while True:
        async with reads.connection():
            pass
        await asyncio.sleep(3600)


async def filled(reads: Reads) -> None:
    """Makes all connections of the pool, and gives them back."""
    ready = asyncio.Barrier(SIZE)

    async def hold() -> None:
        async with reads.connection():
            await ready.wait()

    await asyncio.gather(*(hold() for _ in range(SIZE)))


async def test_dead_connections_are_replaced_unseen(read_db: Database) -> None:
    """The server ended all of them: every query is answered, and none waits for a pause between dead ones."""
    assert read_db.query is not None
    async with pool(read_db.query) as reads:
        for _ in range(3):
            await filled(reads)
            with psycopg.connect(read_db.admin, autocommit=True) as admin:
                # Until they are gone: a query on one that is just being ended is told that the database is away.
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'test-pool'"
                )
            # The pauses were 1, 2 and 4 s, beyond the 3 s that a caller waits for a connection: then it was refused.
            await asyncio.gather(*(ask(reads) for _ in range(2 * SIZE)))


async def test_a_locked_table_holds_up_its_own_queries_alone(read_db: Database) -> None:
    """They are told DATABASE_BUSY, more of them than there are connections, while others are answered."""
    assert read_db.query is not None
    async with pool(read_db.query) as reads:
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("LOCK TABLE people")
            blocked = [asyncio.ensure_future(ask(reads, "SELECT count(*) FROM people")) for _ in range(2 * SIZE)]
            assert await ask(reads, "SELECT count(*) FROM accounts") == (0,)
            for outcome in await asyncio.gather(*blocked, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
                assert (outcome.reason, outcome.retry_after_s) == ("DATABASE_BUSY", 1.0)
        assert await ask(reads, "SELECT count(*) FROM people") == (0,)


async def test_a_database_that_is_there_and_all_connections_in_use(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said to be busy, not away."""
    monkeypatch.setattr(postgres, "CONNECT_TIMEOUT_S", 0.2)
    assert read_db.query is not None
    async with pool(read_db.query) as reads, contextlib.AsyncExitStack() as held:
        for _ in range(SIZE):
            await held.enter_async_context(reads.connection())
        with pytest.raises(Unavailable) as refused:
            await ask(reads)
        assert refused.value.reason == "DATABASE_BUSY"


async def test_a_database_that_is_not_there(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said to be away."""
    monkeypatch.setattr(postgres, "CONNECT_TIMEOUT_S", 0.2)
    async with pool("postgresql://nobody@127.0.0.1:1/nothing") as reads:
        began = time.monotonic()
        with pytest.raises(Unavailable) as refused:
            await ask(reads)
        assert refused.value.reason == "DATABASE_UNAVAILABLE"
        assert time.monotonic() - began < 3.0


@pytest.mark.parametrize("query", ["SELECT * FROM next_year", "SELECT next_year FROM people", "SELECT next_year(1)"])
async def test_what_a_newer_release_would_have_made_is_said_to_be_missing(read_db: Database, query: str) -> None:
    """A database whose bootstrap was not run is not away. What it lacks is in the log alone, and the pool serves all else."""
    async with pool(read_db.app) as reads:
        with capture_logs() as logs, pytest.raises(Unavailable) as refused:
            await ask(reads, query)
        assert (refused.value.reason, refused.value.retry_after_s) == ("SCHEMA_TOO_OLD", 1.0)
        assert "next_year" not in str(refused.value)
        assert ["next_year" in line["error"] for line in logs if line["event"] == "schema_too_old"] == [True]
        assert await ask(reads, "SELECT 1") == (1,)


async def test_a_plan_that_no_longer_fits_costs_one_answer(read_db: Database) -> None:
    """A table changed under a prepared statement: the connection is dropped, and the next query is answered."""
    async with pool(read_db.app) as reads:
        await ask(reads, "SELECT name FROM people")
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("ALTER TABLE people ALTER COLUMN name TYPE varchar(5000)")
        with pytest.raises(Unavailable):
            await ask(reads, "SELECT name FROM people")
        assert await ask(reads, "SELECT name FROM people") is None


# --- poolers ---


class Pooler:
    """Stands between, as PgBouncer does: refuses `options` at start-up, and gives out numbers of processes of its own."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        with contextlib.suppress(OSError, EOFError):
            start = await reader.read(65536)
            while start[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):  # asks for TLS or GSS
                writer.write(b"N")
                start = await reader.read(65536)
            assert b"\0options\0" not in start, "unsupported startup parameter: options"
            far_writer.write(start)

            async def up() -> None:
                while data := await reader.read(65536):
                    far_writer.write(data)
                far_writer.close()

            pumping = asyncio.create_task(up())
            while data := await far_reader.read(65536):
                place = data.find(b"K\x00\x00\x00\x0c")
                if place >= 0:
                    data = data[: place + 5] + b"\x00\x00\x00\x07" + data[place + 9 :]
                writer.write(data)
            pumping.cancel()
        writer.close()
        far_writer.close()


@asynccontextmanager
async def pooler(url: str) -> AsyncIterator[str]:
    """A pooler before the server; its URL."""
    it = Pooler(url)
    server = await asyncio.start_server(it._serve, "127.0.0.1", 0)
    parts = urlsplit(url)
    port = server.sockets[0].getsockname()[1]
    try:
        yield urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"))
    finally:
        server.close()


async def test_reads_go_through_a_pooler_with_their_settings(read_db: Database) -> None:
    """Nothing that a pooler refuses is asked for when connecting, and the settings hold all the same.

    No statement is prepared either: the next transaction may run on another connection of the pooler, which has none.
    """
    assert read_db.query is not None
    async with pooler(read_db.query) as url, pool(url) as reads:
        for name, value in SETTINGS.items():
            assert await ask(reads, f"SHOW {name}") == (value,)
        async with reads.connection() as connection:
            assert connection.prepare_threshold is None
    async with pool(read_db.query) as reads, reads.connection() as connection:
        assert connection.prepare_threshold == 0


def test_a_role_has_the_settings_whoever_connects(read_db: Database) -> None:
    """A pooler that hands out connections for a transaction may give one that was never told: the role has them."""
    for url in (read_db.query, read_db.app):
        assert url is not None
        with psycopg.connect(url) as connection:
            for name, value in SETTINGS.items():
                assert connection.execute(f"SHOW {name}").fetchone() == (value,)


async def test_a_lease_through_a_pooler_is_refused_by_name(read_db: Database) -> None:
    """Its lock would belong to whichever client the pooler gives the session next."""
    async with pooler(read_db.app) as url, asyncio.timeout(10):
        with pytest.raises(UnsafeDatabase, match="a pooler answered"):
            async with hold_lease(url, LockClass.PROJECTOR, 1):
                pass


async def test_a_direct_connection_is_no_pooler(read_db: Database) -> None:
    """The server names its process when it is connected to, and says the same when it is asked."""
    connection = await postgres.connect(read_db.app, application_name="test")
    async with connection:
        await postgres.refuse_pooler(connection)
        assert (await one(connection, "SELECT pg_backend_pid()")) == (connection.info.backend_pid,)


async def test_a_prepared_statement_goes_on_after_a_rollback(read_db: Database) -> None:
    """The driver drops all prepared statements then, ours too. Inside a failed transaction nothing is tried again."""
    statement = Prepared("SELECT %s + 5 %% 3")
    async with await connect(read_db.app, application_name="test") as connection:
        assert await statement.row(connection, [int4(1)]) == [(3).to_bytes(4, "big")]
        await connection.execute("BEGIN")
        await connection.execute("ROLLBACK")
        await connection.execute("SELECT 1")  # the driver drops them before its next statement
        assert await statement.row(connection, [int4(2)]) == [(4).to_bytes(4, "big")]
        await connection.execute("BEGIN")
        with pytest.raises(DivisionByZero):
            await connection.execute("SELECT 1 / 0")
        with pytest.raises(InFailedSqlTransaction):
            await statement.row(connection, [int4(3)])
        await connection.execute("ROLLBACK")
