"""Rebuilds on a real PostgreSQL: filled beside what serves, compared, switched, cut off anywhere, cancelled without a trace."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import psycopg
import pytest

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, MOVEMENTS, AccountRow, opened
from shared.folds.errors import NotFound, Refusal, Rejected
from shared.folds.projection import Group
from shared.line import checkpoint
from shared.line.checkpoint import Fenced
from shared.line.fanout import FanOut
from shared.line.follower import Follower
from shared.platform.postgres import Reads, connect
from shared.projections import changes, rebuild
from shared.projections.groups import GroupProjector
from shared.projections.rebuild_admin import RebuildAdmin, RebuildRow
from shared.projections.tables import Tables
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD, dump, folded, folding
from tests.support.system.waiting import eventually

ALICE = uid(1)
ONE_TOO_MANY = """
INSERT INTO accounts SELECT tenant, 'x', owner_id, name, currency, 1, status, opened_at, 1 FROM accounts LIMIT 1
"""
LOST = "INSERT INTO checkpoints (name, shard, state, reason) VALUES ('accounts', 1, 'stopped', 'HISTORY_DIVERGED: x')"
NAMES = [projection.table.name for projection in ACCOUNT_TABLES.projections]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps follow each other without long pauses."""
    monkeypatch.setattr(rebuild, "LOOK_S", 0.01)
    monkeypatch.setattr(rebuild, "STEP_S", 0.005)


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
    await eventually(lambda: serving(database)[1] == len(store.events), 20)


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


async def test_queries_are_answered_all_the_while_and_never_from_an_earlier_place(read_db: Database) -> None:
    """Under load: no error, no older balance than before; in the end the new tables serve, and are the fold of the line."""
    store = bank()
    before = shape(read_db)
    assert read_db.query
    reads = Reads(read_db.query, application_name="queries")
    await reads.open()
    answers: list[tuple[int, int]] = []
    slowest = 0.0
    done = False

    async def ask() -> None:
        """One after another, so that each answer is from a later moment than the one before."""
        nonlocal slowest
        seen = 0
        while not done:
            began = time.monotonic()
            async with reads.connection() as connection, connection.transaction():
                await connection.execute("SELECT set_config('app.tenant', 'acme', true)")
                cursor = await connection.execute(
                    "SELECT balance_minor, version FROM accounts WHERE account_id = %s", (uid(100),)
                )
                [(balance, version)] = await cursor.fetchall()
            assert version >= seen
            seen = version
            answers.append((balance, version))
            slowest = max(slowest, time.monotonic() - began)

    async def load() -> None:
        number = 5
        while not done:
            number += 1
            store.deposit("acme", uid(100), ALICE, 1, number)
            await asyncio.sleep(0.002)

    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        tasks = [asyncio.create_task(each) for each in (ask(), ask(), ask(), load())]
        await start(admin)
        await eventually(state(admin, "switched"), 40)
        switched = len(answers)
        await eventually(lambda: len(answers) > switched + 50, 20)
        done = True
        await asyncio.gather(*tasks)
        await at_end(read_db, store)
        found = await admin.get("accounts")
        assert (found.rows_differing, found.rows_before) == (0, found.rows_after)
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
        assert serving(read_db)[0] == f"accounts@{found.version}"
        await admin.drop("accounts")
        await eventually(state(admin, ""), 20)
    await reads.close()
    assert all(balance == version + 3 for balance, version in answers)
    assert slowest < 2
    assert shape(read_db) == before


async def test_what_differs_is_counted_and_an_operator_decides(read_db: Database) -> None:
    """A row that was changed by hand, one that is missing and one too many: found, shown, and right after the switch."""
    store = bank()
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        with psycopg.connect(read_db.app) as app:
            app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
            app.execute("DELETE FROM movements WHERE account_id = %s", (uid(102),))
            app.execute(
                "INSERT INTO accounts SELECT tenant, 'x', owner_id, name, currency, 1, status, opened_at, 1 FROM accounts LIMIT 1"
            )
        await start(admin, only_if_same=True)
        await eventually(state(admin, "waiting"), 20)
        found = await admin.get("accounts")
        assert (found.rows_before, found.rows_after, found.rows_differing) == (80, 80, 3)
        assert [(row["table"], row["key"]) for row in found.different_rows] == [
            ("accounts", ["acme", uid(101)]),
            ("accounts", ["acme", "x"]),
            ("movements", ["acme", uid(102), "2"]),
        ]
        with pytest.raises(Rejected, match="already") as twice:
            await start(admin)
        assert twice.value.reason == "REBUILD_THERE_ALREADY"
        store.deposit("acme", uid(103), ALICE, 1, 6)
        await at_end(read_db, store)
        assert dump(read_db, NAMES) != folded(store.events, ACCOUNT_TABLES)
        await admin.switch("accounts")
        await eventually(state(admin, "switched"), 20)
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
    with psycopg.connect(read_db.app) as app:
        assert app.execute("SELECT count(*) FROM accounts__old").fetchone() == (41,)


