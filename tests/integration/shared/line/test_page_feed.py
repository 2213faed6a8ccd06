"""The projector on a real NATS: it follows the pages at once, and whatever the broker does, the tables are the fold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest
from nats.aio.client import Client

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker, sources
from shared.line.broker_access import Broker, connect
from shared.line.checkpoint import Checkpoint
from shared.line.follower import FeedAway, FeedPage, Follower
from shared.line.sources import PageFeed
from tests.support.fakes.line import EPOCH, Store, StoreLine, uid
from tests.support.fakes.tables import dump, folded, projector, reached
from tests.support.system.waiting import eventually
from tests.support.system.working import running

# Long enough that what comes sooner came through the broker.
SILENCE_S = 30.0


async def publish(client: Client, *envelopes: EventEnvelope, epoch: str = EPOCH) -> None:
    """Publishes a page, as the relay does."""
    for page in broker.to_pages(1, epoch, envelopes, client.max_payload):
        await client.publish(broker.pages_subject(1), page)
    await client.flush()
    await client.flush()  # nats-py's PING may overtake what was published; the second does not


@pytest.fixture
async def feed(nats_server: Nats) -> AsyncIterator[PageFeed]:
    """The feed under test."""
    feed = PageFeed(Broker(nats_server.url), 1, "projector-test")
    yield feed
    await feed.close()


async def opened(feed: PageFeed) -> None:
    """Waits until the feed is open."""

    async def opens() -> bool:
        with suppress(FeedAway):
            await feed.open()
            return True
        return False

    await eventually(opens, 30)


def store_of(count: int) -> Store:
    """A line of so many events."""
    store = Store()
    for number in range(count):
        store.person("acme", uid(number), f"Person {number} é")
        store.events[-1].metadata.user_id = "tester"
    return store


async def taken(feed: PageFeed, events: int) -> list[FeedPage]:
    """The next pages, with so many events in all."""
    pages: list[FeedPage] = []
    while sum(len(page.events) for page in pages) < events:
        more = await feed.fetch(5)
        assert more
        pages += more
    return pages


async def test_what_is_published_arrives_as_it_was_stored(client: Client, feed: PageFeed) -> None:
    """The envelopes that a consumer gets are the store's, field for field, from the moment on when the feed was opened."""
    store = store_of(6)
    await publish(client, *store.events[:2])
    await opened(feed)
    await publish(client, *store.events[2:5])
    await publish(client, store.events[5])
    got = await taken(feed, 4)
    assert [(it.epoch, list(it.events)) for it in got] == [(EPOCH, store.events[2:5]), (EPOCH, store.events[5:])]
    assert await feed.fetch(0.05) == []


async def test_a_page_comes_at_once(client: Client, feed: PageFeed) -> None:
    """Whoever waits is woken."""
    store = store_of(1)
    await opened(feed)
    waiting = asyncio.create_task(feed.fetch(30))
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    await publish(client, *store.events)
    assert len(await waiting) == 1
    assert time.monotonic() - begun < 15


async def test_pages_are_handed_out_about_as_many_as_a_batch_has(client: Client, feed: PageFeed) -> None:
    """So a consumer that is behind decodes what it is about to apply, and the rest waits as bytes."""
    store = store_of(1400)
    await opened(feed)
    for begin in range(0, 1400, 200):
        await publish(client, *store.events[begin : begin + 200])
    await eventually(lambda: len(feed._waiting) == 7)
    fetched = [[len(page.events) for page in await feed.fetch(5)] for _ in range(3)]
    assert fetched == [[200] * 3, [200] * 3, [200]]


