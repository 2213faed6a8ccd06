"""The projector on a real NATS: it follows the stream at once, and whatever the broker does, the tables are the fold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker
from shared.line.broker_access import Broker, connect
from shared.line.checkpoint import Checkpoint
from shared.line.follower import FeedMessage, Follower
from shared.line.sources import StreamFeed
from tests.support.fakes.line import EPOCH, Store, StoreLine, uid
from tests.support.fakes.tables import dump, folded, projector, reached, running
from tests.support.system.waiting import eventually

STREAM = broker.stream_name(1)
# Long enough that what comes sooner came through the stream.
SILENCE_S = 30.0


@pytest.fixture
async def client(nats_server: Nats) -> AsyncIterator[Client]:
    """A connection of the test's own to a NATS of its own."""
    client = await connect(Broker(nats_server.url), "test")
    yield client
    await client.close()


@pytest.fixture
async def streams(client: Client) -> JetStreamContext:
    """A NATS with an empty stream of shard 1."""
    streams = client.jetstream()
    await make(streams)
    return streams


async def make(streams: JetStreamContext, first: int = 1) -> None:
    """Makes the stream afresh, beginning at a position, as a relay would."""
    with suppress(NotFoundError):
        await streams.delete_stream(STREAM)
    await streams.add_stream(StreamConfig(name=STREAM, subjects=[broker.stream_subjects(1)], first_seq=first))


async def publish(streams: JetStreamContext, *envelopes: EventEnvelope, epoch: str = EPOCH) -> None:
    """Publishes, as the relay does but for the expected sequence: this broker takes anything."""
    for envelope in envelopes:
        message = broker.to_message(1, epoch, envelope)
        headers = {name: text for name, text in message.headers.items() if name != broker.EXPECTED_LAST_SEQUENCE}
        await streams.publish(message.subject, message.payload, headers=headers)


@pytest.fixture
async def feed(nats_server: Nats) -> AsyncIterator[StreamFeed]:
    """The feed under test."""
    feed = StreamFeed(Broker(nats_server.url), 1, "projector-test")
    yield feed
    await feed.close()


async def connected(feed: StreamFeed, position: int) -> None:
    """Waits until the feed is open."""

    async def opened() -> bool:
        with suppress(Exception):
            await feed.open(position)
            return True
        return False

    await eventually(opened, 30)


async def test_what_is_published_arrives_as_it_was_stored(streams: JetStreamContext, feed: StreamFeed) -> None:
    """The envelope that a consumer gets is the store's, field for field, from the wanted position on."""
    store = Store()
    for number in range(5):
        store.person("acme", uid(number), f"Person {number} é")
        store.events[-1].metadata.user_id = "tester"
    await publish(streams, *store.events)
    await connected(feed, 3)
    got: list[FeedMessage] = []
    while len(got) < 3:
        got.extend(await feed.fetch(5))
    assert [(it.epoch, it.envelope) for it in got] == [(EPOCH, event) for event in store.events[2:]]
    assert await feed.fetch(0.05) == []


async def test_a_thousand_arrive_and_then_one_at_once(streams: JetStreamContext, feed: StreamFeed) -> None:
    """More than one request's worth comes without a pause, and a single event not at the request's end."""
    store = Store()
    for number in range(1201):
        store.person("acme", uid(number), "somebody")
    await connected(feed, 1)
    await asyncio.gather(*(publish(streams, event) for event in store.events[:1]))
    for event in store.events[1:1200]:
        await publish(streams, event)
    positions: list[int] = []
    while len(positions) < 1200:
        positions.extend(it.envelope.position for it in await feed.fetch(5) if it.envelope)
    assert positions == list(range(1, 1201))
    waiting = asyncio.create_task(feed.fetch(30))
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    await publish(streams, store.events[1200])
    assert len(await waiting) == 1
    assert time.monotonic() - begun < 15


async def test_the_tables_follow_the_stream_at_once(streams: JetStreamContext, feed: StreamFeed, read_db: Database) -> None:
    """An event is in the tables long before the next look at the store."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await publish(streams, *store.events)
    await connected(feed, 1)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=SILENCE_S)) as it:
        await reached(it, 1)
        reads = await settled(store)
        for number in range(2, 6):
            begun = time.monotonic()
            await publish(streams, store.rename("acme", uid(1), f"Alice {number}"))
            await reached(it, number)
            assert time.monotonic() - begun < 5
        assert store.reads == reads
    assert dump(read_db) == folded(store.events)


async def settled(store: Store) -> int:
    """Waits until the follower listens: until the store was not read for a while."""
    reads = -1
    while reads != store.reads:
        reads = store.reads
        await asyncio.sleep(0.5)
    return reads


async def test_repeats_reorderings_and_gaps_of_the_stream(streams: JetStreamContext, feed: StreamFeed, read_db: Database) -> None:
    """A stream whose sequences do not fit its positions is no help, and does no harm."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    store.account("acme", uid(2), uid(1))
    balance = 0
    async with running(projector(read_db, StoreLine(store), feed, silence_s=0.05)) as it:
        await reached(it, 3)
        for number in range(10):
            balance += number + 1
            events = [store.deposit("acme", uid(2), uid(1), number + 1, balance), store.rename("acme", uid(1), f"A {number}")]
            await publish(streams, *reversed(events), *events[: number % 3])
        await reached(it, len(store.events))
    assert dump(read_db) == folded(store.events)


