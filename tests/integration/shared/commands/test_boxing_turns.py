"""One box at a time in memory: tenants take turns, and what would wait too long is refused by name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands.boxes import newest_box
from shared.commands.boxing import WAITING_MAX, Boxer
from shared.folds.errors import Refusal
from shared.line.archive import Store
from shared.line.event_store import AggregateKey
from tests.integration.shared.commands.test_boxing import filled
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
