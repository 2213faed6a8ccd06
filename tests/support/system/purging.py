"""A purger in a process that kills itself at a step of its work.

`main` takes URL FOLDER TENANT STEP: steps are counted from 1, before and after each call of the database and of the archive; at
STEP the process gets SIGKILL. It ends with 0 if it was through before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared.commands import purging
from shared.commands.purging import Purger
from shared.line.archive import Archive
from shared.platform.postgres import Connection, Reads
from tests.support.system.boxing import Steps, files_in


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[Reads]:
    """Pooled connections."""
    reads = Reads(url, application_name="test", size_max=4)
    await reads.open()
    try:
        yield reads
    finally:
        await reads.close()


class SteppedPurger(Purger):
    """Counts before and after each step."""

    def __init__(self, reads: Reads, archive: Archive | None, steps: Steps) -> None:
        super().__init__(reads, archive)
        self._steps = steps

    async def _step(self, connection: Connection, tenant: str) -> str:
        self._steps.step()
        stage = await super()._step(connection, tenant)
        self._steps.step()
        return stage

    async def _archived(self, tenant: str) -> str:
        self._steps.step()
        assert self._archive is not None
        await self._archive.forget(tenant)
        self._steps.step()
        stage = await super()._archived(tenant)
        self._steps.step()
        return stage


async def main(url: str, folder: str, tenant: str, last: str) -> None:
    """Purges one tenant, as far as it gets, two positions and two rows a step."""
    purging.WINDOW_POSITIONS, purging.LIMIT_ROWS = 7, 5
    async with reading(url) as reads:
        await SteppedPurger(reads, Archive(files_in(Path(folder))), Steps(int(last))).purge(tenant)
