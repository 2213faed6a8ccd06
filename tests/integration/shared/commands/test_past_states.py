"""Past states of long streams leave room for everybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from deploy.bootstrap import Database
from shared.commands import history
from shared.commands.history import past_state
from shared.folds.errors import Refusal
from shared.platform.fairness import FOLDS_MAX, WAITING_MAX, Room, Turns
from shared.platform.postgres import Reads
from tests.integration.shared.commands.test_boxing import filled
from tests.support.domains.trial import build_registry
from tests.support.system.boxing import TENANT
from tests.support.system.waiting import eventually

KEY = (TENANT, "counter", "a")


class ShutTurns(Turns):
    """Turns that nobody gets until they are opened; whose turns were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()
        self.asked: list[str] = []

    async def next(self, tenant: str) -> None:
        """As in Turns, once they are open."""
        self.asked.append(tenant)
        await self.opened.wait()
        await super().next(tenant)


@pytest.fixture
async def reads(write_db: Database) -> AsyncIterator[Reads]:
    """Reads of a line with a counter of 12 events."""
    await filled(write_db, "a")
    reads = Reads(write_db.app, application_name="test", size_max=4)
    await reads.open()
    yield reads
    await reads.close()


async def test_each_page_is_folded_at_a_turn_of_the_tenant(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine events in pages of three: three turns."""
    monkeypatch.setattr(history, "PAGE_EVENTS", 3)
    room, turns = Room(), ShutTurns()
    turns.opened.set()
    room.turns = turns
    found = await past_state(build_registry(), reads, room, KEY, version=9)
    assert (found.version, found.state.total) == (9, 45)
    assert turns.asked == [TENANT] * 3


async def test_one_tenants_crowd_holds_up_no_other(reads: Reads) -> None:
    """Two fold, 64 wait, the others are refused; another tenant's call is among the next."""
    room, turns = Room(), ShutTurns()
    room.turns = turns
    ended: list[str] = []

    async def ask(tenant: str) -> str:
        try:
            await past_state(build_registry(), reads, room, (tenant, *KEY[1:]), version=9)
        except Refusal as refusal:
            ended.append(tenant)
            return refusal.reason
        ended.append(tenant)
        return "folded"

    crowd = [asyncio.create_task(ask(TENANT)) for _ in range(FOLDS_MAX + WAITING_MAX + 10)]
    await eventually(lambda: len(ended) == 10 and len(turns.asked) == 2)
    other = asyncio.create_task(ask("umbrella"))
    await eventually(lambda: len(ended) == 11)
    assert turns.asked == [TENANT] * 2
    turns.opened.set()
    assert await other == "AGGREGATE_NOT_FOUND"
    assert "umbrella" in ended[11:16]
    assert sorted(await asyncio.gather(*crowd)) == ["TOO_MANY_PAST_STATES"] * 11 + ["folded"] * (FOLDS_MAX + WAITING_MAX - 1)
