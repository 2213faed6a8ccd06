"""Purging aggregates by a rule, on a real database and a real folder: what has ended goes, whole, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import aggregate_purging, export, history, purging, retention_plan, states
from shared.commands.aggregate_purging import AggregatePurger
from shared.commands.append import AppendConflict, append
from shared.commands.boxing import Boxer
from shared.commands.purging import Purger
from shared.commands.recurring import Recurring
from shared.commands.retention import SetRetention
from shared.commands.retention_plan import PlannedPurge, Purges
from shared.commands.schedule import Schedule, Scheduler
from shared.commands.states import Purged, Versioned
from shared.folds.errors import Rejected
from shared.folds.ids import is_of_processes, step_id
from shared.line import streams
from shared.line.archive import Archive
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import PURGED, StoredEvent, read_event_id, read_places
from shared.line.read_through import read_through
from shared.platform.fairness import Room
from shared.platform.identity import Identity, Role
from shared.platform.postgres import Connection, Reads
from tests.integration.shared.commands.test_boxing import online
from tests.integration.shared.commands.test_purging import refusal_of, whole
from tests.support.checks.history import connected
from tests.support.domains.trial import Add, GoOffDuty, Move, SetPassword, lone
from tests.support.fakes.replica import Replica, reasons, replica
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.retention import ending, purger_of, sweeper_of
from tests.support.system.waiting import eventually

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


async def test_what_has_ended_goes_with_its_parts_and_leaves_holes(write_db: Database, tmp_path: Path) -> None:
    """The plan says it before; position, id and tenant of each event stay; what has not ended, and other tenants, keep all."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        rule = SetRetention(aggregate_type="counter", box_after_days=0, purge_after_days=DAYS)
        assert reasons([await one.ask_one(rule)]) == ["completed"]
        before = await whole(mover._reads, tmp_path)
        sweeping = sweeper_of(mover, BUS, lambda: later(DAYS - 1))
        assert await sweeping.round() == 0  # not past the date
        [part, goes] = await planned(mover)
        assert (part.key[2], goes.key[2], goes.held_by) == ("part", "whole", "")
        assert [(each.key, each.version) for each in goes.parts] == [(part.key, part.version)]
        assert await whole(mover._reads, tmp_path) == before  # a plan changes nothing
        await purger_of(mover, BUS).begin(goes)
        await finished(purger_of(mover, BUS))
        assert await sweeper_of(mover, BUS, later).round() == 0  # nothing is left to do
        after = await whole(mover._reads, tmp_path)
        assert await rows(write_db, "whole", "part") == GONE
        assert await rows(write_db, "live") == {
            "events": ["trial.Added", "trial.PasswordSet"],
            "commands": ["trial.Add", "trial.SetPassword"],
            "credentials": [1],
        }
        async with connected(write_db.app) as connection:
            hole = next(event for event in after if event.type == PURGED)
            assert await read_event_id(connection, hole.position) == hole.event_id
            cursor = await connection.execute(
                "SELECT stage, events, boxed_events, commands, snapshots, credentials, boxes, files FROM aggregate_purges"
            )
            assert await cursor.fetchall() == [("done", 17, 4, 20, 1, 1, 3, 9)]
    assert files(tmp_path) == []
    assert [(event.type, event.aggregate_id) for event in after[len(before) :]] == [
        (AGGREGATE_PURGED, "part"),
        (AGGREGATE_PURGED, "whole"),
    ]
    for old, new in zip(before, after, strict=False):
        if old.tenant == OTHER or old.aggregate_id in ("live", "retention"):
            assert new == old
        else:
            assert (new.event_id, new.tenant, new.category, new.aggregate_id) == (old.event_id, TENANT, "", "")
            assert (new.type, new.version, new.payload, new.metadata) == (PURGED, 0, b"", b"")
            assert new.recorded_at == after[-1].recorded_at


