"""What a projector remembers of the parked keys of its group: all of them, or, of very many, none.

Then each batch looks up the keys of its own rows and aggregates. What is read or remembered is as of the checkpoint's generation,
which the batch's fence proves, as it proves rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from shared.platform.postgres import Connection
from shared.projections import parking
from shared.projections.failures import TooManyParked
from shared.projections.parking import KEYS_PER_MINUTE_MAX, Parked, Parking, Place, event_name

KNOWN_MAX = 10_000
"""So many keys are remembered, which take about 5 MB."""


class ParkedKeys:
    """The parked keys of a consumer of the line, as of the last `refresh` and the batches since."""

    def __init__(self, consumer: str) -> None:
        self._consumer = consumer
        self.known: dict[Place, Parked] | None = {}
        """All keys; None if there are more than KNOWN_MAX."""
        self._failed_at: list[float] = []
        """When keys failed within the last minute, by time.monotonic()."""

    async def refresh(self, connection: Connection, shard: int) -> None:
        """Reads them anew."""
        self.known = await parking.load(connection, self._consumer, shard, KNOWN_MAX)
        self._failed_at = await parking.failed_lately(connection, self._consumer, shard)

    async def of_batch(self, connection: Connection, shard: int, places: Callable[[], Iterable[Place]]) -> Parking:
        """What is parked as a batch begins. `places` are those of its rows and aggregates, and asked for only if needed."""
        if self.known is not None:
            return Parking(self.known)
        return Parking(await parking.find(connection, self._consumer, shard, set(places())))

    def refuse_too_many(self, batch: Parking) -> None:
        """Raises TooManyParked if a key failed in the batch, and with it too many have within a minute."""
        if batch.new and (failures := batch.failures):
            since = time.monotonic() - 60
            if (recent := failures + sum(1 for at in self._failed_at if at > since)) > KEYS_PER_MINUTE_MAX:
                first = event_name(batch.queue[0][1])
                raise TooManyParked(f"{recent} keys failed within a minute; the last batch began to fail at {first}")

    def add(self, batch: Parking) -> None:
        """Remembers what a batch has parked, when it is committed."""
        if self.known is not None and batch.new:
            self.known.update(batch.new)
            if len(self.known) > KNOWN_MAX:
                self.known = None
        if batch.new:
            # As many as stop the group are enough.
            self._failed_at = [*self._failed_at, *[time.monotonic()] * batch.failures][-KEYS_PER_MINUTE_MAX - 1 :]
