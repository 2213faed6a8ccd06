"""Cancellations that a library swallowed: whoever cancels a task waits for its end, and would wait for ever."""

from __future__ import annotations

import asyncio


def cancellations() -> int:
    """How often the current task has been cancelled so far."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def heed_cancellation(known: int = 0) -> None:
    """Raises CancelledError if the task was cancelled more often than is `known`. Call it behind what may swallow that.

    - nats-py (seen in 2.16): publish, subscribe and unsubscribe while they wait for a full buffer (Client._flush_pending).
    - `asyncio.wait_for` before Python 3.12, which returns what came in the moment of the cancellation: psycopg_pool (seen in 3.3)
      when it lends a connection, nats-py and aiosmtplib (seen in 5) when an answer comes, nats-py when it has connected.
    """
    if cancellations() > known:
        raise asyncio.CancelledError
