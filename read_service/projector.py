"""`python -m read_service.projector`: keeps the query tables of one shard in step with the line.

Any number may run. Each group of tables is led by one of them, which may lead several; the others stand by. A setting says which
groups a process may lead: the folds of a group take the processor from all other groups of their process. Processes may start in
any order, and the projector works without the broker. Each group follows the line on its own. When one cannot go on (see
`ListProjections`), the projector stays up, applies nothing to that group's tables, and is not ready.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field, model_validator

from read_service.registry import GROUPS
from shared.folds.projection import Group
from shared.line.broker_access import Broker
from shared.line.fanout import FanOut
from shared.line.follower import Feed, Follower, Line
from shared.line.lag import consumers_lag
from shared.line.sources import PageFeed, StoreLine
from shared.platform.leader import LockClass, until
from shared.platform.metrics import Metrics
from shared.platform.parts import lead_parts
from shared.platform.peers import BrokerPeer, WriteServicePeer
from shared.platform.postgres import Connection, connect, refuse_unsafe
from shared.platform.probe import DatabaseProbe
from shared.platform.settings import load, named
from shared.platform.urls import DatabaseUrl
from shared.projections.groups import GroupProjector, Projectors
from shared.projections.projector import BATCH_MAX, GATHER_S
from shared.rpc import bootstrap
from shared.rpc.client import channel
from upcasters import UPCASTERS


class ProjectorSettings(WriteServicePeer, BrokerPeer):
    """The projector: keeps the query tables in step with the line of events."""

    database_url: DatabaseUrl
    """The read database's URL, as the role that writes the tables and not through a pooler: a session lock elects a leader."""
    token_file: Path
    """A file with a token of role `reader`; it is read again for every call, so it can be renewed."""
    shard: int = Field(1, ge=1)
    """The shard whose events are followed."""
    projector_groups: str = ""
    """The groups of tables that this process may lead, separated by commas; by default all. Each group is led by one process at a
    time, others stand by for it. Every group needs a process that may lead it."""

    @property
    def groups(self) -> Sequence[str]:
        """The names of the groups that this process may lead."""
        given = set(filter(None, map(str.strip, self.projector_groups.split(","))))
        known = [group.name for group in GROUPS]
        if unknown := given.difference(known):
            raise ValueError(f"there is no group {min(unknown)}, there are {', '.join(known)}")
        return [name for name in known if not given or name in given]

    @model_validator(mode="after")
    def _knows_groups(self) -> ProjectorSettings:
        named("projector_groups", lambda: self.groups)
        return self


async def connect_safely(database_url: str) -> Connection:
    """A connection for the tables' writer. Raises UnsafeDatabase for a role that policies do not bind."""
    connection = await connect(database_url, application_name="foldline-projector")
    try:
        await refuse_unsafe(connection, tables=())
    except BaseException:
        await connection.close()
        raise
    return connection


def build(settings: ProjectorSettings, line: Line, feed: Feed | None, groups: Iterable[Group] = GROUPS) -> Projectors:
    """The projectors of all groups of tables, reading from `line` and `feed`."""
    database_url = settings.database_url.get_secret_value()
    fan_out = FanOut(
        Follower(line, feed, upcasters=UPCASTERS, batch_max=BATCH_MAX, gather_s=GATHER_S).follow,
        alone=lambda: Follower(line, None, upcasters=UPCASTERS, batch_max=BATCH_MAX).follow,
    )
    projectors = [
        GroupProjector(group, settings.shard, fan_out.follow, connect=lambda: connect_safely(database_url)) for group in groups
    ]
    return Projectors(projectors, fan_out)


class Leading:
    """What the projector does while it leads."""

    def __init__(self, settings: ProjectorSettings) -> None:
        self._settings = settings
        self._projectors: Projectors | None = None
        self._line: Line | None = None

    async def run(self, stopping: asyncio.Event, names: Sequence[str]) -> None:
        """Keeps the groups with these names until `stopping` is set.

        Then the open transactions are rolled back; the next leaders do it again.
        """
        # Built anew for each lease, because nothing that was read under an earlier lease may be used.
        settings = self._settings
        feed = PageFeed(Broker.of(settings), settings.shard, f"projector-{settings.shard}", batch_max=BATCH_MAX)
        try:
            async with channel(settings.write_address, retries=False, tls=settings.write_tls) as events:
                self._line = StoreLine(events, settings.token_file, settings.shard)
                groups = [group for group in GROUPS if group.name in names]
                self._projectors = build(settings, self._line, feed, groups)
                await until(stopping, self._projectors.run())
        finally:
            self._projectors = self._line = None
            await feed.close()

    def measure(self, metrics: Metrics, _: DatabaseProbe) -> None:
        """Makes metrics of how far behind the tables are; one that stands by has none."""
        consumers_lag(
            metrics, lambda: self._projectors.places if self._projectors else {}, lambda: self._line, self._settings.shard
        )

    async def goes_on(self) -> str:
        """A check of readiness: which groups stopped, and why. A projector that stands by has no tables to keep."""
        return "" if self._projectors is None else self._projectors.stopped


def main() -> int:
    """Reads the settings and runs."""
    settings = load(ProjectorSettings, "read_service.projector")
    leading = Leading(settings)
    database_url = settings.database_url.get_secret_value()

    async def work(stopping: asyncio.Event) -> None:
        run = partial(leading.run, stopping)
        await lead_parts(database_url, LockClass.PROJECTOR, settings.shard, settings.groups, run, stopping)

    return bootstrap.lead(
        "projector",
        settings,
        database_url,
        settings.shard,
        work,
        checks={"projection": leading.goes_on},
        measure=leading.measure,
    )


if __name__ == "__main__":
    sys.exit(main())