@pytest.mark.parametrize("what", ["purged", "deleted", "recreated"])
async def test_a_stream_that_is_spoilt(streams: JetStreamContext, feed: StreamFeed, read_db: Database, what: str) -> None:
    """Purged, deleted or recreated at the head under a running projector: it goes on."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await publish(streams, *store.events)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=0.2)) as it:
        await reached(it, 1)
        for number in range(3):
            store.rename("acme", uid(1), f"Alice {number}")
        if what == "purged":
            await publish(streams, *store.events[1:])
            await streams.purge_stream(STREAM)
        elif what == "deleted":
            await streams.delete_stream(STREAM)
        else:
            await make(streams, first=4)
            await publish(streams, store.events[3])
        await reached(it, 4)
        await make(streams, first=5)
        await publish(streams, store.rename("acme", uid(1), "Alice again"))
        await reached(it, 5)
    assert dump(read_db) == folded(store.events)


async def test_a_stranger_on_the_subject(streams: JetStreamContext, client: Client, feed: StreamFeed, read_db: Database) -> None:
    """What no relay published is not applied; the store says what belongs there."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await publish(streams, *store.events)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=0.2)) as it:
        await reached(it, 1)
        await client.jetstream().publish("foldline.events.1.acme.person.PersonRenamed", b"\xff")
        store.rename("acme", uid(1), "Alice Cooper")
        await reached(it, 2)
    assert dump(read_db) == folded(store.events)


async def test_a_broker_that_is_killed_and_comes_back(
    nats_server: Nats, streams: JetStreamContext, feed: StreamFeed, read_db: Database
) -> None:
    """While it is away the tables go on from the store alone; when it is back they follow it at once again."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await publish(streams, *store.events)
    async with running(projector(read_db, StoreLine(store), feed, silence_s=0.1)) as it:
        await reached(it, 1)
        nats_server.kill()
        store.rename("acme", uid(1), "Alice, without a broker")
        await reached(it, 2)
        nats_server.start()

        async def back() -> bool:
            with suppress(Exception):
                await make(streams, first=3)
                return True
            return False

        await eventually(back, 30)
        await publish(streams, store.rename("acme", uid(1), "Alice, with one"))
        await reached(it, 3)
    assert dump(read_db) == folded(store.events)


async def test_it_starts_without_a_broker(nats_server: Nats, read_db: Database) -> None:
    """The tables do not wait for NATS."""
    nats_server.stop()
    store = Store()
    store.person("acme", uid(1), "Alice")
    feed = StreamFeed(Broker(nats_server.url), 1, "projector-test")
    try:
        async with running(projector(read_db, StoreLine(store), feed, silence_s=0.1)) as it:
            await reached(it, 1)
            store.rename("acme", uid(1), "Alice Cooper")
            await reached(it, 2)
    finally:
        await feed.close()
    assert dump(read_db) == folded(store.events)


async def test_an_idle_stream_is_not_asked_for_a_new_consumer(streams: JetStreamContext, feed: StreamFeed) -> None:
    """Silence costs a look at the store, no more."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    follower = Follower(StoreLine(store), feed, silence_s=0.05)

    async def follow() -> None:
        async with aclosing(follower.follow(Checkpoint())) as batches:
            async for _ in batches:
                pass

    following = asyncio.create_task(follow())
    await eventually(lambda: store.reads > 20, 30)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert len(await streams.consumers_info(STREAM)) == 1


async def test_a_cancelled_follower_ends_whatever_it_was_doing(nats_server: Nats, streams: JetStreamContext) -> None:
    """A lost lease ends the work: nats-py swallows a cancellation that meets it in a publish, and we do not."""
    store = Store()
    store.person("acme", uid(1), "Alice")
    await publish(streams, *store.events)

    async def follow(feed: StreamFeed) -> None:
        async with aclosing(Follower(StoreLine(store), feed, silence_s=0.005).follow(Checkpoint())) as batches:
            async for _ in batches:
                pass

    for number in range(60):
        feed = StreamFeed(Broker(nats_server.url), 1, "projector-test")
        following = asyncio.create_task(follow(feed))
        await asyncio.sleep(number * 0.001)
        following.cancel()
        done, _ = await asyncio.wait({following}, timeout=30)
        assert done, f"cancelled after {number} ms, it goes on"
        await feed.close()
