"""Parked keys on a real PostgreSQL: what is held up, what goes on, and what operators' requests come to."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from psycopg.errors import LockNotAvailable

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from shared.folds.projection import Group
from shared.folds.upcasting import Step, Upcasters
from shared.line import checkpoint
from shared.platform.postgres import connect
from shared.projections import parked as parked_module
from shared.projections import replay
from shared.projections.tables import Tables
from tests.integration.shared.projections.parked_keys import (
    ALICE,
    BLUE,
    GROUP,
    NAMES,
    RED,
    answered,
    apply,
    ask,
    at_begin,
    bank,
    broken,
    parked,
    slow,
    unreadable,
)
from tests.support.fakes.tables import SHARD, dump, folded
from tests.support.system.rebuilding import waits
from tests.support.system.waiting import eventually

pytestmark = pytest.mark.usefixtures("remembered")


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


async def test_what_a_newer_release_folds_again_locks_tables_before_the_checkpoint(read_db: Database) -> None:
    """As the switch of a rebuild does: neither waits for the other."""
    store = bank()
    newer = store.deposit("acme", BLUE, ALICE, 13, 113)
    newer.type = "bank.v9.MoneyCharged"
    known = {event.type for event in store.events} - {newer.type}
    async with at_begin(read_db, replace(GROUP, upcasters=Upcasters(known=known))) as (tables, connection):
        await apply(tables, connection, store)
        at = await checkpoint.load(connection, GROUP.name, SHARD)
    async with (
        at_begin(read_db, newest({*known, newer.type})) as (tables, connection),
        await connect(read_db.app, application_name="holds") as holds,
        await connect(read_db.owner, application_name="switch") as switch,
    ):
        async with holds.transaction():
            await checkpoint.hold(holds, GROUP.name, SHARD, at)
            retrying = asyncio.create_task(replay.retry_known(tables, connection, SHARD, at))
            await eventually(waits(read_db, 1))
            with pytest.raises(LockNotAvailable):
                async with switch.transaction():
                    await switch.execute("LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE NOWAIT")
        await retrying
    assert parked(read_db) == []


async def test_an_event_of_a_newer_release_parks_its_aggregate_until_that_release_runs(read_db: Database) -> None:
    """It is not passed over as one that no table has a fold for: rows of the aggregate wait, those of others go on.

    The newer release folds what waits when it begins; what the older one parked under a type that is an old one now, too.
    """
    store = bank()
    newer = store.deposit("acme", BLUE, ALICE, 13, 113)
    newer.type = "bank.v9.MoneyCharged"
    store.withdraw("acme", BLUE, ALICE, 5, 118)
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
        await replay.retry_known(tables, connection, SHARD, at)
        assert [waiting for table, _, _, waiting in parked(read_db) if not table] == [[7]]
    async with at_begin(read_db, newest({*known, newer.type})) as (tables, connection):
        await replay.retry_known(tables, connection, SHARD, at)
        assert parked(read_db) == []
    store.events.remove(newer)
    for event in store.events:
        if event.type == LENT:
            event.type = account_pb2.MoneyDeposited.DESCRIPTOR.full_name
    assert dump(read_db, NAMES) == folded(store.events, GROUP)


async def test_an_event_of_an_older_contract_that_cannot_be_read_is_not_passed_over(read_db: Database) -> None:
    """The follower leaves it as it is stored; it parks its aggregate, as any other that cannot be read."""
    store = bank()
    spoilt = store.append("acme", BLUE, account_pb2.MoneyWithdrawn())
    spoilt.payload = b"\xff"
    async with at_begin(read_db, newest({event.type for event in store.events})) as (tables, connection):
        await apply(tables, connection, store)
        told = f"event {spoilt.event_id} ({LENT}) at position 7 raised DecodeError"
        assert parked(read_db) == [("", f'["account", "{BLUE}"]', told, [7])]


LENT = account_pb2.MoneyWithdrawn.DESCRIPTOR.full_name


def borrowed(old: account_pb2.MoneyWithdrawn) -> account_pb2.MoneyDeposited:
    """The fields of both are the same."""
    return account_pb2.MoneyDeposited.FromString(old.SerializeToString())


def newest(known: set[str]) -> Group:
    """The group of a release in which withdrawals are events of an older contract: each became a deposit."""
    tables = tuple(
        replace(each, on=[(event, fold) for event, fold in each.on if event is not account_pb2.MoneyWithdrawn])
        for each in GROUP.projections
    )
    lent = Step(account_pb2.MoneyWithdrawn, account_pb2.MoneyDeposited, borrowed)
    return replace(GROUP, projections=tables, upcasters=Upcasters(lent, known=known))


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


def remembers(tables: Tables) -> int | None:
    """How many parked keys a projector remembers; None if there are too many."""
    return None if tables.parked.known is None else len(tables.parked.known)


async def test_of_very_many_keys_a_projector_remembers_none(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads one more than it would remember, and looks up those of each batch, until there are fewer."""
    monkeypatch.setattr(parked_module, "KNOWN_MAX", 1)
    store = bank()
    broken.update((13, 14))
    store.deposit("acme", BLUE, ALICE, 13, 113)
    async with at_begin(read_db) as (tables, connection):
        await apply(tables, connection, store)
        assert remembers(tables) == 1
        store.deposit("acme", RED, ALICE, 14, 14)
        await apply(tables, connection, store)
        assert remembers(tables) is None
        for amount in (5, 6):
            store.deposit("acme", BLUE, ALICE, amount, 113 + amount)
            store.deposit("acme", RED, ALICE, amount, 14 + amount)
        await apply(tables, connection, store, batch=3)
        await tables.refresh(connection, SHARD)
        assert remembers(tables) is None
        assert sorted(len(waiting) for *_, waiting in parked(read_db)) == [3, 3]
        broken.clear()
        for row_id, left in ((BLUE, 1), (RED, 0)):
            ask(read_db, "accounts", row_id=row_id)
            await replay.carry_out(tables, connection, SHARD, await checkpoint.load(connection, GROUP.name, SHARD))
            assert (len(parked(read_db)), remembers(tables)) == (left, left)
    assert dump(read_db, NAMES) == folded(store.events, GROUP)
