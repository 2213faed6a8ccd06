"""Retention on a real database and a real folder: what is planned goes, once, and so much a round."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import retention_plan, retention_sweeper
from shared.commands.aggregate_commands import BOX_AGGREGATE, as_part, command_of_rule
from shared.commands.boxing import Boxer
from shared.commands.registry import CommandRegistry
from shared.commands.retention import SetRetention, add_retention
from shared.commands.retention_sweeper import RetentionSweeper
from shared.folds.ids import derived_id, is_of_processes
from shared.line.read_through import read_through
from shared.platform.identity import Role
from shared.platform.postgres import Reads
from tests.integration.shared.commands.test_boxing import online
from tests.integration.shared.commands.test_purging import refusal_of
from tests.support.checks.history import connected, events_of
from tests.support.domains.trial import COUNTER, Add, Move, Moved, build_registry
from tests.support.fakes.replica import Replica, reasons, replica
from tests.support.system import forked, sweeping
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.retention import sweeper_of

DAYS = 30


def ruled() -> CommandRegistry:
    """Counters are boxed with those that they have moved something to, and a tenant may set rules."""
    registry = build_registry()
    registry.rows_of(COUNTER).box_with(Moved, COUNTER, id=lambda e: e.to_id)
    add_retention(registry, roles=frozenset({Role.USER}))
    return registry


BUS = ruled()


class Later:
    """A clock that is so many days ahead."""

    def __init__(self, days: float) -> None:
        self.days = days

    def __call__(self) -> datetime:
        return datetime.now(UTC) + timedelta(days=self.days)


class Then:
    """A clock that stands."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment

    def __call__(self) -> datetime:
        return self._moment


async def rule(one: Replica, days: int, *, kind: str = "counter", tenant: str = TENANT) -> str:
    """Sets a rule; returns what became of the command."""
    asked = SetRetention(aggregate_type=kind, box_after_days=days, purge_after_days=0)
    return reasons([await one.ask_one(asked, tenant=tenant)])[0]


def sweeper(one: Boxer, clock: Later | Then) -> RetentionSweeper:
    """A sweeper with this boxer."""
    return sweeper_of(one, BUS, clock)


async def planned(one: Boxer, clock: Later | Then, days: int = DAYS) -> Sequence[tuple[str, str]]:
    """What a rule would box, and what holds it."""
    page = await retention_plan.plan(one, one._reads, TENANT, "counter", days, clock(), after="", examined=100, found_max=100)
    assert page.after == ""
    return [(each.key[2], each.held_by) for each in page.planned]


async def is_online(database: Database, name: str) -> bool:
    """Whether a counter's events are in the tables."""
    return (await online(database, name))[0].version == 1


async def test_a_rule_is_a_command_that_is_refused_for_what_is_never_boxed(write_db: Database) -> None:
    """It is set, set again without an event, and ended; a type that is not there, or that stays online, gets none."""
    async with replica(write_db, BUS) as one:
        assert [await rule(one, days) for days in (30, 30, 60, 0, 0)] == ["completed"] * 5
        assert await rule(one, 30, kind="zebra") == "AGGREGATE_TYPE_NOT_FOUND"
        assert await rule(one, 30, kind="retention") == "NEVER_BOXED"
    assert [event.type for event in await events_of(write_db)] == ["foldline.v1.RetentionSet"] * 3


