"""Follows the line of events: each event once, in order, without a gap, whatever the broker does.

The broker is not trusted. Of the pages that it brings, events at or below the cursor are dropped, and those directly behind it
are applied. In all other cases the follower reads the event store instead: after a gap, a page of another history or of none, a
reconnect, or a second in which no page brought the next event. It reads from the cursor's own event on, so each reading also
proves that the store still holds that event. So the broker may lose, repeat and reorder pages, or be away for a day. Without a
broker the follower reads the store every second.

Killed anywhere, what is left? The follower stores nothing: the cursor begins at the consumer's checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.upcasting import NONE, Upcasters
from shared.line.checkpoint import DIVERGED, Checkpoint
from shared.line.ends import part
from shared.platform.telemetry import logger

log = logger(__name__)

SILENCE_S = 1.0
BATCH_MAX = 500
PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 1.0
REPEAT_LOG_S = 10.0
GATHER_EVENTS, GATHER_S = 64, 0.03
"""After a batch of at least so many events the next may come so much later, in seconds, and so be larger. A full batch, and one
of fewer events, are followed at once."""


class HistoryDiverged(Exception):
    """The store does not hold the event at our checkpoint: it lost events that are in our tables."""

    reason = DIVERGED


class LineAway(Exception):
    """The event store does not answer."""


class FeedAway(Exception):
    """The broker does not answer, or was away for a moment and may have lost messages."""


@dataclass(frozen=True, slots=True)
class LinePage:
    """A part of the line as the store has it; `head` and `epoch` are from the time when the reading began."""

    epoch: str
    head: int
    events: Sequence[EventEnvelope]


@dataclass(frozen=True, slots=True)
class FeedPage:
    """What the broker brought in one message: events, and the epoch under which they were published; none if it is no page."""

    epoch: str
    events: Sequence[EventEnvelope]


class Line(Protocol):
    """The event store, which decides."""

    def read(self, from_position: int, events_max: int = 0) -> AsyncGenerator[LinePage, None]:
        """The events from that position up to the head, as one page or more. Raises LineAway.

        With `events_max`, so many at the most.
        """


class Feed(Protocol):
    """The broker, whose pages are checked against the cursor."""

    async def open(self) -> None:
        """Receives the pages that are published from now on, and drops earlier ones. Raises FeedAway."""

    async def fetch(self, timeout_s: float) -> list[FeedPage]:
        """The next pages, as soon as there is one; none after `timeout_s`. Raises FeedAway.

        Not more than fill a batch, at least one. If the pages that wait become too many, the oldest are lost.
        """


@dataclass(frozen=True, slots=True)
class EventBatch:
    """The next events of the line, without a gap; `after` is the checkpoint when they are applied. May be empty.

    How they are cut is told in `ends.py`: the event that ends a tenant or an aggregate is in a batch of its own.
    """

    events: Sequence[EventEnvelope]
    after: Checkpoint

    def follows(self, at: Checkpoint) -> bool:
        """Whether these are the events directly behind a checkpoint. Tells by the first and the last one."""
        events, after = self.events, self.after
        if not events:
            return (after.position, after.event_id) == (at.position, at.event_id)
        last = events[-1]
        return (
            events[0].position == at.position + 1
            and last.position == after.position == at.position + len(events)
            and last.event_id == after.event_id
        )


def take(cursor: Checkpoint, pages: Sequence[FeedPage]) -> tuple[list[EventEnvelope], bool]:
    """The events of the broker's pages that may be applied at the cursor, and whether the store must be read next."""
    taken: list[EventEnvelope] = []
    following = cursor.position + 1
    for page in pages:
        if not page.events:
            return taken, True
        for envelope in page.events:
            position = envelope.position
            if position < following:
                continue
            if position > following or page.epoch != cursor.epoch:
                return taken, True
            taken.append(envelope)
            following += 1
    return taken, False


class Follower:
    """Yields the events of the line behind a checkpoint, without end.

    Several may follow at once, each from its own checkpoint. But they share the feed, so each gets a part of its pages and reads
    the store for the others: `FanOut` is for several.
    """

    def __init__(
        self,
        line: Line,
        feed: Feed | None,
        *,
        upcasters: Upcasters = NONE,
        batch_max: int = BATCH_MAX,
        silence_s: float = SILENCE_S,
        gather_s: float = GATHER_S,
    ) -> None:
        """Without a feed, the follower reads the event store every `silence_s`. Older events are yielded as those of today.

        A batch has `batch_max` events at the most; so much the feed should fetch at once.

        A busy consumer's next batch comes up to `gather_s` later, see GATHER_EVENTS.
        """
        self._upcasters = upcasters
        self._line = line
        self._feed = feed
        self._batch_max = batch_max
        self._silence_s = silence_s
        self._gather_s = gather_s

    def follow(self, checkpoint: Checkpoint) -> AsyncGenerator[EventBatch, None]:
        """Batches of events behind the checkpoint. When the caller asks for the next one, it has applied the last one.

        The first batch comes when the store has shown that it holds the checkpoint's event, even if the batch is empty.
        Raises HistoryDiverged.
        """
        return _Following(
            self._line, self._feed, self._upcasters, self._batch_max, self._silence_s, self._gather_s, checkpoint
        ).batches()


