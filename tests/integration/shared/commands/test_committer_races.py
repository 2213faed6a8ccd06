"""Callers that go away and replicas that get in each other's way."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from deploy.bootstrap import Database
from shared.commands.append import lock
from shared.commands.committer import Committer
from shared.commands.decide import Command
from shared.commands.intake import Limits
from tests.support.checks.history import check_line, commands_of, connected, somebody_waits
from tests.support.domains.trial import Add, GoOffDuty, Move, build_registry
from tests.support.fakes.replica import Replica, make_command, reasons, refusal, replica
from tests.support.system.waiting import eventually

BUS = build_registry()
# How many turns of the loop an answer takes depends on how the processes share the machine: when it stands still for a
# moment, few. One early answer therefore does not end a walk through the turns.
TRIED_MIN = 30


def adding(amount: int, counter_id: str = "a") -> Command:
    """A command with an id of its own."""
    return make_command(BUS, Add(counter_id=counter_id, amount=amount))


async def total(one: Replica, counter_id: str = "a") -> int:
    """What a counter is at, as the refusal of an absurd withdrawal tells."""
    [outcome] = await one.ask(adding(-(10**9), counter_id))
    return int(refusal(outcome).facts["total"])


async def cancelled_after(steps: int, one: Replica, *commands: Command, atomic: bool) -> bool:
    """Submits and goes away after so many steps of the loop; returns whether there was still something to leave."""
    asking = asyncio.create_task(one.ask_atomic(*commands) if atomic else one.ask(*commands))
    for _ in range(steps):
        if asking.done():
            break
        await asyncio.sleep(0)
    left = asking.cancel()
    await asyncio.wait([asking])
    return left


async def test_a_caller_that_goes_away_at_any_step_harms_nobody(write_db: Database) -> None:
    """At each step of the loop, from the first to the one that brings the answer.

    Its command is entirely there, and its outcome is to be had by the same id; or it never was, if the caller left before
    it said anything. Those who asked in the same batch notice nothing.
    """
    async with replica(write_db, BUS, limits=Limits(gather_wait_s_max=0)) as one:
        await one.ask(adding(1))
        for steps in itertools.count():
            mine = [adding(1), adding(0), adding(-(10**9))]
            neighbours = asyncio.create_task(one.ask(adding(1), adding(1, "b")))
            left = await cancelled_after(steps, one, *mine, atomic=False)
            assert reasons(await neighbours) == ["completed", "completed"]
            # What is asked now stands in the queue behind it.
            assert reasons(await one.ask(adding(0, "c"))) == ["completed"]
            stored = await commands_of(write_db) if steps % 10 == 0 else None
            outcomes = await one.ask(*mine)
            assert reasons(outcomes) == ["completed", "completed", "BELOW_ZERO"]
            if stored is not None:
                assert len({command.key for command in mine} & set(stored)) == (0 if steps == 0 else 3)
            if not left and steps >= TRIED_MIN:
                break
        assert await total(one) == 1 + 2 * (steps + 1)
        assert await total(one, "b") == steps + 1
    await check_line(write_db)


async def test_a_caller_of_an_atomic_batch_that_goes_away(write_db: Database) -> None:
    """The batch is there as a whole, or not at all."""
    async with replica(write_db, BUS, limits=Limits(gather_wait_s_max=0)) as one:
        for steps in itertools.count():
            unit = [adding(2), adding(-1), make_command(BUS, Move(counter_id="a", to_id="b", amount=1))]
            left = await cancelled_after(steps, one, *unit, atomic=True)
            await one.ask(adding(0))
            stored = {command.key for command in unit} & set(await commands_of(write_db)) if steps % 10 == 0 else set()
            assert len(stored) in (0, 3)
            if not left and steps >= TRIED_MIN:
                break
        assert await total(one) == 0
    await check_line(write_db)


async def test_a_crowd_that_goes_away_leaves_a_committer_that_works(write_db: Database) -> None:
    """Five hundred callers, every other one of which leaves: all commands are carried out, and its books are empty."""
    async with replica(write_db, BUS, limits=Limits(batch_commands_max=16)) as one:
        callers = [asyncio.create_task(one.ask(adding(1))) for _ in range(500)]
        await asyncio.sleep(0.005)
        for caller in callers[::2]:
            caller.cancel()
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert sum(isinstance(answer, list) for answer in answers) >= 250
        assert await total(one) == 500
        assert one.committer._intake.empty
    await check_line(write_db)


async def test_replicas_that_read_what_the_other_writes(write_db: Database) -> None:
    """Write skew, tried thirty times: of two colleagues who leave at once, exactly one may."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        for nth in range(30):
            a, b = f"a{nth}", f"b{nth}"
            if nth % 2:  # with warm caches, and without
                await one.ask(adding(1, a), adding(1, b))
                await other.ask(adding(1, a), adding(1, b))
            [here], [there] = await asyncio.gather(
                one.ask(make_command(BUS, GoOffDuty(counter_id=a, colleague_id=b))),
                other.ask(make_command(BUS, GoOffDuty(counter_id=b, colleague_id=a))),
            )
            assert sorted(reasons([here, there])) == ["NOBODY_ON_DUTY", "completed"]
    await check_line(write_db)