async def test_a_switch_is_a_change_with_a_mark_of_its_own(read_db: Database) -> None:
    """Where it takes the place of an older change, too: so a token of a history that was restored away is not one of this."""
    store = bank(3)
    with psycopg.connect(read_db.owner, autocommit=True) as owner:
        owner.execute("INSERT INTO row_change_heads VALUES ('accounts', 1, 600)")
        owner.execute("INSERT INTO row_changes SELECT 'accounts', 1, n % 512, n, '[]' FROM generate_series(89, 600) n")
    assert read_db.query
    async with (
        running(made(read_db, store)),
        operator(read_db) as admin,
        await connect(read_db.query, application_name="test") as it,
    ):
        await at_end(read_db, store)
        with psycopg.connect(read_db.owner) as owner:
            before = {str(mark) for (mark,) in owner.execute("SELECT mark FROM row_changes")}
        assert len(before) == 512
        was = await changes.place(it, "accounts", SHARD)
        await start(admin)
        await eventually(state(admin, "switched"))
        at = await changes.place(it, "accounts", SHARD)
        assert (at.seq, at.at) == (was.seq + 1, was.at)
        assert at.mark not in before


@pytest.mark.parametrize("moment", ["asked", "filling", "waiting"])
async def test_a_cancelled_rebuild_leaves_nothing(read_db: Database, moment: str) -> None:
    """No table, checkpoint or parked key; what serves goes on, and another rebuild may begin."""
    store = bank()
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        before = shape(read_db)
    async with operator(read_db) as admin:
        with psycopg.connect(read_db.app) as app:
            app.execute("UPDATE accounts SET balance_minor = 6 WHERE account_id = %s", (uid(101),))
        await start(admin, only_if_same=True)
        if moment == "asked":
            await admin.cancel("accounts")
        async with running(made(read_db, store)):
            if moment != "asked":
                await eventually(state(admin, moment), 20)
                await admin.cancel("accounts")
            await eventually(state(admin, ""), 20)
            assert shape(read_db) == before
            store.deposit("acme", uid(103), ALICE, 1, 6)
            await at_end(read_db, store)
            assert serving(read_db)[0] == "accounts"
            with psycopg.connect(read_db.app) as app:
                assert app.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)
            await start(admin)
            await eventually(state(admin, "switched"), 20)


async def test_cut_off_anywhere_it_goes_on_and_ends_once(read_db: Database) -> None:
    """Leader after leader is cut off after a random time, under load; the last sees it through."""
    store, chance = bank(), random.Random(7)
    async with operator(read_db) as admin:
        async with running(made(read_db, store)):
            await at_end(read_db, store)
        await start(admin)
        for number in range(25):
            store.deposit("acme", uid(100 + number), ALICE, 1, 6)
            async with running(made(read_db, store)):
                await asyncio.sleep(chance.random() * 0.08)
        async with running(made(read_db, store)):
            await eventually(state(admin, "switched"), 30)
            store.deposit("acme", uid(139), ALICE, 1, 6)
            await at_end(read_db, store)
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)
        with psycopg.connect(read_db.app) as app:
            assert app.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)


async def test_whatever_still_runs_of_the_old_version_writes_nothing(read_db: Database) -> None:
    """A paused leader finds its checkpoint gone; one that was filling finds no table of that name."""
    store = bank()
    late = store.deposit("acme", uid(100), ALICE, 1, 6)
    del store.events[-1]
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        version = (await start(admin)).version
        await eventually(state(admin, "switched"), 20)
    before = dump(read_db, NAMES)
    store.events.append(late)
    async with await connect(read_db.app, application_name="paused") as connection:
        at = await checkpoint.load(connection, f"accounts@{version}", SHARD)
        batch = batch_of(store, len(store.events), len(store.events))
        with pytest.raises(Fenced):
            await Tables(ACCOUNT_TABLES).apply(connection, SHARD, at, batch)
        filling = Tables(ACCOUNT_TABLES, consumer=f"accounts@{version}", suffix=f"__v{version}")
        with pytest.raises(psycopg.errors.UndefinedTable):
            await filling.apply(connection, SHARD, at, batch)
    assert dump(read_db, NAMES) == before
    async with running(made(read_db, store)):
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


