"""docs/events.md: the public events of a domain, from its `.proto` files. `generate.py` writes it."""

from __future__ import annotations

from collections.abc import Iterator

from domain_contract import Field, Struct, aggregates, events
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
- **Stability.** Each event says which it has:
  - *stable*: it changes only by new fields, which older events lack (`buf breaking` checks every change).
    A field is never reused, and the type is never removed. Should it have to say something else, a new type takes its place, and
    it becomes *retired*.
  - *mark*: stable as well, but of Foldline itself and not of the domain. What it asks of you stands beside it.
  - *retired*: not written any more. Where it was written, it is in the stream and in the archive for ever.

  Ignore types, fields and enum values that you do not know: new ones come without notice. A field marked *personal* says
  something about a natural person.
- **Old events.** The stream and the archive carry an event as it was stored, under the type that it had then. `ReadAll` gives
  what it is today: a retired event comes under the type that took its place, at the same position and with the same id. So a
  subscriber that reads from both handles both types alike, or reads what is retired from `ReadAll` alone.
"""

MARKS = """## Marks of Foldline

They are in the streams of aggregates of any category, or of a category of their own. They have positions like all others, and say
something about the line itself.

| type | category | what to do |
|---|---|---|
| `foldline.v1.AggregateBoxed`, `AggregateUnboxed` | of the aggregate | nothing: `ReadAll` reads what is in the archive as well |
| `foldline.v1.AggregatePurged` | of the aggregate | delete what you keep of this aggregate: its events are gone |
| `foldline.v1.TenantClosed` | `tenant` | delete what you keep of this tenant: it is its last event |
| `foldline.v1.OverrideSwitched`, `RetentionSet` | `overrides`, `retention` | nothing: settings of the tenant |
| `foldline.v1.EventPurged` | none | count its position and go on; `ReadAll` gives it in place of an event that was purged |
"""

RETIRED = """## Retired events

Of lines that were taken over from older systems. `ReadAll` gives the type that took their place.
"""

SUCCESSORS = {"PersonAdded": "bank.v1.PersonRegistered", "PersonEnrolled": "bank.v1.PersonRegistered"}
"""By retired event: what `ReadAll` gives instead. A test holds it to the upcasters."""


def page(image: FileDescriptorSet, prefix: str) -> str:
    """The page of the domain in the `.proto` files that begin with `prefix`."""
    lines = [ABOUT, "## The events"]
    for aggregate in aggregates(image, prefix):
        lines += ["", f"### Category `{aggregate.category}`"]
        for event in aggregate.events:
            lines += ["", *_event(event, "stable")]
    lines += ["", MARKS]
    for event in events(image, "foldline/v1/", marked=True):
        lines += [*_event(event, "mark"), ""]
    lines.append(RETIRED)
    for event in events(image, f"{prefix.partition('/')[0]}/legacy/", marked=False):
        lines += [*_event(event, f"retired: now `{SUCCESSORS[event.message]}`"), ""]
    return "\n".join(lines).rstrip() + "\n"


def _event(event: Struct, stability: str) -> Iterator[str]:
    package = event.module.rpartition(".")[0]
    yield f"**`{package}.{event.message}`** ({stability})" + (f": {event.comment}" if event.comment else "")
    yield ""
    if not event.fields:
        yield "No fields."
        return
    yield "| field | type | meaning |"
    yield "|---|---|---|"
    for field in event.fields:
        yield f"| `{field.name}` | {_type(field)} | {_meaning(field)} |"


def _type(field: Field) -> str:
    name = (
        "enum"
        if field.enum
        else "UUID"
        if field.is_uuid
        else {"str": "text", "int": "integer", "bool": "yes or no"}.get(field.type, field.type)
    )
    return f"{name}, many" if field.is_repeated else f"{name}, optional" if field.is_optional else name


def _meaning(field: Field) -> str:
    said = field.comment.replace("|", "/")
    return f"{said} *personal*".strip() if field.is_personal else said