async def test_what_is_needed_stays_with_its_reason(write_db: Database, tmp_path: Path) -> None:
    """A part that has not ended, or was used since; a command for later; a schedule. What has not ended itself is not planned."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=5))
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2))
        assert await held(mover) == []
        await one.ask_one(Add(counter_id="whole", amount=-3))
        assert await held(mover) == [("whole", retention_plan.PART_NOT_ENDED)]
        await move(mover, "box", "part", str(uuid4()))
        assert await held(mover) == [("whole", retention_plan.PART_NOT_ENDED)]  # read from the archive
        await move(mover, "unbox", "part", str(uuid4()))
        await one.ask_one(Add(counter_id="part", amount=-2))
        assert await held(mover) == [("part", ""), ("whole", "")]
        schedule, recurring = Schedule(mover._reads), Recurring(mover._reads)
        waiting = one.command(Add(counter_id="part", amount=1))
        await schedule.add(waiting, later())
        assert await held(mover) == [("part", retention_plan.COMMAND_WAITS), ("whole", retention_plan.COMMAND_WAITS)]
        async with connected(write_db.app) as connection:
            await connection.execute("SELECT end_scheduled_command(%s, %s, 'cancelled', '')", waiting.key)
        assert await held(mover) == [("part", ""), ("whole", "")]
        seen = await planned(mover)
        await recurring.add(one.command(Add(counter_id="part", amount=1)), "0 0 1 1 *", "UTC", "none")
        assert await held(mover) == [("part", retention_plan.COMMAND_WAITS), ("whole", retention_plan.COMMAND_WAITS)]
        # Between the look and the deed it is found all the same.
        assert await refusal_of(purger_of(mover, BUS).begin(seen[1])) == retention_plan.COMMAND_WAITS
        purges = Purges(mover, mover._reads, BUS)
        clock = datetime.now(UTC) + timedelta(days=DAYS) - timedelta(milliseconds=1)
        page = await purges.plan(TENANT, "counter", 1, clock, after="", examined=1, found_max=100)
        assert (page.planned[0].key[2], page.after) == ("part", "part")
        assert await rows(write_db, "whole", "part") != {}


async def test_a_part_that_was_used_since_keeps_the_whole(write_db: Database, tmp_path: Path) -> None:
    """The whole is past its date, and the part is not."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=2))
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2))
        between = datetime.now(UTC)
        await one.ask_one(Add(counter_id="part", amount=-2))
        page = await Purges(mover, mover._reads, BUS).plan(
            TENANT, "counter", DAYS, between + timedelta(days=DAYS), after="", examined=9, found_max=9
        )
        assert [(each.key[2], each.held_by) for each in page.planned] == [("whole", retention_plan.PART_IN_USE)]


