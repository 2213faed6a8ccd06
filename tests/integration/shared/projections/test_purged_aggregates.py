"""At the event that ends an aggregate its rows go; whoever begins anew, and reads holes before it, ends in the same rows."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from bank.v1 import account_pb2, person_pb2, transfer_pb2, user_pb2
from deploy.bootstrap import Database
from foldline.v1 import retention_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import consumer
from shared.line.event_store import PURGED
from shared.projections import forget as forget_module
from shared.projections import parking
from shared.projections.rows import Rows
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.fakes.tables import checkpoint_row, dump, projector, reached
from tests.support.system.working import running

TENANT = "acme"
GOES, STAYS = uid(1), uid(2)
GOING, STAYING = uid(11), uid(12)
TRANSFER, REFUNDED, USER = uid(21), uid(22), uid(31)

SEEN = """
CREATE TABLE seen (at xid8);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
BEGIN
  INSERT INTO seen VALUES (pg_current_xact_id());
  RETURN OLD;
END $$;
CREATE TRIGGER see BEFORE DELETE ON parked_events FOR EACH ROW EXECUTE FUNCTION see();
"""
"""Notes the transaction of each deletion."""


def moved(store: Store, account_id: str, owner_id: str, amount: int, after: int, transfer_id: str) -> None:
    """Money that a transfer moved."""
    event = store.deposit if amount > 0 else store.withdraw
    envelope = event(TENANT, account_id, owner_id, abs(amount), after)
    kind = account_pb2.MoneyDeposited if amount > 0 else account_pb2.MoneyWithdrawn
    told = kind.FromString(envelope.payload)
    told.transfer_id = transfer_id
    envelope.payload = told.SerializeToString()


def bank() -> Store:
    """Two people with an account each, two transfers between them, a user; the first person and the user end."""
    store = Store()
    for tenant in (TENANT, "umbrella"):
        for person, account in ((GOES, GOING), (STAYS, STAYING)):
            store.person(tenant, person, "Alice")
            store.account(tenant, account, person)
            store.deposit(tenant, account, person, 100, 100)
    for transfer, target in ((TRANSFER, STAYING), (REFUNDED, GOING)):
        started = transfer_pb2.TransferStarted(
            transfer_id=transfer, from_account_id=GOING, to_account_id=STAYING, amount_minor=69, currency="USD"
        )
        store.append(TENANT, transfer, started, category="transfer")
        moved(store, GOING, GOES, -69, 31, transfer)
        moved(store, target, STAYS if target == STAYING else GOES, 69, 169 if target == STAYING else 100, transfer)
        store.append(TENANT, transfer, transfer_pb2.TransferCompleted(transfer_id=transfer), category="transfer")
    store.withdraw(TENANT, GOING, GOES, 100, 0)
    store.append(TENANT, USER, user_pb2.UserRegistrationStarted(user_id=USER, login="alice"), category="user")
    store.append(TENANT, USER, user_pb2.UserDeactivated(user_id=USER), category="user")
    store.append(TENANT, GOES, person_pb2.PersonClosed(person_id=GOES, account_ids=[GOING]), category="person")
    store.append(TENANT, GOING, account_pb2.AccountClosed(account_id=GOING, owner_id=GOES))
    return store


def end(store: Store) -> None:
    """The ends of the account, its owner and the user; behind them another event."""
    for category, id_ in (("account", GOING), ("person", GOES), ("user", USER)):
        store.append(TENANT, id_, retention_pb2.AggregatePurged(), category=category)
    store.deposit(TENANT, STAYING, STAYS, 1, 170)


def purge(store: Store, above: int = 0) -> None:
    """Leaves a hole in place of each event of what has ended, from a position on."""
    gone = {("account", GOING), ("person", GOES), ("user", USER)}
    for event in store.events:
        last = event.type == "foldline.v1.AggregatePurged"
        if event.tenant == TENANT and (event.aggregate_type, event.aggregate_id) in gone and not last and event.position > above:
            position, event_id = event.position, event.event_id
            event.Clear()
            event.MergeFrom(EventEnvelope(position=position, event_id=event_id, tenant=TENANT, type=PURGED))


def begin_anew(database: Database) -> None:
    """The next projector empties the tables and reads the line from its begin."""
    with psycopg.connect(database.owner) as owner:
        owner.execute("UPDATE checkpoints SET epoch = '', position = 0, event_id = ''")


def ids(rows: dict[str, Any], table: str) -> set[tuple[str, str]]:
    """Tenant and id of the rows of a table."""
    return {(row[0], row[1]) for row in rows[table]}


@pytest.mark.parametrize("batch_max", [1, 500])
async def test_the_rows_of_an_aggregate_go_and_a_rebuild_makes_the_same(read_db: Database, batch_max: int) -> None:
    """Of the account, its owner and the user; what a transfer had from the account; with no, some and all events as holes."""
    store = bank()
    end(store)
    seen = []
    for above in (len(store.events), 9, 0):
        purge(store, above)
        async with running(projector(read_db, StoreLine(store), batch_max=batch_max)) as it:
            await reached(it, len(store.events))
            assert it._tables.parked.known == {}
        seen.append(dump(read_db))
        begin_anew(read_db)
    assert seen[0] == seen[1] == seen[2]
    for table, gone, kept in (
        ("people", GOES, STAYS),
        ("person_totals", GOES, STAYS),
        ("accounts", GOING, STAYING),
        ("movements", GOING, STAYING),
    ):
        assert ids(seen[0], table) == {(TENANT, kept), ("umbrella", kept), ("umbrella", gone)}
    assert seen[0]["users"] == []
    transfers = {row[1]: row[10:13] for row in seen[0]["transfers"]}
    assert [bool(at) for at in transfers[TRANSFER]] == [False, True, False]  # debited, credited, refunded
    assert [bool(at) for at in transfers[REFUNDED]] == [False, False, False]


async def test_what_is_parked_and_cached_of_it_goes_and_watchers_are_told(read_db: Database) -> None:
    """Its own parked rows with their events; what waits at rows of others without its events; the others stay."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
        for account, owner in ((GOING, GOES), (STAYING, STAYS)):
            store.deposit(TENANT, account, owner, 1, 1).payload = b"\xff"
            store.deposit(TENANT, account, owner, 1, 2)
        await reached(it, len(store.events))
        with psycopg.connect(read_db.owner) as owner_role:
            owner_role.execute("UPDATE row_changes SET changed = '[]'")
        end(store)
        await reached(it, len(store.events))
        assert {place[1][2] for place in it._tables.parked.known or () if not place[0]} == {STAYING}
        assert not any(GOING in str(place) or GOES in str(place) for place in it._tables.parked.known or ())
    with psycopg.connect(read_db.owner) as owner_role:
        told = "".join(row[0] or "" for row in owner_role.execute("SELECT changed FROM row_changes").fetchall())
        assert all(id_ in told for id_ in (GOING, GOES, USER, TRANSFER))
        events = owner_role.execute("SELECT envelope FROM parked_events").fetchall()
    assert {EventEnvelope.FromString(raw).aggregate_id for (raw,) in events} == {STAYING}


