"""Spans of rounds: one for each event and each answer whose trace is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.spans import consumed
from shared.platform import tracing
from shared.processes.records import PendingCommand


@contextmanager
def round_of(shard: int, events: list[EventEnvelope], answered: list[PendingCommand]) -> Iterator[None]:
    """Records a round in the block, and puts the events into it: what processes do next is below the event's span."""
    if not tracing.on():
        yield
        return
    with ExitStack() as stack:
        places = stack.enter_context(consumed("processes", shard, {event.position: event for event in events}.values()))
        for event in events:
            event.metadata.traceparent = places.get(event.position, event.metadata.traceparent)
        for command in answered:
            attributes = {"foldline.process.type": command.key[1], "foldline.command.type": command.command_type}
            if span := tracing.start("process answer", "internal", parent=command.traceparent, attributes=attributes):
                stack.callback(tracing.end, span)
        yield


def recorded_of(commands: Sequence[PendingCommand]) -> list[str]:
    """The trace contexts of commands that are traced: a call that sends them is below the first, and linked to all."""
    if not tracing.on():
        return []
    return list(dict.fromkeys(each.traceparent for each in commands if tracing.recorded(each.traceparent)))
