"""How far a rebuild is, as operators watch it."""

from __future__ import annotations

import psycopg
import pytest

from foldline.v1 import projection_pb2
from shared.platform.identity import Role
from tests.support.fakes.tables import ACCOUNT_TABLES
from tests.support.system.query_service import Service, bank

PARK = """
INSERT INTO parked_keys (parked_id, consumer, shard, serves, tenant, table_name, key, row_id, error)
SELECT gen_random_uuid(), consumer, 1, false, 'acme', 'accounts', n, n, 'e' FROM generate_series(1, 10001) n,
  unnest(%s::text[]) consumer
"""
TABLES = [projection.table.name for projection in ACCOUNT_TABLES.projections]


async def test_the_progress_of_a_rebuild_is_streamed(service: Service) -> None:
    """Its place, the head that it is to reach, events a second and the time left; a rebuild that rests has no rate."""
    store = bank()
    await service.holds(store)
    stub, who = service.projections, service.of("acme", Role.OPERATOR)
    started = await stub.StartRebuild(projection_pb2.StartRebuildRequest(name="accounts"), metadata=who)
    version = started.rebuild.version
    with psycopg.connect(service.database.app, autocommit=True) as app:
        app.execute("SELECT prepare_rebuild('accounts', 1, %s, %s)", (version, TABLES))
        call = stub.WatchRebuild(projection_pb2.WatchRebuildRequest(name="accounts"), metadata=who, timeout=30)
        shown = (answer.rebuild async for answer in call)
        first = await anext(shown)
        assert (first.state, first.position, first.target_position) == (
            projection_pb2.REBUILD_STATE_FILLING,
            0,
            len(store.events),
        )
        assert (first.events_per_s, first.left_s) == (0, 0)
        app.execute("UPDATE checkpoints SET position = 5 WHERE name = %s", (f"accounts@{version}",))
        while not (moving := await anext(shown)).position:
            pass
        # Five events within one pause of the stream, which a busy machine may stretch.
        assert 0 < moving.events_per_s <= 5 / 0.25 * 1.2
        assert moving.left_s == pytest.approx((len(store.events) - 5) / moving.events_per_s)
        resting = await anext(shown)
        assert (resting.position, resting.events_per_s, resting.left_s) == (5, 0, 0)
        call.cancel()


async def test_of_parked_keys_ten_thousand_are_counted(service: Service) -> None:
    """Of the tables that serve and of those that a rebuild fills, however many there are."""
    await service.holds(bank())
    stub, who = service.projections, service.of("acme", Role.OPERATOR)
    started = await stub.StartRebuild(projection_pb2.StartRebuildRequest(name="accounts"), metadata=who)
    with psycopg.connect(service.database.app) as app:
        app.execute(PARK, (["accounts", f"accounts@{started.rebuild.version}"],))
    listed = await stub.ListProjections(projection_pb2.ListProjectionsRequest(), metadata=who)
    assert {it.name: it.parked for it in listed.projections} == {"accounts": 10_000, "people": 0, "transfers": 0, "users": 0}
    call = stub.WatchRebuild(projection_pb2.WatchRebuildRequest(name="accounts"), metadata=who, timeout=30)
    assert (await anext(aiter(call))).rebuild.parked == 10_000
    call.cancel()
