"""Nobody writes past the append function, and no service starts where somebody could."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from deploy.bootstrap import Database, with_database
from deploy.engines.postgres import Postgres
from shared.commands.append import Batch, append
from shared.line.event_store import TABLES
from shared.platform import versions
from shared.platform.postgres import UnsafeDatabase, refuse_unsafe
from tests.integration.shared.commands.test_append import A, event, row
from tests.support.checks.history import connected
from tests.support.domains.trial import lone
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

CHANGES = {
    "insert": "INSERT INTO {0} SELECT * FROM {0}",
    "update": "UPDATE {0} SET {1} = {1}",
    "delete": "DELETE FROM {0}",
    "truncate": "TRUNCATE {0}",
    "lock": "LOCK TABLE {0} IN EXCLUSIVE MODE",
    "lock rows": "SELECT {1} FROM {0} FOR UPDATE",
    "drop": "DROP TABLE {0}",
    "disable triggers": "ALTER TABLE {0} DISABLE TRIGGER ALL",
}
COLUMNS = {
    "line": "shard",
    "events": "payload",
    "commands": "status",
    "snapshots": "state",
    "credentials": "password_hash",
    "boxes": "chain",
    "boxed_events": "event_id",
    "schedules": "cron",
    "tenant_purges": "stage",
    "purged_events": "event_id",
    "aggregate_purges": "stage",
}


@pytest.fixture
async def filled(write_db: Database) -> Database:
    """A database with a row in every table."""
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(commands=[row(A, last_event=1)], events=[event(A, 1)]))
    return write_db


def batch_of(commands: int) -> Batch:
    """The second event of an aggregate and its command, which `append_one` takes; `append_batch`, if there is another."""
    one = lone(A, 2)
    return one if commands == 1 else Batch(one.reads, [*one.commands, row(A)], one.events)


async def test_the_application_can_change_no_table(filled: Database) -> None:
    """Whatever it tries, it has no right to."""
    assert set(COLUMNS) == set(TABLES)
    async with connected(filled.app) as connection:
        for table, column in COLUMNS.items():
            for change in CHANGES.values():
                statement = sql.SQL(change).format(sql.Identifier(table), sql.Identifier(column))
                # The server looks at identity columns before it looks at rights.
                with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.GeneratedAlways)):
                    async with connection.transaction():
                        await connection.execute(statement)


async def test_the_application_can_make_nothing_that_stands_before_our_tables(filled: Database) -> None:
    """No table, no temporary one, no schema, no function: the names in the append function are ours."""
    async with connected(filled.app) as connection:
        for statement in (
            "CREATE TABLE mine (value integer)",
            "CREATE TEMPORARY TABLE events (value integer)",
            "CREATE SCHEMA mine",
            "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
            "CREATE OR REPLACE FUNCTION events_never_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "DROP FUNCTION append_batch",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await connection.execute(statement)


@pytest.mark.parametrize("commands", [1, 2], ids=["append_one", "append_batch"])
async def test_a_temporary_table_does_not_stand_before_ours(filled: Database, commands: int) -> None:
    """PostgreSQL looks among temporary tables first, unless told otherwise: an append into one would be lost."""
    with psycopg.connect(filled.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("GRANT TEMPORARY ON DATABASE {} TO PUBLIC").format(sql.Identifier(filled.name)))
    async with connected(filled.app) as connection:
        for table in ("line", "events", "commands", "snapshots"):
            name = sql.Identifier(table)
            await connection.execute(sql.SQL("CREATE TEMPORARY TABLE {0} (LIKE public.{0} INCLUDING ALL)").format(name))
        await append(connection, 1, batch_of(commands))
        cursor = await connection.execute("SELECT (SELECT count(*) FROM public.events), (SELECT count(*) FROM public.commands)")
        assert await cursor.fetchall() == [(2, 1 + commands)]


@pytest.mark.parametrize("commands", [1, 2], ids=["append_one", "append_batch"])
async def test_nothing_on_the_callers_search_path_stands_before_ours(filled: Database, commands: int) -> None:
    """The functions run with their owner's rights: what a caller made, and put first, is neither called nor written."""
    with psycopg.connect(filled.admin, autocommit=True) as admin:
        for statement in (
            "CREATE SCHEMA theirs",
            "CREATE TABLE theirs.calls (name text)",
            *(f"CREATE TABLE theirs.{table} (LIKE public.{table} INCLUDING ALL)" for table in TABLES),
            """CREATE FUNCTION theirs.told(name text) RETURNS void LANGUAGE sql AS
               'INSERT INTO theirs.calls VALUES (name)'""",
            """CREATE FUNCTION theirs.pg_advisory_xact_lock(integer, integer) RETURNS void LANGUAGE sql AS
               $$ SELECT theirs.told('pg_advisory_xact_lock') $$""",
            """CREATE FUNCTION theirs.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS
               $$ SELECT theirs.told('clock_timestamp'); SELECT timestamptz '2001-01-01 00:00Z' $$""",
            """CREATE FUNCTION theirs.plus(bigint, integer) RETURNS bigint LANGUAGE sql AS
               $$ SELECT theirs.told('+'); SELECT 1000::bigint $$""",
            "CREATE FUNCTION theirs.greater(bigint, bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 1000::bigint'",
            "CREATE AGGREGATE theirs.max(bigint) (SFUNC = theirs.greater, STYPE = bigint)",
            """CREATE FUNCTION theirs.later(timestamptz, timestamptz) RETURNS timestamptz LANGUAGE sql AS
               $$ SELECT timestamptz '2999-01-01 00:00Z' $$""",
            "CREATE AGGREGATE theirs.max(timestamptz) (SFUNC = theirs.later, STYPE = timestamptz)",
            "CREATE OPERATOR theirs.+ (LEFTARG = bigint, RIGHTARG = integer, FUNCTION = theirs.plus)",
            "GRANT ALL ON SCHEMA theirs TO PUBLIC",
            "GRANT ALL ON ALL TABLES IN SCHEMA theirs TO PUBLIC",
        ):
            admin.execute(statement.encode())
    async with connected(filled.app) as connection:
        await connection.execute("SET search_path = theirs, pg_catalog, public")
        # The control: whoever names no schema gets theirs.
        await connection.execute("SELECT clock_timestamp()")
        appended = await append(connection, 1, batch_of(commands))
        cursor = await connection.execute("SELECT name FROM theirs.calls")
        assert await cursor.fetchall() == [("clock_timestamp",)]
        cursor = await connection.execute("SELECT count(*) FROM theirs.events UNION ALL SELECT count(*) FROM theirs.commands")
        assert (appended.head, await cursor.fetchall()) == (2, [(0,), (0,)])
        assert appended.recorded_at < datetime.now(UTC) + timedelta(minutes=1)


