"""How soon the relay publishes what it is told of, and when it stops waiting for acknowledgements; the notifier that tells it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from shared.line import relay as relay_module
from shared.line import window
from shared.line.notifier import Notifier, pause_s
from shared.line.window import Window
from tests.support.fakes.relaying import grow, in_step, reaches, relaying
from tests.support.system.waiting import eventually

_LISTENING = "SELECT 1 FROM pg_stat_activity WHERE query = 'LISTEN line' AND datname = current_database()"


@contextlib.asynccontextmanager
async def _telling(write_db: Database) -> AsyncIterator[psycopg.Connection]:
    """A connection for notifications, once the relay listens."""
    with psycopg.connect(write_db.admin, autocommit=True) as connection:
        await eventually(lambda: connection.execute(_LISTENING).fetchone())
        yield connection


async def test_a_hint_wakes_an_idle_relay(
    nats_server: Nats, write_db: Database, streams: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a notification an event is out at once, however seldom the relay polls. (Most other tests send none.)"""
    monkeypatch.setattr(relay_module, "POLL_S", 60.0)
    async with relaying(write_db, nats_server.url) as relay:
        await in_step(streams, write_db)
        async with _telling(write_db) as connection:
            grow(write_db, 1)
            connection.execute("NOTIFY line")
            await eventually(lambda: relay.published == 1)
            connection.execute("NOTIFY line")  # so that it sees at once that it shall stop


async def test_events_behind_a_hint_do_not_wait_for_the_acknowledgement_of_those_before(
    nats_server: Nats, write_db: Database, streams: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the broker's answers are under way, the next event goes out; all of them count when they have come."""
    monkeypatch.setattr(relay_module, "POLL_S", 60.0)
    monkeypatch.setattr(window, "ACK_TIMEOUT_S", 60.0)
    answered = asyncio.Event()
    real = Window._on_reply

    async def later(self: Window, message: Msg) -> None:
        await answered.wait()
        await real(self, message)

    monkeypatch.setattr(Window, "_on_reply", later)
    async with relaying(write_db, nats_server.url) as relay:
        await in_step(streams, write_db)
        async with _telling(write_db) as connection:
            for position in (1, 2, 3):
                grow(write_db, 1)
                connection.execute("NOTIFY line")
                await reaches(streams, position)
            assert relay.position == relay.published == 0
            answered.set()
            await eventually(lambda: relay.position == relay.published == 3)
            connection.execute("NOTIFY line")  # so that it sees at once that it shall stop


async def test_hints_do_not_keep_a_relay_waiting_for_a_broker_that_does_not_answer(
    nats_server: Nats, write_db: Database, streams: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for an answer runs from the publish, however often there is more to publish: then the stream's end is read."""
    monkeypatch.setattr(window, "ACK_TIMEOUT_S", 1.0)

    async def never(self: Window, message: Msg) -> None:
        pass

    monkeypatch.setattr(Window, "_on_reply", never)
    async with relaying(write_db, nats_server.url) as relay:
        await in_step(streams, write_db)
        async with _telling(write_db) as connection:

            def found() -> bool:
                grow(write_db, 1)
                connection.execute("NOTIFY line")
                return relay.position > 0

            await eventually(found, every_s=0.1)
        await in_step(streams, write_db)


async def test_the_notifier_tells_each_head_that_is_the_last(write_db: Database) -> None:
    """Whoever listens hears of a commit, and of the last of several commits that come at once."""
    notifier = Notifier(write_db.app)
    running = asyncio.create_task(notifier.run())
    try:
        async with await psycopg.AsyncConnection.connect(write_db.app, autocommit=True) as connection:
            await connection.execute("LISTEN line")
            for heads in ((1,), (2,), (3, 4, 700), (701,)):
                for head in heads:
                    notifier.notify(head)
                async for told in connection.notifies(timeout=30):
                    if told.payload == str(heads[-1]):
                        break
                else:
                    pytest.fail(f"{heads[-1]} was not told")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_a_pause_follows_a_notification_that_is_as_long_as_its_events_are_many() -> None:
    """A lone event's hint holds up the next one for a millisecond, a large batch's for five."""
    assert [pause_s(events) for events in (1, 2, 5, 500)] == [0.001, 0.002, 0.005, 0.005]
