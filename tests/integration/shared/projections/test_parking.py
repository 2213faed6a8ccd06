"""Parked keys on a real PostgreSQL: what is held up, what goes on, and what operators' requests come to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from google.protobuf.message import DecodeError, Message

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections.accounts import ACCOUNTS, MOVEMENTS, AccountRow, money_moved
from read_service.projections.people import PERSON_TOTALS
from shared.folds.projection import Group
from shared.folds.upcasting import Upcasters
from shared.line import checkpoint
from shared.line.checkpoint import Fenced
from shared.line.fanout import FanOut
from shared.line.follower import Follower
from shared.platform.postgres import Connection, connect
from shared.projections import admin, replay
from shared.projections import projector as projector_module
from shared.projections.groups import GroupProjector, Projectors
from shared.projections.tables import Item, Tables, TooManyParked
from tests.integration.shared.projections.test_projector import batch_of
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import SHARD, SUMMARIES, dump, folded, projector, reached, running
from tests.support.system.waiting import eventually

ALICE, BLUE, RED = uid(1), uid(2), uid(3)
broken: set[int] = set()
"""Amounts of deposits on which the fold of accounts raises."""
slow: set[int] = set()
"""Amounts of deposits whose fold takes half a second."""
unreadable: set[str] = set()
"""Ids of events that cannot be read."""


def deposited(row: AccountRow | None, event: account_pb2.MoneyDeposited, envelope: EventEnvelope) -> AccountRow:
    """As the bank's, but for the amounts that are broken."""
    if event.amount_minor in broken:
        raise ArithmeticError("of this amount nothing can be made")
    if event.amount_minor in slow:
        time.sleep(0.5)
    return money_moved(row, event, envelope)


GROUP = Group(
    "accounts", (replace(ACCOUNTS, on={**ACCOUNTS.on, account_pb2.MoneyDeposited: deposited}), MOVEMENTS, PERSON_TOTALS)
)
NAMES = [projection.table.name for projection in GROUP.projections]


PARK_RED = """
INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error)
VALUES (gen_random_uuid(), 'accounts', 1, true, 'acme', 'accounts', %s, %s, '')
"""


class Reader(Tables):
    """Cannot read the events that are said to be unreadable: as a release whose contracts are wrong."""

    def items_of(self, envelope: EventEnvelope) -> tuple[Message, list[Item]] | None:
        if envelope.event_id in unreadable:
            raise DecodeError("of these bytes nothing can be made")
        return super().items_of(envelope)


@pytest.fixture(autouse=True)
def whole() -> None:
    """Nothing is broken when a test begins."""
    broken.clear()
    slow.clear()
    unreadable.clear()


def bank() -> Store:
    """Alice with two accounts in dollars, and 100 on the first."""
    store = Store()
    store.person("acme", ALICE, "Alice")
    store.account("acme", BLUE, ALICE)
    store.account("acme", RED, ALICE)
    store.deposit("acme", BLUE, ALICE, 100, 100)
    return store


@asynccontextmanager
async def at_begin(database: Database, group: Group = GROUP) -> AsyncIterator[tuple[Tables, Connection]]:
    """Tables and a connection that is at the begin of the line."""
    tables = Reader(group)
    async with await connect(database.app, application_name="test") as connection:
        await checkpoint.load(connection, GROUP.name, SHARD)
        await tables.load_parked(connection, SHARD)
        yield tables, connection


async def apply(tables: Tables, connection: Connection, store: Store, *, batch: int = 500) -> None:
    """Applies the line from the checkpoint to its end."""
    at = await checkpoint.load(connection, GROUP.name, SHARD)
    while at.position < len(store.events):
        part = batch_of(store, at.position + 1, min(at.position + batch, len(store.events)))
        await tables.apply(connection, SHARD, at, part)
        at = part.after


