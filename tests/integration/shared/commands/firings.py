"""Recurring schedules of a test, and what they fired."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from deploy.bootstrap import Database
from shared.commands.log import StoredCommand, Wanted, list_commands
from shared.commands.recurring import Recurring, StoredSchedule
from shared.platform.postgres import Reads
from tests.integration.shared.commands.test_schedule import adding, now
from tests.support.checks.history import connected
from tests.support.system.waiting import eventually


async def create(reads: Reads, cron: str = "* * * * *", zone: str = "UTC", catch_up: str = "all", **more: Any) -> StoredSchedule:
    """A schedule of alice's that adds one. A minute may begin in the midst of a test: who counts firings wants another `cron`."""
    return await Recurring(reads).add(adding(**more), cron, zone, catch_up)


async def set_back(database: Database, by: timedelta, schedule: StoredSchedule | None = None) -> None:
    """Has the next firing of a schedule, or of all, be due so much earlier, as if time had passed while nothing ran."""
    async with connected(database.owner) as owner:
        await owner.execute(
            "UPDATE schedules SET due_at = due_at - %s WHERE status = 'active' AND coalesce(schedule_id = %s::uuid, true)",
            (by, schedule.schedule_id if schedule else None),
        )


async def fired(database: Database, schedule: StoredSchedule) -> list[StoredCommand]:
    """The firings of a schedule, in the order of their times."""
    async with connected(database.app) as connection:
        wanted = Wanted(tenant=schedule.tenant, causation_id=schedule.schedule_id)
        return sorted(await list_commands(connection, wanted, limit=1000), key=lambda row: row.due_at or now())


async def all_ran(database: Database, schedule: StoredSchedule, count: int) -> list[StoredCommand]:
    """The firings of a schedule when so many have ended."""

    async def ran() -> list[StoredCommand] | None:
        found = await fired(database, schedule)
        return found if len(found) >= count and all(row.finished_at for row in found) else None

    found = await eventually(ran, 30, every_s=0.05)
    assert found is not None
    return found
