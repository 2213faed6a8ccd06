"""The end of a tenant or an aggregate, as those who follow the line meet it: one event, at which each deletes what it keeps.

It is the only event of its batch, so the batches of the line are cut here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.event_store import AggregateKey

CLOSED = "foldline.v1.TenantClosed"
"""The type of the last event of a tenant."""
AGGREGATE_PURGED = "foldline.v1.AggregatePurged"
"""The type of the last event of an aggregate that is purged."""
ENDS = frozenset({CLOSED, AGGREGATE_PURGED})
"""Each is the only event of its batch (`part`)."""
BATCH_BYTES_MAX = 2 * 1024 * 1024
"""The payloads of a batch take no more bytes, unless it is one event."""


class Event(Protocol):
    """An event, in whatever form."""

    @property
    def type(self) -> str:
        """The full name of its message."""

    @property
    def payload(self) -> bytes:
        """The message."""


def part(events: Sequence[Event], events_max: int) -> int:
    """How many of the first events make the next batch: so many and BATCH_BYTES_MAX at the most, and an end alone."""
    total = 0
    for nth, event in enumerate(events[:events_max]):
        total += len(event.payload)
        if event.type in ENDS or total > BATCH_BYTES_MAX:
            return nth or 1
    return min(len(events), events_max)


def is_end(events: Sequence[EventEnvelope]) -> bool:
    """Whether a batch is the end of a tenant or an aggregate."""
    return len(events) == 1 and events[0].type in ENDS


def closed_in(events: Sequence[EventEnvelope]) -> str | None:
    """The tenant whose end a batch is; None if it is none."""
    return events[0].tenant if len(events) == 1 and events[0].type == CLOSED else None


def purged_in(events: Sequence[EventEnvelope]) -> AggregateKey | None:
    """The aggregate whose end a batch is; None if it is none."""
    if len(events) != 1 or events[0].type != AGGREGATE_PURGED:
        return None
    return events[0].tenant, events[0].aggregate_type, events[0].aggregate_id
