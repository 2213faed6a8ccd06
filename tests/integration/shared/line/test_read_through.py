"""A page of the line whose events are in many boxes."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.line import read_through as module
from shared.line.archive import Archive
from shared.line.files import Store
from shared.line.read_through import read_through
from shared.platform.postgres import Reads
from tests.integration.shared.commands.test_boxing import filled, whole
from tests.support.system.boxing import boxer, files_in, move

NAMES = [f"c{nth:02}" for nth in range(20)]


class SeenStore:
    """A store, with what is read from it and how much of that at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.names: set[str] = set()
        self.inside = self.inside_max = 0

    async def write(self, path: str, data: bytes) -> None:
        """As in Store."""
        await self._store.write(path, data)

    async def forget(self, folder: str) -> int:
        """As in Store."""
        return await self._store.forget(folder)

    async def read(self, path: str) -> bytes:
        """As in Store."""
        self.names.add(path.rpartition("/")[2])
        self.inside += 1
        self.inside_max = max(self.inside_max, self.inside)
        try:
            return await self._store.read(path)
        finally:
            self.inside -= 1


async def test_a_page_reads_eight_boxes_at_once(write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their snapshots. When the time is over, the page is what was read without a gap; the next goes on there."""
    files = files_in(tmp_path)
    await filled(write_db, *NAMES)
    async with boxer(write_db.app, files) as one:
        for name in NAMES:
            await move(one, "box", name, str(uuid4()))
    reads = Reads(write_db.app, application_name="test", size_max=2)
    await reads.open()
    try:
        store = SeenStore(files)
        found = await read_through(reads, Archive(store), after=0, limit=500)
        assert [event.position for event in found] == list(range(1, 261))
        assert (store.inside_max, store.names) == (8, {"manifest.json", "events.jsonl"})
        # The first twenty positions are the first events of the twenty counters.
        monkeypatch.setattr(module, "READING_S_MAX", -1.0)
        archive = Archive(SeenStore(files))
        for after, last in ((0, 8), (8, 16)):
            found = await read_through(reads, archive, after=after, limit=500)
            assert [event.position for event in found] == list(range(after + 1, last + 1))
    finally:
        await reads.close()
    assert len(await whole(write_db, files)) == 260