async def test_the_sweeper_boxes_what_the_plan_shows_and_nothing_else(write_db: Database, tmp_path: Path) -> None:
    """Another tenant without a rule keeps all; a second round finds nothing; the line is whole."""
    store = files_in(tmp_path)
    async with replica(write_db, BUS) as one, boxer(write_db.app, store, BUS) as mover:
        for name in "abc":
            await one.ask_one(Add(counter_id=name, amount=5))
        await one.ask_one(Add(counter_id="other", amount=5), tenant="umbrella")
        clock = Later(DAYS - 1)
        sweeping = sweeper(mover, clock)
        assert await sweeping.round() == 0  # no rule yet
        assert await rule(one, DAYS) == "completed"
        assert (await planned(mover, clock), await sweeping.round()) == ([], 0)  # not past the date
        clock.days = DAYS + 1
        assert await planned(mover, clock) == [("a", ""), ("b", ""), ("c", "")]
        assert await is_online(write_db, "a")  # a plan changes nothing
        assert await sweeping.round() == 3
        assert [await is_online(write_db, name) for name in "abc"] == [False] * 3
        assert (await planned(mover, clock), await sweeping.round()) == ([], 0)
        line = await read_through(mover._reads, mover.archive, after=0, limit=100)
        assert [event.position for event in line] == list(range(1, 9))
        assert {event.tenant for event in line if event.aggregate_id == "other"} == {"umbrella"}
        boxed = [row for row in line if row.type == "foldline.v1.AggregateBoxed"]
        assert len(boxed) == 3


async def test_a_whole_stays_as_long_as_a_part_is_in_use(write_db: Database, tmp_path: Path) -> None:
    """`whole` has moved something to `part`: the plan says that it is held, and the sweeper leaves both."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=5))
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2))
        await rule(one, DAYS)
        await asyncio.sleep(0.01)  # so that the database's times differ
        between = datetime.now(UTC)
        await one.ask_one(Add(counter_id="part", amount=1))
        clock = Then(between + timedelta(days=DAYS))
        assert await planned(mover, clock) == [("whole", retention_plan.PART_IN_USE)]
        assert await sweeper(mover, clock).round() == 0
        assert [await is_online(write_db, name) for name in ("whole", "part")] == [True, True]
        await sweeper(mover, Later(DAYS + 1)).round()
        assert [await is_online(write_db, name) for name in ("whole", "part")] == [False, False]


async def test_a_round_is_bounded_and_the_next_goes_on_with_another_tenant(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two boxes a round, one a page: each tenant gets its turn although the first alone would fill the rounds."""
    monkeypatch.setattr(retention_sweeper, "DONE_MAX", 2)
    monkeypatch.setattr(retention_sweeper, "PAGE_DONE", 1)
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for tenant in (TENANT, "umbrella"):
            for name in "abcd":
                await one.ask_one(Add(counter_id=f"{tenant}-{name}", amount=5), tenant=tenant)
            await rule(one, DAYS, tenant=tenant)
        sweeping = sweeper(mover, Later(DAYS + 1))
        assert await sweeping.round() == 2
        line = await events_of(write_db)
        assert {event.tenant for event in line if event.type == "foldline.v1.AggregateBoxed"} == {TENANT, "umbrella"}
        assert [await sweeping.round() for _ in range(4)] == [2, 2, 2, 0]


async def test_two_sweepers_box_each_aggregate_once(write_db: Database, tmp_path: Path) -> None:
    """They sweep at once: every counter has one box, and no command was carried out twice."""
    store = files_in(tmp_path)
    async with replica(write_db, BUS) as one:
        for name in "abcdef":
            await one.ask_one(Add(counter_id=name, amount=5))
        await rule(one, DAYS)
    async with boxer(write_db.app, store, BUS) as first, boxer(write_db.app, store, BUS) as second:
        await asyncio.gather(*(sweeper(each, Later(DAYS + 1)).round() for each in (first, second)))
    boxed = [event.aggregate_id for event in await events_of(write_db) if event.type == "foldline.v1.AggregateBoxed"]
    assert sorted(boxed) == list("abcdef")


