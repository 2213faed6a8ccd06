"""Follows the line of events: each event once, in order, without a gap, whatever the broker does.

The broker is trusted with nothing. A message at or below the cursor is dropped; the one directly behind it is applied;
anything else is a doubt: a gap, a message of another history or of no history, a reconnect, a second of silence. Every
doubt is settled by the event store, which is read from the cursor itself on, so that each reading also proves that the
store still holds the event we stand on. So the broker may lose, repeat and reorder everything, be wiped, or be away for
a day; without it the follower reads the store every second.

Killed anywhere, what is left? Nothing is kept here: the cursor begins at the consumer's checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.checkpoint import DIVERGED, Checkpoint
from shared.platform.telemetry import logger

log = logger(__name__)

SILENCE_S = 1.0
BATCH_MAX = 500
PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 1.0
REPEAT_LOG_S = 10.0


class HistoryDiverged(Exception):
    """The store does not hold the event at our checkpoint: it lost a part of the line that our tables have seen."""

    reason = DIVERGED


class LineAway(Exception):
    """The event store does not answer now."""


class FeedAway(Exception):
    """The broker does not answer now, or was away for a moment and may have lost what it owed us."""


@dataclass(frozen=True, slots=True)
class LinePage:
    """A part of the line as the store has it; `head` and `epoch` are those of the moment when the reading began."""

    epoch: str
    head: int
    events: Sequence[EventEnvelope]


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """What the broker handed out: an event with the epoch it was published under, or None for what is no event."""

    epoch: str
    envelope: EventEnvelope | None


class Line(Protocol):
    """The event store: the truth."""

    def read(self, from_position: int) -> AsyncGenerator[LinePage, None]:
        """The events from that position up to the head; at least one page. Raises LineAway."""


class Feed(Protocol):
    """The broker: a hint that carries data."""

    async def open(self, from_position: int) -> None:
        """Lets messages come from that position on, afresh. Raises FeedAway."""

    async def fetch(self, timeout_s: float) -> list[FeedMessage]:
        """What has come since, as soon as there is anything; empty when the time is over. Raises FeedAway."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """The next events of the line, without a gap; `after` is the checkpoint when they are applied. May be empty."""

    events: Sequence[EventEnvelope]
    after: Checkpoint


def take(cursor: Checkpoint, deliveries: Sequence[FeedMessage]) -> tuple[list[EventEnvelope], bool]:
    """What of the broker's messages may be applied at the cursor, and whether they leave a doubt."""
    taken: list[EventEnvelope] = []
    following = cursor.position + 1
    for delivery in deliveries:
        envelope = delivery.envelope
        if envelope is None:
            return taken, True
        if envelope.position < following:
            continue
        if envelope.position > following or delivery.epoch != cursor.epoch:
            return taken, True
        taken.append(envelope)
        following += 1
    return taken, False


class Follower:
    """Hands out the line behind a checkpoint, for ever."""

    def __init__(self, line: Line, feed: Feed | None, *, batch_max: int = BATCH_MAX, silence_s: float = SILENCE_S) -> None:
        """Without a feed, the line alone is read, every `silence_s`."""
        self._line = line
        self._feed = feed
        self._batch_max = batch_max
        self._silence_s = silence_s
        self._cursor = Checkpoint()
        self._told_at = -REPEAT_LOG_S

    async def follow(self, checkpoint: Checkpoint) -> AsyncGenerator[EventBatch, None]:
        """Batches from behind the checkpoint on. Asking for the next one says that the last one was applied.

        The first comes as soon as the store has shown that it holds the checkpoint, even if it is empty. Raises
        HistoryDiverged.
        """
        self._cursor = checkpoint
        pause_s, first = 0.0, True
        while True:
            before = self._cursor.position
            async with aclosing(self._catch_up()) as batches:
                async for batch in batches:
                    yield batch
                    self._cursor, first = batch.after, False
            if first:
                yield EventBatch((), self._cursor)
                first = False
            async with aclosing(self._listen()) as batches:
                async for batch in batches:
                    yield batch
                    self._cursor = batch.after
            # A doubt that comes back although nothing was missing must not keep the store busy.
            pause_s = 0.0 if self._cursor.position > before else min(max(2 * pause_s, PAUSE_MIN_S), PAUSE_MAX_S)
            await asyncio.sleep(pause_s)

    async def _catch_up(self) -> AsyncGenerator[EventBatch, None]:
        """Reads the store up to its head; waits for a store that is away."""
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

    async def _listen(self) -> AsyncGenerator[EventBatch, None]:
        """Applies what the broker delivers until there is a doubt that only the store can settle."""
        if self._feed is None:
            await asyncio.sleep(self._silence_s)
            return
        try:
            await self._feed.open(self._cursor.position + 1)
            while True:
                deliveries = await self._feed.fetch(self._silence_s)
                if deliveries:
                    events, doubt = take(self._cursor, deliveries)
                    for begin in range(0, len(events), self._batch_max):
                        yield self._batch(self._cursor.epoch, events[begin : begin + self._batch_max])
                    if doubt:
                        return
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
        except FeedAway as error:
            log.debug("feed_away", error=str(error))
            await asyncio.sleep(self._silence_s)

    async def _read_line(self) -> AsyncGenerator[EventBatch, None]:
        """One reading of the store, from the cursor's own event on, which it must hold."""
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
                while len(waiting) >= self._batch_max:
                    yield self._batch(page.epoch, waiting[: self._batch_max])
                    del waiting[: self._batch_max]
                epoch = page.epoch
        if not proven:
            raise HistoryDiverged(f"the store shows no event at position {cursor.position}")
        if waiting or epoch != self._cursor.epoch:
            yield self._batch(epoch, waiting)

    def _batch(self, epoch: str, events: Sequence[EventEnvelope]) -> EventBatch:
        """The next batch; raises LineAway for a store that skips, since then it is not one of ours that answers."""
        before = self._cursor
        if not events:
            return EventBatch((), Checkpoint(epoch, before.position, before.event_id))
        first, last = events[0].position, events[-1].position
        if first != before.position + 1 or last != before.position + len(events):
            raise LineAway(f"{len(events)} events from {first} to {last} do not follow position {before.position}")
        return EventBatch(events, Checkpoint(epoch, last, events[-1].event_id))


async def _ahead(pages: AsyncGenerator[LinePage, None]) -> AsyncGenerator[LinePage, None]:
    """The same pages, each read while the one before is worked on."""
    async with aclosing(pages):
        coming = asyncio.ensure_future(anext(pages, None))
        try:
            while (page := await coming) is not None:
                coming = asyncio.ensure_future(anext(pages, None))
                yield page
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
