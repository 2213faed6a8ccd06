"""The relay on real engines: whatever happens to the stream, it ends as a faithful copy of the line."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from foldline.v1.event_store_pb2 import ReadAllResponse
from shared.line import broker
from shared.line import relay as relay_module
from shared.line.broker_access import Broker, BrokerTooOld, connect
from shared.line.ends import CLOSED
from shared.line.event_store import envelope
from shared.line.relay import Relay, Retention, WrongShard
from shared.platform import versions
from shared.platform.postgres import UnsafeDatabase
from tests.support.checks.history import events_of
from tests.support.fakes.relaying import (
    GROW,
    STREAM,
    becomes,
    grow,
    in_step,
    messages_of,
    position_in,
    publish_late,
    read_copy,
    relaying,
)
from tests.support.logs import capture_logs
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually


@pytest.fixture
async def client(nats_server: Nats) -> AsyncIterator[Client]:
    """A connection of the test's own to a NATS of its own."""
    client = await connect(Broker(nats_server.url), "test")
    yield client
    await client.close()


@pytest.fixture
def streams(client: Client) -> JetStreamContext:
    """JetStream, as an operator sees it."""
    return client.jetstream()


async def heard(logs: list[Any], *what: str) -> None:
    """Returns when any of these was logged."""
    await eventually(lambda: any(line["event"] in what for line in logs), 30)


async def epoch_of(streams: JetStreamContext) -> str:
    """The history that the stream says it copies."""
    return ((await streams.stream_info(STREAM)).config.metadata or {})[broker.STREAM_EPOCH]


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
    assert max(map(sum, parts)) <= relay_module.BATCH_BYTES_MAX
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


async def test_two_relays_at_once_still_make_one_line(nats_server: Nats, write_db: Database, streams: JetStreamContext) -> None:
    """Without any lease: the stream accepts each position once, whoever sends it."""
    async with relaying(write_db, nats_server.url, "one") as one, relaying(write_db, nats_server.url, "two") as two:
        await in_step(streams, write_db)
        first = (await streams.stream_info(STREAM)).created
        for _ in range(30):
            grow(write_db, 40)
            await asyncio.sleep(0.01)
        copy = await in_step(streams, write_db, 30)
        assert one.published + two.published > 0
    assert sorted(copy.messages) == list(range(1, 1201))
    assert (await streams.stream_info(STREAM)).created == first, "they fought over the stream itself"


