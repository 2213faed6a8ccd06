"""Numbers that a database is asked for are refreshed beside the calls."""

from __future__ import annotations

import asyncio

import pytest

from shared.platform import metrics as module
from shared.platform.metrics import Metrics
from tests.support.logs import capture_logs


async def test_what_cannot_be_refreshed_is_logged_once_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number is refreshed all the while, which must not make the failure look new at every turn."""
    monkeypatch.setattr(module, "WATCH_S", 0.001)
    turns = asyncio.Semaphore(0)

    async def fails() -> None:
        raise OSError("away")

    async def works() -> None:
        turns.release()

    metrics = Metrics()
    metrics.watch(fails)
    metrics.watch(works)
    with capture_logs() as lines:
        loop = asyncio.create_task(metrics.watch_loop())
        async with asyncio.timeout(20):
            for _ in range(3):
                await turns.acquire()
        loop.cancel()
    assert [(line["event"], line["error"]) for line in lines] == [("metrics_not_refreshed", "OSError")]