class _Following:
    """One consumer's way along the line. Its cursor is its own: who follows at the same time has another."""

    def __init__(
        self,
        line: Line,
        feed: Feed | None,
        upcasters: Upcasters,
        batch_max: int,
        silence_s: float,
        gather_s: float,
        checkpoint: Checkpoint,
    ) -> None:
        self._line = line
        self._feed = feed
        self._upcasters = upcasters
        self._batch_max = batch_max
        self._silence_s = silence_s
        self._gather_s = gather_s
        self._cursor = checkpoint
        self._told_at = -REPEAT_LOG_S

    async def batches(self) -> AsyncGenerator[EventBatch, None]:
        """As `Follower.follow`."""
        pause_s, first = 0.0, True
        while True:
            before = self._cursor.position
            # Before the store is read, so that whatever the reading does not find comes as a page.
            listens = await self._open()
            async with aclosing(self._catch_up()) as batches:
                async for batch in batches:
                    yield batch
                    self._cursor, first = batch.after, False
            if first:
                yield EventBatch((), self._cursor)
                first = False
            if listens is None:
                await asyncio.sleep(self._silence_s)
            else:
                async with aclosing(self._listen(listens)) as batches:
                    async for batch in batches:
                        yield batch
                        self._cursor = batch.after
            # A broker that causes reads in which nothing is missing must not keep the store busy.
            pause_s = 0.0 if self._cursor.position > before else min(max(2 * pause_s, PAUSE_MIN_S), PAUSE_MAX_S)
            await asyncio.sleep(pause_s)

    async def _catch_up(self) -> AsyncGenerator[EventBatch, None]:
        """Reads the store up to its head. Waits while the store does not answer."""
        pause_s = PAUSE_MIN_S
        while True:
            try:
                async with aclosing(self._read_line()) as batches:
                    async for batch in batches:
                        pause_s = PAUSE_MIN_S
                        yield batch
                return
            except LineAway as error:
                if time.monotonic() - self._told_at > REPEAT_LOG_S:
                    self._told_at = time.monotonic()
                    log.info("event_store_awaited", error=str(error), position=self._cursor.position)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)

    async def _open(self) -> Feed | None:
        """The feed, if there is one and its broker answers."""
        if self._feed is not None:
            try:
                await self._feed.open()
            except FeedAway as error:
                log.debug("feed_away", error=str(error))
            else:
                return self._feed
        return None

    async def _listen(self, feed: Feed) -> AsyncGenerator[EventBatch, None]:
        """Yields what the broker brings, until the store must be read."""
        try:
            progress_at = time.monotonic()
            while True:
                # Pages that bring nothing new do not count: behind them an event may have been lost.
                left_s = progress_at + self._silence_s - time.monotonic()
                if left_s > 0 and (pages := await feed.fetch(left_s)):
                    waiting, doubt = take(self._cursor, pages)
                    came = len(waiting)
                    while events := self._cut(waiting, all_=True):
                        yield self._batch(self._cursor.epoch, events)
                    if doubt:
                        return
                    if came:
                        progress_at = time.monotonic()
                    if GATHER_EVENTS <= came < self._batch_max:
                        await asyncio.sleep(self._gather_s)
                    continue
                missed = False
                try:
                    async with aclosing(self._read_line()) as batches:
                        async for batch in batches:
                            missed = True
                            yield batch
                except LineAway:  # then nobody appends through it either; what the relay still has may come
                    pass
                if missed:
                    return
                progress_at = time.monotonic()
        except FeedAway as error:
            log.debug("feed_away", error=str(error))
            await asyncio.sleep(self._silence_s)

    async def _read_line(self) -> AsyncGenerator[EventBatch, None]:
        """One reading of the store, from the cursor's own event on. Raises HistoryDiverged if the store lacks that event."""
        cursor = self._cursor
        waiting: list[EventEnvelope] = []
        proven = cursor.position == 0
        async with aclosing(_ahead(self._line.read(max(cursor.position, 1)))) as pages:
            async for page in pages:
                if page.head < cursor.position:
                    raise HistoryDiverged(f"the store ends at {page.head}, the tables are at {cursor.position}")
                waiting.extend(page.events)
                if not proven and waiting:
                    found = waiting.pop(0)
                    if (found.position, found.event_id) != (cursor.position, cursor.event_id):
                        raise HistoryDiverged(
                            f"at position {cursor.position} the tables have seen event {cursor.event_id}, "
                            f"the store holds {found.event_id} (position {found.position})"
                        )
                    proven = True
                while events := self._cut(waiting, all_=False):
                    yield self._batch(page.epoch, events)
                epoch = page.epoch
        if not proven:
            raise HistoryDiverged(f"the store shows no event at position {cursor.position}")
        if not waiting and epoch != self._cursor.epoch:
            yield self._batch(epoch, waiting)
        while events := self._cut(waiting, all_=True):
            yield self._batch(epoch, events)

    def _cut(self, waiting: list[EventEnvelope], *, all_: bool) -> list[EventEnvelope]:
        """Takes the next batch from the events that wait; without `all_`, only if no further event would fit."""
        size = part(waiting, self._batch_max)
        if not all_ and size == len(waiting) < self._batch_max:
            return []
        events = waiting[:size]
        del waiting[:size]
        return events

    def _batch(self, epoch: str, events: Sequence[EventEnvelope]) -> EventBatch:
        """The next batch. Raises LineAway if the answer has a gap: then it is not from an event store of ours."""
        before = self._cursor
        if not events:
            return EventBatch((), Checkpoint(epoch, before.position, before.event_id))
        first, last = events[0].position, events[-1].position
        if first != before.position + 1 or last != before.position + len(events):
            raise LineAway(f"{len(events)} events from {first} to {last} do not follow position {before.position}")
        self._upcasters.update(events)
        return EventBatch(events, Checkpoint(epoch, last, events[-1].event_id))


async def _ahead(pages: AsyncGenerator[LinePage, None]) -> AsyncGenerator[LinePage, None]:
    """The same pages, each read while the caller works on the page before."""
    async with aclosing(pages):
        coming = asyncio.ensure_future(anext(pages, None))
        try:
            while (page := await coming) is not None:
                coming = asyncio.ensure_future(anext(pages, None))
                yield page
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