async def test_the_application_may_read(filled: Database) -> None:
    """It reads what it decides on and checks passwords by; all writing is the function's."""
    async with connected(filled.app) as connection:
        for table in ("line", "events", "commands", "snapshots", "credentials"):
            await connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table)))


async def test_even_the_owner_cannot_change_an_event(filled: Database) -> None:
    """A trigger stands before it; the administrator meets it too. A statement that finds no row is refused as well."""
    for url in (filled.owner, filled.admin):
        async with connected(url) as connection:
            for change in (
                "UPDATE events SET payload = 'x'",
                "UPDATE events SET payload = 'x' WHERE false",
                "DELETE FROM events",
                "DELETE FROM events WHERE false",
                "TRUNCATE events",
            ):
                with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="events are never changed"):
                    await connection.execute(change.encode())


async def test_the_function_runs_for_its_roles_alone(engines: Engines, filled: Database) -> None:
    """The read service's role cannot append, even if it got into the database."""
    reader = engines.templates.read.app
    with psycopg.connect(filled.admin, autocommit=True) as admin:
        name = sql.Identifier(filled.name), sql.Identifier("foldline_read_app")
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(*name))
        admin.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(name[1]))
    async with connected(with_database(reader, filled.name)) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await append(connection, 1, Batch())


# What a service refuses to start on


async def test_the_role_of_the_bootstrap_is_safe(write_db: Database) -> None:
    """The application's role passes."""
    async with connected(write_db.app) as connection:
        await refuse_unsafe(connection, tables=TABLES)


async def test_the_owner_and_the_administrator_are_refused(write_db: Database) -> None:
    """A service that was given the wrong URL does not start."""
    for url in (write_db.owner, write_db.admin):
        async with connected(url) as connection:
            with pytest.raises(UnsafeDatabase):
                await refuse_unsafe(connection, tables=TABLES)


@contextmanager
def trial_role(database: Database, *grants: str) -> Iterator[str]:
    """The URL of a role that may connect, and whatever the administrator's `grants` let it do."""
    with psycopg.connect(database.admin, autocommit=True) as admin:
        admin.execute("CREATE ROLE trial_role LOGIN PASSWORD 'trial'")
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO trial_role").format(sql.Identifier(database.name)))
        admin.execute("GRANT USAGE ON SCHEMA public TO trial_role")
        try:
            for grant in grants:
                admin.execute(grant.encode())
            yield with_database(database.admin, database.name, user="trial_role", password="trial")
        finally:
            admin.execute("REASSIGN OWNED BY trial_role TO foldline_write_owner")
            admin.execute("DROP OWNED BY trial_role")
            admin.execute("DROP ROLE trial_role")
            admin.execute("REVOKE INSERT ON events FROM PUBLIC")


