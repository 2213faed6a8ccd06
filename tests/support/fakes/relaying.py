"""A running relay, the line that it copies, and the contents of its stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import nats.errors
import psycopg
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg, StreamConfig
from nats.js.errors import NotFoundError

from deploy.bootstrap import Database
from shared.line import broker
from shared.line.broker_access import Broker, connect
from shared.line.event_store import envelope, read_line
from shared.line.relay import Relay
from tests.support.checks.history import connected, events_of
from tests.support.system.waiting import eventually

STREAM = broker.stream_name(1)

# Any bytes will do for a payload: a relay does not look at it. The metadata has a command id (field 1, text "c").
GROW = """
INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
SELECT head + n, gen_random_uuid(), 'acme', 'account', 'a-' || (head + n), 1, 'bank.v1.MoneyDeposited',
       convert_to(rpad('payload ' || (head + n), %s), 'UTF8'), clock_timestamp(), '\\x0a0163'
FROM generate_series(1, %s) n, (SELECT coalesce(max(position), 0) AS head FROM events) line
"""


def grow(database: Database, events: int, size: int = 20) -> None:
    """Appends events of `size` bytes to the line, as its owner can."""
    with psycopg.connect(database.owner) as connection:
        connection.execute(GROW, (size, events))


@dataclass(frozen=True, slots=True)
class Copy:
    """A stream: where it begins and ends, and the messages that it has."""

    first: int
    end: int
    messages: dict[int, RawStreamMsg]


async def read_copy(streams: JetStreamContext) -> Copy:
    """All that is in the stream."""
    state = (await streams.stream_info(STREAM)).state

    async def read(sequence: int) -> RawStreamMsg | None:
        try:
            return await streams.get_msg(STREAM, sequence)
        except NotFoundError:
            return None

    found = {sequence: await read(sequence) for sequence in range(max(state.first_seq, 1), state.last_seq + 1)}
    return Copy(state.first_seq, state.last_seq, {number: message for number, message in found.items() if message})


async def faithful(streams: JetStreamContext, database: Database) -> Copy:
    """The stream, if it ends with the line and every message in it is the event of its position; else AssertionError."""
    try:
        copy = await read_copy(streams)
    except nats.errors.Error as error:  # no stream, or no server
        raise AssertionError(str(error)) from error
    events = {event.position: event for event in await events_of(database)}
    assert copy.end == len(events)
    for sequence, message in copy.messages.items():
        assert message.headers is not None, f"at {sequence} is a stranger's message"
        assert message.headers.get(broker.ID) == str(events[sequence].event_id), f"at {sequence}"
        assert message.data == events[sequence].payload
    return copy


async def in_step(streams: JetStreamContext, database: Database, deadline_s: float = 30) -> Copy:
    """Waits until the stream is a faithful copy that ends with the line."""
    return await eventually(lambda: faithful(streams, database), deadline_s, every_s=0.05)


def position_in(headers: Mapping[str, str] | None) -> int:
    """The position of an event of `grow`, as a message of the stream tells it."""
    return int((headers or {})["ce-subject"].removeprefix("a-"))


async def reaches(streams: JetStreamContext, position: int, deadline_s: float = 30) -> int:
    """Waits until the stream has the position; returns where it ends."""

    async def look() -> int:
        try:
            end = (await streams.stream_info(STREAM)).state.last_seq
        except nats.errors.Error as error:
            raise AssertionError(str(error)) from error
        assert end >= position
        return end

    return await eventually(look, deadline_s)


async def becomes(streams: JetStreamContext, check: Callable[[StreamConfig], bool], deadline_s: float = 30) -> StreamConfig:
    """Waits until there is a stream whose configuration passes the check, and returns that."""

    async def look() -> StreamConfig:
        try:
            config = (await streams.stream_info(STREAM)).config
        except nats.errors.Error as error:
            raise AssertionError(str(error)) from error
        assert check(config), config
        return config

    return await eventually(look, deadline_s)


@asynccontextmanager
async def relaying(database: Database, nats_url: str, name: str = "relay") -> AsyncIterator[Relay]:
    """A running relay without a lease. At the end it drains, as after SIGTERM."""
    client = await connect(Broker(nats_url), name)
    stopping = asyncio.Event()
    relay = Relay(database.app, client, 1)
    running = asyncio.create_task(relay.run(stopping))
    try:
        yield relay
    finally:
        stopping.set()
        try:
            await asyncio.wait_for(running, 10)
        finally:
            await client.close()


async def messages_of(database: Database, first: int, last: int) -> list[broker.Message]:
    """What a relay publishes for the events from `first` to `last`."""
    async with connected(database.app) as connection:
        events = await read_line(connection, after=first - 1, limit=last - first + 1)
    return [broker.to_message(1, envelope(event)) for event in events]


async def publish_late(client: Client, messages: list[broker.Message], *, fenced: bool = True) -> list[bool]:
    """Publishes as a relay does that was stopped with these in its buffers; whether each was accepted."""
    accepted = []
    for message in messages:
        headers = {name: value for name, value in message.headers.items() if fenced or not name.startswith("Nats-")}
        answer = await client.request(message.subject, message.payload, headers=headers)
        accepted.append(b'"error"' not in answer.data)
    return accepted
