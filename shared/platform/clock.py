"""The time, as every process reads it and as messages carry it."""

from __future__ import annotations

from datetime import UTC, datetime

from shared.folds.moments import timestamp

__all__ = ["timestamp", "utc_now"]


def utc_now() -> datetime:
    """The current time, with the time zone UTC."""
    return datetime.now(UTC)
