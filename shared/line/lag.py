"""How far behind the line is in seconds: the age of the oldest event that a consumer, or the stream, does not have yet.

The line is asked every few seconds for one event, that behind the place of who follows. In between the age grows by itself, also
while the line does not answer.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime

from shared.line.follower import Line
from shared.platform.instruments import Labels
from shared.platform.metrics import Metrics
from shared.platform.probe import DatabaseProbe

Places = Callable[[], Mapping[str, int]]
"""The positions up to which those who follow have the line, by name; only of those who follow now."""
RecordedAt = Callable[[int], Awaitable[datetime | None]]
"""When the first event behind a position was recorded; None if there is none."""

_BEHIND = "SELECT recorded_at FROM events WHERE position > %s ORDER BY position LIMIT 1"


class Lag:
    """The age of the oldest event behind the places of those who follow."""

    def __init__(self, places: Places, recorded_at: RecordedAt, now: Callable[[], float] = time.time) -> None:
        """`now` is in seconds since 1970, by a clock that agrees with the database's."""
        self._places = places
        self._recorded_at = recorded_at
        self._now = now
        # By position: when the event behind it was recorded.
        self._behind: dict[int, float] = {}

    async def refresh(self) -> None:
        """Asks the line. Raises what that raises; then the ages are those of the events that were known before."""
        behind = {}
        for position in set(self._places().values()):
            if (recorded_at := await self._recorded_at(position)) is not None:
                behind[position] = recorded_at.timestamp()
        self._behind = behind

    def seconds(self) -> dict[str, float]:
        """The ages by name; 0 for who had all when the line was asked, or has gone on since."""
        now, behind = self._now(), self._behind
        return {name: max(now - behind[at], 0.0) if at in behind else 0.0 for name, at in self._places().items()}

    def register(self, metrics: Metrics, name: str, description: str, labels: Callable[[str], Labels]) -> None:
        """Makes a gauge of it. `labels` are those of a name."""
        metrics.gauge(name, description, lambda: [(age_s, labels(who)) for who, age_s in self.seconds().items()], unit="s")
        metrics.watch(self.refresh)


def consumers_lag(
    metrics: Metrics, places: Places, line: Callable[[], Line | None], shard: int, now: Callable[[], float] = time.time
) -> None:
    """Makes a gauge of the lag of the consumers that this process leads. `line` is the event store, None while it leads none."""

    async def recorded_at(position: int) -> datetime | None:
        if (store := line()) is not None:
            async with aclosing(store.read(position + 1, 1)) as pages:
                async for page in pages:
                    for event in page.events:
                        return event.recorded_at.ToDatetime(tzinfo=UTC)
        return None

    Lag(places, recorded_at, now).register(
        metrics,
        "foldline.consumer.lag",
        "How old the oldest event is that a consumer has not applied, by who leads.",
        lambda name: {"foldline.consumer": name, "foldline.shard": str(shard)},
    )


def relay_lag(metrics: Metrics, places: Places, probe: DatabaseProbe) -> None:
    """Makes a gauge of the lag of the stream; `places` are by shard."""

    async def recorded_at(position: int) -> datetime | None:
        rows = await probe.rows(_BEHIND, (position,))
        return rows[0][0] if rows else None

    Lag(places, recorded_at).register(
        metrics,
        "foldline.relay.lag",
        "How old the oldest event is that the stream does not have, by who leads.",
        lambda shard: {"foldline.shard": shard},
    )
