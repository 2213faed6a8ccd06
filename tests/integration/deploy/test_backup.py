"""The commands for backups that docs/operations.md gives, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import psycopg
import pytest

from deploy.bootstrap import Database
from deploy.engines.postgres import find_home
from tests.support.checks.history import check_line, events_of
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import replica
from tests.support.system.engines import Engines

BUS = build_registry()
SHELL = re.findall(r"^```bash\n(.*?)^```", Path("docs/operations.md").read_text(), re.MULTILINE | re.DOTALL)
[DUMPS] = [block.splitlines() for block in SHELL if block.startswith("pg_dump")]
[RESTORES] = [block.splitlines() for block in SHELL if block.startswith("pg_restore")]


def line_of(lines: list[str], service: str) -> str:
    """The command for one database."""
    [line] = [line for line in lines if f"{service}.dump" in line]
    return line


def run(line: str, engines: Engines, folder: Path, database: Database) -> None:
    """Runs it in a folder, on a database of the test's own in place of foldline_write."""
    line = line.replace("/foldline_write", f"/{database.name}")
    environment = {"ADMIN": engines.admin_url.rpartition("/")[0], "PATH": f"{find_home() / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["/bin/sh", "-c", line], cwd=folder, env=environment, check=True, timeout=60)


def test_the_order_is_that_no_consumer_is_newer_than_the_line() -> None:
    """Dumped last, restored first is the write database."""
    services = [re.findall(r"(\w+)\.dump", line)[0] for line in (*DUMPS, *RESTORES)]
    assert services == ["saga", "read", "write", "write", "read", "saga"]


async def test_a_restored_write_database_goes_on_where_it_was(engines: Engines, write_db: Database, tmp_path: Path) -> None:
    """Events, rights and roles are those of the backup; what came after it is gone, and the next command goes behind it."""
    async with replica(write_db, BUS) as one:
        await one.ask(*[one.command(Add(counter_id="a", amount=1)) for _ in range(3)])
        run(line_of(DUMPS, "write"), engines, tmp_path, write_db)
        await one.ask(one.command(Add(counter_id="a", amount=1)))
    before = (await events_of(write_db))[:3]
    run(line_of(RESTORES, "write"), engines, tmp_path, write_db)
    assert await events_of(write_db) == before
    with psycopg.connect(write_db.app) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("DELETE FROM events")
    async with replica(write_db, BUS) as one:
        [outcome] = await one.ask(one.command(Add(counter_id="a", amount=1)))
    assert (outcome.status, outcome.version, outcome.head) == ("completed", 4, 4)
    await check_line(write_db)
