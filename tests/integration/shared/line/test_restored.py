"""A line that was restored, by a copy of its database: its epoch is another, by itself or at an operator's word."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from deploy.bootstrap import Database
from shared.line import event_store
from shared.line.event_store import Head
from tests.support.checks.history import check_line, connected, head_of
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import replica
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

BUS = build_registry()


@pytest.fixture
def copy(engines: Engines, write_db: Database) -> Iterator[str]:
    """The name for a copy of the database."""
    name = f"{write_db.name}_copy"
    yield name
    with psycopg.connect(engines.admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def owner_of(database: Database) -> str:
    """The role that owns it."""
    return urlsplit(database.owner).username or ""


def run(engines: Engines, statement: str, *names: str) -> None:
    """A statement of the administrator."""
    with psycopg.connect(engines.admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


async def test_a_copy_has_another_epoch_and_keeps_it(engines: Engines, write_db: Database, copy: str) -> None:
    """A logical restore: the old database is dropped, its copy takes its name. Nobody needs to say anything."""
    before = await head_of(write_db)
    run(engines, "CREATE DATABASE {} TEMPLATE {} OWNER {}", copy, write_db.name, owner_of(write_db))
    async with replica(write_db, BUS) as one:
        await one.ask(one.command(Add(counter_id="a", amount=1)))
        assert one.committer.epoch == before.epoch
    run(engines, "DROP DATABASE {} WITH (FORCE)", write_db.name)
    run(engines, "ALTER DATABASE {} RENAME TO {}", copy, write_db.name)
    run(engines, "GRANT CONNECT ON DATABASE {} TO PUBLIC", write_db.name)
    after = await head_of(write_db)
    assert after.position == before.position
    assert after.epoch != before.epoch
    assert (await head_of(write_db)).epoch == after.epoch


async def test_an_operator_says_that_it_was_restored(write_db: Database) -> None:
    """Once: who says it of an epoch that is gone changes nothing, and of two at once one is heard."""
    before = (await head_of(write_db)).epoch

    async def say() -> Head | None:
        async with connected(write_db.app) as connection:
            return await event_store.mark_restored(connection, before)

    said = [head for head in await asyncio.gather(say(), say()) if head is not None]
    assert [head.epoch for head in said] == [(await head_of(write_db)).epoch]
    assert said[0].epoch != before
    assert said[0].epoch.split("/")[1] == before.split("/")[1]
    assert await say() is None
    with psycopg.connect(write_db.app) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("UPDATE line SET epoch = gen_random_uuid()")


async def test_a_write_service_that_runs_on_takes_the_new_epoch_and_forgets_what_it_knew(write_db: Database) -> None:
    """Set back without a lost connection, which no append could notice, and marked: within a second it reads anew."""
    async with replica(write_db, BUS) as one:
        await one.ask(one.command(Add(counter_id="a", amount=10)))
        before = one.committer.epoch
        with psycopg.connect(write_db.owner, autocommit=True) as owner:
            owner.execute("ALTER TABLE events DISABLE TRIGGER USER")
            owner.execute("DELETE FROM events")
            owner.execute("DELETE FROM commands")
        async with connected(write_db.app) as connection:
            assert await event_store.mark_restored(connection, before)

        async def noticed() -> bool:
            [outcome] = await one.ask(one.command(Add(counter_id="b", amount=1)))
            assert outcome.status == "completed"
            return one.committer.epoch != before

        await eventually(noticed, 10)
        [outcome] = await one.ask(one.command(Add(counter_id="a", amount=1)))
        assert (outcome.status, outcome.version) == ("completed", 1)
    await check_line(write_db)
