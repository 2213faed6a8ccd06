"""The bench's bare loops write the rows that they claim, so its ceilings are honest. Nothing is timed here."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bank.v1 import account_pb2
from deploy.bootstrap import Database, Databases
from deploy.local.system import PROJECTOR, WRITE, System
from foldline.v1 import command_pb2
from tests.bench import echo, workload
from tests.bench.bare_catch_up import catch_up
from tests.bench.bare_write import BareWriter
from tests.bench.rows import _until
from tests.bench.stage import Stage, head, on_stage
from tests.bench.workload import Ids, Template
from tests.support.system.engines import Engines

ACCOUNTS = 20


@pytest.fixture
async def stage(engines: Engines, tmp_path: Path) -> AsyncIterator[Stage]:
    """The bench's own stage, on the engines of the tests."""
    async with on_stage(tmp_path, engines) as stage:
        yield stage


@pytest.fixture
async def system(stage: Stage) -> System:
    """A write service on which the workload's accounts are open."""
    system = await stage.system(WRITE)
    await stage.order(system, "set_up", accounts=ACCOUNTS)
    return system


def read(database: Database, query: str) -> list[dict[str, Any]]:
    """The rows of a query."""
    with psycopg.connect(database.admin) as connection:
        cursor = connection.execute(query.encode())
        assert cursor.description is not None  # a query
        names = [column.name for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def test_every_request_has_ids_of_its_own() -> None:
    """A filled template is a request whose command ids are UUIDs, none of them seen before."""
    items = [workload.batch_item(workload.deposit(account_id)) for account_id in workload.names("account", 5)]
    template, ids, seen = Template(command_pb2.SendBatchRequest(items=items)), Ids(), set()
    for _ in range(20):
        for item in command_pb2.SendBatchRequest.FromString(template.fill(ids)).items:
            deposit = account_pb2.DepositMoneyRequest()
            assert item.command.Unpack(deposit)
            seen.add(uuid.UUID(deposit.options.command_id))
    assert template.commands == 5
    assert len(seen) == 100


async def test_the_load_is_carried_out_as_it_is_counted(stage: Stage, system: System) -> None:
    """Each kind of load leaves one event for each command that the load generator says it sent; the echo answers both."""
    database = system.databases.write
    for kind, method in (("unary", workload.DEPOSIT), ("batch", workload.SEND_BATCH), ("stream", workload.SEND_STREAM)):
        before = await head(database)
        answer = await stage.order(system, kind, method=method, callers=2, accounts=ACCOUNTS, batch=10, seconds=0.1)
        assert answer["sent"] > 0, kind
        assert await head(database) - before == answer["sent"], kind
    for kind, method in (("unary", echo.UNARY), ("stream", echo.STREAM)):
        answer = await stage.order_echo(kind, method, callers=2, accounts=ACCOUNTS, seconds=0.1)
        assert answer["sent"] > 0, kind


async def test_the_bare_statements_leave_the_rows_of_the_service(stage: Stage, system: System, databases: Databases) -> None:
    """Same tables, same columns filled, same sizes: only ids, times, versions and positions are others."""
    await stage.order(system, "unary", method=workload.DEPOSIT, accounts=ACCOUNTS, seconds=0.1)
    writer = BareWriter(databases.write.owner)
    rows = list(writer.rows(ACCOUNTS, 8))
    writer.commit(rows[0])
    writer.append(rows[1:])
    writer.close()
    for table in ("events", "commands"):
        query = f"SELECT * FROM {table} WHERE type LIKE '%Deposit%' ORDER BY position LIMIT 8"
        theirs = read(system.databases.write, query)[0]
        ours = read(databases.write, query)
        assert [row["position"] for row in ours] == [1, 2, 3, 4, 5, 6, 7, 8]
        for row in ours:
            assert {name: type(value) for name, value in row.items()} == {name: type(value) for name, value in theirs.items()}
            for name, value in theirs.items():
                if isinstance(value, str | bytes):
                    assert len(row[name]) == len(value), name


async def test_the_bare_catch_up_leaves_the_tables_of_the_projector(stage: Stage, system: System, engines: Engines) -> None:
    """One line, two ways into the same tables: every row is the same."""
    order = {"callers": 2, "accounts": ACCOUNTS, "batch": 50, "seconds": 0.1}
    await stage.order(system, "batch", method=workload.SEND_BATCH, **order)
    end = await head(system.databases.write)
    bare, projected = engines.clone("read"), system.databases.read
    assert catch_up(system.databases.write.owner, bare.app)["done"] == end
    like = system.programs[PROJECTOR]
    system.add(replace(like, name="the projector"))
    system.start("the projector")
    async with await psycopg.AsyncConnection.connect(projected.admin, autocommit=True) as watch:
        assert await _until(watch, end) == end
    for table in ("people", "person_totals", "accounts", "movements"):
        rows = read(bare, f"SELECT * FROM {table} ORDER BY {table}")
        assert rows, table
        assert rows == read(projected, f"SELECT * FROM {table} ORDER BY {table}"), table
    engines.drop(bare)
