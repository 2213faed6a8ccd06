"""A projector of accounts with its rebuilder, over a line in memory and a real PostgreSQL, and its operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from deploy.bootstrap import Database
from shared.folds.errors import NotFound
from shared.folds.projection import Group
from shared.line.fanout import FanOut
from shared.line.follower import Follower
from shared.platform.postgres import Reads, connect
from shared.projections.groups import GroupProjector
from shared.projections.rebuild_admin import RebuildAdmin, RebuildRow
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD
from tests.support.system.waiting import eventually

ALICE = uid(1)
NAMES = [projection.table.name for projection in ACCOUNT_TABLES.projections]
FILL_S = 40
"""A busy machine may take long to fill, compare and switch."""


def bank(accounts: int = 40) -> Store:
    """Accounts with a deposit each."""
    store = Store()
    store.person("acme", ALICE, "Alice")
    for number in range(accounts):
        store.account("acme", uid(100 + number), ALICE)
        store.deposit("acme", uid(100 + number), ALICE, 5, 5)
    return store


def made(database: Database, store: Store, group: Group = ACCOUNT_TABLES) -> GroupProjector:
    """The projector of accounts, as the service makes it, but for where its events come from."""

    def follower() -> Follower:
        return Follower(StoreLine(store), None, batch_max=20, silence_s=0.005)

    fan_out = FanOut(follower().follow, lambda: follower().follow)
    return GroupProjector(group, SHARD, fan_out.follow, lambda: connect(database.app, application_name="projector"))


@asynccontextmanager
async def running(projector: GroupProjector) -> AsyncIterator[GroupProjector]:
    """The projector at work."""
    task = asyncio.create_task(projector.run())
    try:
        yield projector
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def operator(database: Database) -> AsyncIterator[RebuildAdmin]:
    """What an operator asks with."""
    assert database.query
    reads = Reads(database.query, application_name="operator")
    await reads.open()
    yield RebuildAdmin(reads, SHARD, ("accounts", "people"))
    await reads.close()


async def start(admin: RebuildAdmin, *, only_if_same: bool = False) -> RebuildRow:
    """Asks for a rebuild of accounts."""
    return await admin.start("accounts", only_if_same=only_if_same, user_id="olga")


async def at_end(database: Database, store: Store) -> None:
    """Waits until the tables that serve hold the line."""
    await eventually(lambda: serving(database)[1] == len(store.events), FILL_S)


def serving(database: Database) -> tuple[str, int]:
    """Name and position of the checkpoint that serves."""
    with psycopg.connect(database.app) as connection:
        row = connection.execute("SELECT name, position FROM checkpoints WHERE group_name = 'accounts' AND serves").fetchone()
        return row or ("", 0)


def state(admin: RebuildAdmin, wanted: str) -> Callable[[], Any]:
    """Whether the rebuild of accounts is in a state."""

    async def check() -> bool:
        try:
            return (await admin.get("accounts")).state == wanted
        except NotFound:
            return wanted == ""

    return check


def shape(database: Database) -> list[Any]:
    """Tables, indexes with their definitions and options, policies and grants of the read database."""
    with psycopg.connect(database.owner) as owner:
        return [
            owner.execute(query).fetchall()
            for query in (
                "SELECT relname, relkind, reloptions, relrowsecurity, relforcerowsecurity, relacl::text FROM pg_class"
                " WHERE relnamespace = 'public'::regnamespace ORDER BY 1",
                "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
                "SELECT tablename, policyname, roles, cmd, qual, with_check FROM pg_policies ORDER BY 1, 2",
                "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace"
                " ORDER BY 1, 2",
            )
        ]