async def test_a_long_query_holds_up_the_switch_and_nobody_else(read_db: Database) -> None:
    """While it lasts other queries are answered, and events applied; when it ends the new tables serve."""
    store = bank()
    assert read_db.query
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        # A busy machine may take longer than the role's own limits, which would end the long query before the test does.
        unlimited = "-c transaction_timeout=0 -c idle_in_transaction_session_timeout=0"
        with (
            psycopg.connect(read_db.query, options=unlimited) as long,
            psycopg.connect(read_db.query, autocommit=True) as other,
        ):
            long.execute("SELECT count(*) FROM accounts")
            await start(admin)

            async def compared() -> bool:
                return (await admin.get("accounts")).rows_differing == 0

            await eventually(compared, 20)
            for number in range(6):
                began = time.monotonic()
                await asyncio.to_thread(other.execute, "SELECT count(*) FROM accounts")
                assert time.monotonic() - began < 1.5
                store.deposit("acme", uid(100 + number), ALICE, 1, 6)
                await at_end(read_db, store)
            assert (await admin.get("accounts")).state == "filling"
            long.rollback()
            await eventually(state(admin, "switched"), 20)


async def test_a_switch_and_a_batch_of_the_old_version_do_not_wait_for_each_other(read_db: Database) -> None:
    """The batch begins while the switch waits for one of the new version: the switch succeeds, and the batch is fenced."""
    store = bank(3)
    assert read_db.query
    with psycopg.connect(read_db.owner, autocommit=True) as owner:
        # Longer than PostgreSQL takes to find a deadlock.
        owner.execute("ALTER FUNCTION switch_rebuild SET lock_timeout = '20s'")
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        with psycopg.connect(read_db.query) as query:
            query.execute("SELECT count(*) FROM accounts")  # holds the switch up
            version = (await start(admin)).version

            async def compared() -> bool:
                return (await admin.get("accounts")).rows_differing == 0

            await eventually(compared, 20)
    with psycopg.connect(read_db.admin, autocommit=True) as watching:

        def waiting(count: int) -> Callable[[], bool]:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            return lambda: watching.execute(asked).fetchone() == (count,)

        async with (
            await connect(read_db.app, application_name="new") as new,
            await connect(read_db.app, application_name="old") as old,
            await connect(read_db.app, application_name="switch") as switch,
        ):
            at = await checkpoint.load(old, "accounts", SHARD)
            store.deposit("acme", uid(100), ALICE, 1, 6)
            async with new.transaction():
                await checkpoint.hold(new, f"accounts@{version}", SHARD, at)
                switching = asyncio.create_task(switch.execute("SELECT switch_rebuild('accounts', 1, %s)", [version]))
                await eventually(waiting(1))
                batch = batch_of(store, len(store.events), len(store.events))
                applying = asyncio.create_task(Tables(ACCOUNT_TABLES).apply(old, SHARD, at, batch))
                await eventually(waiting(2))
            assert await (await switching).fetchone() == (True,)
            with pytest.raises(Fenced):
                await applying
    assert serving(read_db) == (f"accounts@{version}", at.position)


async def test_of_rebuilds_that_are_asked_for_at_once_one_is_made(read_db: Database) -> None:
    """The others are told that it is there; it switches, and leaves one set of tables beside the former."""
    store = bank()
    async with running(made(read_db, store)), operator(read_db) as admin:
        await at_end(read_db, store)
        answers = await asyncio.gather(*(start(admin) for _ in range(6)), return_exceptions=True)
        refused = [it.reason for it in answers if isinstance(it, Rejected)]
        assert refused == ["REBUILD_THERE_ALREADY"] * 5
        await eventually(state(admin, "switched"), 20)
        assert serving(read_db)[1] == len(store.events)
        assert dump(read_db, NAMES) == folded(store.events, ACCOUNT_TABLES)