async def test_pages_that_nobody_fetches_are_dropped(client: Client, feed: PageFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow consumer costs a bounded amount of memory. It sees a gap, and reads the store."""
    monkeypatch.setattr(sources, "WAITING_BYTES_MAX", 20_000)
    store = store_of(1000)
    await opened(feed)
    for event in store.events:
        await publish(client, event)
    await eventually(lambda: feed._waiting and feed._read(feed._waiting[-1]).events[0].position == 1000)
    assert sum(map(len, feed._waiting)) < 21_000
    assert feed._read(feed._waiting[0]).events[0].position > 1


async def test_a_flood_of_empty_pages_is_bounded(client: Client, feed: PageFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory though it has no bytes, and the first sends the reader to the store: the others are not looked at."""
    monkeypatch.setattr(sources, "WAITING_BYTES_MAX", 20_000)
    await opened(feed)
    most = 0
    for _ in range(10):
        for _ in range(50):
            await client.publish(broker.pages_subject(1), b"")
        await client.flush()
        await client.flush()
        await eventually(lambda: feed._waiting)
        most = max(most, len(feed._waiting))
    assert most <= 20_000 // sources.WAITING_PAGE_BYTES + 1
    assert await feed.fetch(5) == [FeedPage("", ())]


async def test_the_tables_follow_the_pages_at_once(client: Client, feed: PageFeed, read_db: Database) -> None:
    """An event is in the tables long before the next look at the store."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await opened(feed)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=SILENCE_S)) as it:
        await reached(it, 1)
        for number in range(2, 6):
            begun = time.monotonic()
            await publish(client, store.rename("acme", uid(1), f"Alice {number}"))
            await reached(it, number)
            assert time.monotonic() - begun < 5
        assert store.reads == 1
    assert dump(read_db) == folded(store.events)


async def test_what_is_published_while_the_store_is_read_is_not_missed(client: Client, feed: PageFeed) -> None:
    """The feed is open before: so nothing falls between the end of the reading and the first page."""
    store = store_of(3)
    later = store.events.pop()
    await opened(feed)
    async with (
        asyncio.timeout(20),
        aclosing(Follower(StoreLine(store), feed, silence_s=SILENCE_S).follow(Checkpoint())) as batches,
    ):
        assert [event.position for event in (await anext(batches)).events] == [1, 2]
        await publish(client, later)  # the follower has read the store, and does not listen yet
        assert [event.position for event in (await anext(batches)).events] == [3]
    assert store.reads == 1


async def test_repeats_reorderings_and_gaps(client: Client, feed: PageFeed, read_db: Database) -> None:
    """Pages out of order are no help, and do no harm."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    store.account("acme", uid(2), uid(1))
    balance = 0
    async with running(projector(read_db, StoreLine(store), feed, silence_s=0.05)) as it:
        await reached(it, 3)
        for number in range(10):
            balance += number + 1
            events = [store.deposit("acme", uid(2), uid(1), number + 1, balance), store.rename("acme", uid(1), f"A {number}")]
            await publish(client, *reversed(events), *events[: number % 3])
        await reached(it, len(store.events))
    assert dump(read_db) == folded(store.events)


async def test_a_stranger_on_the_subject(client: Client, feed: PageFeed, read_db: Database) -> None:
    """What no relay published is not applied; the store says what belongs there."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await opened(feed)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=SILENCE_S)) as it:
        await reached(it, 1)
        forged = Store()
        forged.person("acme", uid(1), "Mallory")
        true = store.rename("acme", uid(1), "Alice Cooper")
        lie = forged.rename("acme", uid(1), "Mallory")
        far = EventEnvelope(position=10**9)
        other_shard = broker.to_pages(2, EPOCH, [lie], client.max_payload)[0]
        for page in (
            b"\xff",
            b"",
            other_shard,
            broker.to_pages(1, EPOCH, [far], 1)[0],
            broker.to_pages(1, "another/1", [lie], 1)[0],
        ):
            await client.publish(broker.pages_subject(1), page)
        await reached(it, 2)
        await publish(client, true)
        await publish(client, store.rename("acme", uid(1), "Alice"))
        await reached(it, 3)
    assert dump(read_db) == folded(store.events)


async def test_a_broker_that_is_killed_and_comes_back(
    nats_server: Nats, client: Client, feed: PageFeed, read_db: Database
) -> None:
    """While it is away the tables go on from the store alone; when it is back they follow it at once again."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await opened(feed)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=0.1)) as it:
        await reached(it, 1)
        nats_server.kill()
        store.rename("acme", uid(1), "Alice, without a broker")
        await reached(it, 2)
        nats_server.start()
        await opened(feed)
        await eventually(lambda: client.is_connected, 30)
        await publish(client, store.rename("acme", uid(1), "Alice, with one"))
        await reached(it, 3)
    assert dump(read_db) == folded(store.events)


async def test_it_starts_without_a_broker(nats_server: Nats, read_db: Database) -> None:
    """The tables do not wait for NATS."""
    nats_server.stop()
    store = Store()
    store.person("acme", uid(1), "Alice")
    feed = PageFeed(Broker(nats_server.url), 1, "projector-test")
    try:
        async with running(projector(read_db, StoreLine(store), feed, silence_s=0.1)) as it:
            await reached(it, 1)
            store.rename("acme", uid(1), "Alice Cooper")
            await reached(it, 2)
    finally:
        await feed.close()
    assert dump(read_db) == folded(store.events)


async def test_a_cancelled_follower_ends_whatever_it_was_doing(nats_server: Nats, client: Client) -> None:
    """A lost lease ends the work: nats-py swallows a cancellation that meets it in a subscribe, and we do not."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await publish(client, *store.events)

    async def follow(feed: PageFeed) -> None:
        async with aclosing(Follower(StoreLine(store), feed, silence_s=0.005).follow(Checkpoint())) as batches:
            async for _ in batches:
                pass

    for number in range(60):
        feed = PageFeed(Broker(nats_server.url), 1, "projector-test")
        following = asyncio.create_task(follow(feed))
        await asyncio.sleep(number * 0.001)
        following.cancel()
        done, _ = await asyncio.wait({following}, timeout=30)
        assert done, f"cancelled after {number} ms, it goes on"
        await feed.close()


async def test_who_waits_for_a_broker_that_does_not_answer_ends_when_told() -> None:
    """Whenever that is: nats-py swallows a cancellation that meets it as a connection is made, and would go on for ever."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for steps in range(20):
            connecting = asyncio.create_task(connect(Broker(url), "test"))
            for _ in range(steps):
                await asyncio.sleep(0)
            connecting.cancel()
            done, _ = await asyncio.wait({connecting}, timeout=30)
            assert done, f"cancelled after {steps} steps, it goes on"
