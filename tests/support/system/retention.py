"""Sweepers and purgers of aggregates without their service, in this process or in one that kills itself at a step of its work.

Run as `python -m tests.support.system.retention URL FOLDER STEP`: the purge of the counter `whole`, if it is due a hundred days
from now, and then all purges that are open; steps are counted from 1, before and after each call of the database and of the
archive; at STEP the process gets SIGKILL. It ends with 0 if it was through before.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shared.commands import aggregate_purging
from shared.commands.aggregate_purging import AggregatePurger
from shared.commands.boxing import Boxer
from shared.commands.registry import CommandRegistry
from shared.commands.retention import add_retention
from shared.commands.retention_plan import PlannedPurge, Purges
from shared.commands.retention_sweeper import RetentionSweeper
from shared.line.archive import Archive
from shared.line.event_store import AggregateKey
from shared.platform.identity import Role
from shared.platform.postgres import Reads
from tests.support.domains.trial import COUNTER, Moved, build_registry
from tests.support.system.boxing import Steps, boxer, files_in


def ending() -> CommandRegistry:
    """Counters end at zero, each with those that it has moved something to; a tenant may set rules."""
    registry = build_registry(ended=lambda counter: counter.total == 0)
    registry.rows_of(COUNTER).box_with(Moved, COUNTER, id=lambda e: e.to_id)
    add_retention(registry, roles=frozenset({Role.USER}))
    return registry


def purger_of(one: Boxer, registry: CommandRegistry) -> AggregatePurger:
    """A purger beside a boxer."""
    return AggregatePurger(one._reads, registry, one._archive, shard=1, clock=lambda: datetime.now(UTC))


def sweeper_of(one: Boxer, registry: CommandRegistry, clock: Callable[[], datetime]) -> RetentionSweeper:
    """A sweeper with a boxer."""
    purges = Purges(one, one._reads, registry)
    return RetentionSweeper(one, purges, purger_of(one, registry), one._reads, registry, clock=clock)


class SteppedPurger(AggregatePurger):
    """Counts before and after each step."""

    def __init__(self, reads: Reads, registry: CommandRegistry, archive: Archive, steps: Steps) -> None:
        super().__init__(reads, registry, archive, shard=1, clock=lambda: datetime.now(UTC))
        self._steps = steps

    async def begin(self, planned: PlannedPurge) -> None:
        """As in AggregatePurger."""
        self._steps.step()
        await super().begin(planned)
        self._steps.step()

    async def _step(self, purge_id: int) -> str:
        self._steps.step()
        stage = await super()._step(purge_id)
        self._steps.step()
        return stage

    async def _forgotten(self, archive: Archive, keys: Sequence[AggregateKey]) -> int:
        self._steps.step()
        await archive.forget_aggregate(keys[0])
        self._steps.step()
        files = await super()._forgotten(archive, keys)
        self._steps.step()
        return files


async def main(url: str, folder: str, last: str) -> None:
    """Sweeps and purges, as far as it gets, three rows a step."""
    aggregate_purging.LIMIT_ROWS = 3
    registry, archive = ending(), Archive(files_in(Path(folder)))
    async with boxer(url, files_in(Path(folder)), registry) as mover:
        purger = SteppedPurger(mover._reads, registry, archive, Steps(int(last)))
        now = datetime.now(UTC) + timedelta(days=100)
        plan = Purges(mover, mover._reads, registry).plan
        for each in (await plan("acme", "counter", 1, now, after="", examined=99, found_max=99)).planned:
            if each.key[2] == "whole":
                await purger.begin(each)
        for purge_id in await purger.open():
            await purger.purge(purge_id)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
