"""The end of old rows of the command log, if the settings say that they end.

What a swept row knew is gone: the same command id would be carried out again. An id that is a UUID of version 7 says when
it was made, so one from before what is kept is refused as COMMAND_ID_EXPIRED. Any other id says nothing; its sender must
not repeat it for longer than rows are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from shared.platform.postgres import Reads
from shared.platform.rounds import Hindrances, rounds
from shared.platform.telemetry import logger

CHUNK = 2000
PAUSE_S = 0.05
"""Between two chunks: sweeping leaves most of the database's time to others."""

EVERY_S = 60.0

log = logger(__name__)


class Sweeper:
    """Deletes rows that were received, and ended, longer ago than `kept`. Several may run at once."""

    def __init__(self, database: Reads, kept: timedelta, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._kept = kept
        self._clock = clock

    async def run(self) -> None:
        """Sweeps until cancelled."""
        await rounds(Hindrances("sweeper_waits"), self.sweep, EVERY_S)

    async def sweep(self) -> int:
        """Deletes what is old by now, chunk by chunk, each in a transaction of its own; returns how many rows of the log went.

        Schedules that ended so long ago go as well, a chunk at a time.
        """
        before = self._clock() - self._kept
        async with self._database.connection() as connection:
            await connection.execute("SELECT sweep_schedules(%s, %s::integer)", (before, CHUNK))
        swept = 0
        while True:
            async with self._database.connection() as connection:
                cursor = await connection.execute("SELECT sweep_commands(%s, %s::integer)", (before, CHUNK))
                [(found,)] = await cursor.fetchall()
            chunk = int(found)
            swept += chunk
            if chunk < CHUNK:
                break
            await asyncio.sleep(PAUSE_S)
        if swept:
            log.info("commands_swept", rows=swept)
        return swept


def made_before(command_id: str, moment: datetime) -> bool:
    """Whether a command id says that it was made before a moment: only a UUID of version 7 does (RFC 9562)."""
    if command_id[14] != "7":
        return False
    made_ms = int(command_id[:8] + command_id[9:13], 16)
    return made_ms < int(moment.timestamp() * 1000)
