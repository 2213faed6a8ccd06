"""One reading of the line for several consumers of a process, each at its own checkpoint.

Consumers that are at the same place share a follower: each event is fetched once, whoever takes it. The follower reads on when
the first consumer wants more. What it read last stays for the others; a consumer that falls further behind reads the line by
itself until it has caught up. So a slow or stopped consumer holds up no other. When all who shared the reading have left it, it
begins anew where the next consumer is.

Which event is next is decided for each consumer by its own checkpoint: it joins the shared follower only at a place where event
id and epoch are those of its checkpoint.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from shared.line.checkpoint import Checkpoint
from shared.line.follower import EventBatch

KEPT_MAX = 8
"""So many batches stay for those who are behind."""
PATIENCE_S = 0.25
"""So long the reading waits for the slowest, when it would lose its place, before it goes on without it."""

Follow = Callable[[Checkpoint], AsyncGenerator[EventBatch, None]]


class FanOut:
    """Followers of the line that share one reading where they can."""

    def __init__(self, shared: Follow, alone: Callable[[], Follow]) -> None:
        """`shared` is the follower of those who are at the same place; `alone` makes one for a consumer that is behind."""
        self._follow = shared
        self._alone = alone
        self._proven = False
        self._places: dict[object, Checkpoint] = {}
        """Where the consumers are that share the reading."""
        self._moved = asyncio.Event()
        self._kept: deque[tuple[Checkpoint, EventBatch]] = deque(maxlen=KEPT_MAX)
        self._cursor: Checkpoint | None = None
        self._source: AsyncGenerator[EventBatch, None] | None = None
        self._coming: asyncio.Task[None] | None = None

    async def follow(self, checkpoint: Checkpoint) -> AsyncGenerator[EventBatch, None]:
        """As Follower.follow. Raises what it raises."""
        at, first, me = checkpoint, True, object()
        try:
            while True:
                batch = self._shared(at)
                if batch is None and self._cursor not in (None, at) and not self._places:
                    await self._restart()  # those who shared the reading have left it at another place
                    continue
                if self._cursor is None:
                    self._cursor, self._source, self._proven = at, self._follow(at), False
                self._place(me, at if batch is not None or at == self._cursor else None)
                if batch is not None:
                    yield batch
                    at, first = batch.after, False
                elif at != self._cursor:
                    async with aclosing(self._alone()(at)) as batches:
                        async for batch in batches:
                            yield batch
                            at, first = batch.after, False
                            if at == self._cursor or self._shared(at) is not None or not self._places:
                                break
                elif first and self._proven:  # the store has shown that it holds this event
                    yield EventBatch((), at)
                    first = False
                else:
                    await self._read_on()
        finally:
            self._place(me, None)

    async def close(self) -> None:
        """Ends the shared reading."""
        await self._restart()

    def _place(self, consumer: object, at: Checkpoint | None) -> None:
        """Notes where a consumer is; None for one that does not share the reading."""
        if at is None:
            self._places.pop(consumer, None)
        else:
            self._places[consumer] = at
        self._moved.set()

    async def _slowest(self) -> None:
        """Waits until nobody needs the oldest batch any more, or the patience is over."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while len(self._kept) == KEPT_MAX:
                    oldest = self._kept[0][1].after.position
                    if all(at.position >= oldest for at in self._places.values()):
                        return
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            pass

    def _shared(self, at: Checkpoint) -> EventBatch | None:
        """What the shared follower has read behind this place; None if that is nothing, or not certain."""
        for before, batch in self._kept:
            if before == at:
                return batch
            if before.position < at.position < batch.after.position and at.epoch == before.epoch == batch.after.epoch:
                known = at.position - before.position - 1
                if batch.events[known].event_id == at.event_id:
                    return EventBatch(batch.events[known + 1 :], batch.after)
        return None

    async def _read_on(self) -> None:
        """Waits until the shared follower has read more. A consumer that is cancelled meanwhile disturbs no other."""
        if self._coming is None or self._coming.done():
            self._coming = asyncio.create_task(self._take())
        await asyncio.shield(self._coming)

    async def _take(self) -> None:
        source, before = self._source, self._cursor
        assert source is not None  # a consumer has begun
        assert before is not None
        await self._slowest()
        try:
            batch = await anext(source)
        except BaseException:
            # Each consumer learns it; the next to begin starts anew.
            if self._source is source:
                self._coming = None
                await self._restart()
            raise
        if self._source is not source:
            return  # ended meanwhile, and a cancellation was swallowed on the way: the next reading is at another place
        self._proven = True
        if batch.after != before:
            self._kept.append((before, batch))
            self._cursor = batch.after

    async def _restart(self) -> None:
        """Ends the shared reading; the next consumer begins another, perhaps before this has returned."""
        source, self._source, self._cursor = self._source, None, None
        coming, self._coming = self._coming, None
        self._kept.clear()
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        if source is not None:
            await source.aclose()
