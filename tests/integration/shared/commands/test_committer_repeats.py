"""The same command id again, in every way it can come: the first answer again, and no second effect."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands.decide import Command, Outcome
from shared.folds.aggregate import Meta
from shared.folds.errors import Code
from tests.support.checks.history import check_line, commands_of
from tests.support.domains.trial import ADD, COUNTER, Add, Counter, CounterEvent, Swell, add, build_registry
from tests.support.fakes.replica import Replica, make_command, reasons, refusal, replica

BUS = build_registry()


def adding(amount: int, counter_id: str = "a", *, like: Command | None = None) -> Command:
    """A command with an id of its own, or with that of another."""
    return make_command(BUS, Add(counter_id=counter_id, amount=amount), id=like.key[1] if like else None)


async def total(one: Replica, counter_id: str = "a") -> int:
    """What a counter is at, as the refusal of an absurd withdrawal tells."""
    [outcome] = await one.ask(adding(-(10**9), counter_id))
    return int(refusal(outcome).facts["total"])


def same(first: Outcome, again: Outcome) -> bool:
    """Whether two answers are one; a refusal that was read from the log is another object."""
    told = [(no.code, no.reason, no.text, no.facts) if (no := each.refusal) else None for each in (first, again)]
    return replace(first, refusal=None) == replace(again, refusal=None) and told[0] == told[1]


async def test_later(write_db: Database) -> None:
    """After others have moved the aggregate and the line: the answer of then, of an acceptance, a no-op and a refusal."""
    async with replica(write_db, BUS) as one:
        commands = [adding(5), adding(0), adding(-9)]
        firsts = await one.ask(*commands)
        await one.ask(adding(100))
        assert reasons(firsts) == ["completed", "completed", "BELOW_ZERO"]
        for command, first in zip(commands, firsts, strict=True):
            [again] = await one.ask(command)
            assert same(first, again)
        assert all(same(*both) for both in zip(firsts, await one.ask(*commands), strict=True))
        assert await total(one) == 105
    await check_line(write_db)


async def test_after_a_restart(write_db: Database) -> None:
    """Nothing of it was in memory alone."""
    commands = [adding(5), adding(0), adding(-9)]
    async with replica(write_db, BUS) as before:
        firsts = await before.ask(*commands)
    async with replica(write_db, BUS) as after:
        assert all(same(*both) for both in zip(firsts, await after.ask(*commands), strict=True))
        assert await total(after) == 5


async def test_a_refusal_is_final_even_if_it_would_be_accepted_now(write_db: Database) -> None:
    """Whoever wants to try again takes a new id."""
    async with replica(write_db, BUS) as one:
        asked = adding(-9)
        assert reasons(await one.ask(asked)) == ["BELOW_ZERO"]
        await one.ask(adding(100))
        [again] = await one.ask(asked)
        assert (refusal(again).code, refusal(again).reason) == (Code.FAILED_PRECONDITION, "BELOW_ZERO")
        assert (refusal(again).text, refusal(again).facts) == ("the total would be below zero", {"total": "0"})
        assert reasons(await one.ask(adding(-9))) == ["completed"]


async def test_a_stale_expectation_is_final_too(write_db: Database) -> None:
    """With its facts, and as the same code."""
    async with replica(write_db, BUS) as one:
        asked = make_command(BUS, Add(counter_id="a", amount=1), expected_version=1)
        await one.ask(asked)
        await one.ask(adding(1))
        [again] = await one.ask(asked)
        assert (refusal(again).code, refusal(again).facts) == (Code.ABORTED, {"expected": "1", "actual": "0"})


async def test_at_once(write_db: Database) -> None:
    """Twenty callers with one id, while it is under way: one effect, one answer for all."""
    async with replica(write_db, BUS) as one:
        asked = adding(5)
        outcomes = [outcome for [outcome] in await asyncio.gather(*(one.ask(asked) for _ in range(20)))]
        assert all(outcome == Outcome("completed", 1, 1, 1, 1) for outcome in outcomes)
        assert await total(one) == 5


async def test_twice_in_one_call(write_db: Database) -> None:
    """The second gets the first's answer, in its place."""
    async with replica(write_db, BUS) as one:
        asked, other, refused = adding(5), adding(7), adding(-99)
        outcomes = await one.ask(asked, other, asked, refused, refused)
        assert reasons(outcomes) == ["completed", "completed", "completed", "BELOW_ZERO", "BELOW_ZERO"]
        assert outcomes[0] == outcomes[2]
        assert await total(one) == 12


