"""What runs until it is cancelled ends, though a library has swallowed the cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from shared.platform.cancellation import cancellations, heed_cancellation
from shared.platform.rounds import Hindrances, rounds


async def test_rounds_end_with_the_round_that_swallowed_a_cancellation() -> None:
    """The next one does not begin."""
    began: asyncio.Queue[None] = asyncio.Queue()

    async def one() -> None:
        began.put_nowait(None)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    task = asyncio.create_task(rounds(Hindrances("hindered"), one, 0.0))
    await began.get()
    task.cancel()
    await asyncio.wait({task}, timeout=20)
    assert task.cancelled()
    assert began.empty()


async def test_a_cancellation_that_was_known_before_is_not_heeded_again() -> None:
    """What is done at the end of a cancelled task goes on, until it is cancelled once more."""
    ended: list[int] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            known = cancellations()
            heed_cancellation(known)
            ended.append(known)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                heed_cancellation(known)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=20)
    assert ended == [1]
    assert task.cancelled()
