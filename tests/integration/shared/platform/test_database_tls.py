"""PostgreSQL over TLS: `sslmode=verify-full` in a URL reaches the server that was meant, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from deploy.bootstrap import bootstrap, drop
from shared.platform.postgres import Reads, connect, describe
from tests.support.system.authority import Authority
from tests.support.system.engines import Engines
from tests.support.system.tls_engines import TlsPostgres, has_tls_postgres
from tests.support.system.waiting import eventually

YEAR = timedelta(days=365)

pytestmark = pytest.mark.skipif(not has_tls_postgres(), reason=f"no wheel of a PostgreSQL with TLS for {sys.platform}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsPostgres]:
    """A PostgreSQL over TLS for the tests of this module; each puts its certificate right again."""
    folder = tmp_path_factory.mktemp("tls")
    server = TlsPostgres(folder / "postgres", Authority(folder))
    try:
        server.start()
        yield server
    finally:
        server.destroy()


async def trouble(url: str) -> str:
    """What is told of a database that is not reached; empty if it is."""
    try:
        await (await connect(url, application_name="test")).close()
    except psycopg.OperationalError as error:
        return describe(error)
    return ""


async def test_databases_are_made_and_read_over_tls(server: TlsPostgres) -> None:
    """The URLs that the bootstrap makes have the parameters of the administrator's, and each connection is encrypted."""
    databases = bootstrap(server.verified(server.authority.ca), "over_tls")
    try:
        assert urlsplit(databases.write.app).query == urlsplit(server.verified(server.authority.ca)).query
        reads = Reads(databases.write.app, application_name="test")
        await reads.open()
        try:
            async with reads.connection() as connection:
                cursor = await connection.execute("SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                assert await cursor.fetchone() == (True, "TLSv1.3")
        finally:
            await reads.close()
    finally:
        drop(server.url, "over_tls")


async def test_another_server_than_the_one_that_was_meant_is_not_spoken_to(
    server: TlsPostgres, tmp_path: Path, engines: Engines
) -> None:
    """A foreign authority, and a server without TLS, which would get the password."""
    assert "certificate verify failed" in await trouble(server.verified(Authority(tmp_path, "foreign").ca))
    plain = f"{engines.admin_url}?sslmode=verify-full&sslrootcert={server.authority.ca}"
    assert "server does not support SSL, but SSL was required" in await trouble(plain)


@pytest.mark.parametrize(
    ("host", "begins_in", "why"),
    [
        ("elsewhere", timedelta(days=-1), 'does not match host name "localhost"'),
        ("localhost", -YEAR, "certificate verify failed"),
        ("localhost", YEAR, "certificate verify failed"),
    ],
)
async def test_a_bad_certificate_is_told_and_a_renewed_one_is_taken(
    server: TlsPostgres, host: str, begins_in: timedelta, why: str
) -> None:
    """It is what the log says a process waits for; nobody has to restart it."""
    url = server.verified(server.authority.ca)

    async def told() -> bool:
        return why in await trouble(url)

    async def reached() -> bool:
        return await trouble(url) == ""

    server.renew(host, begins_in)
    try:
        await eventually(told, 10)
    finally:
        server.renew()
    await eventually(reached, 10)
