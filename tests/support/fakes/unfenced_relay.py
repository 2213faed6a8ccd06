"""The relay without its fence, to show that the test fails without it. `python -m tests.support.fakes.unfenced_relay`.

It does not repair the stream either. Otherwise a relay that wakes up might see the damage that it did, before it learns that
its lease is gone, and create the stream anew; then the test would find nothing wrong.
"""

from __future__ import annotations

import sys

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker
from shared.line.relay import Relay
from write_service import relay

to_message = broker.to_message


def without_the_fence(shard: int, envelope: EventEnvelope) -> broker.Message:
    """The message, to be accepted anywhere."""
    message = to_message(shard, envelope)
    del message.headers[broker.EXPECTED_LAST_SEQUENCE]
    return message


async def mends_nothing(*_: object) -> None:
    """Any stream will do."""


if __name__ == "__main__":
    broker.to_message = without_the_fence
    Relay._misfit = mends_nothing  # type: ignore[method-assign, assignment]
    sys.exit(relay.main())
