"""The relay on real engines: what it publishes, in what order and in what pages, of boxed events too."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import psycopg
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from foldline.v1.event_store_pb2 import ReadAllResponse
from shared.line import broker, ends
from shared.line import relay as relay_module
from shared.line.broker_access import Broker, connect
from shared.line.ends import CLOSED
from shared.line.event_store import envelope
from shared.line.relay import Relay
from tests.support.checks.history import events_of
from tests.support.checks.stream import ends_at, epoch_of
from tests.support.fakes.relaying import GROW, grow, in_step, read_copy, relaying
from tests.support.system.waiting import eventually


async def test_every_event_is_published_at_the_sequence_of_its_position(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """What comes out of the stream is what the store holds, envelope and payload, in the order of the line."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 700)
        copy = await in_step(streams, write_db)
    stored = await events_of(write_db)
    assert sorted(copy.messages) == list(range(1, 701))
    for event in stored:
        message = copy.messages[event.position]
        assert message.headers is not None
        assert message.data is not None
        wanted = broker.to_message(1, envelope(event))
        assert (message.subject, message.headers, message.data) == (wanted.subject, wanted.headers, wanted.payload)


async def test_the_same_events_come_in_pages(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """To whoever listens: as the store answers, field for field, in order, each page of the broker's size at the most."""
    raw: list[bytes] = []

    async def hear(message: Msg) -> None:
        raw.append(message.data)

    await client.subscribe(broker.pages_subject(1), cb=hear)
    await client.flush()
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 400)
        grow(write_db, 20, 200_000)
        await in_step(streams, write_db)
        epoch = await epoch_of(streams)
    await client.flush()
    pages = [ReadAllResponse.FromString(page) for page in raw]
    assert [event for page in pages for event in page.events] == [envelope(event) for event in await events_of(write_db)]
    assert {(page.epoch, page.shard) for page in pages} == {(epoch, 1)}
    assert max(map(len, raw)) <= client.max_payload
    assert len(pages) < 50


async def test_a_relay_ends_though_a_cancellation_was_swallowed(
    nats_server: Nats, write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it loses its lease in the moment in which an answer comes: another relay may lead by then."""
    entered = asyncio.Event()

    async def swallows(*_: object, **__: object) -> list[Any]:
        entered.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return []

    client = await connect(Broker(nats_server.url), "relay")
    relay = Relay(write_db.app, client, 1)
    task = asyncio.create_task(relay.run(asyncio.Event()))
    try:
        await eventually(lambda: relay.follows)
        monkeypatch.setattr(relay_module, "read_line", swallows)
        await asyncio.wait_for(entered.wait(), 20)
        task.cancel()
        await asyncio.wait({task}, timeout=20)
        assert task.cancelled()
    finally:
        await client.close()


async def test_large_events_go_out_in_parts_that_are_soon_through(
    nats_server: Nats, write_db: Database, streams: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part has a time limit, so its bytes are limited, however many events of the largest size follow each other."""
    parts: list[list[int]] = []
    real = Relay._publish

    async def publish(self: Relay, window: Any, epoch: str, events: Any) -> None:
        parts.append([len(event.payload) for event in events])
        await real(self, window, epoch, events)

    monkeypatch.setattr(Relay, "_publish", publish)
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 30, 250_000)
        grow(write_db, 20)
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == list(range(1, 51))
    assert max(map(sum, parts)) <= ends.BATCH_BYTES_MAX
    assert max(map(len, parts)) >= 8


async def test_the_end_of_a_tenant_among_other_events_takes_its_messages(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """Events before and behind it are read with it; those of the tenant before it go, and the rest is there."""
    grow(write_db, 1)
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        with psycopg.connect(write_db.owner) as connection:
            for kind in ("acme", "other", "acme", "end", "acme", "other", "acme"):
                added = GROW.replace("'acme'", "'other'") if kind == "other" else GROW
                connection.execute(added.replace("bank.v1.MoneyDeposited", CLOSED) if kind == "end" else added, (20, 1))
        await eventually(lambda: ends_at(streams, 8))
    assert sorted((await read_copy(streams)).messages) == [3, 5, 6, 7, 8]


async def test_events_that_were_boxed_before_they_were_published(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """The stream takes no gap, so it is created anew at the head: consumers read from the store what it does not bring."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 3)
        await in_step(streams, write_db)
    grow(write_db, 5)
    box(write_db, 5)
    box(write_db, 7)
    async with relaying(write_db, nats_server.url):
        await eventually(lambda: ends_at(streams, 8), 30, every_s=0.05)
        grow(write_db, 2)
        await eventually(lambda: ends_at(streams, 10), 30, every_s=0.05)
        copy = await read_copy(streams)
    assert sorted(copy.messages) == [9, 10]


async def test_an_event_that_is_boxed_is_no_reason_to_make_the_stream_anew(
    nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """A new relay compares the event at the stream's end, although that is in the archive by now."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 3)
        await in_step(streams, write_db)
    grow(write_db, 1)
    box(write_db, 3)
    async with relaying(write_db, nats_server.url):
        await eventually(lambda: ends_at(streams, 4), 30, every_s=0.05)
        copy = await read_copy(streams)
    assert sorted(copy.messages) == [1, 2, 3, 4]


def box(database: Database, position: int) -> None:
    """Takes an event out of the tables, as boxing its aggregate does."""
    with psycopg.connect(database.owner) as connection:
        connection.execute("SELECT set_config('foldline.boxing', 'on', true)")
        connection.execute(
            """WITH gone AS (DELETE FROM events WHERE position = %s RETURNING *), box AS (
                 INSERT INTO boxes (tenant, category, aggregate_id, version, location, chain, boxed_at)
                 SELECT tenant, category, aggregate_id, version, '', '', now() FROM gone RETURNING box_id)
               INSERT INTO boxed_events (position, event_id, box_id) SELECT position, event_id, box_id FROM gone, box""",
            (position,),
        )
