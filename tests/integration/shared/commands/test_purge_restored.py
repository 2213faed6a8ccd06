"""The database is restored to before a purge: with the archive's folders of then it is whole, and the rule purges again."""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import uuid4

from deploy.bootstrap import Database
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import BOXED, PURGED
from tests.integration.shared.commands.test_purging import refusal_of, whole
from tests.integration.shared.line.test_restored import copy, owner_of, run
from tests.support.domains.trial import Add
from tests.support.fakes.replica import replica
from tests.support.system.aggregate_purges import BUS, files, purged
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.engines import Engines

__all__ = ["copy"]


async def test_a_restored_purge(engines: Engines, write_db: Database, copy: str, tmp_path: Path) -> None:
    """Without the folder of the aggregate the line is read up to its first event; nothing else is wrong with it."""
    archive, kept = tmp_path / "archive", tmp_path / "kept"
    archive.mkdir()
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(archive), BUS) as mover:
        await one.ask_one(Add(counter_id="live", amount=1))
        for amount in (1, -1):
            await one.ask_one(Add(counter_id="a", amount=amount))
        await move(mover, "box", "a", str(uuid4()))
        before = await whole(mover._reads, archive)
    run(engines, "CREATE DATABASE {} TEMPLATE {} OWNER {}", copy, write_db.name, owner_of(write_db))
    shutil.copytree(archive, kept)
    async with boxer(write_db.app, files_in(archive), BUS) as mover:
        await purged(mover)
        assert [event.type for event in await whole(mover._reads, archive)][1:] == [PURGED, PURGED, PURGED, AGGREGATE_PURGED]
    assert files(archive) == []
    run(engines, "DROP DATABASE {} WITH (FORCE)", write_db.name)
    run(engines, "ALTER DATABASE {} RENAME TO {}", copy, write_db.name)
    run(engines, "GRANT CONNECT ON DATABASE {} TO PUBLIC", write_db.name)
    async with boxer(write_db.app, files_in(archive), BUS) as mover:
        assert await refusal_of(whole(mover._reads, archive)) == "ARCHIVE_DAMAGED"
        shutil.copytree(kept / TENANT / "counter" / "a", archive / TENANT / "counter" / "a")
        assert await whole(mover._reads, archive) == before
        assert before[-1].type == BOXED
        await purged(mover)
        assert [event.type for event in await whole(mover._reads, archive)][1:] == [PURGED, PURGED, PURGED, AGGREGATE_PURGED]
    assert files(archive) == []
