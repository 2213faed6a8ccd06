"""Two projectors at once, and events in any order of delivery: each is applied once."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Group
from shared.line import checkpoint
from shared.line.checkpoint import Fenced
from shared.line.follower import FeedPage, Follower
from shared.platform.postgres import connect
from shared.projections import tables as tables_module
from shared.projections.tables import Tables
from tests.integration.shared.projections.test_projector import ALICE, BLUE, bank, batch_of, stands_at
from tests.support.fakes.line import ScriptedFeed, Store, StoreLine, delivery
from tests.support.fakes.tables import SHARD, SUMMARIES, dump, folded, projector, reached
from tests.support.system.working import running


async def test_a_paused_projector_that_wakes_up_is_refused(read_db: Database) -> None:
    """Two projectors on one checkpoint: the older finishes its batch after the newer, and writes nothing."""
    store, tables = bank(), Tables(SUMMARIES)
    begin = await stands_at(read_db, tables, store, 3)
    older = await connect(read_db.app, application_name="older")
    newer = await connect(read_db.app, application_name="newer")
    async with older, newer:
        batch = batch_of(store, 4, 6)
        await Tables(SUMMARIES).apply(newer, SHARD, begin, batch)
        after_newer = dump(read_db)
        with pytest.raises(Fenced):
            await tables.apply(older, SHARD, begin, batch)
        assert dump(read_db) == after_newer == folded(store.events[:6])
        # It reloads and goes on from where the other is.
        begin = await checkpoint.load(older, SUMMARIES.name, SHARD)
        await tables.apply(older, SHARD, begin, batch_of(store, 7, 20))
    assert dump(read_db) == folded(store.events)


@pytest.mark.parametrize("changes", [True, False], ids=["cached rows", "no row"])
async def test_the_fence_holds_where_nothing_is_read(read_db: Database, changes: bool) -> None:
    """A replaced projector that has all rows in its cache, or has none to change, finds out by its write, which does nothing."""
    store, tables = bank(), Tables(SUMMARIES)
    if not changes:
        store.append("acme", BLUE, account_pb2.AccountFrozen()).type = "bank.v1.Unknown"
    begin = await stands_at(read_db, tables, store, 5 if changes else len(store.events) - 1)
    batch = batch_of(store, begin.position + 1, begin.position + 1)
    older = await connect(read_db.app, application_name="older")
    newer = await connect(read_db.app, application_name="newer")
    async with older, newer:
        await Tables(SUMMARIES).apply(newer, SHARD, begin, batch)
        after_newer = dump(read_db)
        with pytest.raises(Fenced):
            await tables.apply(older, SHARD, begin, batch)
        assert dump(read_db) == after_newer == folded(store.events[: batch.after.position])
        at = await checkpoint.load(older, SUMMARIES.name, SHARD)
        assert at == batch.after
        if changes:
            await tables.apply(older, SHARD, at, batch_of(store, 7, 20))
            assert dump(read_db) == folded(store.events)


async def test_without_the_fence_the_same_write_would_have_doubled(read_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with a fence that matches any position, the older projector adds the money a second time."""
    store, tables = bank(), Tables(SUMMARIES)
    begin = await stands_at(read_db, tables, store, 5)
    monkeypatch.setattr(
        checkpoint,
        "MOVE",
        checkpoint.MOVE.replace("AND position = %s", "AND position >= 0 * %s").replace(
            "AND event_id = %s", "AND event_id <> %s || '!'"
        ),
    )
    # Statements are kept for the whole process: those of other tests have the fence, and these must not be kept.
    monkeypatch.setattr(tables_module, "_statement", tables_module._statement.__wrapped__)
    older = await connect(read_db.app, application_name="older")
    newer = await connect(read_db.app, application_name="newer")
    totals = Tables(Group("summaries", [each for each in SUMMARIES.projections if each.table.name == "person_totals"]))
    async with older, newer:
        batch = batch_of(store, 6, 6)
        await totals.apply(newer, SHARD, begin, batch)
        await totals.apply(older, SHARD, begin, batch)
    assert dump(read_db)["person_totals"] == [("acme", ALICE, "EUR", 0), ("acme", ALICE, "USD", 200)]
    assert folded(store.events[:6])["person_totals"] == [("acme", ALICE, "EUR", 0), ("acme", ALICE, "USD", 100)]


