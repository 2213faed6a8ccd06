"""A projector of accounts with its rebuilder, over a line in memory and a real PostgreSQL, and its operator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, MOVEMENTS, AccountRow, opened
from shared.folds.errors import NotFound
from shared.folds.projection import Group
from shared.line.fanout import FanOut
from shared.line.follower import Follower
from shared.platform.postgres import Connection, Reads, connect
from shared.projections.groups import GroupProjector
from shared.projections.rebuild_admin import RebuildAdmin, RebuildRow
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD, folding
from tests.support.system.waiting import eventually
from tests.support.system.working import running

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


def release(version: int) -> Group:
    """Accounts whose names say the version by which they were opened."""

    def named(row: AccountRow | None, event: account_pb2.AccountOpened, envelope: EventEnvelope) -> AccountRow:
        return opened(row, event, envelope)._replace(name=f"{event.name} {version}")

    return Group("accounts", (folding(ACCOUNTS, account_pb2.AccountOpened, named), MOVEMENTS), version=version)


def made(database: Database, store: Store, group: Group = ACCOUNT_TABLES) -> GroupProjector:
    """The projector of accounts, as the service makes it, but for where its events come from."""
    return projecting(lambda: connect(database.app, application_name="projector"), store, group)


def projecting(connect: Callable[[], Awaitable[Connection]], store: Store, group: Group = ACCOUNT_TABLES) -> GroupProjector:
    """The same with connections of the caller's. Its batches are of 20 events."""

    def follower() -> Follower:
        return Follower(StoreLine(store), None, batch_max=20, silence_s=0.005)

    fan_out = FanOut(follower().follow, lambda: follower().follow)
    return GroupProjector(group, SHARD, fan_out.follow, connect)


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


def patient(database: Database) -> None:
    """Lets the functions of rebuilds wait for locks as long as a busy machine takes."""
    with psycopg.connect(database.owner, autocommit=True) as owner:
        for name in ("switch_rebuild", "steer_rebuild", "end_rebuild"):
            owner.execute(f"ALTER FUNCTION {name} SET lock_timeout = '60s'")


async def unhurried(url: str, name: str) -> Connection:
    """A connection whose transactions may last as long as a busy machine takes."""
    connection = await connect(url, application_name=name)
    for limit in ("transaction_timeout", "idle_in_transaction_session_timeout"):
        await connection.execute(f"SET {limit} = 0")
    return connection


def waits(database: Database, count: int) -> Callable[[], bool]:
    """Whether so many sessions of the database wait for a lock."""

    def check() -> bool:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        with psycopg.connect(database.admin) as admin:
            return admin.execute(asked, (database.name,)).fetchone() == (count,)

    return check


async def compared(database: Database, store: Store, admin: RebuildAdmin, group: Group = ACCOUNT_TABLES) -> int:
    """A rebuild that is ready to switch, while nobody leads; returns its version.

    From then on the functions of rebuilds are `patient`.
    """
    assert database.query
    unlimited = "-c transaction_timeout=0 -c idle_in_transaction_session_timeout=0"
    with psycopg.connect(database.query, options=unlimited) as query:
        async with running(made(database, store, group)):
            await at_end(database, store)
            query.execute("SELECT count(*) FROM accounts")  # holds the switch up
            version = (await start(admin)).version

            async def ready() -> bool:
                return (await admin.get("accounts")).rows_differing == 0

            await eventually(ready, FILL_S)

        def alone() -> bool:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'projector'"
            with psycopg.connect(database.admin) as it:
                return it.execute(asked, (database.name,)).fetchone() == (0,)

        await eventually(alone)
    patient(database)
    return version