def parked(database: Database) -> list[tuple[Any, ...]]:
    """Table, key, error and positions of what is parked."""
    with psycopg.connect(database.app) as connection:
        return connection.execute(
            """SELECT k.table_name, k.key, k.error, array_agg(e.position ORDER BY e.position) FILTER (WHERE e.position > 0)
               FROM parked_keys k LEFT JOIN parked_events e USING (parked_id)
               GROUP BY k.parked_id ORDER BY k.table_name, min(e.position)"""
        ).fetchall()


def ask(database: Database, table: str, action: str = "retry", *, all_events: bool = False) -> UUID:
    """Leaves an operator's request for the parked key of a table; returns its id."""
    request_id = uuid4()
    assert database.query
    with psycopg.connect(database.app) as app, psycopg.connect(database.query, autocommit=True) as connection:
        [(parked_id,)] = app.execute("SELECT parked_id FROM parked_keys WHERE table_name = %s", [table]).fetchall()
        asked = connection.execute("SELECT ask_parked(%s, %s, %s, %s, 'olga')", (request_id, parked_id, action, all_events))
        assert asked.fetchone() == (True,)
    return request_id


def answered(database: Database, request_id: UUID) -> tuple[Any, ...]:
    """Outcome, how many events were applied and skipped."""
    assert database.query
    with psycopg.connect(database.query) as connection:
        row = connection.execute("SELECT outcome, applied, skipped FROM parked_answer(%s)", [request_id]).fetchone()
        assert row is not None
        return row


@pytest.mark.parametrize("batch", [1, 2, 500])
async def test_a_fold_that_raises_parks_its_key_alone(read_db: Database, batch: int) -> None:
    """Later events of the key wait behind it, in order; the account's statement, the totals and other accounts go on."""
    store = bank()
    broken.add(13)
    bad = store.deposit("acme", BLUE, ALICE, 13, 113)
    store.deposit("acme", BLUE, ALICE, 5, 118)
    store.deposit("acme", RED, ALICE, 7, 7)
    store.withdraw("acme", BLUE, ALICE, 8, 110)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store, batch=batch)
    told = f"event {bad.event_id} (bank.v1.MoneyDeposited) at position 7 raised ArithmeticError"
    assert parked(read_db) == [("accounts", f'["{BLUE}"]', told, [7, 8, 10])]
    broken.clear()
    now, wanted = dump(read_db, NAMES), folded(store.events, GROUP)
    assert {name: now[name] for name in NAMES[1:]} == {name: wanted[name] for name in NAMES[1:]}
    assert [row[5] for row in now["accounts"]] == [100, 7]


@pytest.mark.parametrize("batch", [1, 500])
async def test_a_retry_folds_what_waits_in_order(read_db: Database, batch: int) -> None:
    """Up to the event that still fails; when the cause is mended, the tables are the fold of the line, and it goes on."""
    store = bank()
    broken.update((13, 14))
    for amount, balance in ((13, 113), (5, 118), (14, 132), (6, 138)):
        store.deposit("acme", BLUE, ALICE, amount, balance)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store, batch=batch)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        broken.remove(13)
        first = ask(read_db, "accounts")
        await replay.carry_out(tables, connection, SHARD, at)
        assert answered(read_db, first) == (replay.STILL_PARKED, 2, 0)
        [(_, _, error, waiting)] = parked(read_db)
        assert (error.endswith("at position 9 raised ArithmeticError"), waiting) == (True, [9, 10])
        assert [row[5] for row in dump(read_db, NAMES)["accounts"]] == [118, 0]
        broken.clear()
        second = ask(read_db, "accounts")
        await replay.carry_out(tables, connection, SHARD, at)
        assert (answered(read_db, second), parked(read_db)) == ((replay.RELEASED, 2, 0), [])
        store.deposit("acme", BLUE, ALICE, 1, 139)
        await apply(tables, connection, store, batch=batch)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


