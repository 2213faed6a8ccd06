"""Rebuilds on a real PostgreSQL: filled beside what serves, compared and switched, while queries are answered."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.folds.errors import Refusal, Rejected
from shared.platform.postgres import Reads, connect
from shared.projections import changes
from tests.support.fakes.line import uid
from tests.support.fakes.tables import ACCOUNT_TABLES, SHARD, dump, folded
from tests.support.system.rebuilding import ALICE, NAMES, at_end, bank, made, operator, serving, shape, start, state
from tests.support.system.waiting import eventually
from tests.support.system.working import running

pytestmark = pytest.mark.usefixtures("quick")


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
