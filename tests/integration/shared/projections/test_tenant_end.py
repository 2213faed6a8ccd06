"""At the event that ends a tenant its rows go from all tables; whoever begins anew, or reads holes, ends in the same rows."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from deploy.bootstrap import Database
from foldline.v1 import tenant_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import consumer
from shared.line.event_store import PURGED
from shared.projections import forget as forget_module
from shared.projections.rows import Rows
from tests.integration.shared.projections.test_projector import bank
from tests.support.fakes.line import ScriptedFeed, Store, StoreLine, delivery, uid
from tests.support.fakes.tables import checkpoint_row, dump, folded, projector, reached
from tests.support.system.working import running

GONE = "acme"


def ended() -> Store:
    """The bank of two tenants, the end of one of them, and an event of the other."""
    store = bank()
    store.append(GONE, "tenant", tenant_pb2.TenantClosed(), category="tenant")
    store.deposit("umbrella", uid(2), uid(1), 1, 218)
    return store


def purge(store: Store) -> None:
    """Leaves a hole in place of each event of the tenant but its last."""
    for event in store.events:
        if event.tenant == GONE and event.aggregate_type != "tenant":
            position, event_id = event.position, event.event_id
            event.Clear()
            event.MergeFrom(EventEnvelope(position=position, event_id=event_id, tenant=GONE, type=PURGED))


def expected(store: Store) -> dict[str, Any]:
    """The fold of what the other tenant did."""
    return folded([event for event in store.events if event.tenant != GONE])


@pytest.mark.parametrize("batch_max", [1, 3, 500])
async def test_the_rows_of_the_tenant_go_and_no_others(read_db: Database, batch_max: int) -> None:
    """In batches of any size, and again from the begin when the events are holes."""
    store = ended()
    for _ in range(2):
        async with running(projector(read_db, StoreLine(store), batch_max=batch_max)) as it:
            await reached(it, len(store.events))
        assert dump(read_db) == expected(store)
        purge(store)
        with psycopg.connect(read_db.owner) as owner:
            owner.execute("UPDATE checkpoints SET epoch = '', position = 0, event_id = ''")


async def test_a_projector_that_runs_forgets_what_it_has_in_memory(read_db: Database) -> None:
    """Rows, cached and parked, and what watchers were told of them."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
        broken = store.deposit(GONE, uid(2), uid(1), 1, 32)
        broken.payload = b"\xff"
        store.deposit(GONE, uid(2), uid(1), 1, 33)
        store.deposit("umbrella", uid(2), uid(1), 1, 218)
        await reached(it, len(store.events))
        with psycopg.connect(read_db.owner) as owner:
            assert owner.execute("SELECT DISTINCT tenant FROM parked_keys").fetchall() == [(GONE,)]
        store.append(GONE, "tenant", tenant_pb2.TenantClosed(), category="tenant")
        store.deposit("umbrella", uid(2), uid(1), 1, 219)
        await reached(it, len(store.events))
        assert it._tables.parked.known == {}
    assert dump(read_db) == expected(store)
    with psycopg.connect(read_db.owner) as owner:
        assert owner.execute("SELECT count(*) FROM parked_keys").fetchone() == (0,)
        assert owner.execute("SELECT count(*) FROM parked_events").fetchone() == (0,)
        told = owner.execute("SELECT changed FROM row_changes WHERE changed LIKE %s", (f"%{GONE}%",)).fetchall()
        assert told == []


async def test_ended_between_two_deletions_the_next_goes_on(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time; at each the projector dies. The checkpoint stays before the end until all is gone."""
    monkeypatch.setattr(forget_module, "FORGET_MAX", 1)
    store = ended()
    end = next(event.position for event in store.events if event.aggregate_type == "tenant")
    forget, gone = Rows.forget, 0

    async def dying(rows: Rows, connection: Any, tenant: str, limit: int) -> int:
        nonlocal gone
        count = await forget(rows, connection, tenant, limit)
        gone += count
        if count and gone in (2, 4, 7):
            raise psycopg.OperationalError("killed here")
        if count:
            assert checkpoint_row(read_db)[0] == end - 1
        return count

    monkeypatch.setattr(Rows, "forget", dying)
    monkeypatch.setattr(consumer, "RETRY_MIN_S", 0.01)
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
    assert gone > 7
    assert dump(read_db) == expected(store)
    with psycopg.connect(read_db.app) as app:
        counted: dict[str, int] = dict(
            app.execute("SELECT table_name, rows FROM forgotten_tenants WHERE tenant = %s", (GONE,)).fetchall()
        )
    mine = folded([event for event in store.events if event.tenant == GONE and event.aggregate_type != "tenant"])
    assert counted == {**{table: len(rows) for table, rows in mine.items()}, "parked": 0}  # what was rolled back is not


async def test_the_broker_may_bring_the_end_among_others(read_db: Database) -> None:
    """What comes in one delivery is applied in three parts."""
    store = ended()
    known = StoreLine(copy_of(store))
    more = [
        store.deposit("umbrella", uid(2), uid(1), 1, 219),
        store.append("third", "tenant", tenant_pb2.TenantClosed(), category="tenant"),
        store.deposit("umbrella", uid(2), uid(1), 1, 220),
    ]
    feed = ScriptedFeed([[delivery(*more)]])
    async with running(projector(read_db, known, feed, silence_s=5)) as it:
        await reached(it, len(store.events))
    assert dump(read_db) == expected(store)


def copy_of(store: Store) -> Store:
    """A store that knows nothing of what comes later."""
    other = Store(store.epoch)
    other.events = list(store.events)
    return other


async def test_tables_that_a_rebuild_has_replaced_lose_the_rows_too(read_db: Database) -> None:
    """They are kept until an operator drops them, but not what is gone."""
    store = bank()
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
    with psycopg.connect(read_db.owner) as owner:
        owner.execute("CREATE TABLE people__old (LIKE people)")
        owner.execute("SELECT secure_query_table('people__old', 'foldline_read_app', 'foldline_read_query')")
        owner.execute("ALTER TABLE people__old NO FORCE ROW LEVEL SECURITY")
        owner.execute("ALTER TABLE people NO FORCE ROW LEVEL SECURITY")
        owner.execute("INSERT INTO people__old SELECT * FROM people")
    store.append(GONE, "tenant", tenant_pb2.TenantClosed(), category="tenant")
    async with running(projector(read_db, StoreLine(store))) as it:
        await reached(it, len(store.events))
    with psycopg.connect(read_db.app) as app:
        assert app.execute("SELECT tenant FROM people__old").fetchall() == [("umbrella",)]