@pytest.mark.parametrize("ways", [["box"], ["box", "unbox"], ["box", "unbox", "box"]])
async def test_boxing_and_a_look_at_it_put_no_purge_off(write_db: Database, tmp_path: Path, ways: list[str]) -> None:
    """The time to the purge is that since the last use, of the whole and of its part; the rule of boxing sees the unboxing."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=2))
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2))
        await one.ask_one(Add(counter_id="part", amount=-2))
        used = datetime.now(UTC)
        for way in ways:
            await move(mover, way, "whole", str(uuid4()))
        due = used + timedelta(days=DAYS)
        page = await Purges(mover, mover._reads, BUS).plan(TENANT, "counter", DAYS, due, after="", examined=9, found_max=9)
        assert [(each.key[2], each.held_by) for each in page.planned] == [("part", ""), ("whole", "")]
        assert max(each.changed_at for each in page.planned) < used
        boxes = await retention_plan.plan(mover, mover._reads, TENANT, "counter", DAYS, due, after="", examined=9, found_max=9)
        assert boxes.planned == []
        for each in page.planned[1:]:
            await purger_of(mover, BUS).begin(each)
        await finished(purger_of(mover, BUS))
        assert await rows(write_db, "whole", "part") == GONE


async def test_whatever_concerns_it_is_refused_for_ever(write_db: Database, tmp_path: Path) -> None:
    """By replicas with its newest state in memory, an older one, or none; by commands, reactions, readings, schedules."""
    async with (
        replica(write_db, BUS) as first,
        replica(write_db, BUS) as second,
        boxer(write_db.app, files_in(tmp_path), BUS) as mover,
    ):
        scheduler = Scheduler(mover._reads, first.committer)
        await second.ask_one(Add(counter_id="a", amount=5))  # the second remembers version 1
        for amount in (1, -6):
            await first.ask_one(Add(counter_id="a", amount=amount))
        await first.ask_one(Add(counter_id="live", amount=5))
        await purged(mover)
        for one in (first, second):
            assert reasons([await one.ask_one(Add(counter_id="a", amount=1))]) == ["AGGREGATE_PURGED"]
        async with replica(write_db, BUS) as third:
            assert reasons([await third.ask_one(Add(counter_id="a", amount=1))]) == ["AGGREGATE_PURGED"]
            assert reasons([await third.ask_one(Move(counter_id="live", to_id="a", amount=1))]) == ["AGGREGATE_PURGED"]
            assert reasons([await third.ask_one(GoOffDuty(counter_id="live", colleague_id="a"))]) == ["AGGREGATE_PURGED"]
            late = third.command(Add(counter_id="a", amount=1))
            await Schedule(mover._reads).add(late, datetime.now(UTC))
            await scheduler._fire()
            assert reasons(await third.ask(late)) == ["AGGREGATE_PURGED"]
        async with connected(write_db.app) as connection:
            cursor = await connection.execute("SELECT type, payload FROM commands WHERE aggregate_id = 'a'")
            logged = dict(await cursor.fetchall())
        assert logged.keys() == {"foldline.v1.PurgeAggregateRequest", "trial.Add"}
        assert logged["trial.Add"] == b""
        for way in ("box", "unbox"):
            assert await refusal_of(move(mover, way, "a", str(uuid4()))) == "AGGREGATE_PURGED"
        key = (TENANT, "counter", "a")
        assert await refusal_of(history.past_state(BUS, mover._reads, Room(), key)) == "AGGREGATE_PURGED"
        told = await history.describe(BUS, mover._reads, key, cached=False)
        assert (told.purged, told.boxed, told.version) == (True, False, 4)
        assert [event.type for event in await online(write_db, "a")] == [AGGREGATE_PURGED]


async def test_the_sweeper_purges_by_the_rule_alone(write_db: Database, tmp_path: Path) -> None:
    """What has ended, online or boxed by the rule before, once; what has not ended only goes into the archive."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for name in ("ended", "live"):
            for tenant in (TENANT, OTHER):
                await one.ask_one(Add(counter_id=name, amount=1), tenant=tenant)
        for tenant in (TENANT, OTHER):
            await one.ask_one(Add(counter_id="ended", amount=-1), tenant=tenant)
        rule = SetRetention(aggregate_type="counter", box_after_days=DAYS, purge_after_days=2 * DAYS)
        assert reasons([await one.ask_one(rule), await one.ask_one(rule)]) == ["completed"] * 2
        for days, boxed in ((DAYS - 1, 0), (DAYS + 1, 2), (DAYS + 1, 0)):
            assert await sweeper_of(mover, BUS, partial(later, days)).round() == boxed
        sweeping = sweeper_of(mover, BUS, lambda: later(2 * DAYS + 1))
        assert [await sweeping.round() for _ in range(2)] == [1, 0]
        await finished(purger_of(mover, BUS))
        assert await rows(write_db, "ended") == {
            "events": [AGGREGATE_PURGED],
            "commands": ["foldline.v1.BoxAggregateRequest", "foldline.v1.PurgeAggregateRequest"],
            "boxes": [""],
        }
        assert (await rows(write_db, "live"))["boxed_events"] == [1]
        assert {event.tenant for event in await whole(mover._reads, tmp_path) if event.type == PURGED} == {TENANT}


