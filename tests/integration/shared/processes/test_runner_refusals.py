"""What the runner makes of refusals, of calls that cannot be made, and of folds that fail."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from bank.v1 import account_pb2
from foldline.v1 import command_pb2
from shared.folds.errors import InternalError, Invalid, NotFound, OverLimit, Refusal, Rejected, Unauthenticated, Unavailable
from shared.folds.ids import step_id
from shared.processes.dispatcher import REFUSED_TOLD_AFTER
from tests.support.checks.gifts import HAPPY, all_ended, everything_once
from tests.support.domains import gifts
from tests.support.domains.gifts import GIFT, World, frozen, key, refused_call
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually


async def test_a_refusal_is_an_input(world: World) -> None:
    """Never sent again; the process makes up for it, and an operator sees what it said."""
    world.write.decide = frozen
    world.open(1)
    async with world.running():
        await all_ended(world, 1)
    assert await world.process(1) == ("ended", "", "GIFT_REFUSED", "sorry")
    assert world.write.carried_out == {(uid(1), 1): 1}
    assert sum(len(call.items) for call in world.write.calls) == 2
    rows = await world.query("SELECT error, attempts, phase FROM process_history WHERE kind = 'answer' ORDER BY number")
    assert rows[0][0] is not None
    assert rows[0][1:] == (1, "sorry: ACCOUNT_FROZEN")


@pytest.mark.parametrize(
    "refusal",
    [
        Unavailable("DATABASE_UNAVAILABLE", "away", retry_after_s=0.01),
        OverLimit("QUEUE_FULL", "full", retry_after_s=0.01),
        Unauthenticated("TOKEN_EXPIRED", "renew it"),
    ],
    ids=lambda refusal: refusal.reason,
)
async def test_a_call_that_cannot_be_made_now_is_made_later(world: World, refusal: Refusal) -> None:
    """With growing pauses, under the same ids, as often as it takes; meanwhile the reason can be seen."""
    away = True

    def gone(request: command_pb2.SendBatchRequest) -> None:
        if away:
            raise refused_call(refusal)

    world.write.before = gone
    world.open(1, 2)
    async with world.running():

        async def seen() -> bool:
            rows = await world.query("SELECT tries, last_error FROM process_commands")
            return len(rows) == 2 and all(tries > 4 and error.startswith(refusal.reason) for tries, error in rows)

        await eventually(seen)
        assert await world.statuses() == {"running": 2}
        away = False
        await all_ended(world, 2)
    await everything_once(world, 1, 2)


async def test_calls_that_are_refused_for_long_are_seen(world: World) -> None:
    """Nobody is parked, since no process is at fault: the runner has a reason, which readiness and the alert go by."""
    refusal: Refusal | None = Unauthenticated("TOKEN_EXPIRED", "renew it")

    def gone(request: command_pb2.SendBatchRequest) -> None:
        if refusal is not None:
            raise refused_call(refusal)

    world.write.before = gone
    world.open(1)
    async with world.running(), world.desk() as desk:

        async def trouble() -> str:
            [runner] = await desk.runners()
            return runner.standing.reason.partition(" since")[0] + runner.standing.reason.rpartition(" as")[2]

        await eventually(lambda: len(world.write.calls) > 3)
        assert await trouble() == ""
        world.clock.ahead += REFUSED_TOLD_AFTER
        await eventually(lambda: becomes(trouble, "CALLS_REFUSED: TOKEN_EXPIRED"), 20)
        assert await world.statuses() == {"running": 1}
        world.open(2)
        async with asyncio.timeout(30):
            while await world.statuses() != {"running": 2}:
                assert await trouble() == "CALLS_REFUSED: TOKEN_EXPIRED"
        for _ in range(20):  # also after a round was saved
            assert await trouble() == "CALLS_REFUSED: TOKEN_EXPIRED"
        refusal = None
        await all_ended(world, 2)
        await eventually(lambda: becomes(trouble, ""), 20)
    await everything_once(world, 1, 2)


async def becomes(ask: Callable[[], Awaitable[str]], wanted: str) -> bool:
    """Whether that is the answer."""
    return await ask() == wanted


async def test_a_receipt_that_says_later_is_no_answer(world: World) -> None:
    """COMMAND_IN_FLIGHT, and a database that went away under a batch: sent again, the same id."""
    times = iter(range(100))

    def in_flight(command: account_pb2.DepositMoneyRequest) -> Refusal | None:
        return Unavailable("COMMAND_IN_FLIGHT", "under way") if next(times) < 3 else None

    world.write.decide = in_flight
    world.open(1)
    async with world.running():
        await all_ended(world, 1)
    await everything_once(world, 1)
    assert await world.query("SELECT attempts FROM process_history WHERE step = 'gift' AND kind = 'answer'") == [(4,)]


async def test_a_missing_token_is_waited_for(world: World, token_file: Path) -> None:
    """The token's file may come late: nothing is lost."""
    token_file.unlink()  # noqa: ASYNC240 (a file of four bytes)
    world.open(1)
    async with world.running():

        async def seen() -> bool:
            rows = await world.query("SELECT last_error FROM process_commands")
            return bool(rows) and rows[0][0].startswith("NO_TOKEN")

        await eventually(seen)
        token_file.write_text("t0ken")  # noqa: ASYNC240
        await all_ended(world, 1)
    await everything_once(world, 1)


