"""The relay while NATS or PostgreSQL is away or is not the right one, and two relays at once."""

from __future__ import annotations

import asyncio
import shutil

import psycopg
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from shared.line.broker_access import Broker, BrokerTooOld, connect
from shared.line.relay import Relay, WrongShard
from shared.platform import versions
from shared.platform.postgres import UnsafeDatabase
from tests.support.checks.stream import heard
from tests.support.fakes.relaying import STREAM, grow, in_step, messages_of, position_in, publish_late, read_copy, relaying
from tests.support.logs import capture_logs
from tests.support.system.engines import Engines


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
