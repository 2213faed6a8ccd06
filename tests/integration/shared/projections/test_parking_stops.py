"""Parked keys of a running projector: too many stop a group, kills change nothing, refused values park too."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, MOVEMENTS, AccountRow, money_moved
from read_service.projections.people import PERSON_TOTALS
from shared.folds.projection import Group
from shared.line import checkpoint
from shared.line.checkpoint import Fenced
from shared.line.fanout import FanOut
from shared.line.follower import Follower
from shared.platform.postgres import connect
from shared.projections import admin, replay
from shared.projections import projector as projector_module
from shared.projections.failures import TooManyParked
from shared.projections.groups import GroupProjector, Projectors
from shared.projections.tables import Tables
from tests.integration.shared.projections.parked_keys import (
    ALICE,
    BLUE,
    GROUP,
    NAMES,
    PARK_RED,
    RED,
    answered,
    apply,
    ask,
    at_begin,
    bank,
    broken,
    parked,
)
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import SHARD, SUMMARIES, dump, folded, folding, projector, reached
from tests.support.system.waiting import eventually
from tests.support.system.working import running


async def test_parked_keys_are_counted_without_their_queues(read_db: Database) -> None:
    """By group, up to a limit, even while nobody can read what waits at them."""
    assert read_db.query
    with psycopg.connect(read_db.app) as app, psycopg.connect(read_db.query) as query, psycopg.connect(read_db.owner) as owner:
        for number in range(5):
            app.execute(PARK_RED, (f'["{uid(number)}"]', uid(number)))
        app.execute("INSERT INTO checkpoints (name, shard) VALUES ('accounts', %s)", (SHARD,))
        app.commit()
        owner.execute("LOCK TABLE parked_events")
        query.execute("SET statement_timeout = '5s'")
        for limit, counted in ((1000, 5), (3, 3)):
            assert query.execute(admin._COUNT, (SHARD, limit)).fetchall() == [("accounts", counted)]
        assert query.execute(admin._COUNT, (SHARD + 1, 1000)).fetchall() == []


@pytest.mark.usefixtures("remembered")
async def test_more_than_twenty_keys_in_a_minute_stop_the_group(read_db: Database) -> None:
    """By name, before anything of the batch is written; twenty are parked."""
    store = Store()
    store.person("acme", ALICE, "Alice")
    broken.add(13)
    for number in range(21):
        store.account("acme", uid(100 + number), ALICE)
        store.deposit("acme", uid(100 + number), ALICE, 13, 13)
    late = store.events.pop()
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
        assert len(parked(read_db)) == 20
        before = dump(read_db, NAMES)
        store.events.append(late)
        with pytest.raises(TooManyParked, match=late.event_id):
            await apply(tables, connection, store)
    assert (len(parked(read_db)), dump(read_db, NAMES)) == (20, before)
    # What was parked longer ago does not count, for a projector that starts anew either.
    with psycopg.connect(read_db.app) as app:
        app.execute("UPDATE parked_keys SET parked_at = parked_at - interval '1 minute'")
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
    assert len(parked(read_db)) == 21


async def test_a_retry_that_is_cut_off_anywhere_is_done_once(read_db: Database) -> None:
    """Cancelled later and later until one gets through: before that nothing is changed, then all is, and the answer stands."""
    store = bank()
    broken.add(13)
    for amount, balance in ((13, 113), (5, 118)):
        store.deposit("acme", BLUE, ALICE, amount, balance)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
        before = dump(read_db, NAMES)
        request_id = ask(read_db, "accounts")
    broken.clear()
    turns, cut, deadline = 0, 0, time.monotonic() + 60
    while parked(read_db):
        assert time.monotonic() < deadline
        assert dump(read_db, NAMES) == before
        async with at_begin(read_db) as (tables, connection):
            at = await checkpoint.load(connection, GROUP.name, SHARD)
            task = asyncio.create_task(replay.carry_out(tables, connection, SHARD, at))
            for _ in range(turns):
                await asyncio.sleep(0)
            cut += not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        turns += 1 + turns // 4
    assert cut > 3
    assert answered(read_db, request_id) == (replay.RELEASED, 2, 0)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_a_paused_projector_parks_and_retries_nothing_after_another(read_db: Database) -> None:
    """One that was replaced is fenced; one whose key an operator has released meanwhile queues nothing behind it."""
    store = bank()
    broken.add(13)
    store.deposit("acme", BLUE, ALICE, 13, 113)
    async with at_begin(read_db) as (older, connection), at_begin(read_db) as (newer, other):
        await apply(older, connection, store)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        await newer.refresh(other, SHARD)
        broken.clear()
        ask(read_db, "accounts")
        await replay.carry_out(newer, other, SHARD, at)
        store.deposit("acme", BLUE, ALICE, 5, 118)
        with pytest.raises(Fenced):
            await older.apply(connection, SHARD, at, batch_of(store, 8, 8))
        await apply(newer, other, store)
        with psycopg.connect(read_db.app) as app:
            app.execute(PARK_RED, (f'["{RED}"]', RED))
        ask(read_db, "accounts")
        async with await connect(read_db.app, application_name="test") as third:
            with pytest.raises(Fenced):
                await replay.carry_out(older, third, SHARD, at)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_a_running_projector_does_what_is_asked(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """With or without new events on the line, and also after a new start."""
    monkeypatch.setattr(projector_module, "ASKED_S", 0.01)
    store = bank()
    broken.add(13)
    store.deposit("acme", BLUE, ALICE, 13, 113)
    for _ in range(2):
        async with running(projector(read_db, StoreLine(store), group=GROUP)) as it:
            await reached(it, len(store.events))
            request_id = ask(read_db, "accounts")
            await eventually(lambda request_id=request_id: answered(read_db, request_id)[0] == replay.STILL_PARKED)  # type: ignore[misc]
    broken.clear()
    async with running(projector(read_db, StoreLine(store), group=GROUP)) as it:
        ask(read_db, "accounts")
        await eventually(lambda: parked(read_db) == [])
        store.deposit("acme", BLUE, ALICE, 1, 114)
        await reached(it, len(store.events))
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_a_stopped_group_holds_up_no_other(read_db: Database) -> None:
    """Accounts stop by name over an event without a key; people and totals reach the head, and the process says which stopped."""
    store = bank()
    bad = store.deposit("acme", BLUE, ALICE, 13, 113)
    bad.payload, bad.aggregate_id = b"\xff\xff", ""
    store.person("acme", uid(9), "after it")
    fan_out = FanOut(Follower(StoreLine(store), None, silence_s=0.01).follow, lambda: Follower(StoreLine(store), None).follow)
    groups = [Group("accounts", (ACCOUNTS, MOVEMENTS)), Group("people", [SUMMARIES.projections[0]])]

    def made(group: Group) -> GroupProjector:
        return GroupProjector(group, SHARD, fan_out.follow, lambda: connect(read_db.app, application_name="test"))

    both = Projectors([made(group) for group in groups], fan_out)
    task = asyncio.create_task(both.run())
    try:
        await eventually(lambda: both.stopped == "accounts: EVENT_WITHOUT_KEY")
        accounts, people = (it.projector for it in both.projectors)
        assert accounts is not None
        assert people is not None
        await reached(people, len(store.events))
        store.rename("acme", ALICE, "Alice Cooper")
        await reached(people, len(store.events))
        assert accounts.at.position == 0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    wanted = folded([event for event in store.events if event.aggregate_id], groups[1])
    assert dump(read_db, ["people"]) == wanted


huge: dict[int, int] = {}
"""What the fold of accounts makes of a balance."""


def inflated(row: AccountRow | None, event: account_pb2.MoneyDeposited, envelope: EventEnvelope) -> AccountRow:
    """As the bank's, but for the balances that become something else."""
    moved = money_moved(row, event, envelope)
    return moved._replace(balance_minor=huge.get(moved.balance_minor, moved.balance_minor))