async def test_defects_park_a_process_and_an_operator_lets_it_go_on(world: World) -> None:
    """After three FAILED receipts nobody tries any more; Retry is another attempt, with another id, and all goes on."""
    world.write.decide = lambda command: InternalError() if command.account_id == uid(1) else None
    world.open(1, 2)
    async with world.running(), world.desk() as desk:

        async def parked() -> bool:
            return await world.process(1) == ("parked", "COMMAND_FAILED", "", "giving")

        await eventually(parked)
        await all_ended(world, 1)
        assert await world.query("SELECT tries, answered, failures, given_up FROM process_commands") == [(3, 3, 3, True)]
        assert [row.key for row in await desk.find(10, None, attention=True)] == [key(1)]
        world.write.decide = lambda command: None
        await desk.retry(key(1), "olga")
        await all_ended(world, 2)
    assert world.write.carried_out == {(uid(n), amount): 1 for n in (1, 2) for amount in (500, 100)}
    assert set(world.write.receipts) == {
        str(it)
        for it in (
            step_id("gift", uid(1), "gift", 2),
            step_id("gift", uid(1), "bonus"),
            step_id("gift", uid(2), "gift"),
            step_id("gift", uid(2), "bonus"),
        )
    }
    assert await world.history(1) == [
        ("event", "AccountOpened"),
        ("command", "gift"),
        ("timer_set", "late"),
        ("parked", "gift"),
        ("operator", "retry"),
        ("command", "gift"),
        *HAPPY[3:],
    ]


async def test_a_mandatory_step_that_is_refused_parks_its_process_until_it_is_taken(world: World) -> None:
    """The refusal is no answer; Retry is another attempt each time, however the first tries ended; the process then ends."""
    refusing, lose = True, True

    def decide(command: account_pb2.DepositMoneyRequest) -> Refusal | None:
        return Rejected("FULL", "there is no room") if refusing and command.amount_minor == 1 else frozen(command)

    async def after(request: command_pb2.SendBatchRequest) -> None:
        nonlocal lose
        if any(account_pb2.DepositMoneyRequest.FromString(it.command.value).amount_minor == 1 for it in request.items) and lose:
            lose = False
            raise refused_call(Unavailable("AWAY", "the answer is lost"))

    world.write.decide, world.write.after = decide, after
    manager = dataclasses.replace(GIFT, mandatory=frozenset({"apology"}))
    world.open(1)
    async with world.running(world.runner(manager=manager)), world.desk() as desk:
        for attempt in (1, 2):

            async def parked(attempt: int = attempt) -> bool:
                rows = await world.query("SELECT attempt, given_up, tries - answered, last_error FROM process_commands")
                return rows == [(attempt, True, 0, "FULL: there is no room")]

            await eventually(parked)
            assert (await world.process(1))[:3] == ("parked", "COMMAND_REFUSED", "GIFT_REFUSED")
            if attempt == 2:
                refusing = False
            await desk.retry(key(1), "olga")
        await all_ended(world, 1)
    assert await world.process(1) == ("ended", "", "GIFT_REFUSED", "sorry")
    assert world.write.carried_out == {(uid(1), 1): 1}
    assert str(step_id("gift", uid(1), "apology", 3)) in world.write.receipts