async def test_at_two_replicas_at_once(write_db: Database) -> None:
    """Whoever comes second gives the first's answer; a hundred times."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        for nth in range(1, 101):
            asked = adding(1)
            [here], [there] = await asyncio.gather(one.ask(asked), other.ask(asked))
            assert here == there
            assert (here.status, here.version) == ("completed", nth)
        assert await total(one) == 100
    await check_line(write_db)


async def test_at_two_replicas_at_once_in_batches_in_another_order(write_db: Database) -> None:
    """The same two hundred commands, from the front here and from the back there: each is carried out once."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        commands = [adding(1, f"c{nth % 7}") for nth in range(200)]
        here, there = await asyncio.gather(one.ask(*commands), other.ask(*reversed(commands)))
        assert here == list(reversed(there))
    assert len(await check_line(write_db)) == 200


async def test_with_another_content(write_db: Database) -> None:
    """Refused, whenever it comes: later, at once, in one call, after a restart; the first is not touched by it."""
    async with replica(write_db, BUS) as one:
        asked = adding(5)
        assert reasons(await one.ask(asked, adding(6, like=asked), asked)) == ["completed", "COMMAND_ID_REUSED", "completed"]
        [[first], [second]] = await asyncio.gather(one.ask(other := adding(5)), one.ask(adding(6, like=other)))
        assert reasons([first, second]) == ["completed", "COMMAND_ID_REUSED"]
        [later] = await one.ask(adding(6, like=asked))
        assert (refusal(later).code, refusal(later).reason) == (Code.INVALID_ARGUMENT, "COMMAND_ID_REUSED")
        assert refusal(later).facts == {"used_by": "client"}
        assert await total(one) == 10
    async with replica(write_db, BUS) as after:
        assert reasons(await after.ask(adding(6, like=asked), adding(5, "b", like=asked))) == ["COMMAND_ID_REUSED"] * 2
        assert reasons(await after.ask(asked)) == ["completed"]
        assert await total(after) == 10
    assert (await commands_of(write_db))[asked.key].payload == asked.payload


async def test_from_another_user(write_db: Database) -> None:
    """Nobody gets somebody else's answer."""
    async with replica(write_db, BUS) as one:
        asked = adding(5)
        await one.ask(asked)
        theirs = make_command(BUS, asked.content, id=asked.key[1], user_id="mallory")
        assert reasons(await one.ask(theirs)) == ["COMMAND_ID_REUSED"]


async def test_after_a_failure(write_db: Database) -> None:
    """A defect is not final: once it is mended the same id is carried out, once, and then is final."""
    broken = True

    def sometimes(counter: Counter, command: Add, meta: Meta) -> Sequence[CounterEvent]:
        if broken:
            raise ValueError("not today")
        return add(counter, command, meta)

    bus = build_registry()
    bus.rows_of(COUNTER).override(ADD, sometimes, tenant="acme", name="other")
    async with replica(write_db, bus) as one:
        asked = make_command(bus, adding(5).content)
        for _ in range(2):
            assert reasons(await one.ask(asked)) == ["INTERNAL"]
            assert (await commands_of(write_db))[asked.key].status == "failed"
        other = make_command(bus, asked.content, id=asked.key[1], user_id="mallory")
        assert reasons(await one.ask(other)) == ["COMMAND_ID_REUSED"]
        broken = False
        [mended] = await one.ask(asked)
        assert mended == Outcome("completed", 1, 1, 1, 1)
        row = (await commands_of(write_db))[asked.key]
        assert (row.status, row.error, row.position) == ("completed", None, 1)
        broken = True
        assert await one.ask(asked) == [mended]
    assert len(await check_line(write_db)) == 1


async def test_after_a_failure_on_a_stale_cache(write_db: Database) -> None:
    """The failed row is no answer on the way that takes the lock first, either."""
    broken = True

    def sometimes(counter: Counter, command: Add, meta: Meta) -> Sequence[CounterEvent]:
        if broken:
            raise ValueError("not today")
        return add(counter, command, meta)

    bus = build_registry()
    bus.rows_of(COUNTER).override(ADD, sometimes, tenant="acme", name="other")
    async with replica(write_db, bus) as one, replica(write_db, BUS) as other:
        asked = make_command(bus, adding(5).content)
        assert reasons(await one.ask(asked)) == ["INTERNAL"]
        broken = False
        await one.ask(adding(1))
        await other.ask(adding(1))
        assert await one.ask(asked) == [Outcome("completed", 3, 1, 3, 3)]
    assert len(await check_line(write_db)) == 3


# In atomic batches


async def test_an_atomic_batch_again(write_db: Database) -> None:
    """As a whole: the same answers, of accepted ones and of refused ones."""
    async with replica(write_db, BUS) as one:
        good = [adding(5), adding(-3)]
        firsts = await one.ask_atomic(*good)
        await one.ask(adding(100))
        assert await one.ask_atomic(*good) == firsts
        bad = [adding(1), adding(-999), adding(1)]
        assert reasons(await one.ask_atomic(*bad)) == ["ATOMIC_BATCH_REFUSED", "BELOW_ZERO", "ATOMIC_BATCH_REFUSED"]
        await one.ask(adding(10_000))
        assert reasons(await one.ask_atomic(*bad)) == ["ATOMIC_BATCH_REFUSED", "BELOW_ZERO", "ATOMIC_BATCH_REFUSED"]
        assert await total(one) == 10_102


