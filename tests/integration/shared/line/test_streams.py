"""The streams of several aggregates, in the tables and in the archive, against a plain look at the whole line."""

from __future__ import annotations

import itertools
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from deploy.bootstrap import Database
from shared.folds.errors import OverLimit, Unavailable
from shared.line import streams
from shared.line.archive import Archive
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import StoredEvent
from shared.line.read_through import read_through
from shared.platform.postgres import Reads, connect
from tests.integration.shared.commands.test_boxing import filled
from tests.support.fakes.replica import TENANT, replica
from tests.support.system import aggregate_purges
from tests.support.system.boxing import boxer, files_in, move
from tests.support.system.retention import purger_of
from tests.support.system.waiting import eventually

NAMES = ["a", "b", "c", "d"]
LINE_EVENTS = 40_000

ENDING = "SELECT FROM pg_stat_activity WHERE application_name = 'test'"
FILL = """
INSERT INTO events (position, event_id, tenant, category, aggregate_id, version, type, payload, recorded_at, metadata)
SELECT n, gen_random_uuid(), 'acme', 'counter', {id}, row_number() OVER (PARTITION BY {id} ORDER BY n), 'trial.Added', '',
  now(), ''
FROM generate_series(1, {events}) AS n
"""


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


@pytest.mark.parametrize(
    "id_",
    ["'a' || n % 200", "CASE n % 600 WHEN 1 THEN 'a1' WHEN 2 THEN 'a2' ELSE 'a0' END"],
    ids=["many alike", "one hot"],
)
async def test_a_part_of_a_stream_costs_the_same_in_any_line(write_db: Database, id_: str) -> None:
    """Neither the line between the two ends of the part is read, nor the stream before or behind them."""
    with psycopg.connect(write_db.admin, autocommit=True) as admin:
        admin.execute(FILL.format(id=id_, events=LINE_EVENTS).encode())
        admin.execute("VACUUM ANALYZE events")

        def tuples_read() -> dict[str, int]:
            admin.execute("SELECT pg_stat_force_next_flush()")
            rows = admin.execute("SELECT indexrelname, idx_tup_read FROM pg_stat_user_indexes WHERE relname = 'events'")
            return dict(rows.fetchall())

        for names, after, upto in (
            (["a1", "a2"], LINE_EVENTS // 4, LINE_EVENTS),
            (["a1", "a2"], 0, LINE_EVENTS // 2),
            (["a0"], 0, 1000),
            (["a0"], LINE_EVENTS // 2, LINE_EVENTS // 2 + 1000),
        ):
            before = tuples_read()
            async with await connect(write_db.app, application_name="test") as connection:
                found = await streams.positions_of(
                    connection, TENANT, [("counter", name) for name in names], after=after, upto=upto, limit=10_000
                )
            # The server counts what a connection did when it ends.
            await eventually(lambda: not admin.execute(ENDING).fetchall())
            read = {index: count - before[index] for index, count in tuples_read().items()}
            wanted = admin.execute(
                "SELECT position FROM events WHERE aggregate_id = ANY (%s) AND position BETWEEN %s AND %s ORDER BY position",
                (names, after + 1, upto),
            ).fetchall()
            assert found == [position for (position,) in wanted]
            assert read["events_pkey"] == 0, (names, after, upto, read)
            assert sum(read.values()) <= len(found) + 2 * len(names) * streams.NEAR_VERSIONS, (names, after, upto, read)


async def test_of_a_marked_aggregate_nothing_but_the_mark_is_read(write_db: Database, tmp_path: Path) -> None:
    """At once, though nothing of it is gone yet: neither what is in the tables, nor what is boxed."""
    names = ["whole", "part"]
    async with (
        replica(write_db, aggregate_purges.BUS) as one,
        boxer(write_db.app, files_in(tmp_path), aggregate_purges.BUS) as mover,
    ):
        await aggregate_purges.filled(one, mover)
        archive = Archive(files_in(tmp_path))
        before = await read(mover._reads, archive, names, 0, 1000, 500)
        [_, goes] = await aggregate_purges.planned(mover)
        await purger_of(mover, aggregate_purges.BUS).begin(goes)
        for after in (0, before[4].position):
            events = await read(mover._reads, archive, names, after, 1000, 500)
            assert [event.type for event in events] == [AGGREGATE_PURGED] * 2
        assert await read(mover._reads, archive, names, 0, before[-1].position, 500) == []


async def test_looking_for_positions_has_limits(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the events that are looked at, whatever is asked for, and of the time of a statement; the connection is as before."""
    await filled(write_db, "a", "b")
    names = [("counter", "a"), ("counter", "b")]

    async with await connect(write_db.app, application_name="test") as connection:

        async def found(limit: int) -> int:
            return len(await streams.positions_of(connection, TENANT, names, after=0, upto=24, limit=limit))

        monkeypatch.setattr(streams, "LOOKED_AT_MAX", 20)
        assert await found(limit=10) == 10
        with pytest.raises(OverLimit, match="more than 20 events") as refused:
            await found(limit=11)
        assert refused.value.reason == "HISTORY_TOO_LONG"
    monkeypatch.setattr(streams, "STATEMENT_TIMEOUT", "50ms")
    monkeypatch.setattr(streams, "_POSITIONS", "SELECT pg_sleep(20), %(limit)s::bigint")
    reads = Reads(write_db.app, application_name="test", size_max=1)
    await reads.open()
    try:
        with pytest.raises(Unavailable) as busy:
            async with reads.connection() as connection:
                await found(limit=10)
        assert busy.value.reason == "DATABASE_BUSY"
    finally:
        await reads.close()