async def test_a_command_that_no_write_service_knows_parks_its_process_in_the_end(world: World) -> None:
    """For as long as an upgrade may take it is sent again; then the process is parked by name, and Retry lets it go on."""
    known = {uid(2)}
    world.write.decide = lambda command: None if command.account_id in known else Invalid("UNKNOWN_COMMAND", "what?")
    world.open(1, 2)
    async with world.running(), world.desk() as desk:

        async def tried() -> bool:
            return await world.query("SELECT last_error FROM process_commands WHERE tries > 3 AND NOT given_up") != []

        await eventually(tried)
        await all_ended(world, 1)
        assert await world.process(1) == ("running", "", "", "giving")
        world.clock.ahead = timedelta(hours=1)

        async def parked() -> bool:
            return (await world.process(1))[:2] == ("parked", "COMMAND_UNKNOWN")

        await eventually(parked)
        found = await desk.find(10, None, status="parked", trouble="COMMAND_UNKNOWN")
        assert [row.key for row in found] == [key(1)]
        assert (await world.query("SELECT DISTINCT last_error FROM process_commands"))[0][0].startswith("UNKNOWN_COMMAND")
        known.add(uid(1))
        await desk.retry(key(1), "olga")
        await all_ended(world, 2)
    assert world.write.carried_out == {(uid(number), amount): 1 for number in (1, 2) for amount in (500, 100)}


async def test_a_command_that_may_have_happened_keeps_its_id(world: World) -> None:
    """INTERNAL for a whole call says nothing about the command: Retry must not carry it out a second time."""
    broken = True

    def swallow(request: command_pb2.SendBatchRequest) -> None:
        if broken:
            raise refused_call(InternalError())

    world.write.after = swallow
    world.open(1)
    async with world.running(), world.desk() as desk:

        async def parked() -> bool:
            return (await world.process(1))[:2] == ("parked", "COMMAND_FAILED")

        await eventually(parked)
        with pytest.raises(Rejected) as refused:
            await desk.cancel(key(1), "olga")
        assert refused.value.reason == "MAY_HAVE_HAPPENED"
        broken = False
        await desk.retry(key(1), "olga")
        await all_ended(world, 1)
    assert world.write.carried_out == {(uid(1), 500): 1, (uid(1), 100): 1}
    assert set(world.write.receipts) == {str(step_id("gift", uid(1), "gift")), str(step_id("gift", uid(1), "bonus"))}


@pytest.mark.parametrize("parked", [False, True], ids=["at once", "after it was given up"])
async def test_a_command_whose_id_a_client_took_gets_another(world: World, parked: bool) -> None:
    """A client's command is in the log under the id, so ours never happened: a new attempt, by itself, and all goes on."""
    used_by = "process" if parked else "client"

    def taken(command: account_pb2.DepositMoneyRequest) -> Refusal | None:
        if command.options.command_id != str(step_id("gift", uid(1), "gift")):
            return None
        refusal = Invalid("COMMAND_ID_REUSED", "used")
        refusal.facts["used_by"] = used_by
        return refusal

    world.write.decide = taken
    world.open(1)
    async with world.running(), world.desk() as desk:
        if parked:

            async def given_up() -> bool:
                return (await world.process(1))[:2] == ("parked", "COMMAND_FAILED")

            await eventually(given_up)
            used_by = "client"  # an earlier release did not say
            world.write.receipts.clear()
            await desk.retry(key(1), "olga")
        await all_ended(world, 1)
    assert world.write.carried_out == {(uid(1), 500): 1, (uid(1), 100): 1}
    assert str(step_id("gift", uid(1), "gift", 2)) in world.write.receipts
    assert await world.query("SELECT step FROM process_commands") == []
    assert await world.process(1) == ("ended", "", "", "given")