@pytest.mark.parametrize("all_events", [False, True])
async def test_what_is_discarded_is_not_in_the_row(read_db: Database, all_events: bool) -> None:
    """The first event or all that wait; the answer says which, and the rest is folded."""
    store = bank()
    broken.add(13)
    store.deposit("acme", BLUE, ALICE, 13, 113)
    store.withdraw("acme", BLUE, ALICE, 3, 110)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
        request_id = ask(read_db, "accounts", "discard", all_events=all_events)
        await replay.carry_out(tables, connection, SHARD, await checkpoint.load(connection, GROUP.name, SHARD))
    outcome = (replay.RELEASED, 0, 2) if all_events else (replay.RELEASED, 1, 1)
    assert (answered(read_db, request_id), parked(read_db)) == (outcome, [])
    [blue, _] = dump(read_db, NAMES)["accounts"]
    assert (blue[5], blue[8]) == ((100, 2) if all_events else (110, 4))


@pytest.mark.parametrize("batch", [1, 500])
async def test_an_event_that_cannot_be_read_parks_its_aggregate(read_db: Database, batch: int) -> None:
    """Rows that the aggregate's later events change wait for it; the rows of other aggregates go on; a retry ends it."""
    store = bank()
    unreadable.add(store.deposit("acme", BLUE, ALICE, 13, 113).event_id)
    store.deposit("acme", BLUE, ALICE, 5, 118)
    store.deposit("acme", RED, ALICE, 7, 7)
    store.deposit("umbrella", RED, ALICE, 1, 1)  # another tenant's, of an account that was never opened
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store, batch=batch)
        found = parked(read_db)
        assert [(table, waiting) for table, _, _, waiting in found if table != "accounts"] == [
            ("", [7]),
            ("movements", [8]),
            ("person_totals", [8, 9]),
            ("person_totals", [10]),
        ]
        assert [(error == "", waiting) for table, _, error, waiting in found if table == "accounts"] == [
            (True, [8]),
            (False, [10]),
        ]
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        assert [row[5] for row in dump(read_db, NAMES)["accounts"]] == [100, 7]
        unreadable.clear()
        request_id = ask(read_db, "")
        await replay.carry_out(tables, connection, SHARD, at)
        assert answered(read_db, request_id)[0] == replay.RELEASED
        store.deposit("acme", BLUE, ALICE, 1, 119)
        await apply(tables, connection, store, batch=batch)
    wanted = folded([event for event in store.events if event.tenant == "acme"], GROUP)
    now = {name: [row for row in rows if row[0] == "acme"] for name, rows in dump(read_db, NAMES).items()}
    assert now == wanted


async def test_an_event_of_a_newer_release_parks_its_aggregate_until_that_release_runs(read_db: Database) -> None:
    """It is not passed over as one that no table has a fold for: rows of the aggregate wait, those of others go on."""
    store = bank()
    newer = store.deposit("acme", BLUE, ALICE, 13, 113)
    newer.type = "bank.v9.MoneyCharged"
    store.deposit("acme", BLUE, ALICE, 5, 118)
    store.deposit("acme", RED, ALICE, 7, 7)
    known = {event.type for event in store.events} - {newer.type}
    async with at_begin(read_db, replace(GROUP, upcasters=Upcasters(known=known))) as (tables, connection):
        await apply(tables, connection, store)
        told = f"event {newer.event_id} (bank.v9.MoneyCharged) at position 7 raised UnknownEvent"
        assert parked(read_db)[0] == ("", f'["account", "{BLUE}"]', told, [7])
        assert [row[5] for row in dump(read_db, NAMES)["accounts"]] == [100, 7]
        request_id = ask(read_db, "")
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        await replay.carry_out(tables, connection, SHARD, at)
        assert answered(read_db, request_id) == (replay.STILL_PARKED, 0, 0)
    async with at_begin(read_db, replace(GROUP, upcasters=Upcasters(known={*known, newer.type}))) as (tables, connection):
        request_id = ask(read_db, "")
        await replay.carry_out(tables, connection, SHARD, at)
        assert answered(read_db, request_id)[0] == replay.RELEASED
    assert parked(read_db) == []
    store.events.remove(newer)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_a_row_behind_its_aggregate_is_not_folded_alone(read_db: Database) -> None:
    """What it lacks comes first."""
    store = bank()
    unreadable.add(store.deposit("acme", BLUE, ALICE, 13, 113).event_id)
    store.deposit("acme", BLUE, ALICE, 5, 118)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
        request_id = ask(read_db, "accounts")
        await replay.carry_out(tables, connection, SHARD, await checkpoint.load(connection, GROUP.name, SHARD))
    assert answered(read_db, request_id) == (replay.BEHIND, 0, 0)
    assert len(parked(read_db)) == 4


