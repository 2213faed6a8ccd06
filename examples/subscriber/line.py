"""The events of a shard in order, each once: from JetStream as they come, from the event store whatever JetStream lacks.

JetStream tells quickly; the event store (`foldline.v1.EventStoreService/ReadAll`, role `reader`) decides. The sequence of a
message in the stream is the event's position on the line, so a gap is seen at once and filled from the store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import unquote

import grpc.aio
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import Error as JetStreamError

from examples.subscriber.inbox import Event, Place
from foldline.v1 import event_store_pb2, event_store_pb2_grpc

FETCH_MAX = 200
SILENCE_S = 1.0
"""After so long without a message the store is read: the broker may have lost something, or be away."""
NOTHING_TOLD = (nats.errors.Error, JetStreamError, OSError, TimeoutError, KeyError, ValueError)
"""The broker is away, the stream is gone, or somebody else published into it: the store has what is missing."""


class HistoryDiverged(Exception):
    """The store does not hold the event that was handled last: it was restored to an older state."""


class Line:
    """The line of one shard."""

    def __init__(self, store: grpc.aio.Channel, token: str, nats_url: str, shard: int = 1) -> None:
        self._store = event_store_pb2_grpc.EventStoreServiceStub(store)
        self._token = token
        self._nats_url = nats_url
        self._shard = shard

    async def after(self, place: Place) -> AsyncIterator[tuple[str, Event]]:
        """Every event behind a place, without end, each with the epoch of its history. Raises HistoryDiverged."""
        while True:
            async for epoch, event in self._stored(place):
                yield epoch, event
                place = Place(epoch, event.position, event.event_id)
            with contextlib.suppress(*NOTHING_TOLD):
                async for event in self._told(place):
                    yield place.epoch, event
                    place = Place(place.epoch, event.position, event.event_id)
            await asyncio.sleep(0.05)

    async def one(self, position: int) -> Event:
        """The event at a position. Raises grpc.aio.AioRpcError, and LookupError if the line ends before it."""
        return (await self._one(position))[1]

    async def before(self, position: int) -> Place:
        """The place from which the event at a position is the next. Raises what `one` raises."""
        if position == 1:
            return Place("", 0, "")
        epoch, event = await self._one(position - 1)
        return Place(epoch, event.position, event.event_id)

    async def _one(self, position: int) -> tuple[str, Event]:
        request = event_store_pb2.ReadAllRequest(shard=self._shard, from_position=position, events_max=1)
        async for answer in self._read_all(request):
            for envelope in answer.events:
                return answer.epoch, _event(envelope)
        raise LookupError(f"the line ends before {position}")

    def _read_all(
        self, request: event_store_pb2.ReadAllRequest
    ) -> grpc.aio.UnaryStreamCall[event_store_pb2.ReadAllRequest, event_store_pb2.ReadAllResponse]:
        return self._store.ReadAll(request, metadata=(("authorization", f"Bearer {self._token}"),), timeout=60)

    async def _stored(self, place: Place) -> AsyncIterator[tuple[str, Event]]:
        """What the store has behind the place; waits while it does not answer. Reads the place's own event as a proof."""
        while True:
            request = event_store_pb2.ReadAllRequest(shard=self._shard, from_position=max(place.position, 1))
            try:
                async for answer in self._read_all(request):
                    if answer.head_position < place.position:
                        raise HistoryDiverged(f"the line ends at {answer.head_position}, {place.position} was handled")
                    for event in map(_event, answer.events):
                        if event.position == place.position and event.event_id != place.event_id:
                            raise HistoryDiverged(f"position {event.position} is another event than the one that was handled")
                        if event.position == place.position + 1:
                            yield answer.epoch, event
                            place = Place(answer.epoch, event.position, event.event_id)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                await asyncio.sleep(0.5)

    async def _told(self, place: Place) -> AsyncIterator[Event]:
        """What JetStream delivers directly behind a place, until something is missing or nothing comes for a while."""
        client = Client()
        await client.connect(
            self._nats_url,
            allow_reconnect=False,
            max_reconnect_attempts=1,  # counts for the first connection as well: else it is tried for two minutes
            reconnect_time_wait=0,
            connect_timeout=2,
            error_cb=_ignore,
        )
        try:
            stream = f"FOLDLINE_EVENTS_{self._shard}"
            # The consumer lives no longer than this connection, and acknowledges nothing. The place is in the subscriber's own
            # database, where it changes with the effects; a durable consumer would keep a second one in the broker, which is
            # lost with it and never agrees with the first for certain.
            wanted = ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=place.position + 1,
                ack_policy=AckPolicy.NONE,
                inactive_threshold=30,
                mem_storage=True,
            )
            streams = client.jetstream(timeout=2)
            consumer = await streams.add_consumer(stream, wanted)
            config = (await streams.stream_info(stream)).config
            if (config.metadata or {}).get("foldline-epoch") != place.epoch:
                return
            messages = await streams.pull_subscribe_bind(consumer.name, stream)
            position = place.position
            while True:
                for message in await messages.fetch(FETCH_MAX, timeout=SILENCE_S):
                    event = _from_message(message)
                    if event.position <= position:
                        continue
                    if event.position > position + 1:
                        return
                    yield event
                    position = event.position
        finally:
            await client.close()


async def _ignore(_: Exception) -> None:
    """A broker that is away is no error here: the store is read instead."""


def _event(envelope: event_store_pb2.EventEnvelope) -> Event:
    return Event(
        position=envelope.position,
        event_id=envelope.event_id,
        tenant=envelope.tenant,
        aggregate_type=envelope.aggregate_type,
        aggregate_id=envelope.aggregate_id,
        version=envelope.version,
        type=envelope.type,
        payload=envelope.payload,
    )


def _from_message(message: Msg) -> Event:
    """The event in a message: CloudEvents 1.0 in binary mode, values percent-encoded."""
    headers = message.headers or {}
    _, _, _, tenant, aggregate_type = headers["ce-source"].split("/")
    return Event(
        position=message.metadata.sequence.stream,
        event_id=unquote(headers["ce-id"]),
        tenant=unquote(tenant),
        aggregate_type=unquote(aggregate_type),
        aggregate_id=unquote(headers["ce-subject"]),
        version=int(headers["Foldline-Version"]),
        type=unquote(headers["ce-type"]),
        payload=message.data,
    )
