"""The projectors of a process: one for each group of tables, and one more for a group that is being rebuilt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import psycopg

from shared.folds.projection import Group
from shared.line.checkpoint import Checkpoint
from shared.line.fanout import FanOut
from shared.line.follower import EventBatch
from shared.platform.postgres import Connection, describe
from shared.platform.telemetry import logger
from shared.projections.projector import Projector
from shared.projections.rebuild import Rebuilder, serving
from shared.projections.tables import Tables

log = logger(__name__)

TROUBLE_S = 1.0

T = TypeVar("T")
Follow = Callable[[Checkpoint], AsyncGenerator[EventBatch, None]]


class GroupProjector:
    """Keeps the tables of a group that serve in step with the line, and rebuilds them when an operator asks."""

    def __init__(self, group: Group, shard: int, follow: Follow, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._group = group
        self._shard = shard
        self._follow = follow
        self._connect = connect
        self.projector: Projector | None = None
        """Of the tables that serve; None until it is known which those are."""

    @property
    def name(self) -> str:
        """The group's name."""
        return self._group.name

    @property
    def stopped(self) -> str | None:
        """Why the tables that serve go on no more."""
        return None if self.projector is None else self.projector.stopped

    async def run(self) -> None:
        """Runs until cancelled. Raises UnsafeDatabase."""
        rebuilder = Rebuilder(self._group, self._shard, self._connect, self._made)
        while True:
            consumer = await self._in_spite_of_trouble(self._serving)
            self.projector = self._made(Tables(self._group, consumer=consumer))
            await _first_of(
                self.projector.run(),
                self._in_spite_of_trouble(lambda consumer=consumer: rebuilder.until_replaced(consumer)),  # type: ignore[misc]
            )

    def _made(self, tables: Tables) -> Projector:
        return Projector(tables, self._shard, self._follow, self._connect)

    async def _serving(self) -> str:
        async with await self._connect() as connection:
            return await serving(connection, self._group.name, self._shard)

    async def _in_spite_of_trouble(self, work: Callable[[], Awaitable[T]]) -> T:
        """What the work returns. Whatever the database says, the work is begun anew. Raises UnsafeDatabase."""
        while True:
            try:
                return await work()
            except (psycopg.Error, OSError) as error:
                log.warning("rebuild_waits", projection=self._group.name, error=describe(error))
                await asyncio.sleep(TROUBLE_S)


class Projectors:
    """The projectors of several groups in one process. One that stops does not stop the others."""

    def __init__(self, projectors: Sequence[GroupProjector], fan_out: FanOut) -> None:
        self.projectors = projectors
        self._fan_out = fan_out

    async def run(self) -> None:
        """Follows the line for every group until cancelled. Raises UnsafeDatabase."""
        try:
            await _first_of(*(projector.run() for projector in self.projectors))
        finally:
            await self._fan_out.close()

    @property
    def places(self) -> dict[str, int]:
        """The positions of the tables that serve, by group, as far as they are known."""
        serve = ((it.name, it.projector) for it in self.projectors)
        return {name: projector.at.position for name, projector in serve if projector is not None and projector.at.epoch}

    @property
    def stopped(self) -> str:
        """Which groups stopped themselves, and why in one word each; empty if all go on."""
        stopped = ((it.name, it.stopped) for it in self.projectors)
        return "; ".join(f"{name}: {reason.partition(':')[0]}" for name, reason in stopped if reason)


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Runs all until one ends, then ends the others. Raises what that one raised."""
    running = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
