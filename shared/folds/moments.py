"""Moments as messages carry them."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(moment: datetime) -> Timestamp:
    """The protobuf form of a datetime that has a time zone."""
    made = Timestamp()
    made.FromDatetime(moment)
    return made


def timestamp_or_none(moment: datetime | None) -> Timestamp | None:
    """The same, of a moment that may not have come."""
    return None if moment is None else timestamp(moment)
