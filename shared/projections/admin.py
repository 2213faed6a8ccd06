"""What operators see of parked keys, and how they ask the projector to retry or discard one.

The read service can write no row. It leaves the request in the read database, under a new id, and waits until the projector has
carried it out (`replay`). A request whose caller is gone is carried out all the same; one that finds no projector waits for one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, NamedTuple
from uuid import UUID, uuid4

from shared.folds.errors import NotFound, Rejected, Unavailable
from shared.platform.metrics import Metrics
from shared.platform.postgres import Connection, Reads
from shared.platform.probe import DatabaseProbe
from shared.platform.watched import Values, watch

EVENTS_SHOWN_MAX = 100
ASK_AGAIN_S = 0.02
WAIT_MAX_S = 10.0
BEFORE_ALL = UUID(int=0)

_UNIX = datetime(1970, 1, 1, tzinfo=UTC)


class ParkedRow(NamedTuple):
    """A parked key as operators see it."""

    parked_id: UUID
    consumer: str
    shard: int
    tenant: str
    table: str
    key: str
    error: str
    behind: UUID | None
    parked_at: datetime
    events: int

    @property
    def parked_at_us(self) -> int:
        """When the key was parked, in microseconds since 1970."""
        return (self.parked_at - _UNIX) // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request came to. `parked` is the key as it stands now; None if it is released."""

    parked: ParkedRow | None
    applied: int
    skipped: int
    skipped_events: Sequence[dict[str, Any]]


METRICS = {"foldline.projection.parked": ("1", "Parked keys by group, up to a thousand of each.")}
MEASURED_MAX, COUNTED_MAX = 1000, 10_000
"""Up to how many keys of a group are counted, for the gauge and for operators."""
_COUNT: LiteralString = "SELECT * FROM count_parked_each(%s, %s)"


def watch_parked(metrics: Metrics, probe: DatabaseProbe, shard: int, groups: Iterable[str]) -> None:
    """Makes a gauge of the parked keys. Of these groups it is also told that there are none."""
    none = dict.fromkeys(groups, 0)

    async def ask() -> Values:
        counts = none | dict(await probe.rows(_COUNT, (shard, MEASURED_MAX)))
        return {"foldline.projection.parked": [(count, {"foldline.consumer": name}) for name, count in counts.items()]}

    watch(metrics, METRICS, ask)


class ParkedAdmin:
    """Parked keys of one shard, of all tenants."""

    def __init__(self, reads: Reads, shard: int) -> None:
        self._reads = reads
        self._shard = shard

    async def find(self, projection: str, tenant: str, after: tuple[int, str] | None, limit: int) -> list[ParkedRow]:
        """Parked keys, oldest first, behind a place: microseconds since 1970 and an id. Raises ValueError for no such place."""
        at, at_id = (0, BEFORE_ALL) if after is None else (after[0], UUID(after[1]))
        try:
            moment = _UNIX + timedelta(microseconds=at)
        except OverflowError as error:
            raise ValueError("beyond the calendar") from error
        async with self._reads.connection() as connection:
            cursor = await connection.execute(
                "SELECT * FROM list_parked(%s, %s, %s, %s, %s, %s)", (self._shard, projection, tenant, moment, at_id, limit)
            )
            return [ParkedRow(*row) for row in await cursor.fetchall()]

    async def get(self, parked_id: str) -> tuple[ParkedRow, list[tuple[int, str, str]]]:
        """A parked key, and position, id and type of the first events that wait. Raises NotFound."""
        async with self._reads.connection() as connection:
            parked = await _get(connection, parked_id)
            cursor = await connection.execute("SELECT * FROM parked_events_of(%s, %s)", (UUID(parked_id), EVENTS_SHOWN_MAX))
            return parked, await cursor.fetchall()

    async def counts(self) -> dict[str, int]:
        """How many keys are parked, by projection, up to COUNTED_MAX of each. Those without any are left out."""
        async with self._reads.connection() as connection:
            return dict(await (await connection.execute(_COUNT, (self._shard, COUNTED_MAX))).fetchall())

    async def ask(self, parked_id: str, action: str, *, all_events: bool, user_id: str, within_s: float | None) -> Outcome:
        """Has the projector `retry` or `discard` a key. Raises NotFound; Rejected PARKED_BEHIND; Unavailable PROJECTOR_AWAY."""
        request_id = uuid4()
        async with self._reads.connection() as connection:
            parked = await _get(connection, parked_id)
            if parked.behind is not None:
                raise Rejected(
                    "PARKED_BEHIND",
                    "the row waits for an event of its aggregate that cannot be read; see to the aggregate's key",
                    behind_parked_id=str(parked.behind),
                )
            asked = (request_id, UUID(parked_id), action, all_events, user_id)
            cursor = await connection.execute("SELECT ask_parked(%s, %s, %s, %s, %s)", asked)
            if await cursor.fetchone() != (True,):
                raise _absent(parked_id)
        try:
            async with asyncio.timeout(min(WAIT_MAX_S, WAIT_MAX_S if within_s is None else within_s * 0.9)):
                return await self._answer(request_id, parked_id)
        except TimeoutError:
            raise Unavailable("PROJECTOR_AWAY", "no projector has come to it yet; it is done when one leads") from None

    async def _answer(self, request_id: UUID, parked_id: str) -> Outcome:
        while True:
            async with self._reads.connection() as connection:
                cursor = await connection.execute("SELECT * FROM parked_answer(%s)", (request_id,))
                row = await cursor.fetchone()
                done, _, applied, skipped, skipped_events, there = row or (False, "", 0, 0, "[]", False)
                if done:
                    parked = await _get(connection, parked_id) if there else None
                    return Outcome(parked, applied, skipped, json.loads(skipped_events))
                if not there:  # another request has released it
                    raise _absent(parked_id)
            await asyncio.sleep(ASK_AGAIN_S)


async def _get(connection: Connection, parked_id: str) -> ParkedRow:
    cursor = await connection.execute("SELECT * FROM get_parked(%s)", (UUID(parked_id),))
    row = await cursor.fetchone()
    if row is None:
        raise _absent(parked_id)
    return ParkedRow(*row)


def _absent(parked_id: str) -> NotFound:
    return NotFound("PARKED_NOT_FOUND", f"there is no parked key {parked_id.lower()}")