async def test_a_command_on_what_is_being_purged_reads_the_mark_alone(write_db: Database, tmp_path: Path) -> None:
    """However many of its events are still there, and without a snapshot."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (*[1] * 11, -11):
            await one.ask_one(Add(counter_id="a", amount=amount))
        await purger_of(mover, BUS).begin((await planned(mover))[0])
        read = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'events'"
        key = (TENANT, "counter", "a")
        async with connected(write_db.app) as connection, connection.transaction():
            await connection.execute("SET LOCAL enable_seqscan = off")
            before = await (await connection.execute(read)).fetchone()
            found = await states.load(connection, BUS, [key])
            after = await (await connection.execute(read)).fetchone()
        assert found == {key: Versioned(13, Purged())}
        assert before is not None
        assert after is not None
        assert after[0] - before[0] <= 2  # to see that it is the mark, and then the mark
        assert len(await online(write_db, "a")) == 13


async def test_a_process_that_was_away_gets_its_first_answers(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the log, without the payloads, however many there are to a step; what others sent is gone."""
    monkeypatch.setattr(aggregate_purging, "LIMIT_ROWS", 2)
    monkeypatch.setattr(aggregate_purging, "PAUSE_S", 0)
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        sent = []
        for nth, amount in enumerate((1, 2, 3, 4, -10)):
            step = str(step_id("transfer", str(UUID(int=nth)), "debit"))
            sent.append(replace(one.command(Add(counter_id="a", amount=amount), id=step), received_at=later(-nth)))
            await one.ask_one(Add(counter_id="a", amount=1))
            first = await one.ask(*sent[-1:])
            assert reasons(first) == ["completed"]
        await one.ask_one(Add(counter_id="a", amount=-5))
        refused = one.command(Add(counter_id="a", amount=-1), id=str(step_id("transfer", str(UUID(int=9)), "debit")))
        assert reasons(await one.ask(refused)) == ["BELOW_ZERO"]
        answers = [await one.ask(command) for command in sent]
        await purged(mover)
        async with replica(write_db, BUS) as other:
            assert [await other.ask(command) for command in sent] == answers
            assert reasons(await other.ask(refused)) == ["BELOW_ZERO"]
        async with connected(write_db.app) as connection:
            cursor = await connection.execute("SELECT payload FROM commands WHERE tenant = %s AND type = 'trial.Add'", (TENANT,))
            assert await cursor.fetchall() == [(b"",)] * 6
            assert await (await connection.execute("SELECT commands FROM aggregate_purges")).fetchall() == [(6,)]


async def test_nobody_can_keep_it_by_the_id_of_its_purge(write_db: Database, tmp_path: Path) -> None:
    """Users may not use it, for it is in the space of processes; if it is taken all the same, the refusal is named."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (1, -1):
            await one.ask_one(Add(counter_id="a", amount=amount))
        purger = purger_of(mover, BUS)
        [goes] = await planned(mover)
        command_id = purger._command(goes).key[1]
        assert is_of_processes(command_id)
        await one.ask_one(Add(counter_id="live", amount=1), id=command_id)
        assert await refusal_of(purger.begin(goes)) == "COMMAND_ID_REUSED"
        assert await purger.open() == []


async def test_a_step_reads_as_many_rows_as_it_may_delete(write_db: Database, tmp_path: Path) -> None:
    """However many aggregates there are, in the archive or not; what goes is the end of what is left."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        parts = [f"part-{n}" for n in range(4)]
        await one.ask_one(Add(counter_id="whole", amount=4))
        for name in parts:
            await one.ask_one(Move(counter_id="whole", to_id=name, amount=1))
        await one.ask(*(one.command(Add(counter_id=parts[n % 4], amount=1)) for n in range(400)))
        await one.ask(*(one.command(Add(counter_id=name, amount=-101)) for name in parts))
        await move(mover, "box", parts[0], str(uuid4()))
        [goes] = [each for each in await planned(mover) if each.key[2] == "whole"]
        purger = purger_of(mover, BUS)
        await purger.begin(goes)
        [purge_id] = await purger.open()
        read = (
            "SELECT sum(idx_tup_fetch + seq_tup_read) FROM pg_stat_xact_user_tables WHERE relname IN ('events', 'boxed_events')"
        )
        stage, steps = "events", 0
        async with connected(write_db.app) as connection:
            while stage == "events":
                async with connection.transaction():
                    await connection.execute("SET LOCAL enable_seqscan = off")
                    [(before,)] = await (await connection.execute(read)).fetchall()
                    cursor = await connection.execute("SELECT purge_aggregates_step(%s, 100)", (purge_id,))
                    [(stage,)] = await cursor.fetchall()
                    [(after,)] = await (await connection.execute(read)).fetchall()
                assert after - (before or 0) <= 300  # twenty of each aggregate and of the box, and what is deleted
                assert is_beginning(await whole(mover._reads, tmp_path))
                steps += 1
        assert 5 <= steps <= 10


