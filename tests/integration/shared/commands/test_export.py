"""What is exported of a tenant: each event once, as it was stored, wherever it is, and nothing behind the position."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import export
from shared.commands.recurring import Recurring
from shared.folds.errors import Rejected
from shared.line.archive import Archive
from shared.line.event_store import StoredEvent
from shared.line.read_through import read_through
from shared.platform.identity import Identity, Role
from shared.platform.postgres import Reads
from tests.integration.shared.commands.test_purging import filled
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import replica
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.purging import reading


async def exported(reads: Reads, folder: Path | None, upto: int) -> list[StoredEvent]:
    """All events of the first tenant up to a position."""
    archive = Archive(files_in(folder)) if folder else None
    return [event async for page in export.events_of(reads, archive, TENANT, upto) for event in page]


async def test_every_event_once_while_aggregates_are_boxed_and_unboxed(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows and pages of any size; what is appended meanwhile is no part of it, nor are commands on it."""
    monkeypatch.setattr(export, "WINDOW_POSITIONS", 7)
    monkeypatch.setattr(export, "PAGE_EVENTS", 3)
    monkeypatch.setattr(export, "PAGE_ROWS", 5)
    await filled(write_db, tmp_path)
    async with (
        reading(write_db.app) as reads,
        boxer(write_db.app, files_in(tmp_path)) as mover,
        replica(write_db, build_registry()) as one,
    ):
        line = await read_through(reads, Archive(files_in(tmp_path)), after=0, limit=1000)
        mine, upto = [event for event in line if event.tenant == TENANT], line[-1].position

        async def toggle() -> None:
            for _ in range(4):
                await move(mover, "unbox", "a", str(uuid4()))
                await one.ask_one(Add(counter_id="later", amount=1))
                await move(mover, "box", "a", str(uuid4()))

        toggling = asyncio.create_task(toggle())
        while not toggling.done():
            assert await exported(reads, tmp_path, upto) == mine
        await toggling
        commands = [row async for page in export.commands_of(reads, TENANT, upto) for row in page]
        assert sum(row.events_appended for row in commands) == len(mine)
        assert len({row.command_id for row in commands}) == len(commands)
        with pytest.raises(Rejected, match="not told where"):
            await exported(reads, None, upto)


async def test_schedules_are_there_once_whatever_their_state(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pages of any size, also those that are paused or have ended; another tenant's are not."""
    monkeypatch.setattr(export, "PAGE_ROWS", 2)
    async with reading(write_db.app) as reads, replica(write_db, build_registry()) as one:
        recurring = Recurring(reads)
        alice = Identity(tenant=TENANT, user_id="alice", roles=frozenset({Role.TENANT_ADMIN}))
        for nth in range(6):
            tenant = TENANT if nth else "umbrella"
            row = await recurring.add(one.command(Add(counter_id=f"{nth}", amount=1), tenant=tenant), "0 0 1 1 *", "UTC", "none")
            if nth in (2, 4):
                await (recurring.pause if nth == 2 else recurring.end)(alice, row.schedule_id)
        found = [row async for page in export.schedules_of(reads, TENANT) for row in page]
        statuses = {"1": "active", "2": "paused", "3": "active", "4": "ended", "5": "active"}
        assert {row.aggregate_id: row.status for row in found} == statuses
        assert len(found) == 5