@pytest.mark.parametrize("limit", [2**63, 100], ids=["cannot be packed", "refused by the database"])
async def test_a_value_out_of_range_parks_its_key_at_its_event(read_db: Database, limit: int) -> None:
    """Earlier events and other keys of the batch are applied, later ones wait; when the cause is mended, a retry applies all."""
    store = bank()
    store.deposit("acme", BLUE, ALICE, 5, 105)
    bad = store.deposit("acme", BLUE, ALICE, 6, 111)
    store.deposit("acme", BLUE, ALICE, 7, 118)
    store.deposit("acme", RED, ALICE, 8, 8)
    tables = Tables(Group("accounts", (folding(ACCOUNTS, account_pb2.MoneyDeposited, inflated), MOVEMENTS, PERSON_TOTALS)))
    huge.clear()
    if limit == 2**63:
        huge.update({111: limit, 118: limit + 1})
    else:
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("ALTER TABLE accounts ADD CONSTRAINT small CHECK (balance_minor NOT IN (111, 118))")
    async with await connect(read_db.app, application_name="test") as connection:
        await checkpoint.load(connection, "accounts", SHARD)
        await apply(tables, connection, store)
        with psycopg.connect(read_db.app) as app:
            [(table, error, first, events)] = app.execute(
                """SELECT table_name, error, min(position), count(*) FROM parked_keys JOIN parked_events USING (parked_id)
                   GROUP BY parked_id"""
            ).fetchall()
        assert (table, first, events) == ("accounts", bad.position, 2)
        assert "the database refuses its row" in error
        balances = {row[1]: row[5] for row in dump(read_db, ["accounts"])["accounts"]}
        assert balances == {BLUE: 105, RED: 8}
        wanted = folded(store.events, GROUP)
        others = ["movements", "person_totals"]
        assert dump(read_db, others) == {name: wanted[name] for name in others}
        huge.clear()
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("ALTER TABLE accounts DROP CONSTRAINT IF EXISTS small")
        with psycopg.connect(read_db.app) as app:
            app.execute(
                """INSERT INTO parked_requests (request_id, parked_id, action, all_events, asked_by)
                   SELECT gen_random_uuid(), parked_id, 'retry', false, 'olga' FROM parked_keys"""
            )
        at = await checkpoint.load(connection, "accounts", SHARD)
        await replay.carry_out(tables, connection, SHARD, at)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


@pytest.mark.usefixtures("remembered")
async def test_many_refused_rows_stop_the_group(read_db: Database) -> None:
    """As many as a bad release makes, however they come; nothing behind them is applied."""
    store = bank()
    for number in range(30):
        store.account("acme", uid(100 + number), ALICE, currency="USD")
    with psycopg.connect(read_db.owner) as owner:
        owner.execute("ALTER TABLE accounts ADD CONSTRAINT none CHECK (name <> 'blue')")
    tables = Tables(GROUP)
    async with await connect(read_db.app, application_name="test") as connection:
        await checkpoint.load(connection, GROUP.name, SHARD)
        with pytest.raises(TooManyParked):
            await apply(tables, connection, store)
