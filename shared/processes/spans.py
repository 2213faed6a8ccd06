"""Spans of rounds: one for each event and each answer whose trace is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.spans import consumed
from shared.platform import tracing
from shared.processes.records import PendingCommand

if TYPE_CHECKING:
    from opentelemetry.trace import Span


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


def batch_of(commands: list[PendingCommand], method: str) -> Span | None:
    """A span for a call that sends these commands, linked to all of them that are traced; None if none is."""
    if not tracing.on():
        return None
    parents = list(dict.fromkeys(each.traceparent for each in commands if tracing.recorded(each.traceparent)))
    if not parents:
        return None
    attributes: dict[str, str | int] = {"rpc.system.name": "grpc", "rpc.method": method, "foldline.commands": len(commands)}
    return tracing.start(method, "client", parent=parents[0], links=parents, attributes=attributes)