async def test_one_stopped_inside_its_transaction_holds_up_nobody_for_long(read_db: Database) -> None:
    """A projector that is frozen between its two statements holds the checkpoint's lock; the server takes it away."""
    store, tables = bank(), Tables(SUMMARIES)
    begin = await stands_at(read_db, tables, store, 3)
    frozen = await connect(read_db.app, application_name="frozen")
    newer = await connect(read_db.app, application_name="newer")
    async with newer:
        batch = batch_of(store, 4, 6)
        await frozen.execute("BEGIN")
        await frozen.execute(checkpoint.MOVE, checkpoint.move(SUMMARIES.name, SHARD, begin, batch.after))
        async with asyncio.timeout(20):
            await tables.apply(newer, SHARD, begin, batch)
    with pytest.raises(psycopg.Error):
        await frozen.execute("COMMIT")
    await frozen.close()
    assert dump(read_db) == folded(store.events[:6])


async def test_two_projectors_at_once_give_the_same_tables(read_db: Database) -> None:
    """Two that both believe they lead fence each other all the way, and each event is applied once."""
    store = bank()
    async with (
        running(projector(read_db, StoreLine(store), batch_max=1)) as first,
        running(projector(read_db, StoreLine(store), batch_max=2)) as second,
    ):
        await reached(first, len(store.events))
        await reached(second, len(store.events))
    assert dump(read_db) == folded(store.events)


@st.composite
def lines(draw: st.DrawFn) -> Store:
    """A line of up to a dozen events on a few rows."""
    store = Store()
    balances: dict[tuple[str, str], int] = {}
    for tenant in ("acme", "umbrella"):
        store.person(tenant, ALICE, "Alice")
        store.account(tenant, BLUE, ALICE)
        balances[tenant, BLUE] = 0
    for _ in range(draw(st.integers(0, 12))):
        tenant, amount = draw(st.sampled_from(["acme", "umbrella"])), draw(st.integers(1, 9))
        kind = draw(st.sampled_from(["deposit", "withdraw", "rename", "stranger"]))
        if kind == "rename":
            store.rename(tenant, ALICE, f"Alice {amount}")
        elif kind == "stranger":
            store.append(tenant, BLUE, account_pb2.AccountFrozen()).type = "bank.v1.Unknown"
        else:
            balances[tenant, BLUE] += amount if kind == "deposit" else -amount
            getattr(store, kind)(tenant, BLUE, ALICE, amount, balances[tenant, BLUE])
    return store


@st.composite
def deliveries(draw: st.DrawFn, events: list[EventEnvelope]) -> list[list[FeedPage]]:
    """Some of the events, in any order, any number of times, some under a wrong epoch or unreadable, in any pages and parts."""
    script: list[list[FeedPage]] = []
    for _ in range(draw(st.integers(0, 6))):
        part: list[FeedPage] = []
        for begin in draw(st.lists(st.integers(0, len(events) - 1), max_size=8)):
            kind = draw(st.sampled_from(["good"] * 8 + ["stale", "unreadable", "shuffled"]))
            page = events[begin : begin + draw(st.integers(1, 4))]
            part.append(
                delivery(*page) if kind == "good"
                else delivery(*page, epoch="another epoch") if kind == "stale"
                else delivery(*reversed(page)) if kind == "shuffled"
                else FeedPage("", ())
            )  # fmt: skip
        script.append(sorted(part, key=lambda it: it.events[0].position if it.events else 0) if draw(st.booleans()) else part)
    return script


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_the_fold_of_the_line(read_db: Database, data: st.DataObject) -> None:
    """Any batch sizes, repeats, reorderings, gaps and lies of the broker end in the same tables."""
    store = data.draw(lines())
    events = list(store.events)
    known = data.draw(st.integers(0, len(events)))
    batch_max, page = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    feed = ScriptedFeed(data.draw(deliveries(events)), of=store)
    with psycopg.connect(read_db.owner) as owner:
        owner.execute("TRUNCATE people, person_totals, accounts, movements, checkpoints")
    del store.events[known:]  # what the store holds when the follower begins; the rest comes while it runs

    async def grow() -> None:
        while len(store.events) < len(events):
            await asyncio.sleep(0.001)
            store.events.append(events[len(store.events)])

    async def play() -> None:
        tables, follower = Tables(SUMMARIES), Follower(StoreLine(store, page=page), feed, batch_max=batch_max, silence_s=0.001)
        growing = asyncio.create_task(grow())
        connection = await connect(read_db.app, application_name="test")
        async with connection:
            at = await checkpoint.load(connection, SUMMARIES.name, SHARD)
            async with asyncio.timeout(20), aclosing(follower.follow(at)) as batches:
                async for batch in batches:
                    assert len(batch.events) <= batch_max
                    await tables.apply(connection, SHARD, at, batch)
                    at = batch.after
                    if at.position == len(events):
                        break
        await growing

    asyncio.run(play())
    assert dump(read_db) == folded(events)
