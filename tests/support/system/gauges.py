"""Metrics of a process that is not there: their values, as Prometheus reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe


async def page(metrics: Metrics) -> dict[str, float]:
    """All series with their labels, and their values."""
    _, text = await metrics.render()
    rows = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[tuple[Metrics, DatabaseProbe]]:
    """Metrics, and what they may ask a database with. Numbers that must be asked for are, from the block's first wait on."""
    metrics, probe = Metrics(), DatabaseProbe(url, application_name="test-metrics")
    refreshing = asyncio.create_task(metrics.watch_loop())
    try:
        yield metrics, probe
    finally:
        refreshing.cancel()
        await asyncio.wait([refreshing])
        await probe.close()
