"""NATS JetStream: the names of streams and subjects that Foldline uses, and how an event becomes a message and comes back.

A message is an event as it is stored: the payload is the stored protobuf, byte for byte, and the rest of
`foldline.v1.EventEnvelope` is in headers, those of CloudEvents 1.0 in binary mode where they have one:

    ce-id        the event's id                     Foldline-Shard
    ce-source    /foldline/<shard>/<tenant>/<type>  Foldline-Position   = the stream's sequence
    ce-subject   the aggregate's id                 Foldline-Version
    ce-type      the payload's full name            Foldline-Epoch
    ce-time      recorded_at                        Foldline-Metadata   EventMetadata, base64
    content-type application/protobuf               traceparent         of the relay's span, or of the call

Values are percent-encoded as the CloudEvents binding asks, so no id can break a header or a subject.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from google.protobuf.message import DecodeError
from nats.errors import NotJSMessageError

from foldline.v1.event_store_pb2 import EventEnvelope, EventMetadata
from shared.platform.clock import timestamp
from shared.platform.telemetry import trace_id, valid_traceparent

if TYPE_CHECKING:
    from nats.aio.msg import Msg

EXPECTED_LAST_SEQUENCE = "Nats-Expected-Last-Sequence"
ID = "ce-id"
SHARD = "Foldline-Shard"
POSITION = "Foldline-Position"
VERSION = "Foldline-Version"
EPOCH = "Foldline-Epoch"
METADATA = "Foldline-Metadata"
TRACEPARENT = "traceparent"

STREAM_EPOCH = "foldline-epoch"  # in the stream's metadata: the history that it copies


def stream_name(shard: int) -> str:
    """The stream that copies the line of a shard: sequence = position."""
    return f"FOLDLINE_EVENTS_{shard}"


def stream_subjects(shard: int) -> str:
    """All subjects of a shard's stream. Consumers read all of them: with a filter, a gap would look like a filtered event."""
    return f"foldline.events.{shard}.>"


def subject(shard: int, envelope: EventEnvelope) -> str:
    """`foldline.events.<shard>.<tenant>.<aggregate type>.<event>`."""
    event = envelope.type.rpartition(".")[2]
    return f"foldline.events.{shard}.{_token(envelope.tenant)}.{_token(envelope.aggregate_type)}.{_token(event)}"


def _token(text: str) -> str:
    """A part of a subject, percent-encoded. The dot is encoded too, because it separates parts."""
    return quote(text, safe="").replace(".", "%2E") or "%00"


@dataclass(frozen=True, slots=True)
class Message:
    """What is published for one event."""

    subject: str
    payload: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Received:
    """What was read from a stream, if it was an event."""

    shard: int
    epoch: str
    envelope: EventEnvelope


class NotAnEvent(Exception):
    """No relay published this message at this place. The event of this position must be read from the event store."""


def to_message(shard: int, epoch: str, envelope: EventEnvelope) -> Message:
    """An event as a message. The stream accepts it only directly behind its predecessor."""
    position = envelope.position
    tenant, category = quote(envelope.tenant, safe=""), quote(envelope.aggregate_type, safe="")
    return Message(
        subject(shard, envelope),
        envelope.payload,
        {
            EXPECTED_LAST_SEQUENCE: str(position - 1),
            "ce-specversion": "1.0",
            ID: quote(envelope.event_id),
            "ce-source": f"/foldline/{shard}/{tenant}/{category}",
            "ce-subject": quote(envelope.aggregate_id),
            "ce-type": quote(envelope.type),
            "ce-time": envelope.recorded_at.ToDatetime(UTC).isoformat(),
            "content-type": "application/protobuf",
            TRACEPARENT: quote(envelope.metadata.traceparent),
            SHARD: str(shard),
            POSITION: str(position),
            VERSION: str(envelope.version),
            EPOCH: epoch,
            METADATA: b64encode(envelope.metadata.SerializeToString()).decode(),
        },
    )


def from_message(message: Msg) -> Received:
    """The event in a message of a stream. Raises NotAnEvent for a message that no relay published at this place.

    The check of the sequence finds a copy of an event that somebody published further down the stream.
    """
    try:
        headers = message.headers or {}
        received = from_headers(headers, message.data)
        sequence = message.metadata.sequence.stream
    except (KeyError, ValueError, DecodeError, NotJSMessageError) as error:
        raise NotAnEvent(f"{message.subject}: {error!r}") from error
    if sequence != received.envelope.position:
        raise NotAnEvent(f"{message.subject}: sequence {sequence} holds position {received.envelope.position}")
    return received


def from_headers(headers: dict[str, str], payload: bytes) -> Received:
    """The inverse of `to_message`. Raises KeyError, ValueError or DecodeError."""
    _, _, _, tenant, category = headers["ce-source"].split("/")
    return Received(
        int(headers[SHARD]),
        headers[EPOCH],
        EventEnvelope(
            position=int(headers[POSITION]),
            event_id=unquote(headers[ID]),
            tenant=unquote(tenant),
            aggregate_type=unquote(category),
            aggregate_id=unquote(headers["ce-subject"]),
            version=int(headers[VERSION]),
            type=unquote(headers["ce-type"]),
            payload=payload,
            recorded_at=timestamp(datetime.fromisoformat(headers["ce-time"])),
            metadata=_metadata(headers),
        ),
    )


def _metadata(headers: dict[str, str]) -> EventMetadata:
    """The event's metadata. If the relay recorded its span in the same trace, the reader goes on below that."""
    metadata = EventMetadata.FromString(b64decode(headers[METADATA], validate=True))
    given = valid_traceparent(unquote(headers.get(TRACEPARENT, "")))
    if given is not None and trace_id(given) == trace_id(metadata.traceparent):
        metadata.traceparent = given
    return metadata
