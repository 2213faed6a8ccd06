"""The oldest engines that Foldline runs on, and the sentences with which older ones are refused."""

from __future__ import annotations

POSTGRES_MIN = 17
"""`transaction_timeout` came with it. Without, a consumer that is frozen between two statements of a pipeline would hold its
locks, and hold up the one that takes over, for as long as it is frozen."""
NATS_MIN = (2, 11)
"""2.9 knows neither a stream's first sequence nor its metadata and ignores both, so sequences would not be positions. 2.10.25
loses what the stream holds when it is killed and later stopped (test_nats_may_be_restarted_under_load, each time)."""


def postgres_too_old(version: int) -> str:
    """Why a PostgreSQL is refused, by its version as libpq tells it (170010 for 17.10); empty if it is new enough."""
    if version >= POSTGRES_MIN * 10_000:
        return ""
    return f"POSTGRES_TOO_OLD: this is PostgreSQL {version // 10_000}, and {POSTGRES_MIN} or newer is needed"


def nats_too_old(major: int, minor: int) -> str:
    """Why a NATS server is refused, by its version; empty if it is new enough."""
    if (major, minor) >= NATS_MIN:
        return ""
    return f"NATS_TOO_OLD: this is NATS {major}.{minor}, and {NATS_MIN[0]}.{NATS_MIN[1]} or newer is needed"
