"""What operators see of rebuilds, and how they ask the projector for one. See `rebuild`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

from shared.folds.errors import NotFound, Refusal, Rejected
from shared.platform.postgres import Connection, Reads, one

SWITCHED = "switched"
ENDED = (SWITCHED, "waiting")
"""States in which a rebuild does not go on by itself."""

_REFUSALS = {
    "NEVER_FILLED": "the projection has no tables that serve: no projector has run yet",
    "DIVERGED": "the projection follows a lost history; empty and fill it with RefillProjection",
    "THERE_ALREADY": "there is a rebuild already, or the former tables of the last one are kept: cancel it, or drop them",
}


class RebuildRow(NamedTuple):
    """A rebuild as operators see it."""

    version: int
    state: str
    only_if_same: bool
    asked_by: str
    started_at: datetime | None
    ended_at: datetime | None
    position: int
    target_position: int
    reason: str
    parked: int
    compared_at: int | None
    rows_before: int | None
    rows_after: int | None
    rows_differing: int | None
    differences: str

    @property
    def different_rows(self) -> Sequence[dict[str, object]]:
        """Table and key of the first rows that differ."""
        found: list[dict[str, object]] = json.loads(self.differences)
        return found


class RebuildAdmin:
    """Rebuilds of the projections of one shard."""

    def __init__(self, reads: Reads, shard: int, names: Collection[str]) -> None:
        self._reads = reads
        self._shard = shard
        self._names = names

    async def get(self, name: str) -> RebuildRow:
        """The rebuild of a projection. Raises NotFound PROJECTION_NOT_FOUND or REBUILD_NOT_FOUND."""
        self._known(name)
        async with self._reads.connection() as connection:
            return await self._get(connection, name)

    async def start(self, name: str, *, only_if_same: bool, user_id: str) -> RebuildRow:
        """Asks for a rebuild. Raises NotFound; Rejected NEVER_FILLED, PROJECTION_DIVERGED or REBUILD_THERE_ALREADY."""
        self._known(name)
        async with self._reads.connection() as connection:
            asked = (name, self._shard, only_if_same, user_id)
            (answer,) = await one(connection, "SELECT ask_rebuild(%s, %s, %s, %s)", asked)
            if answer in _REFUSALS:
                reason = {"DIVERGED": "PROJECTION_DIVERGED", "THERE_ALREADY": "REBUILD_THERE_ALREADY"}.get(answer, answer)
                raise Rejected(reason, _REFUSALS[answer])
            return await self._get(connection, name)

    async def switch(self, name: str) -> RebuildRow:
        """Lets a rebuild that waits switch. Raises NotFound; Rejected REBUILD_NOT_WAITING."""
        refusal = Rejected("REBUILD_NOT_WAITING", "the projection has no rebuild that waits for an operator")
        return await self._steer(name, ["waiting"], "switching", refusal)

    async def cancel(self, name: str) -> RebuildRow:
        """Ends a rebuild. Raises NotFound; Rejected REBUILD_NOT_RUNNING."""
        refusal = Rejected("REBUILD_NOT_RUNNING", "the projection has no rebuild that can be cancelled")
        return await self._steer(name, ["asked", "filling", "waiting", "switching"], "cancelling", refusal)

    async def drop(self, name: str) -> RebuildRow:
        """Drops the former tables. Raises NotFound; Rejected NO_FORMER_TABLES."""
        refusal = Rejected("NO_FORMER_TABLES", "the projection has no tables of before a rebuild")
        return await self._steer(name, [SWITCHED], "dropping", refusal)

    async def _steer(self, name: str, before: list[str], after: str, refusal: Refusal) -> RebuildRow:
        """The rebuild in its new state; all else as it was before, since the projector may have ended it meanwhile."""
        self._known(name)
        async with self._reads.connection() as connection:
            cursor = await connection.execute("SELECT * FROM get_rebuild(%s, %s)", (name, self._shard))
            row = await cursor.fetchone()
            (steered,) = await one(connection, "SELECT steer_rebuild(%s, %s, %s, %s)", (name, self._shard, before, after))
        if not steered or row is None:
            raise refusal
        return RebuildRow(*row)._replace(state=after)

    async def _get(self, connection: Connection, name: str) -> RebuildRow:
        cursor = await connection.execute("SELECT * FROM get_rebuild(%s, %s)", (name, self._shard))
        row = await cursor.fetchone()
        if row is None:
            raise NotFound("REBUILD_NOT_FOUND", f"there is no rebuild of {name}")
        return RebuildRow(*row)

    def _known(self, name: str) -> None:
        if name not in self._names:
            raise NotFound("PROJECTION_NOT_FOUND", f"there is no projection {name}")
