"""The time, as every process reads it and as messages carry it."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp


def utc_now() -> datetime:
    """The current time, with the time zone UTC."""
    return datetime.now(UTC)


def timestamp(moment: datetime) -> Timestamp:
    """The protobuf form of a datetime that has a time zone."""
    made = Timestamp()
    made.FromDatetime(moment)
    return made