@pytest.mark.parametrize("batch", [1, 2])
async def test_a_row_that_fails_before_its_aggregate_does_waits_for_it(read_db: Database, batch: int) -> None:
    """A retry of the row folds what is before the event that cannot be read; the row stays parked until that is folded."""
    store = bank()
    broken.add(13)
    store.deposit("acme", BLUE, ALICE, 13, 113)
    unreadable.add(store.deposit("acme", BLUE, ALICE, 5, 118).event_id)
    store.deposit("acme", BLUE, ALICE, 7, 125)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store, batch=batch)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        broken.clear()
        first = ask(read_db, "accounts")
        await replay.carry_out(tables, connection, SHARD, at)
        assert answered(read_db, first) == (replay.BEHIND, 1, 0)
        assert [(error, waiting) for table, _, error, waiting in parked(read_db) if table == "accounts"] == [("", [9])]
        assert [row[5] for row in dump(read_db, NAMES)["accounts"]] == [113, 0]
        store.deposit("acme", BLUE, ALICE, 1, 126)
        await apply(tables, connection, store, batch=batch)
        unreadable.clear()
        second = ask(read_db, "")
        await replay.carry_out(tables, connection, SHARD, await checkpoint.load(connection, GROUP.name, SHARD))
    assert (answered(read_db, second)[0], parked(read_db)) == (replay.RELEASED, [])
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_a_retry_may_take_longer_than_a_batch(read_db: Database) -> None:
    """The role's limit of a transaction, which is for batches, does not end it."""
    store = bank()
    broken.add(13)
    store.deposit("acme", BLUE, ALICE, 13, 113)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
        broken.clear()
        request_id = ask(read_db, "accounts")
        slow.add(13)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
        limited = await connection.execute(
            "SELECT set_config(name, '200ms', false) FROM pg_settings WHERE name = 'transaction_timeout'"
        )
        if limited.rowcount != 1:
            pytest.skip("PostgreSQL before 17 knows no such limit")
        await replay.carry_out(tables, connection, SHARD, at)
    assert (answered(read_db, request_id), parked(read_db)) == ((replay.RELEASED, 1, 0), [])


async def test_parked_keys_are_counted_without_their_queues(read_db: Database) -> None:
    """By group, up to a limit, even while nobody can read what waits at them."""
    assert read_db.query
    with psycopg.connect(read_db.app) as app, psycopg.connect(read_db.query) as query, psycopg.connect(read_db.owner) as owner:
        for number in range(5):
            app.execute(PARK_RED, (f'["{uid(number)}"]', uid(number)))
        app.commit()
        owner.execute("LOCK TABLE parked_events")
        query.execute("SET statement_timeout = '5s'")
        for limit, counted in ((1000, 5), (3, 3)):
            assert query.execute(admin._COUNT, (SHARD, limit)).fetchall() == [("accounts", counted)]
        assert query.execute(admin._COUNT, (SHARD + 1, 1000)).fetchall() == []


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
        await newer.load_parked(other, SHARD)
        broken.clear()
        ask(read_db, "accounts")
        await replay.carry_out(newer, other, SHARD, at)
        store.deposit("acme", BLUE, ALICE, 5, 118)
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
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
    folds = {**ACCOUNTS.on, account_pb2.MoneyDeposited: inflated}
    tables = Tables(Group("accounts", (replace(ACCOUNTS, on=folds), MOVEMENTS, PERSON_TOTALS)))
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
