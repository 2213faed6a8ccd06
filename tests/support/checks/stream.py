"""What the stream of a shard holds, and says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker
from tests.support.checks.kinds import PURGED
from tests.support.fakes.relaying import STREAM
from tests.support.system.waiting import eventually


async def heard(logs: list[Any], *what: str) -> None:
    """Returns when any of these was logged."""
    await eventually(lambda: any(line["event"] in what for line in logs), 30)


async def epoch_of(streams: JetStreamContext) -> str:
    """The history that the stream says it copies."""
    return ((await streams.stream_info(STREAM)).config.metadata or {})[broker.STREAM_EPOCH]


async def ends_at(streams: JetStreamContext, position: int) -> bool:
    """Whether the stream ends there."""
    try:
        return (await streams.stream_info(STREAM)).state.last_seq == position
    except NotFoundError:
        return False


async def published(nats_url: str, line: Sequence[EventEnvelope], *, within_s: float = 20) -> None:
    """The broker's stream is a copy of the line: the same events at the same positions, from its first one on.

    Of a tenant that is gone it has the last event alone.
    """
    client = await nats.connect(nats_url)
    try:
        streams = client.jetstream()

        async def end() -> int:
            try:
                return int((await streams.stream_info(STREAM)).state.last_seq)
            except NotFoundError:  # the relay has not made it yet
                return -1

        async def caught_up() -> bool:
            return await end() == (line[-1].position if line else 0)

        await eventually(caught_up, within_s, every_s=0.02)
        state = (await streams.stream_info(STREAM)).state
        expected = [event for event in line[state.first_seq - 1 :] if event.type != PURGED]
        inbox = await streams.pull_subscribe_bind(
            stream=STREAM,
            consumer=(await streams.add_consumer(STREAM, ConsumerConfig(ack_policy=AckPolicy.NONE))).name,
        )
        found: list[Msg] = []
        while len(found) < len(expected):
            found += await inbox.fetch(500, timeout=5)
    finally:
        await client.close()
    assert [(m.metadata.sequence.stream, (m.headers or {})["ce-id"], m.data) for m in found] == [
        (event.position, event.event_id, event.payload) for event in expected
    ]
