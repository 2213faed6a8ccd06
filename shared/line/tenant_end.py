"""The end of a tenant, as those who follow the line meet it: one event, at which each deletes what it keeps of the tenant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from foldline.v1.event_store_pb2 import EventEnvelope

CLOSED = "foldline.v1.TenantClosed"
"""The type of the last event of a tenant. It is the only one of its batch (`part`)."""


class Typed(Protocol):
    """An event, in whatever form."""

    @property
    def type(self) -> str:
        """The full name of its message."""


def part(events: Sequence[Typed], size_max: int) -> int:
    """How many of the first events make the next batch, which holds the end of a tenant alone or not at all."""
    for nth, event in enumerate(events[:size_max]):
        if event.type == CLOSED:
            return nth or 1
    return min(len(events), size_max)


def closed_in(events: Sequence[EventEnvelope]) -> str | None:
    """The tenant whose end a batch is; None if it is none."""
    return events[0].tenant if len(events) == 1 and events[0].type == CLOSED else None