async def test_what_waits_at_a_key_goes_a_page_in_a_transaction(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a queue of any length is done within the time limit of transactions."""
    monkeypatch.setattr(parking, "PAGE", 1)
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        for _ in range(3):
            store.deposit(TENANT, GOING, GOES, 1, 1).payload = b"\xff"
        await reached(it, len(store.events))
        with psycopg.connect(read_db.owner) as owner_role:
            owner_role.execute(SEEN)
        end(store)
        await reached(it, len(store.events))
        assert it._tables.parked.known == {}
    with psycopg.connect(read_db.owner) as owner_role:
        assert owner_role.execute("SELECT count(*), count(DISTINCT at) FROM seen").fetchone() == (3, 3)


async def test_killed_between_two_deletions_the_next_goes_on(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time; at each the projector dies. The checkpoint stays before the end until all is gone."""
    store = bank()
    last = len(store.events)
    end(store)
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
    expected = dump(read_db)
    begin_anew(read_db)
    monkeypatch.setattr(forget_module, "FORGET_MAX", 1)
    monkeypatch.setattr(consumer, "RETRY_MIN_S", 0.01)
    forget_with, gone = Rows.forget_with, 0

    async def dying(rows: Rows, *more: Any) -> list[str]:
        nonlocal gone
        ids = await forget_with(rows, *more)
        gone += len(ids)
        if ids and gone in (2, 4):
            raise psycopg.OperationalError("killed here")
        if ids:
            assert last <= checkpoint_row(read_db)[0] < last + 3
        return ids

    monkeypatch.setattr(Rows, "forget_with", dying)
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
    assert gone > 6
    assert dump(read_db) == expected
