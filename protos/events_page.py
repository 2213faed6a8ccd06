"""docs/events.md: the public events of a domain, from its `.proto` files. `generate.py` writes it."""

from __future__ import annotations

from collections.abc import Iterator

from domain_code import Field, Struct, aggregates
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ABOUT = """# Events for other teams

Every event that Foldline commits is published to NATS JetStream, in the order of commits, and may be read again from the
event store for as long as the system lives. [examples/subscriber](../examples/subscriber) is a complete subscriber: it takes
each event exactly once, through any loss of the broker; [examples/subscriber_node](../examples/subscriber_node) does so in
JavaScript.

This page is generated from the `.proto` files by `make proto`.

## Where

| | |
|---|---|
| stream | `FOLDLINE_EVENTS_<shard>`, one for each shard; shard 1 is the default |
| subject | `foldline.events.<shard>.<tenant>.<category>.<event>`, each part percent-encoded |
| sequence | the sequence of a message in the stream is the event's **position** on the line: 1, 2, 3 ... without a gap |
| kept | for the time and size of `FOLDLINE_STREAM_AGE_MAX_S`, `FOLDLINE_STREAM_BYTES_MAX`; the event store has everything |
| history | the stream's metadata `foldline-epoch`; another one means that the database was restored, see below |
| event store | gRPC, `foldline.v1.EventStoreService/ReadAll` of the write service, by position; a token with role `reader` |

## What a message holds

[CloudEvents 1.0](https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/nats-protocol-binding.md) in binary
mode. The data are the protobuf message of the event, byte for byte as they are stored; header values are percent-encoded.

| header | value |
|---|---|
| `ce-specversion` | `1.0` |
| `ce-id` | the event's id, a UUID: the same at every delivery |
| `ce-source` | `/foldline/<shard>/<tenant>/<category>` |
| `ce-subject` | the aggregate's id |
| `ce-type` | the full name of the message, for example `bank.v1.AccountOpened` |
| `ce-time` | when it was recorded; never decreases along the line |
| `content-type` | `application/protobuf` |
| `traceparent` | W3C trace context |
| `Foldline-Version` | the event's place in its aggregate's stream: 1, 2, 3 ... |

Other headers that begin with `Foldline-` are between Foldline's own processes and may change.

## What you can rely on

- **Order and completeness.** Handle position after position. If the next message is not position + 1, messages are missing
  (the broker was wiped, or is behind): read them with `ReadAll`, which has every event ever committed.
- **Exactly once** is yours to keep: save the position in the transaction of your effect, and ignore what is not the next.
- **The broker is never the truth.** When it is away, read the store every second; when it is back, go on with it.
- **A lost history.** Save the id of the last event as well. If the store holds another event at that position, it was restored
  to an older state: stop, and let a person decide.
- **Stability.** Messages change only by new fields and new events (checked by `buf breaking`); a field is never reused. Ignore
  types and fields that you do not know. A field marked *personal* says something about a natural person.
"""


def page(image: FileDescriptorSet, prefix: str) -> str:
    """The page of the domain in the `.proto` files that begin with `prefix`."""
    lines = [ABOUT, "## The events"]
    for aggregate in aggregates(image, prefix):
        lines += ["", f"### Category `{aggregate.category}`"]
        for event in aggregate.events:
            lines += ["", *_event(event)]
    return "\n".join(lines) + "\n"


def _event(event: Struct) -> Iterator[str]:
    package = event.module.rpartition(".")[0]
    yield f"**`{package}.{event.message}`**" + (f": {event.comment}" if event.comment else "")
    yield ""
    yield "| field | type | meaning |"
    yield "|---|---|---|"
    for field in event.fields:
        yield f"| `{field.name}` | {_type(field)} | {_meaning(field)} |"


def _type(field: Field) -> str:
    name = "enum" if field.enum else "UUID" if field.is_uuid else {"str": "text", "int": "integer"}.get(field.type, field.type)
    return f"{name}, many" if field.is_repeated else f"{name}, optional" if field.is_optional else name


def _meaning(field: Field) -> str:
    said = field.comment.replace("|", "/")
    return f"{said} *personal*".strip() if field.is_personal else said
