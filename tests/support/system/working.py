"""Whatever of a service has a `run` that goes on until it is cancelled, at work in a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar


class Worker(Protocol):
    """A projector, a runner of processes, a sender of deliveries."""

    async def run(self) -> None: ...


W = TypeVar("W", bound=Worker)


@asynccontextmanager
async def running(worker: W) -> AsyncIterator[W]:
    """The worker at work; at the end it is cancelled, as when its lease is lost."""
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
