"""One box at a time in memory: tenants take turns, and what would wait too long is refused by name."""

from __future__ import annotations

import asyncio
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import retention_plan
from shared.commands.boxes import newest_box
from shared.commands.boxing import WAITING_MAX, Boxer
from shared.folds.errors import Refusal
from shared.line.event_store import AggregateKey
from shared.line.files import Store
from tests.integration.shared.commands.test_boxing import filled
from tests.integration.shared.commands.test_boxing_together import together
from tests.support.domains.trial import Add, Move, Swell, build_registry
from tests.support.fakes.replica import replica
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.waiting import eventually

KEY = (TENANT, "counter", "a")


class ShutStore:
    """A store that gives nothing back until it is opened; counts how many wait for a file."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.opened = asyncio.Event()
        self.inside = self.inside_max = 0

    async def write(self, path: str, data: bytes) -> None:
        """As in Store."""
        await self._store.write(path, data)

    async def forget(self, folder: str) -> int:
        """As in Store."""
        return await self._store.forget(folder)

    async def read(self, path: str) -> bytes:
        """As in Store, once it is open."""
        self.inside += 1
        self.inside_max = max(self.inside_max, self.inside)
        try:
            await self.opened.wait()
            return await self._store.read(path)
        finally:
            self.inside -= 1


@pytest.mark.parametrize("way", ["box", "unbox", "verify"])
async def test_one_tenants_crowd_holds_up_no_other(write_db: Database, tmp_path: Path, way: str) -> None:
    """Of one tenant's many, one is at work, 64 wait and the others are refused; another tenant's is next, whatever it does."""
    files = files_in(tmp_path)
    await filled(write_db, "a", "b")
    async with boxer(write_db.app, files) as one:
        await move(one, "box", "a", str(uuid4()))
        box = await newest_box(one._reads, KEY)
        assert box is not None
    store = ShutStore(files)
    async with boxer(write_db.app, store) as one:
        ended: list[str] = []

        async def verify(of: Boxer, key: AggregateKey) -> str:
            try:
                await of.verify(key, box)
            except Refusal as refusal:
                ended.append(key[0])
                return refusal.reason
            ended.append(key[0])
            return "whole"

        crowd = [asyncio.create_task(verify(one, KEY)) for _ in range(WAITING_MAX + 11)]
        await eventually(lambda: len(ended) == 10)
        if way != "verify":
            with pytest.raises(Refusal) as told:
                await move(one, way, "b" if way == "box" else "a", str(uuid4()))
            assert (told.value.reason, told.value.retry_after_s) == ("TOO_MANY_BOXINGS", 2.0)
        other = asyncio.create_task(verify(one, ("umbrella", "counter", "a")))
        await eventually(lambda: len(ended) == 11)
        store.opened.set()
        # The box is not its own, which is found when it is read.
        assert await other == "ARCHIVE_DAMAGED"
        assert ended[:11] == [TENANT] * 11
        assert "umbrella" in ended[11:14]
        assert sorted(await asyncio.gather(*crowd)) == ["TOO_MANY_BOXINGS"] * 11 + ["whole"] * WAITING_MAX
        assert store.inside_max == 1


async def test_what_goes_with_an_aggregate_is_looked_for_by_turns(write_db: Database, tmp_path: Path) -> None:
    """Not while a box is read, whoever plans what: it waits, and is refused when too many wait."""
    store = ShutStore(files_in(tmp_path))
    store.opened.set()
    await filled(write_db, "a", "b")
    async with boxer(write_db.app, store, together()) as one:
        await move(one, "box", "a", str(uuid4()))
        store.opened.clear()
        crowd = [asyncio.create_task(one.parts_of(KEY)) for _ in range(1 + WAITING_MAX)]
        await eventually(lambda: store.inside)
        with pytest.raises(Refusal) as told:
            await one.parts_of((TENANT, "counter", "b"))
        assert told.value.reason == "TOO_MANY_BOXINGS"
        later = datetime.now(UTC) + timedelta(days=2)
        with pytest.raises(Refusal) as told:  # as PlanRetention is
            await retention_plan.plan(one, one._reads, TENANT, "counter", 1, later, after="", examined=9, found_max=9)
        assert told.value.reason == "TOO_MANY_BOXINGS"
        store.opened.set()
        assert await asyncio.gather(*crowd) == [[]] * (1 + WAITING_MAX)
        assert store.inside_max == 1


async def test_of_the_events_only_those_that_name_something_are_read(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 MB of others stay in the database; what is named is found in pages of any size, once, in order."""
    monkeypatch.setattr("shared.commands.box_parts.PAGE_EVENTS", 2)
    async with replica(write_db, build_registry()) as one:
        await one.ask_one(Add(counter_id="a", amount=20))
        for nth in range(60):
            await one.ask_one(Swell(counter_id="a", amount=50_000))
            if nth % 10 == 0:
                await one.ask_one(Move(counter_id="a", to_id=f"to {nth % 40}", amount=1))
    async with boxer(write_db.app, files_in(tmp_path), together()) as mover:
        tracemalloc.start()
        try:
            parts = await mover.parts_of(KEY)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [name for _, _, name in parts] == ["to 0", "to 10", "to 20", "to 30"]
    assert peak_bytes < 1_000_000