async def test_what_cannot_be_rebuilt_is_refused_by_name(read_db: Database) -> None:
    """Unknown, never filled, diverged, nothing to steer."""
    async with operator(read_db) as admin:

        async def reason(asking: Any) -> str:
            with pytest.raises(Refusal) as refusal:
                await asking
            return refusal.value.reason

        assert await reason(admin.start("sums", only_if_same=False, user_id="olga")) == "PROJECTION_NOT_FOUND"
        assert await reason(start(admin)) == "NEVER_FILLED"
        assert await reason(admin.get("accounts")) == "REBUILD_NOT_FOUND"
        with psycopg.connect(read_db.app) as app:
            app.execute(
                "INSERT INTO checkpoints (name, shard, state, reason) VALUES ('accounts', 1, 'stopped', 'HISTORY_DIVERGED: x')"
            )
        assert await reason(start(admin)) == "PROJECTION_DIVERGED"
        assert await reason(admin.switch("accounts")) == "REBUILD_NOT_WAITING"
        assert await reason(admin.cancel("accounts")) == "REBUILD_NOT_RUNNING"
        assert await reason(admin.drop("accounts")) == "NO_FORMER_TABLES"


def release(version: int) -> Group:
    """Accounts whose names say the version by which they were opened."""

    def named(row: AccountRow | None, event: account_pb2.AccountOpened, envelope: EventEnvelope) -> AccountRow:
        return opened(row, event, envelope)._replace(name=f"{event.name} {version}")

    return Group("accounts", (folding(ACCOUNTS, account_pb2.AccountOpened, named), MOVEMENTS), version=version)


def folds_that_serve(database: Database) -> int:
    """By which version the tables that serve were made."""
    with psycopg.connect(database.app) as connection:
        [(folds,)] = connection.execute("SELECT folds FROM checkpoints WHERE group_name = 'accounts' AND serves").fetchall()
        return int(folds)


def serve_of(database: Database, version: int) -> bool:
    """Whether tables of a version serve."""
    return folds_that_serve(database) == version


async def test_a_newer_release_rebuilds_by_itself(read_db: Database) -> None:
    """Cut off again and again; the former rows answer until the switch. The next release does not wait for an operator's drop."""
    store = bank()
    async with running(made(read_db, store, release(1))):
        await at_end(read_db, store)
    for version in (2, 3):
        for pause_s in (0.02, 0.05, 0.1):
            async with running(made(read_db, store, release(version))):
                await asyncio.sleep(pause_s)
            names = {row[3] for row in dump(read_db, ["accounts"])["accounts"]}
            assert names in ({f"blue {version - 1}"}, {f"blue {version}"})
        async with running(made(read_db, store, release(version))):
            await eventually(partial(serve_of, read_db, version), 20)
            store.account("acme", uid(1000 + version), ALICE)
            await at_end(read_db, store)
        assert dump(read_db, NAMES) == folded(store.events, release(version))
    with psycopg.connect(read_db.app) as connection:
        assert connection.execute("SELECT state, asked_by FROM projection_rebuilds").fetchall() == [("switched", "release 3")]


async def test_a_rebuild_that_older_folds_began_is_begun_anew(read_db: Database) -> None:
    """An operator's, which waits with rows of version 1: they never serve."""
    store = bank()
    async with operator(read_db) as admin:
        async with running(made(read_db, store, release(1))):
            await at_end(read_db, store)
            with psycopg.connect(read_db.app) as connection:
                connection.execute(ONE_TOO_MANY)
            await start(admin, only_if_same=True)
            await eventually(state(admin, "waiting"), 20)
        async with running(made(read_db, store, release(2))):
            await eventually(lambda: folds_that_serve(read_db) == 2, 20)
        assert dump(read_db, NAMES) == folded(store.events, release(2))


async def test_an_older_release_does_not_touch_the_tables_of_a_newer_one(read_db: Database) -> None:
    """It stops by name; the newer one goes on."""
    store = bank()
    async with running(made(read_db, store, release(2))):
        await at_end(read_db, store)
    end = len(store.events)
    store.account("acme", uid(1000), ALICE)
    async with running(made(read_db, store, release(1))) as it:
        await eventually(lambda: (it.stopped or "").startswith("RELEASE_TOO_OLD"), 20)
    assert serving(read_db)[1] == end
    async with running(made(read_db, store, release(2))):
        await at_end(read_db, store)
    assert dump(read_db, NAMES) == folded(store.events, release(2))