async def test_replicas_that_write_the_same_few_aggregates(write_db: Database) -> None:
    """Three of them, moving money in both directions under load: nobody is refused wrongly, and none is lost or made."""
    async with (
        replica(write_db, BUS, limits=Limits(batch_commands_max=8)) as one,
        replica(write_db, BUS, limits=Limits(batch_commands_max=8)) as two,
        replica(write_db, BUS, limits=Limits(batch_commands_max=8)) as three,
    ):
        await one.ask(adding(400, "a"), adding(400, "b"))

        def moves(there: str, back: str) -> list[Command]:
            return [make_command(BUS, Move(counter_id=there, to_id=back, amount=1)) for _ in range(80)]

        answers = await asyncio.gather(
            *(one.ask(command) for command in moves("a", "b")),
            *(two.ask(command) for command in moves("b", "a")),
            *(three.ask(command) for command in moves("a", "b")),
        )
        assert {reason for answer in answers for reason in reasons(answer)} == {"completed"}
        assert (await total(one, "a"), await total(two, "b")) == (320, 480)
    assert len(await check_line(write_db)) == 2 + 2 * 240


async def test_a_loser_of_every_race_is_answered_all_the_same(write_db: Database) -> None:
    """One replica asks one by one for what the other changes all the time: after a clash it takes the lock first."""
    async with replica(write_db, BUS) as busy, replica(write_db, BUS) as slow:
        over = False

        async def keep_busy() -> None:
            while not over:
                await busy.ask(*(adding(1) for _ in range(20)))

        working = asyncio.create_task(keep_busy())
        async with asyncio.timeout(20):
            for _ in range(50):
                assert reasons(await slow.ask(adding(1))) == ["completed"]
        over = True
        await working
    await check_line(write_db)


async def test_what_was_decided_ahead_of_a_clash_is_decided_anew(write_db: Database) -> None:
    """The version that it rests on is there after all, but holds another's event: only the decision is wrong.

    Of ten, all ten are to be taken, and then one. Before the first is committed another replica has taken five: the first
    is refused, and the second must not be, though it was when it seemed that nothing would be left.
    """
    at_once = Limits(decide_ahead_min=1)
    async with replica(write_db, BUS, limits=at_once) as one, replica(write_db, BUS) as other, connected(write_db.owner) as owner:
        await one.ask(adding(10))
        await other.ask(adding(-5))
        async with owner.transaction():
            await lock(owner, 1)
            first = asyncio.create_task(one.ask(adding(-10)))
            await eventually(lambda: somebody_waits(owner))
            second = asyncio.create_task(one.ask(adding(-1)))
            await eventually(lambda: one.committer._next is not None and one.committer._next.decided == 1)
        assert reasons(await first) == ["BELOW_ZERO"]
        assert reasons(await second) == ["completed"]
        assert await total(one) == 4
    await check_line(write_db)


async def test_what_is_decided_ahead_sees_what_is_being_committed(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would collide, and be decided a second time under the lock."""
    clashes: list[object] = []
    monkeypatch.setattr(Committer, "_commit_locked", lambda self, connection, batch: clashes.append(batch))
    async with replica(write_db, BUS, limits=Limits(decide_ahead_min=1)) as one, connected(write_db.owner) as owner:
        await one.ask(adding(1))
        async with owner.transaction():
            await lock(owner, 1)
            first = asyncio.create_task(one.ask(adding(10)))
            await eventually(lambda: somebody_waits(owner))
            second = asyncio.create_task(one.ask(adding(-11)))
            await asyncio.sleep(0)
        assert reasons([*await first, *await second]) == ["completed", "completed"]
    assert not clashes
    assert [event.version for event in await check_line(write_db)] == [1, 2, 3]