async def why_unsafe(url: str, tables: Sequence[str] = TABLES) -> str:
    """The reasons against starting a service with this URL; empty if there are none."""
    async with connected(url) as connection:
        try:
            await refuse_unsafe(connection, tables=tables)
        except UnsafeDatabase as unsafe:
            return str(unsafe)
    return ""


async def test_a_server_that_is_too_old_is_refused_by_name(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else could be said of it."""
    monkeypatch.setattr(versions, "POSTGRES_MIN", 99)
    assert re.fullmatch(r"POSTGRES_TOO_OLD: this is PostgreSQL \d+, and 99 or newer is needed", await why_unsafe(write_db.owner))


async def test_settings_with_which_a_commit_may_be_lost_are_refused(write_db: Database) -> None:
    """However they came about: here, they are the role's own. Other isolation would break the append's check."""
    setting = "ALTER ROLE trial_role SET {} = '{}'"
    for name, value in (
        ("synchronous_commit", "off"),
        ("synchronous_commit", "local"),
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_isolation", "repeatable read"),
    ):
        with trial_role(write_db, setting.format(name, value)) as url:
            assert f"{name}={value}" in await why_unsafe(url)
    for value in ("on", "remote_write", "remote_apply"):
        with trial_role(write_db, setting.format("synchronous_commit", value)) as url:
            assert await why_unsafe(url) == ""


async def test_a_server_that_may_lose_a_commit_is_refused(tmp_path: Path) -> None:
    """Whichever of both it leaves out, it is named."""
    server = Postgres(tmp_path / "postgres", settings={"fsync": "off"}, sync_new=False)
    server.start()
    try:
        assert "fsync=off, full_page_writes=on" in await why_unsafe(server.url, tables=())
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute("ALTER SYSTEM SET full_page_writes = off")
            admin.execute("SELECT pg_reload_conf()")

        async def reloaded() -> bool:
            return "full_page_writes=off" in await why_unsafe(server.url, tables=())

        await eventually(reloaded, 20)
    finally:
        server.destroy()


WAYS = {
    "insert": ["GRANT INSERT ON events TO trial_role"],
    "update": ["GRANT UPDATE ON commands TO trial_role"],
    "delete": ["GRANT DELETE ON snapshots TO trial_role"],
    "truncate": ["GRANT TRUNCATE ON credentials TO trial_role"],
    "update of one column": ["GRANT UPDATE (status) ON commands TO trial_role"],
    "insert of one column": ["GRANT INSERT (payload) ON events TO trial_role"],
    "everybody may": ["GRANT INSERT ON events TO PUBLIC"],
    "a predefined role": ["GRANT pg_write_all_data TO trial_role"],
    "may become a predefined role": ["GRANT pg_write_all_data TO trial_role WITH INHERIT FALSE, SET TRUE"],
    "member of the owner": ["GRANT foldline_write_owner TO trial_role"],
    "may become the owner": ["GRANT foldline_write_owner TO trial_role WITH INHERIT FALSE, SET TRUE"],
    "owner without rights, yet": ["ALTER TABLE events OWNER TO trial_role", "REVOKE ALL ON events FROM trial_role"],
    "bypasses row-level security": ["ALTER ROLE trial_role BYPASSRLS"],
    "creates roles": ["ALTER ROLE trial_role CREATEROLE"],
    "superuser": ["ALTER ROLE trial_role SUPERUSER"],
    "may become superuser": ["GRANT postgres TO trial_role WITH INHERIT FALSE, SET TRUE"],
}


async def test_a_role_that_could_write_past_the_function_is_refused(write_db: Database) -> None:
    """Whichever way the right came to it; reading and calling the function is no reason."""
    harmless = "GRANT SELECT ON events, commands TO trial_role", "GRANT EXECUTE ON FUNCTION append_batch TO trial_role"
    with trial_role(write_db, *harmless) as url:
        assert await why_unsafe(url) == ""
    for way, grants in WAYS.items():
        with trial_role(write_db, *grants) as url:
            assert await why_unsafe(url), way


async def test_the_reasons_name_the_tables(write_db: Database) -> None:
    """Whoever reads the message knows what to revoke."""
    with trial_role(write_db, "GRANT INSERT ON events, snapshots TO trial_role") as url:
        assert await why_unsafe(url) == "the role may write events, snapshots"


async def test_an_append_as_the_application_still_works_beside_all_this(filled: Database) -> None:
    """The control of this page: what is forbidden is not everything."""
    async with connected(filled.app) as connection:
        appended = await append(connection, 1, Batch(reads={A: 1}, events=[event(A, 2)]))
        assert appended.head == 2
