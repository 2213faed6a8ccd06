"""The embedded engines and the bootstrap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nats
import psycopg
import pytest

from deploy.bootstrap import Database, bootstrap, bootstrap_with_files, drop, with_database
from deploy.bootstrap import main as bootstrap_program
from deploy.engines.child import NotStarted, free_port
from deploy.engines.nats import Nats
from deploy.engines.postgres import Postgres
from deploy.local.dev import Machine
from shared.platform import versions
from shared.platform.migrate import SchemaTooNew
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%CREATE TABLE%'"
TABLES = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"


def one(url: str, statement: str) -> object:
    """The first column of the first row."""
    with psycopg.connect(url) as connection:
        row = connection.execute(statement.encode()).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture
def prefix(engines: Engines) -> Iterator[str]:
    """A prefix for databases and roles of one test's own."""
    yield "trial"
    drop(engines.admin_url, "trial")


def test_committed_rows_survive_a_kill_and_a_stop(private_engines: Engines) -> None:
    """After kill -9 and after a stop, PostgreSQL comes back at the same URL with what was committed."""
    postgres = private_engines.postgres
    url = postgres.url
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (value integer)")
        connection.execute("INSERT INTO kept VALUES (7)")
    for end in (postgres.kill, postgres.stop):
        end()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=2)
        assert postgres.start() == url
        assert one(url, "SELECT value FROM kept") == 7


async def test_stored_messages_survive_a_kill_and_a_stop(nats_server: Nats) -> None:
    """After kill -9 and after a stop, NATS comes back at the same URL with its streams."""
    url = nats_server.url
    client = await nats.connect(url)
    await client.jetstream().add_stream(name="KEPT", subjects=["kept.>"])
    await client.jetstream().publish("kept.one", b"1")
    await client.close()
    for end in (nats_server.kill, nats_server.stop):
        end()
        assert not nats_server.running
        assert nats_server.start() == url
        client = await nats.connect(url)
        assert (await client.jetstream().stream_info("KEPT")).state.messages == 1
        await client.close()


def test_commits_are_durable_in_tests_too(engines: Engines) -> None:
    """Tests run with the durability of production, else they would prove nothing about it."""
    assert one(engines.admin_url, "SHOW fsync") == "on"
    assert one(engines.admin_url, "SHOW synchronous_commit") == "on"


def test_a_clone_has_the_tables_and_nobody_elses_roles_get_in(engines: Engines, write_db: Database, read_db: Database) -> None:
    """A clone is like the real database: migrated, and closed to the other service's roles."""
    assert one(write_db.owner, TABLES) == one(engines.templates.write.owner, TABLES) != 0
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(with_database(read_db.app, write_db.name))


def test_the_application_can_make_nothing_and_does_not_idle_in_a_transaction(
    write_db: Database, read_db: Database, saga_db: Database
) -> None:
    """Application roles cannot create tables, and their forgotten transactions end after 3 s."""
    for database in (write_db, read_db, saga_db):
        assert one(database.app, "SHOW idle_in_transaction_session_timeout") == "3s"
        with psycopg.connect(database.app) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("CREATE TABLE mine (value integer)")


def test_a_bootstrap_repeated_with_its_passwords_changes_nothing(engines: Engines, prefix: str) -> None:
    """`foldline dev` runs it at every start: URLs stay, data stay."""
    first = bootstrap(engines.admin_url, prefix)
    with psycopg.connect(first.write.owner, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (value integer)")
    assert bootstrap(engines.admin_url, prefix, passwords=first.passwords) == first
    assert one(first.write.owner, "SELECT count(*) FROM kept") == 0


def test_two_bootstraps_at_once_do_no_harm(engines: Engines, prefix: str) -> None:
    """Two replicas of a deployment job give the same databases, with the passwords that both were given."""
    names = ("write_owner", "write_app", "read_owner", "read_app", "read_query", "saga_owner", "saga_app")
    passwords = {f"{prefix}_{name}": "x" * 16 for name in names}
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda _: bootstrap(engines.admin_url, prefix, passwords=passwords), range(2)))
    assert made[0] == made[1]
    assert one(made[0].write.app, "SELECT current_user") == "trial_write_app"


def test_urls_in_files_stay_as_they_are(engines: Engines, prefix: str, tmp_path: Path) -> None:
    """A second run changes nothing; a password from elsewhere is taken; the files are their owner's alone."""
    made = with_database(engines.admin_url, f"{prefix}_read", user=f"{prefix}_read_query", password="made elsewhere")
    (tmp_path / "read_query").write_text(made + "\n")
    first = bootstrap_with_files(engines.admin_url, tmp_path, prefix)
    content = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(content) == {
        "write_owner", "write_app", "read_owner", "read_app", "read_query", "saga_owner", "saga_app",
    }  # fmt: skip
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir() if file.name != "read_query"} == {0o400}
    assert bootstrap_with_files(engines.admin_url, tmp_path, prefix) == first
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == content
    assert one(content["read_query"].strip(), "SELECT current_user") == f"{prefix}_read_query"
    assert one(content["write_app"].strip(), "SELECT current_user") == f"{prefix}_write_app"


