"""The streams of several aggregates, in the tables and in the archive, against a plain look at the whole line."""

from __future__ import annotations

import itertools
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.line import streams
from shared.line.archive import Archive
from shared.line.event_store import StoredEvent
from shared.line.read_through import read_through
from shared.platform.postgres import Reads
from tests.integration.shared.commands.test_boxing import filled
from tests.support.fakes.replica import TENANT
from tests.support.system.boxing import boxer, files_in, move

NAMES = ["a", "b", "c", "d"]


async def read(reads: Reads, archive: Archive, names: list[str], after: int, upto: int, limit: int) -> list[StoredEvent]:
    """The events of counters, page by page."""
    async with reads.connection() as connection:
        named = [("counter", name) for name in names]
        positions = await streams.positions_of(connection, TENANT, named, after=after, upto=upto, limit=limit)
    return [event async for page in streams.pages_of(reads, archive, TENANT, positions) for event in page]


@pytest.mark.parametrize("near", [2, 1000])
async def test_streams_are_the_line_without_the_others(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: int
) -> None:
    """One boxed, one that is back, and two that never went; behind each position, up to each, and no more than asked for.

    With streams of which the begin is searched for, and with short ones.
    """
    monkeypatch.setattr(streams, "NEAR_VERSIONS", near)
    monkeypatch.setattr(streams, "PAGE_EVENTS", 3)
    archive = Archive(files_in(tmp_path))
    await filled(write_db, *NAMES)
    async with boxer(write_db.app, files_in(tmp_path)) as one:
        for action, name in (("box", "a"), ("box", "b"), ("unbox", "b")):
            await move(one, action, name, str(uuid4()))
    reads = Reads(write_db.app, application_name="test", size_max=2)
    await reads.open()
    try:
        line = await read_through(reads, archive, after=0, limit=500)
        head = line[-1].position
        for names in (["a"], ["c", "a", "nobody"], NAMES):
            for after, upto in itertools.product(range(0, head + 1, 5), (3, head // 2, head)):
                wanted = [event for event in line if event.aggregate_id in names and after < event.position <= upto]
                assert await read(reads, archive, names, after, upto, 500) == wanted
                assert await read(reads, archive, names, after, upto, 2) == wanted[:2]
    finally:
        await reads.close()


async def test_what_is_boxed_between_two_pages_is_found(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is unboxed: the positions stay."""
    monkeypatch.setattr(streams, "PAGE_EVENTS", 3)
    archive = Archive(files_in(tmp_path))
    await filled(write_db, *NAMES)
    reads = Reads(write_db.app, application_name="test", size_max=2)
    await reads.open()
    try:
        line = await read_through(reads, archive, after=0, limit=500)
        positions = [event.position for event in line if event.aggregate_id in ("a", "b")]
        found: list[StoredEvent] = []
        async with boxer(write_db.app, files_in(tmp_path)) as one:
            moves = iter([("box", "a"), ("box", "b"), ("unbox", "a"), ("unbox", "b")])
            async for page in streams.pages_of(reads, archive, TENANT, positions):
                found += page
                if (step := next(moves, None)) is not None:
                    await move(one, *step, str(uuid4()))
        assert found == [event for event in line if event.position in positions]
    finally:
        await reads.close()
