"""Why a batch was not written.

ConsumerFailed
└── ProjectionFailed         the group stops
    ├── TooManyParked
    └── EventWithoutKey
RowRefused                   the events of the batch are tried one by one
"""

from __future__ import annotations

from shared.line.consumer import ConsumerFailed


class ProjectionFailed(ConsumerFailed):
    """The group stops, and nothing of the batch was written."""


class TooManyParked(ProjectionFailed):
    """More keys failed within a minute than bad events would explain: the release is bad."""

    reason = "TOO_MANY_PARKED"


class EventWithoutKey(ProjectionFailed):
    """An event cannot be read and names no aggregate, so there is no key to park."""

    reason = "EVENT_WITHOUT_KEY"


class RowRefused(Exception):
    """A row of a batch cannot be stored, and nothing of the batch was written."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(type(cause)))
        self.cause = cause