async def test_what_a_woken_relay_still_has_to_say_is_refused(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """The publishes of a relay that was stopped before sending them change nothing once another went on."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 20)
        await in_step(streams, write_db)
    late = await messages_of(write_db, 11, 20)

    assert await publish_late(client, late) == [False] * 10

    async with relaying(write_db, nats_server.url):
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == list(range(1, 21))


async def test_control_without_the_expected_sequence_they_would_be_doubled_and_out_of_order(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """The control of the test above: the very same publishes, minus the fence."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 20)
        await in_step(streams, write_db)
    late = await messages_of(write_db, 11, 20)

    assert await publish_late(client, late, fenced=False) == [True] * 10

    copy = await read_copy(streams)
    positions = [position_in(copy.messages[sequence].headers) for sequence in sorted(copy.messages)]
    assert positions == [*range(1, 21), *range(11, 21)]


async def test_a_refusal_is_heard_at_once(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext
) -> None:
    """Not after a time-out: the client library's own publish_async drops refusals, which is why we do not use it."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 1)
        await in_step(streams, write_db)
        await client.publish("foldline.events.1.acme.account.Forged", b"not an event")
        await client.flush()
        grow(write_db, 1)
        await in_step(streams, write_db, 2)


async def test_nats_may_be_restarted_under_load(nats_server: Nats, write_db: Database, streams: JetStreamContext) -> None:
    """With its store kept, the stream goes on without a gap."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        for end in (nats_server.kill, nats_server.stop):
            for _ in range(10):
                grow(write_db, 100)
            end()
            grow(write_db, 50)
            with capture_logs() as logs:
                await heard(logs, "relay_waits_for_broker", "relay_in_doubt")
            nats_server.start()
            await in_step(streams, write_db, 30)
        copy = await in_step(streams, write_db, 30)
    assert sorted(copy.messages) == list(range(1, 2101))


async def test_nats_may_come_back_empty(nats_server: Nats, write_db: Database, streams: JetStreamContext) -> None:
    """With its store wiped, a new stream begins at the head."""
    async with relaying(write_db, nats_server.url):
        await in_step(streams, write_db)
        grow(write_db, 100)
        await in_step(streams, write_db)
        nats_server.kill()
        shutil.rmtree(nats_server.folder / "streams")
        grow(write_db, 50)
        nats_server.start()
        copy = await in_step(streams, write_db, 30)
        assert copy.first == 151
        grow(write_db, 5)
        copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == list(range(151, 156))


async def test_postgresql_may_be_restarted_under_load(private_engines: Engines) -> None:
    """The relay waits for the database and goes on by itself."""
    database = private_engines.clone("write")
    client = await connect(Broker(private_engines.nats_url), "test")
    streams = client.jetstream()
    async with relaying(database, private_engines.nats_url):
        await in_step(streams, database)
        for end in (private_engines.postgres.kill, private_engines.postgres.stop):
            grow(database, 500)
            end()
            with capture_logs() as logs:
                await heard(logs, "relay_waits_for_database")
            private_engines.postgres.start()
            await in_step(streams, database, 30)
        grow(database, 500)
        copy = await in_step(streams, database, 30)
    await client.close()
    assert sorted(copy.messages) == list(range(1, 1501))


async def test_a_relay_waits_for_tables_that_are_not_there_yet(
    engines: Engines, nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """Processes start in any order: the migration may come later."""
    del engines
    with psycopg.connect(write_db.owner, autocommit=True) as connection:
        connection.execute("ALTER TABLE events RENAME TO events_later")
        with capture_logs() as logs:
            async with relaying(write_db, nats_server.url):
                await heard(logs, "relay_waits_for_database")
                with pytest.raises(NotFoundError):
                    await streams.stream_info(STREAM)
                connection.execute("ALTER TABLE events_later RENAME TO events")
                grow(write_db, 3)
                await in_step(streams, write_db)


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


async def test_a_relay_refuses_a_role_that_could_change_the_line(nats_server: Nats, write_db: Database, client: Client) -> None:
    """No waiting mends that, so it is raised."""
    del nats_server
    with pytest.raises(UnsafeDatabase):
        await Relay(write_db.owner, client, 1).run(asyncio.Event())


async def test_a_relay_refuses_a_nats_that_cannot_hold_the_stream(
    nats_server: Nats, write_db: Database, client: Client, streams: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, and before a stream is made that would begin elsewhere than the line."""
    del nats_server
    monkeypatch.setattr(versions, "NATS_MIN", (99, 0))
    with pytest.raises(BrokerTooOld, match=r"NATS_TOO_OLD: this is NATS 2\.\d+, and 99\.0 or newer is needed"):
        await Relay(write_db.app, client, 1).run(asyncio.Event())
    with pytest.raises(NotFoundError):
        await streams.stream_info(STREAM)


async def test_a_relay_refuses_another_shards_database(nats_server: Nats, write_db: Database, client: Client) -> None:
    """Else it would publish one shard's line under another's name."""
    del nats_server
    with pytest.raises(WrongShard):
        await Relay(write_db.app, client, 2).run(asyncio.Event())


async def test_a_hint_wakes_an_idle_relay(
    nats_server: Nats, write_db: Database, streams: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a notification an event is out at once, however seldom the relay polls. (The other tests send none.)"""
    monkeypatch.setattr(relay_module, "POLL_S", 60.0)
    async with relaying(write_db, nats_server.url) as relay:
        await in_step(streams, write_db)
        with psycopg.connect(write_db.admin, autocommit=True) as connection:
            listening = "SELECT 1 FROM pg_stat_activity WHERE query = 'LISTEN line' AND datname = current_database()"
            await eventually(lambda: connection.execute(listening).fetchone())
            grow(write_db, 1)
            connection.execute("NOTIFY line")
            await eventually(lambda: relay.published == 1)
            connection.execute("NOTIFY line")  # so that it sees at once that it shall stop


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


async def ends_at(streams: JetStreamContext, position: int) -> bool:
    """Whether the stream ends there."""
    try:
        return (await streams.stream_info(STREAM)).state.last_seq == position
    except NotFoundError:
        return False
