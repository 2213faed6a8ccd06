"""Spans of those who publish and follow the line: one for each event whose trace is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.broker import stream_name
from shared.platform import tracing


@contextmanager
def sent(shard: int, events: Iterable[EventEnvelope]) -> Iterator[None]:
    """Records that the relay sends events in the block. Their traceparents become those of the spans: consumers go on below."""
    spans = []
    if tracing.on():
        for event in events:
            attributes, parent = messaging(shard, event, "send"), event.metadata.traceparent
            if span := tracing.start(f"send {stream_name(shard)}", "producer", parent=parent, attributes=attributes):
                event.metadata.traceparent = tracing.traceparent_of(span)
                spans.append(span)
    failure = ""
    try:
        yield
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        for span in spans:
            tracing.end(span, error=failure)


@contextmanager
def consumed(consumer: str, shard: int, events: Iterable[EventEnvelope]) -> Iterator[dict[int, str]]:
    """Records that a consumer takes events in the block; gives the traceparents of the spans, by position.

    A span is below the relay's if the event came over NATS, else below that of the call that caused the event.
    """
    if not tracing.on():
        yield {}
        return
    spans = {}
    for event in events:
        attributes, parent = messaging(shard, event, "process"), event.metadata.traceparent
        if span := tracing.start(f"process {consumer}", "consumer", parent=parent, attributes=attributes):
            spans[event.position] = span
    failure = ""
    try:
        yield {position: tracing.traceparent_of(span) for position, span in spans.items()}
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        for span in spans.values():
            tracing.end(span, error=failure)


def messaging(shard: int, event: EventEnvelope, operation: str) -> dict[str, str | int]:
    """What a span says of an event: no part of its content."""
    return {
        "messaging.system": "nats",
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
        "messaging.destination.name": stream_name(shard),
        "messaging.message.id": event.event_id,
        "foldline.event.type": event.type,
        "foldline.event.position": event.position,
        "foldline.tenant": event.tenant,
    }
