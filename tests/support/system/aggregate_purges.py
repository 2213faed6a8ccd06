"""Counters that have ended, their purge, and what is left of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from deploy.bootstrap import Database
from shared.commands.aggregate_purging import AggregatePurger
from shared.commands.boxing import Boxer
from shared.commands.retention_plan import PlannedPurge, Purges
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import PURGED, StoredEvent
from tests.support.checks.history import connected
from tests.support.domains.trial import Add, Move, SetPassword
from tests.support.fakes.replica import Replica
from tests.support.system.boxing import TENANT, move
from tests.support.system.retention import ending, purger_of

DAYS = 30


BUS = ending()


OTHER = "umbrella"


def later(days: float = DAYS + 1) -> datetime:
    """So many days from now."""
    return datetime.now(UTC) + timedelta(days=days)


async def filled(one: Replica, mover: Boxer) -> None:
    """`whole` and its part at zero, with a password, a snapshot, a box of each; others that have not ended; another tenant."""
    for tenant in (TENANT, OTHER):
        for amount in (5, *range(1, 11)):
            await one.ask_one(Add(counter_id="whole", amount=amount), tenant=tenant)
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2), tenant=tenant)
        await one.ask_one(SetPassword(counter_id="whole", subject_id="whole", word="long enough"), tenant=tenant)
        await one.ask_one(Add(counter_id="whole", amount=-58), tenant=tenant)
        await one.ask_one(Add(counter_id="part", amount=-2), tenant=tenant)
        await one.ask_one(Add(counter_id="live", amount=7), tenant=tenant)
    await one.ask_one(SetPassword(counter_id="live", subject_id="live", word="long enough"))
    await move(mover, "box", "whole", str(uuid4()))
    await move(mover, "unbox", "whole", str(uuid4()))
    await move(mover, "box", "part", str(uuid4()))


async def planned(mover: Boxer, days: int = DAYS) -> list[PlannedPurge]:
    """What a rule would purge."""
    purges = Purges(mover, mover._reads, BUS)
    page = await purges.plan(TENANT, "counter", days, later(), after="", examined=100, found_max=100)
    assert page.after == ""
    return list(page.planned)


async def held(mover: Boxer) -> list[tuple[str, str]]:
    """What a rule would purge, and what holds it."""
    return [(each.key[2], each.held_by) for each in await planned(mover)]


async def finished(purger: AggregatePurger) -> None:
    """Goes on with all purges to their end."""
    for purge_id in await purger.open():
        await purger.purge(purge_id)


async def purged(mover: Boxer) -> None:
    """Purges all that has ended of the first tenant."""
    purger = purger_of(mover, BUS)
    for each in await planned(mover):
        await purger.begin(each)
    await finished(purger)


async def rows(database: Database, *names: str) -> dict[str, list[Any]]:
    """What is left of counters of the first tenant, by table, where there is anything."""
    queries = {
        "events": "SELECT type FROM events WHERE tenant = %s AND aggregate_id = ANY (%s) ORDER BY position",
        "commands": "SELECT type FROM commands WHERE tenant = %s AND aggregate_id = ANY (%s) ORDER BY type",
        "snapshots": "SELECT version FROM snapshots WHERE tenant = %s AND aggregate_id = ANY (%s)",
        "credentials": "SELECT 1 FROM credentials WHERE tenant = %s AND subject_id = ANY (%s)",
        "boxes": "SELECT location FROM boxes WHERE tenant = %s AND aggregate_id = ANY (%s)",
        "boxed_events": "SELECT 1 FROM boxed_events JOIN boxes USING (box_id) WHERE tenant = %s AND aggregate_id = ANY (%s)",
    }
    found: dict[str, list[Any]] = {}
    async with connected(database.app) as connection:
        for table, query in queries.items():
            if them := await (await connection.execute(query, (TENANT, list(names)))).fetchall():
                found[table] = [value for (value,) in them]
    return found


def files(folder: Path) -> list[str]:
    """What is in the archive."""
    return [path.name for path in folder.rglob("*") if path.is_file()]


GONE = {
    "events": [AGGREGATE_PURGED] * 2,
    "commands": ["foldline.v1.PurgeAggregateRequest"],
    "boxes": ["", ""],
}
"""What is left of `whole` and its part."""


def is_beginning(line: list[StoredEvent], *, tenant: str = TENANT) -> bool:
    """Whether what is left of `whole` and its part is the beginning of it, but for the marks."""
    left = [event.type for event in line if event.tenant == tenant and event.aggregate_id not in ("live", "retention")]
    kept = [type_ != PURGED for type_ in left if type_ != AGGREGATE_PURGED]
    return kept == sorted(kept, reverse=True)