async def test_tenants_take_turns(write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small purge of one is done before the large one of another that began before."""
    monkeypatch.setattr(aggregate_purging, "LIMIT_ROWS", 1)
    monkeypatch.setattr(aggregate_purging, "PAUSE_S", 0)
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for tenant, count in ((TENANT, 60), (OTHER, 1)):
            await one.ask(*(one.command(Add(counter_id="a", amount=1), tenant=tenant) for _ in range(count)))
            await one.ask_one(Add(counter_id="a", amount=-count), tenant=tenant)
        purger = purger_of(mover, BUS)
        for tenant in (TENANT, OTHER):
            page = await Purges(mover, mover._reads, BUS).plan(
                tenant, "counter", DAYS, later(), after="", examined=9, found_max=9
            )
            await purger.begin(page.planned[0])
        running = asyncio.create_task(purger.run())
        try:
            await eventually(lambda: _none_open(purger), 20)
        finally:
            running.cancel()
        async with connected(write_db.app) as connection:
            cursor = await connection.execute("SELECT tenant FROM aggregate_purges ORDER BY done_at")
            assert await cursor.fetchall() == [(OTHER,), (TENANT,)]


async def _none_open(purger: AggregatePurger) -> bool:
    """Whether all purges are done."""
    return await purger.open() == []


async def test_schedules_that_have_ended_go_with_it(write_db: Database, tmp_path: Path) -> None:
    """Of the aggregate and of its parts; those of others stay."""
    identity = Identity(tenant=TENANT, user_id="alice", roles=frozenset({Role.USER}))
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (1, -1):
            await one.ask_one(Add(counter_id="a", amount=amount))
        recurring = Recurring(mover._reads)
        for name in "ab":
            added = await recurring.add(one.command(Add(counter_id=name, amount=1)), "0 0 1 1 *", "UTC", "none")
            await recurring.end(identity, added.schedule_id)
        await purged(mover)
        async with connected(write_db.app) as connection:
            assert await (await connection.execute("SELECT aggregate_id FROM schedules")).fetchall() == [("b",)]
            assert await (await connection.execute("SELECT schedules FROM aggregate_purges")).fetchall() == [(1,)]


@pytest.mark.parametrize("version", [2, 3, 4])
async def test_no_append_of_an_older_state_takes_a_version_that_is_gone(write_db: Database, tmp_path: Path, version: int) -> None:
    """Nor that of the mark. Who decides on such a state is told that it moved."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (1, 1, -2):
            await one.ask_one(Add(counter_id="a", amount=amount))
        await purged(mover)
        key = (TENANT, "counter", "a")
        async with connected(write_db.app) as connection:
            with pytest.raises(AppendConflict):
                await append(connection, 1, lone(key, version))
        assert len(await online(write_db, "a")) == 1


@pytest.mark.parametrize("first", ["command", "purge"])
async def test_a_command_at_the_same_time_is_before_or_refused(write_db: Database, tmp_path: Path, first: str) -> None:
    """Both wait for the shard's lock. Whoever gets it first wins; the other finds that the aggregate moved."""
    async with (
        replica(write_db, BUS) as one,
        boxer(write_db.app, files_in(tmp_path), BUS) as mover,
        connected(write_db.app) as connection,
        connected(write_db.app) as watch,
    ):
        for amount in (1, -1):
            await one.ask_one(Add(counter_id="a", amount=amount))
        [goes] = await planned(mover)
        purger = purger_of(mover, BUS)
        both: dict[str, Callable[[], Awaitable[Any]]] = {
            "command": lambda: one.ask_one(Add(counter_id="a", amount=1)),
            "purge": lambda: purger.begin(goes),
        }
        tasks: dict[str, asyncio.Future[Any]] = {}
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(1, 1)")
            for name in (first, *(both.keys() - {first})):
                tasks[name] = asyncio.ensure_future(both[name]())
                await eventually(lambda: _waiting(watch, len(tasks)), 10)
        outcome: Any
        purge: Any
        outcome, purge = await asyncio.gather(tasks["command"], tasks["purge"], return_exceptions=True)
        if first == "purge":
            assert (reasons([outcome]), purge) == (["AGGREGATE_PURGED"], None)
        else:
            assert (reasons([outcome]), purge.reason) == (["completed"], aggregate_purging.MOVED)
            assert (await purger.open(), await held(mover)) == ([], [])


async def _waiting(connection: Connection, count: int) -> bool:
    """Whether so many sessions wait for the shard's lock."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1 AND NOT granted"
    return (await (await connection.execute(query)).fetchone()) == (count,)


async def test_it_cannot_be_boxed_or_put_back_at_the_same_time(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is purged between the reading and the last call of a box, and of an unboxing; nothing of it stays in the archive."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for name in "ab":
            for amount in (1, -1):
                await one.ask_one(Add(counter_id=name, amount=amount))
        await move(mover, "box", "b", str(uuid4()))
        archive, purger = mover.archive, purger_of(mover, BUS)
        goes = {each.key[2]: each for each in await planned(mover)}
        read = Archive.read

        async def purging_meanwhile(self: Archive, location: str, key: tuple[str, str, str], chain: bytes) -> Any:
            found = await read(self, location, key, chain)
            if key[2] in goes:
                await purger.begin(goes.pop(key[2]))
            return found

        monkeypatch.setattr(Archive, "read", purging_meanwhile)
        assert await refusal_of(move(mover, "box", "a", str(uuid4()))) == "AGGREGATE_PURGED"
        assert await refusal_of(move(mover, "unbox", "b", str(uuid4()))) == "AGGREGATE_PURGED"
        assert goes == {}
        await finished(purger)
        assert archive is mover.archive
        for name in "ab":
            assert [event.type for event in await online(write_db, name)] == [AGGREGATE_PURGED]
        await whole(mover._reads, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("reader", ["line", "streams", "export"])
async def test_a_reader_that_finds_a_box_gone_looks_again(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """The aggregate is purged after its place was looked up: that is no damage. Files that are missing at a place are."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for name in "ab":
            for amount in (1, -1):
                await one.ask_one(Add(counter_id=name, amount=amount))
            await move(mover, "box", name, str(uuid4()))
        goes, events = await planned(mover), Archive.events
        positions = [1, 2, 3, 4, 5, 6]

        async def read() -> list[StoredEvent]:
            if reader == "line":
                return await whole(mover._reads, tmp_path)
            pages: AsyncIterator[Sequence[StoredEvent]]
            if reader == "streams":
                pages = streams.pages_of(mover._reads, mover.archive, TENANT, positions)
            else:
                pages = export.events_of(mover._reads, mover.archive, TENANT, 6)
            return [event async for page in pages for event in page]

        async def purging_before(self: Archive, *asked: Any) -> Any:
            if goes and asked[1][2] == "a":
                await purger_of(mover, BUS).begin(goes.pop(0))
                await finished(purger_of(mover, BUS))
            return await events(self, *asked)

        monkeypatch.setattr(Archive, "events", purging_before)
        if reader == "streams":
            assert await refusal_of(read()) == "LINE_CHANGING"  # its positions are of before
            positions = [4, 5, 6]
        assert {event.aggregate_id for event in await read() if event.aggregate_id != "a"} >= {"b"}
        await mover.archive.forget_aggregate((TENANT, "counter", "b"))
        assert await refusal_of(read()) == "ARCHIVE_DAMAGED"


async def test_a_page_shows_no_event_without_those_before_it(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aggregate, in a box and with an event behind it, is purged between two queries of one page."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=5))
        await one.ask_one(Add(counter_id="whole", amount=-5))
        await move(mover, "box", "whole", str(uuid4()))
        [goes] = await planned(mover)

        async def purging_before(*asked: Any, **named: Any) -> Any:
            await purger_of(mover, BUS).begin(goes)
            await finished(purger_of(mover, BUS))
            return await read_places(*asked, **named)

        monkeypatch.setattr("shared.line.read_through.read_places", purging_before)
        page = await read_through(mover._reads, mover.archive, after=0, limit=3)
    assert [event.type for event in page] == [PURGED] * 3


async def test_two_purgers_and_a_reader_at_once(write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each aggregate is purged once, what went is counted once, and what is read at any time is a beginning."""
    monkeypatch.setattr(aggregate_purging, "LIMIT_ROWS", 2)
    monkeypatch.setattr(aggregate_purging, "PAUSE_S", 0)
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        goes = (await planned(mover))[1]
        begun = await asyncio.gather(*(purger_of(mover, BUS).begin(goes) for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in begun if each is not None] == [Rejected]  # the other found it moved
        working = asyncio.gather(*(finished(purger_of(mover, BUS)) for _ in range(2)))
        while not working.done():
            assert is_beginning(await whole(mover._reads, tmp_path))
        await working
        async with connected(write_db.app) as connection:
            cursor = await connection.execute(
                "SELECT sum(events), sum(boxed_events), sum(commands), sum(cardinality(versions)) FROM aggregate_purges"
            )
            assert await cursor.fetchall() == [(17, 4, 20, 2)]
        marks = [event for event in await whole(mover._reads, tmp_path) if event.type == AGGREGATE_PURGED]
        assert sorted(event.aggregate_id for event in marks) == ["part", "whole"]


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_killed_at_every_step_it_goes_on(write_db: Database, tmp_path: Path) -> None:
    """At any time the line has no gap, and what is left is a beginning; in the end it is as if nobody had been killed."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        for step in (1, 2, 5, 3, 4, 6, 2, 5, 100):
            words = ("-m", "tests.support.system.retention", write_db.app, str(tmp_path), str(step))
            code = await (await asyncio.create_subprocess_exec(sys.executable, *words)).wait()
            assert code in (0, -9)
            assert is_beginning(await whole(mover._reads, tmp_path))
            if code == 0:
                break
        assert code == 0
        left = await rows(write_db, "whole", "part")
        assert (left["events"], left["boxes"]) == (GONE["events"], GONE["boxes"])
        assert set(left["commands"]) == set(GONE["commands"])
        assert left.keys() == GONE.keys()
    assert files(tmp_path) == []


async def test_the_purge_of_the_tenant_takes_over(write_db: Database, tmp_path: Path) -> None:
    """A purge that is half done does nothing more; all holes are in the tenant's chain, and nothing of the tenant is left."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await filled(one, mover)
        purger = purger_of(mover, BUS)
        goes = (await planned(mover))[1]
        await purger.begin(goes)
        [purge_id] = await purger.open()
        async with connected(write_db.app) as connection:
            await connection.execute("SELECT purge_aggregates_step(%s, 4)", (purge_id,))
        await purging.close(mover._reads, 1, TENANT, "olga")
        assert await purger.open() == []
        await purger.purge(purge_id)  # of an older leader
        assert await refusal_of(purger.begin(goes)) == aggregate_purging.MOVED
        await _tenant_purged(mover._reads, tmp_path)
        done = await purging.read(mover._reads, TENANT)
        line = await whole(mover._reads, tmp_path)
        async with connected(write_db.app) as connection:
            assert await (await connection.execute("SELECT * FROM aggregate_purges")).fetchall() == []
    assert done is not None
    holes = [event for event in line if event.type == PURGED]
    text = hashlib.sha256(b"")
    link = "\n".join(f"{event.position} {event.event_id}" for event in reversed(holes))
    assert done.chain == hashlib.sha256(text.digest() + link.encode()).digest()
    assert await rows(write_db, "whole", "part", "live") == {}


async def _tenant_purged(reads: Reads, folder: Path) -> None:
    await Purger(reads, Archive(files_in(folder))).purge(TENANT)