async def test_all_or_nothing_and_the_others_may_be_sent_again(write_db: Database) -> None:
    """Only the culprit is in the log; each of the others is carried out when it comes again, alone or together."""
    async with replica(write_db, BUS) as one:
        first, culprit, last = adding(5), adding(-999), adding(7)
        outcomes = await one.ask_atomic(first, culprit, last)
        assert [refusal(outcome).code for outcome in outcomes] == [Code.ABORTED, Code.FAILED_PRECONDITION, Code.ABORTED]
        assert set(await commands_of(write_db)) == {culprit.key}
        assert await total(one) == 0
        assert reasons(await one.ask_atomic(last, first)) == ["completed", "completed"]
        assert await total(one) == 12


async def test_a_command_twice_in_an_atomic_batch(write_db: Database) -> None:
    """Carried out once, answered twice."""
    async with replica(write_db, BUS) as one:
        asked = adding(5)
        outcomes = await one.ask_atomic(asked, adding(1), asked)
        assert reasons(outcomes) == ["completed"] * 3
        assert outcomes[0] == outcomes[2]
        assert await total(one) == 6


async def test_an_id_with_two_contents_in_an_atomic_batch(write_db: Database) -> None:
    """Refused as a whole, though another command of the batch has the content of the first."""
    async with replica(write_db, BUS) as one:
        asked = adding(5)
        assert reasons(await one.ask_atomic(asked, adding(6, like=asked))) == ["COMMAND_ID_REUSED"] * 2
        assert reasons(await one.ask_atomic(asked, adding(5), adding(6, like=asked))) == ["COMMAND_ID_REUSED"] * 3
        assert await total(one) == 0


async def test_an_atomic_batch_with_a_command_that_is_done_already(write_db: Database) -> None:
    """It gets its answer of then; the new one is decided without a second effect of it.

    Were the done one carried out again in memory, the new one would find too little, or too much.
    """
    async with replica(write_db, BUS) as one:
        await one.ask(adding(100))
        done = adding(-100)
        [first] = await one.ask(done)
        await one.ask(adding(100))
        outcomes = await one.ask_atomic(done, adding(-50))
        assert reasons(outcomes) == ["completed", "completed"]
        assert outcomes[0] == first
        assert await total(one) == 50

        done = adding(30)
        [first] = await one.ask(done)
        outcomes = await one.ask_atomic(done, adding(-100))
        assert reasons(outcomes) == ["completed", "BELOW_ZERO"]
        assert outcomes[0] == first
        assert refusal(outcomes[1]).facts == {"total": "80"}
        assert await total(one) == 80
    await check_line(write_db)


async def test_an_atomic_batch_with_a_command_that_was_refused_already(write_db: Database) -> None:
    """It is refused as a whole."""
    async with replica(write_db, BUS) as one:
        refused = adding(-100)
        await one.ask(refused)
        await one.ask(adding(500))
        assert reasons(await one.ask_atomic(adding(1), refused, adding(1))) == [
            "ATOMIC_BATCH_REFUSED", "BELOW_ZERO", "ATOMIC_BATCH_REFUSED",
        ]  # fmt: skip
        assert await total(one) == 500


async def test_a_command_under_way_in_a_batch_and_alone(write_db: Database) -> None:
    """Whoever comes second is told to come again; then it gets the answer."""
    async with replica(write_db, BUS) as one:
        asked = adding(5)
        together, [alone] = await asyncio.gather(one.ask_atomic(asked, adding(1)), one.ask(asked))
        assert reasons(together) == ["completed", "completed"]
        assert (refusal(alone).code, refusal(alone).reason) == (Code.UNAVAILABLE, "COMMAND_IN_FLIGHT")
        assert await one.ask(asked) == together[:1]
        assert await total(one) == 6


async def test_what_was_carried_out_is_answered_even_if_it_would_be_too_large_now(write_db: Database) -> None:
    """A refusal that is not stored, because the event is too large, is still checked against the log."""
    async with replica(write_db, BUS) as one:
        asked = one.command(Swell(counter_id="a", amount=1000))
        [first] = await one.ask(asked)
        await one.ask(adding(262_000))
        assert await one.ask(asked) == [first]
        assert reasons(await one.ask(one.command(Swell(counter_id="a", amount=1000)))) == ["EVENT_TOO_LARGE"]
    assert len(await check_line(write_db)) == 2
