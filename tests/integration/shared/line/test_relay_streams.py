"""Streams that are not as the relay left them: gone, behind, made by strangers, of another history."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from shared.line import broker
from shared.line.relay import Relay, Retention
from tests.support.checks.stream import epoch_of
from tests.support.fakes.relaying import STREAM, becomes, grow, in_step, read_copy, relaying
from tests.support.system.engines import Engines


async def test_a_new_relay_goes_on_where_the_stream_ends(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """The stream is the only checkpoint: what was appended while no relay ran is published by the next."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 5)
        await in_step(streams, write_db)
    grow(write_db, 5)
    async with relaying(write_db, nats_server.url):
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == list(range(1, 11))


async def test_a_stream_is_created_at_the_head_of_a_line_that_is_there_already(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """History is read from the store; the stream begins with what is new."""
    grow(write_db, 40)
    async with relaying(write_db, nats_server.url):
        copy = await in_step(streams, write_db)
        assert (copy.first, copy.end, copy.messages) == (41, 40, {})
        grow(write_db, 2)
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == [41, 42]


async def test_a_purged_stream_goes_on_with_the_next_position(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """A purge keeps the sequence, so what follows still is at its place; ids for de-duplication would lose it here."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 10)
        await in_step(streams, write_db)
        await streams.purge_stream(STREAM)
        grow(write_db, 3)
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == [11, 12, 13]


async def test_a_deleted_stream_comes_back_at_the_head(nats_server: Nats, write_db: Database, streams: JetStreamContext) -> None:
    """Even if nothing is appended any more: an idle relay looks, too."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 10)
        await in_step(streams, write_db)
        await streams.delete_stream(STREAM)
        copy = await in_step(streams, write_db)
        assert copy.first == 11
        grow(write_db, 1)
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == [11]


@pytest.mark.parametrize(
    ("first_seq", "own_epoch"),
    [pytest.param(None, False, id="no metadata"), pytest.param(500, True, id="beyond the head")],
)
async def test_a_stream_that_a_stranger_made_is_replaced(
    nats_server: Nats, write_db: Database, streams: JetStreamContext, first_seq: int | None, own_epoch: bool
) -> None:
    """A stream is ours if it says so and does not end beyond our line."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        metadata = {broker.STREAM_EPOCH: await epoch_of(streams)} if own_epoch else {}
        grow(write_db, 10)
        await in_step(streams, write_db)
        await streams.delete_stream(STREAM)
        await streams.add_stream(name=STREAM, subjects=[broker.stream_subjects(1)], first_seq=first_seq, metadata=metadata)
        grow(write_db, 5)
        copy = await in_step(streams, write_db)
        assert copy.first > 10
        assert await epoch_of(streams)
        grow(write_db, 1)
        copy = await in_step(streams, write_db)
    assert 16 in copy.messages


async def test_a_stream_with_rules_of_its_own_is_replaced(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """A stream that never acknowledges would hold a relay up for ever."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        epoch = await epoch_of(streams)
        await streams.delete_stream(STREAM)
        await streams.add_stream(
            name=STREAM, subjects=[broker.stream_subjects(1)], no_ack=True, metadata={broker.STREAM_EPOCH: epoch}
        )
        grow(write_db, 5)
        await becomes(streams, lambda config: not config.no_ack, 30)
        grow(write_db, 5)
        await in_step(streams, write_db)


async def test_a_strangers_message_at_the_end_does_not_stay(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """It takes a position that is not its own: the stream is made anew."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 10)
        await in_step(streams, write_db)
        await client.publish("foldline.events.1.acme.account.Forged", b"not an event")
        await client.flush()
        grow(write_db, 5)
        copy = await in_step(streams, write_db)
    assert all(message.data != b"not an event" for message in copy.messages.values())


async def test_strangers_messages_among_events_under_way_do_not_stay(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """A message that slips in between two publishes takes one event's place, and what comes after it fits again.

    The stream's end alone would look right. The refusal of that one publish tells.
    """
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        for _ in range(10):
            grow(write_db, 200)
            for _ in range(10):
                await client.publish("foldline.events.1.acme.account.Forged", b"not an event")
                await asyncio.sleep(0.001)
        await client.flush()
        copy = await in_step(streams, write_db)
        grow(write_db, 1)
        copy = await in_step(streams, write_db)
    assert 2001 in copy.messages


async def test_a_line_of_another_history_gets_a_stream_of_its_own(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """After a failover or a restore that changed the epoch, the old history's messages are gone from the stream."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        before = await epoch_of(streams)
        grow(write_db, 10)
        await in_step(streams, write_db)
    with psycopg.connect(write_db.owner) as connection:
        connection.execute("UPDATE line SET epoch = gen_random_uuid(), home = line_home()")
    async with relaying(write_db, nats_server.url):
        await becomes(streams, lambda config: (config.metadata or {})[broker.STREAM_EPOCH] != before)
        grow(write_db, 1)
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == [11]


async def test_a_store_that_was_restored_under_the_same_epoch_is_noticed_by_the_event_id(
    engines: Engines, nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """Same epoch, same length, other events: the last message's id differs from the line's."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 10)
        await in_step(streams, write_db)
    restored = engines.clone("write")
    with psycopg.connect(write_db.owner) as old, psycopg.connect(restored.owner) as new:
        row = old.execute("SELECT split_part(line_epoch(), '/', 1)::uuid").fetchone()
        new.execute("UPDATE line SET epoch = %s, home = line_home()", row)
    grow(restored, 12)
    async with relaying(restored, nats_server.url):
        copy = await in_step(streams, restored)
        assert copy.messages == {}
        grow(restored, 1)
        copy = await in_step(streams, restored)
    assert sorted(copy.messages) == [13]
    engines.drop(restored)


async def test_an_empty_stream_far_behind_is_made_anew_at_the_head(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """Nothing in it is worth keeping, and consumers read the store faster than it could be filled."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
    grow(write_db, 10_001)
    async with relaying(write_db, nats_server.url):
        copy = await in_step(streams, write_db)
    assert (copy.first, copy.messages) == (10_002, {})


async def test_new_limits_reach_a_stream_that_is_there(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """Retention is a setting of the relay; a change of it keeps the messages."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 3)
        await in_step(streams, write_db)
    stopping = asyncio.Event()
    relay = Relay(write_db.app, client, 1, Retention(age_max_s=3600.0, bytes_max=1024 * 1024))
    running = asyncio.create_task(relay.run(stopping))

    await becomes(streams, lambda config: (config.max_age, config.max_bytes) == (3600.0, 1024 * 1024))
    stopping.set()
    await running
    assert sorted((await read_copy(streams)).messages) == [1, 2, 3]