async def test_one_bad_command_holds_up_no_other(world: World) -> None:
    """A call that fails for one of its commands is split until only that one is in trouble."""

    def choke(request: command_pb2.SendBatchRequest) -> None:
        if any(account_pb2.DepositMoneyRequest.FromString(item.command.value).account_id == uid(7) for item in request.items):
            raise refused_call(InternalError())

    world.write.before = choke
    world.open(*range(1, 21))
    async with world.running():
        await all_ended(world, 19)

        async def parked() -> bool:
            return (await world.process(7))[:2] == ("parked", "COMMAND_FAILED")

        await eventually(parked)
    assert set(world.write.carried_out.values()) == {1}


async def test_a_fold_that_raises_parks_its_process_alone(world: World) -> None:
    """Later events wait behind it in their order; Retry gives it all of them; nothing of the defect's text is told."""
    gifts.DEFECTS.accounts.add(uid(1))
    world.open(1, 2, name="Eve")
    async with world.running(), world.desk() as desk:
        await all_ended(world, 1)
        frozen_ids = [world.freeze(1).event_id for _ in range(3)]

        async def queued() -> bool:
            return await world.query("SELECT count(*) FROM process_inputs") == [(4,)]

        await eventually(queued)
        assert await world.process(1) == ("parked", "FOLD_FAILED", "", "")
        still = await desk.retry(key(1), "olga")
        assert (still.status, still.trouble) == ("parked", "FOLD_FAILED")
        assert await world.query("SELECT count(*) FROM process_inputs") == [(4,)]
        gifts.DEFECTS.accounts.clear()
        await desk.retry(key(1), "olga")
        await all_ended(world, 2)
        case = await desk.get(key(1))
    assert [entry.id for entry in case.history if entry.name == "bank.v1.AccountFrozen"] == frozen_ids
    assert all(b"secret" not in (entry.error or b"") for entry in case.history)
    assert await world.query("SELECT count(*) FROM process_inputs") == [(0,)]
    assert world.write.carried_out == {(uid(n), amount): 1 for n in (1, 2) for amount in (500, 100)}


async def test_more_than_twenty_parked_in_a_minute_stop_the_runner(world: World) -> None:
    """A bad release stops rather than parking everything; a good one goes on from where it stopped."""
    gifts.DEFECTS.accounts.update(uid(number) for number in range(1, 22))
    world.open(*range(1, 22))
    async with world.running() as runner:
        await eventually(lambda: runner.stopped)
        assert runner.stopped == "PROCESSES_FAILED: more than 20 processes or streams were parked within a minute"
    assert await world.statuses() == {}
    gifts.DEFECTS.accounts.clear()
    async with world.running():
        await all_ended(world, 21)
    await everything_once(world, *range(1, 22))


async def test_cancel_refuses_what_waits_and_the_process_compensates(world: World) -> None:
    """Only what certainly never happened is taken back: to the process it is a refusal."""
    world.write.decide = lambda command: InternalError() if command.amount_minor == 500 else None
    world.open(1)
    async with world.running(), world.desk() as desk:

        async def parked() -> bool:
            return (await world.process(1))[0] == "parked"

        await eventually(parked)
        await desk.cancel(key(1), "olga")
        await all_ended(world, 1)
        for call, reason in ((desk.cancel, "PROCESS_ENDED"), (desk.retry, "NOTHING_TO_RETRY")):
            with pytest.raises(Rejected) as refused:
                await call(key(1), "olga")
            assert refused.value.reason == reason
        with pytest.raises(NotFound):
            await desk.cancel(key(2), "olga")
    assert await world.process(1) == ("ended", "", "GIFT_REFUSED", "sorry")
    assert world.write.carried_out == {(uid(1), 1): 1}