async def test_an_event_that_comes_after_the_look_keeps_the_aggregate_online(write_db: Database, tmp_path: Path) -> None:
    """The box is for the version that was seen."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="a", amount=5))
        await rule(one, DAYS)
        sweeping = sweeper(mover, Later(DAYS + 1))
        box_idle = mover.box_idle

        async def late(key: tuple[str, str, str], version: int) -> object:
            await one.ask_one(Add(counter_id="a", amount=1))
            return await box_idle(key, version)

        mover.box_idle = late  # type: ignore[method-assign, assignment]
        assert await sweeping.round() == 0
        assert await is_online(write_db, "a")
        assert dict(sweeping._left) == {"VERSION_MISMATCH": 1}


@pytest.mark.parametrize("step", [3, 8, 14, 15, 20])
async def test_killed_in_a_round_the_next_ends_it(write_db: Database, tmp_path: Path, step: int) -> None:
    """In the first counter's box, in its call of the database, and in the second's: then all are boxed, once."""
    store = files_in(tmp_path)
    async with replica(write_db, BUS) as one:
        for name in "abc":
            await one.ask_one(Add(counter_id=name, amount=5))
        await rule(one, DAYS)
    killed = forked.start(sweeping.main, write_db.app, str(tmp_path), str(DAYS + 1), str(step))
    assert await forked.ended(killed) == -9
    async with boxer(write_db.app, store, BUS) as mover:
        await sweeper(mover, Later(DAYS + 1)).round()
        reads: Reads = mover._reads
        line = await read_through(reads, mover.archive, after=0, limit=100)
    assert [event.position for event in line] == list(range(1, 8))
    assert sorted(e.aggregate_id for e in line if e.type == "foldline.v1.AggregateBoxed") == list("abc")


async def test_nobody_can_keep_an_aggregate_online_by_an_id_that_can_be_computed(write_db: Database, tmp_path: Path) -> None:
    """A user takes the ids under which earlier versions boxed, of the whole and of its part. Today's are closed to users."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=5))
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2))
        await rule(one, DAYS)
        taken = derived_id("retention", TENANT, "counter", "whole", "2")
        for command_id in (taken, derived_id(taken, "counter", "part"), derived_id("retention", TENANT, "counter", "part", "1")):
            await one.ask_one(Add(counter_id="mine", amount=1), id=command_id)
        sweeping = sweeper(mover, Later(DAYS + 1))
        await sweeping.round()
        assert dict(sweeping._left) == {}
        assert [await is_online(write_db, name) for name in ("whole", "part", "mine")] == [False] * 3
        async with connected(write_db.app) as connection:
            cursor = await connection.execute("SELECT command_id::text FROM commands WHERE user_id = 'retention'")
            ids = [command_id for (command_id,) in await cursor.fetchall()]
        assert len(ids) == 3
        assert all(is_of_processes(command_id) for command_id in ids)


@pytest.mark.parametrize("killed", [False, True])
async def test_what_an_earlier_version_boxed_for_a_rule_is_not_boxed_again(
    write_db: Database, tmp_path: Path, killed: bool
) -> None:
    """Its command is in the log under an id of the earlier version, which may have been killed between the part and the whole."""
    whole, part = (TENANT, "counter", "whole"), (TENANT, "counter", "part")
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        await one.ask_one(Add(counter_id="whole", amount=5))
        await one.ask_one(Move(counter_id="whole", to_id="part", amount=2))
        await rule(one, DAYS)
        command = command_of_rule("box", BOX_AGGREGATE, COUNTER, whole, 2, datetime.now(UTC))
        before = replace(command, key=(TENANT, derived_id("retention", *whole, "2")))
        if killed:
            async with await mover._connect(TENANT) as connection:
                await mover._one(as_part(before, part), connection, mover._box_one)
            assert await sweeper(mover, Later(DAYS + 1)).round() == 1
        else:
            await mover._carry_out(before, mover._box_one, skips="AGGREGATE_BOXED")
        for key, version in ((part, 1), (whole, 2)):
            if (killed, key) == (True, whole):
                await mover.box_idle(key, version)  # a repeat
            else:
                assert await refusal_of(mover.box_idle(key, version)) == "AGGREGATE_BOXED"
        assert await sweeper(mover, Later(DAYS + 1)).round() == 0
        await move(mover, "unbox", "part", str(uuid4()))
        assert await refusal_of(mover.box_idle(part, 1)) == "VERSION_MISMATCH"
        assert await sweeper(mover, Later(DAYS + 1)).round() == 1
    boxed = [event.aggregate_id for event in await events_of(write_db) if event.type == "foldline.v1.AggregateBoxed"]
    assert sorted(boxed) == ["part", "whole"]
