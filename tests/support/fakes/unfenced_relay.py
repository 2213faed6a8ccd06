"""The relay without its fence: the control that must fail. `python -m tests.support.fakes.unfenced_relay`.

It mends nothing either: a relay that wakes up may look at the stream before it learns that its lease is gone, see the
harm that it did, and make the stream anew, and the test would find nothing left to look at.
"""

from __future__ import annotations

import sys

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line import broker
from shared.line.relay import Relay
from write_service import relay

to_message = broker.to_message


def without_the_fence(shard: int, epoch: str, envelope: EventEnvelope) -> broker.Message:
    """The message, to be accepted anywhere."""
    message = to_message(shard, epoch, envelope)
    del message.headers[broker.EXPECTED_LAST_SEQUENCE]
    return message


async def mends_nothing(*_: object) -> None:
    """Any stream will do."""


if __name__ == "__main__":
    broker.to_message = without_the_fence
    Relay._misfit = mends_nothing  # type: ignore[method-assign, assignment]
    sys.exit(relay.main())
