"""Purging aggregates by a rule, on a real database and a real folder: what has ended goes, whole, and nothing else."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import aggregate_purging, retention_plan
from shared.commands.aggregate_purging import AggregatePurger
from shared.commands.recurring import Recurring
from shared.commands.retention import SetRetention
from shared.commands.retention_plan import Purges
from shared.commands.schedule import Schedule
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import PURGED, read_event_id
from shared.platform.identity import Identity, Role
from tests.integration.shared.commands.test_purging import refusal_of, whole
from tests.support.checks.history import connected
from tests.support.domains.trial import Add, Move
from tests.support.fakes.replica import reasons, replica
from tests.support.system.aggregate_purges import (
    BUS,
    DAYS,
    GONE,
    OTHER,
    files,
    filled,
    finished,
    held,
    is_beginning,
    later,
    planned,
    purged,
    rows,
)
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.retention import purger_of, sweeper_of
from tests.support.system.waiting import eventually


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


@pytest.mark.parametrize("analysed", [False, True], ids=["not analysed", "analysed"])
async def test_a_step_reads_as_many_rows_as_it_may_delete(write_db: Database, tmp_path: Path, analysed: bool) -> None:
    """However many aggregates there are, in the archive or not, and whatever PostgreSQL knows of them; the end goes first."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        parts = [f"part-{n}" for n in range(4)]
        await one.ask_one(Add(counter_id="whole", amount=4))
        for name in parts:
            await one.ask_one(Move(counter_id="whole", to_id=name, amount=1))
        await one.ask(*(one.command(Add(counter_id=parts[n % 4], amount=1)) for n in range(800)))
        await one.ask(*(one.command(Add(counter_id=name, amount=-201)) for name in parts))
        await move(mover, "box", parts[0], str(uuid4()))
        [goes] = [each for each in await planned(mover) if each.key[2] == "whole"]
        purger = purger_of(mover, BUS)
        await purger.begin(goes)
        [purge_id] = await purger.open()
        read = (
            "SELECT sum(idx_tup_fetch + seq_tup_read) FROM pg_stat_xact_user_tables WHERE relname IN ('events', 'boxed_events')"
        )
        stage, steps = "events", 0
        async with connected(write_db.app) as connection, connected(write_db.admin) as owner:
            if analysed:
                await owner.execute("ANALYZE events, boxed_events, boxes")
                await owner.commit()
            while stage == "events":
                async with connection.transaction():
                    await connection.execute("SET LOCAL enable_seqscan = off")
                    [(before,)] = await (await connection.execute(read)).fetchall()
                    cursor = await connection.execute("SELECT purge_aggregates_step(%s, 100)", (purge_id,))
                    [(stage,)] = await cursor.fetchall()
                    [(after,)] = await (await connection.execute(read)).fetchall()
                # Twenty of each aggregate and of the box, and what is deleted.
                assert after - (before or 0) <= 200
                assert is_beginning(await whole(mover._reads, tmp_path))
                steps += 1
        assert 9 <= steps <= 18


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
