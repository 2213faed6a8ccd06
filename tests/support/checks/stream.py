"""What the stream of a shard says of itself."""

from __future__ import annotations

from typing import Any

from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from shared.line import broker
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