def test_two_bootstraps_at_once_leave_files_that_open_the_databases(engines: Engines, prefix: str, tmp_path: Path) -> None:
    """Each would make passwords of its own: the later one must find the files of the earlier."""
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: bootstrap_with_files(engines.admin_url, tmp_path, prefix), range(3)))
    for file in tmp_path.iterdir():
        assert one(file.read_text().strip(), "SELECT current_user") == f"{prefix}_{file.name}"


def test_a_file_of_another_role_is_refused_before_anything_is_made(engines: Engines, prefix: str, tmp_path: Path) -> None:
    """A mix-up of secrets must not give one service the rights of another."""
    (tmp_path / "write_app").write_text(f"postgresql://{prefix}_read_app:x@127.0.0.1/{prefix}_write\n")
    with pytest.raises(ValueError, match=f"holds no URL with the user {prefix}_write_app"):
        bootstrap_with_files(engines.admin_url, tmp_path, prefix)
    assert one(engines.admin_url, f"SELECT count(*) FROM pg_database WHERE datname LIKE '{prefix}%'") == 0


def test_a_server_that_is_too_old_is_refused_before_anything_is_made(
    engines: Engines, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that names it, and exit code 2."""
    monkeypatch.setattr(versions, "POSTGRES_MIN", 99)
    monkeypatch.setattr(sys, "argv", ["bootstrap", prefix])
    monkeypatch.setenv("DATABASE_URL", engines.admin_url)
    assert bootstrap_program() == 2
    assert re.fullmatch(r"POSTGRES_TOO_OLD: this is PostgreSQL \d+, and 99 or newer is needed\n", capsys.readouterr().err)
    assert one(engines.admin_url, f"SELECT count(*) FROM pg_database WHERE datname LIKE '{prefix}%'") == 0


def test_a_schema_of_a_newer_release_is_refused_and_left_as_it_is(
    engines: Engines, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older release's bootstrap, run by mistake: one sentence and exit code 2. The newer release's passwords stay."""
    made = bootstrap(engines.admin_url, prefix)
    with psycopg.connect(made.read.owner) as read:
        read.execute("UPDATE alembic_version SET version_num = '9999'")
    monkeypatch.setattr(sys, "argv", ["bootstrap", prefix])
    monkeypatch.setenv("DATABASE_URL", engines.admin_url)
    assert bootstrap_program() == 2
    assert re.fullmatch(r"SCHEMA_TOO_NEW: the database is at revision 9999, which this .+\n", capsys.readouterr().err)
    assert one(made.read.admin, "SELECT version_num FROM alembic_version") == "9999"
    assert one(made.write.app, "SELECT 1") == one(made.read.app, "SELECT 1") == 1


async def test_a_schema_of_a_newer_release_is_one_sentence_of_foldline_dev(
    engines: Engines, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not start, and says why."""
    made = bootstrap(engines.admin_url, prefix)
    with psycopg.connect(made.saga.owner) as saga:
        saga.execute("UPDATE alembic_version SET version_num = '9999'")
    monkeypatch.setenv("DATABASE_URL", engines.admin_url)
    monkeypatch.setenv("NATS_URL", engines.nats_url)
    machine = Machine(tmp_path, prefix=prefix)
    try:
        with pytest.raises(NotStarted, match="SCHEMA_TOO_NEW"):
            await machine.start()
    finally:
        await machine.stop()


def test_a_bootstrap_that_is_ended_in_the_midst_of_a_migration_can_be_repeated(engines: Engines, prefix: str) -> None:
    """SIGTERM while the first migration runs: it leaves nothing half done, and holds no lock."""
    owner = bootstrap(engines.admin_url, prefix).write.owner
    with psycopg.connect(owner, autocommit=True) as write:
        write.execute("DROP SCHEMA public CASCADE")
        write.execute("CREATE SCHEMA public")
    environment = os.environ | {"DATABASE_URL": engines.admin_url}
    with psycopg.connect(owner) as holder:  # the migration's table cannot be made until this ends
        holder.execute("CREATE TABLE events (a int)")
        process = subprocess.Popen([sys.executable, "-m", "deploy.bootstrap", prefix], env=environment, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while one(engines.admin_url, BLOCKED) == 0 and time.monotonic() < until:
                time.sleep(0.02)
            assert one(engines.admin_url, BLOCKED) == 1
        finally:
            process.terminate()
        assert process.wait(30) == -signal.SIGTERM
        holder.rollback()
    assert one(bootstrap(engines.admin_url, prefix).write.app, TABLES) != 0


def test_an_administrator_need_not_be_superuser(engines: Engines, prefix: str) -> None:
    """CREATEDB and CREATEROLE are enough, as managed servers give them."""
    with psycopg.connect(engines.admin_url, autocommit=True) as admin:
        admin.execute("CREATE ROLE manager LOGIN CREATEDB CREATEROLE PASSWORD 'secret'")
    try:
        url = with_database(engines.admin_url, "postgres", user="manager", password="secret")
        made = bootstrap(url, prefix)
        assert one(made.write.app, TABLES) != 0
        with psycopg.connect(made.saga.owner) as saga:
            saga.execute("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(SchemaTooNew):
            bootstrap(url, prefix)
        assert one(made.write.app, "SELECT 1") == 1  # its password was not changed
    finally:
        drop(engines.admin_url, prefix)
        with psycopg.connect(engines.admin_url, autocommit=True) as admin:
            admin.execute("DROP ROLE manager")


def test_an_administrator_who_may_not_make_roles_is_told_so(
    engines: Engines, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence; nothing is made."""
    with psycopg.connect(engines.admin_url, autocommit=True) as admin:
        admin.execute("CREATE ROLE nobody LOGIN PASSWORD 'secret'")
    try:
        url = with_database(engines.admin_url, "postgres", user="nobody", password="secret")
        monkeypatch.setattr(sys, "argv", ["bootstrap", prefix])
        monkeypatch.setenv("DATABASE_URL", url)
        assert bootstrap_program() == 1
        assert capsys.readouterr().err.startswith("the database server cannot be used: permission denied to create role")
        assert one(engines.admin_url, f"SELECT count(*) FROM pg_roles WHERE rolname LIKE '{prefix}%'") == 0
    finally:
        with psycopg.connect(engines.admin_url, autocommit=True) as admin:
            admin.execute("DROP ROLE nobody")


def test_a_stale_pid_file_does_not_block_a_start(private_engines: Engines) -> None:
    """A pid file left by a crash may name a program that has nothing to do with PostgreSQL."""
    postgres = private_engines.postgres
    postgres.kill()
    status = postgres._cluster / "postmaster.pid"
    lines = status.read_text().splitlines()
    status.write_text("\n".join(["1", *lines[1:]]))
    postgres.start()
    assert one(postgres.url, "SELECT 1") == 1


async def test_eventually_fails_with_the_last_answer() -> None:
    """A condition that never comes true fails the test and says what it last was."""
    with pytest.raises(AssertionError, match=r"not within 0.05 s, the last answer was \[\]"):
        await eventually(list, 0.05)


def test_a_chosen_port_is_kept(tmp_path: Path) -> None:
    """A port given by the caller is the port of the URL."""
    port = free_port()
    server = Nats(tmp_path, port=port)
    try:
        assert server.start().endswith(f":{port}")
    finally:
        server.destroy()


def test_no_port_is_given_to_two_processes() -> None:
    """Each process has blocks of its own, though its servers do not listen yet; who comes when all are taken is told so."""
    program = (
        "import sys; from deploy.engines import child; child.PORTS, child.BLOCK = range(14700, 14800), 50\n"
        "try: print(*(child.free_port() for _ in range(40)), flush=True)\n"
        "except child.NotStarted as error: print(error, flush=True)\n"
        "sys.stdin.read()"
    )
    with contextlib.ExitStack() as running:
        said = []
        for _ in range(3):
            process = running.enter_context(
                subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdout is not None
            said.append(process.stdout.readline())
    assert said[2] == "found no free port between 14700 and 14800\n"
    first, second = ({int(port) for port in line.split()} for line in said[:2])
    assert first.isdisjoint(second)
    assert all(14700 <= port < 14800 for port in first | second)


@pytest.mark.parametrize("prefix", ["", "Foldline", "a-b", 'a"; drop', "9lives", "x" * 41])
def test_a_prefix_that_is_no_plain_name_is_refused(prefix: str) -> None:
    """It becomes part of the names of databases and roles, in migrations too."""
    with pytest.raises(ValueError, match="prefix"):
        bootstrap("postgresql://nowhere", prefix)


async def test_the_bootstrap_waits_for_a_server_that_starts_later(tmp_path: Path) -> None:
    """With --wait it asks until the server answers; without one it ends with code 1 when the time is over."""
    server = Postgres(tmp_path / "postgres", port=free_port(), sync_new=False)
    server.start()
    url = server.url
    server.stop()
    program = [sys.executable, "-m", "deploy.bootstrap", "trial"]
    environment = {**os.environ, "DATABASE_URL": url}
    at_once = await asyncio.create_subprocess_exec(*program, "--wait", "0.5", env=environment, stderr=subprocess.PIPE)
    assert b"cannot be used" in (await at_once.communicate())[1]
    assert at_once.returncode == 1
    patient = await asyncio.create_subprocess_exec(*program, "--wait", "120", env=environment, stdout=subprocess.PIPE)
    try:
        server.start()
        await patient.communicate()
        assert patient.returncode == 0
        assert one(with_database(url, "trial_write"), TABLES) != 0
    finally:
        if patient.returncode is None:
            patient.kill()
        server.destroy()
