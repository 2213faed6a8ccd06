"""What operators do with running processes, on a real database: pause, skip, acknowledge with two people, retry many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import Any

import pytest

from foldline.v1 import command_pb2
from shared.folds.errors import InternalError, Refusal, Unavailable
from shared.folds.ids import step_id
from shared.line.standing import State
from shared.platform.leader import LockClass, hold_lease
from shared.processes.dispatcher import RetryPolicy
from shared.processes.pending import Acknowledgement
from shared.processes.records import ProcessStatus
from shared.processes.runners import STUCK_AFTER
from tests.support.domains import gifts
from tests.support.domains.gifts import World, frozen, key
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually


async def reason(call: Awaitable[object]) -> str:
    """Why a call is refused."""
    with pytest.raises(Refusal) as refused:
        await call
    return refused.value.reason


async def are(world: World, **counts: int) -> None:
    """Waits for so many processes of each status."""

    async def reached() -> bool:
        return dict(await world.statuses()) == counts

    await eventually(reached, 20)


async def notes(world: World, number: int) -> list[tuple[str, str, str, str]]:
    """What operators did with an account's process: action, step, user, words."""
    query = "SELECT name, step, id, note FROM process_history WHERE process_id = %s AND kind = 'operator' ORDER BY number"
    return list(await world.query(query, uid(number)))


# Pause


async def test_a_paused_type_sends_nothing_until_it_is_resumed(world: World) -> None:
    """Events are taken and the commands wait untried; resumed, each is carried out once."""
    async with world.steering() as (desk, steering), world.running() as runner:
        await runner.follows.wait()
        paused = await steering.pause("gift", "wrong amounts", "olga")
        assert (paused.type, paused.reason, paused.user_id) == ("gift", "wrong amounts", "olga")
        world.open(1, 2)
        await are(world, running=2)
        assert await world.query("SELECT step, tries, answered FROM process_commands") == [("gift", 0, 0)] * 2
        [seen] = await desk.runners()
        assert seen.work.paused == [paused]
        assert seen.work.trouble == "paused gift"
        assert world.write.calls == []
        assert await steering.resume("gift") == paused
        await are(world, ended=2)
    assert set(world.write.carried_out.values()) == {1}


async def test_answers_are_taken_while_a_type_is_paused(world: World) -> None:
    """A command that was under way counts; the next one waits. So it is after the leader was killed, too."""
    hold = asyncio.Event()

    async def wait(request: command_pb2.SendBatchRequest) -> None:
        await hold.wait()

    world.write.after = wait
    world.open(1)
    async with world.steering() as (_, steering), world.running():
        await eventually(lambda: world.write.calls)
        await steering.pause("gift", "to look", "olga")
        hold.set()

        async def topping_up() -> bool:
            return (await world.process(1))[3] == "topping up"

        await eventually(topping_up)
    async with world.steering() as (_, steering), world.running() as runner:
        await runner.follows.wait()
        assert await world.query("SELECT step, tries FROM process_commands") == [("bonus", 0)]
        await steering.resume("gift")
        await are(world, ended=1)
    assert world.write.carried_out == {(uid(1), 500): 1, (uid(1), 100): 1}


async def test_what_waits_in_the_queue_is_taken_back(world: World) -> None:
    """Commands that wait behind calls that hang are not sent after the pause; nothing of them counts as sent."""
    hold = asyncio.Event()

    async def wait(request: command_pb2.SendBatchRequest) -> None:
        await hold.wait()

    world.write.before = wait
    few = RetryPolicy().few
    hang, queued = range(1, few + 1), range(few + 1, few + 3)

    def sent() -> int:
        return sum(len(call.items) for call in world.write.calls)

    world.open(*hang)
    async with world.steering() as (_, steering), world.running():
        await eventually(lambda: sent() == few)
        world.open(*queued)
        await are(world, running=few + 2)
        await steering.pause("gift", "to look", "olga")

        async def taken_back() -> bool:
            rows = await world.query("SELECT process_id, tries - answered FROM process_commands ORDER BY process_id")
            return rows == [*((uid(n), 1) for n in hang), *((uid(n), 0) for n in queued)]

        await eventually(taken_back, 10)
        hold.set()
        await eventually(lambda: len(world.write.receipts) == few)
        assert sent() == few
        await steering.resume("gift")
        await are(world, ended=few + 2)
    assert set(world.write.carried_out.values()) == {1}


async def test_timers_of_a_paused_type_fire_when_it_is_resumed(world: World) -> None:
    """Late rather than never; and the runner does not spin meanwhile."""
    world.write.decide = lambda command: Unavailable("AWAY", "away")
    world.open(1)
    async with world.steering() as (_, steering), world.running():
        await are(world, running=1)
        await steering.pause("gift", "to look", "olga")
        world.clock.ahead = timedelta(hours=2)

        async def looked() -> bool:
            return bool(await world.query("SELECT FROM checkpoints WHERE paused ? 'gift'"))

        await eventually(looked)
        assert (await world.process(1))[2] == ""
        await steering.resume("gift")

        async def late() -> bool:
            return (await world.process(1))[2] == "LATE"

        await eventually(late)


async def test_what_cannot_be_paused_or_resumed_is_refused_by_name(world: World) -> None:
    """Twice, not paused, no such type; of two who pause at once one does. Before any runner has run, too."""
    async with world.steering() as (_, steering):
        assert await reason(steering.pause("loan", "", "olga")) == "PROCESS_TYPE_NOT_FOUND"
        assert await reason(steering.resume("gift")) == "NOT_PAUSED"
        both = await asyncio.gather(*(steering.pause("gift", who, who) for who in ("olga", "otto")), return_exceptions=True)
        assert sorted(type(it).__name__ for it in both) == ["PausedType", "Rejected"]
        assert await reason(steering.pause("gift", "again", "olga")) == "ALREADY_PAUSED"
        both = await asyncio.gather(*(steering.resume("gift") for _ in range(2)), return_exceptions=True)
        assert sorted(type(it).__name__ for it in both) == ["PausedType", "Rejected"]


async def test_a_runner_that_leaves_due_work_is_stuck(world: World) -> None:
    """It holds the lease and takes nothing for a minute: seen as stuck; when the work is taken, no more."""
    world.write.decide = lambda command: Unavailable("AWAY", "away")
    world.open(1)
    async with world.running():
        await are(world, running=1)
    async with world.steering() as (desk, _), hold_lease(world.database.app, LockClass.SAGA, 1):
        world.clock.ahead = STUCK_AFTER / 2
        [runner] = await desk.runners()
        assert (runner.standing.state, runner.work.stuck) == (State.RUNNING, False)
        world.clock.ahead = 10 * STUCK_AFTER
        [runner] = await desk.runners()
        assert (runner.work.stuck, runner.work.trouble) == (True, "stuck")


# Skip


async def test_a_skipped_step_counts_as_done(world: World) -> None:
    """The process goes on and ends; the command is never sent again; the history says who, which step and why."""
    world.write.decide = lambda command: InternalError() if command.amount_minor == 100 else None
    world.open(1)
    async with world.steering() as (_, steering), world.running():
        await are(world, parked=1)
        process = await steering.skip(key(1), "bonus", "paid by hand", "olga")
        assert (process.status, process.phase, process.trouble) == (ProcessStatus.ENDED, "given", "")
        assert await world.query("SELECT step FROM process_commands") == []
        for step in ("bonus", "gift"):
            assert await reason(steering.skip(key(1), step, "again", "olga")) == "PROCESS_ENDED"
    assert await notes(world, 1) == [("skip", "bonus", "olga", "paid by hand")]
    assert world.write.carried_out == {(uid(1), 500): 1}


async def test_only_a_step_that_waits_and_may_be_skipped_is_skipped(world: World) -> None:
    """Others are refused by name, and nothing changes."""
    world.write.decide = lambda command: InternalError()
    world.open(1)
    async with world.steering() as (_, steering), world.running():
        await are(world, parked=1)
        assert await reason(steering.skip(key(1), "gift", "no", "olga")) == "STEP_NOT_SKIPPABLE"
        assert await reason(steering.skip(key(1), "bonus", "no", "olga")) == "STEP_NOT_WAITING"
        assert await reason(steering.skip(key(2), "bonus", "no", "olga")) == "PROCESS_NOT_FOUND"
    assert await notes(world, 1) == []


async def test_of_two_who_skip_or_cancel_at_once_one_does(world: World) -> None:
    """The turns run one after the other; the second finds the process ended."""
    world.write.decide = lambda command: InternalError() if command.amount_minor == 100 else None
    world.open(1)
    async with world.running():
        await are(world, parked=1)
    async with world.steering() as (_, first), world.steering() as (desk, second):
        both: Sequence[Any] = await asyncio.gather(
            first.skip(key(1), "bonus", "by hand", "olga"),
            second.skip(key(1), "bonus", "by hand", "otto"),
            desk.cancel(key(1), "otto"),
            return_exceptions=True,
        )
        assert [getattr(it, "reason", "done") for it in both if getattr(it, "reason", "done") != "PROCESS_ENDED"] == ["done"]
    assert len(await notes(world, 1)) == 1


async def test_an_answer_that_comes_after_the_skip_changes_nothing(world: World) -> None:
    """The command was under way: it is carried out, and its answer has no row any more."""
    hold = asyncio.Event()

    async def wait(request: command_pb2.SendBatchRequest) -> None:
        if str(step_id("gift", uid(1), "bonus")) in str(request):
            await hold.wait()

    world.write.before = wait
    world.open(1)
    async with world.steering() as (_, steering), world.running():
        await eventually(lambda: len(world.write.calls) == 2)
        await steering.skip(key(1), "bonus", "by hand", "olga")
        await are(world, ended=1)
        before = await world.history(1)
        hold.set()
        await eventually(lambda: (uid(1), 100) in world.write.carried_out)
        world.open(2)
        await are(world, ended=2)
        assert await world.history(1) == before


# Acknowledge


@pytest.fixture
async def refused_gift(world: World) -> World:
    """A world whose process 1 has ended and says GIFT_REFUSED."""
    world.write.decide = frozen
    world.open(1)
    async with world.running():
        await are(world, ended=1)
    return world


async def attention(world: World) -> list[str]:
    """Who an operator should look at."""
    async with world.desk() as desk:
        return [process.process_id for process in await desk.find(9, None, attention=True)]


async def test_one_asks_and_another_confirms(refused_gift: World) -> None:
    """Until then the process is shown; the history says who settled what, and how."""
    async with refused_gift.steering() as (desk, steering):
        asked = await steering.ask(key(1), "GIFT_REFUSED", "sent by post", "olga")
        assert isinstance(asked, Acknowledgement)
        assert (await desk.get(key(1))).acknowledgement == asked
        assert await attention(refused_gift) == [uid(1)]
        assert await reason(steering.confirm(key(1), "olga")) == "SAME_PERSON"
        assert await reason(steering.ask(key(1), "GIFT_REFUSED", "otherwise", "otto")) == "ALREADY_ASKED"
        process = await steering.confirm(key(1), "otto")
        assert (process.attention, process.status) == ("", ProcessStatus.ENDED)
        assert await attention(refused_gift) == []
        assert (await desk.get(key(1))).acknowledgement is None
        assert await reason(steering.confirm(key(1), "otto")) == "NOT_ASKED"
        assert await reason(steering.ask(key(1), "GIFT_REFUSED", "again", "olga")) == "NOTHING_TO_ACKNOWLEDGE"
    assert await notes(refused_gift, 1) == [
        ("ask", "", "olga", "GIFT_REFUSED: sent by post"),
        ("confirm", "", "otto", "GIFT_REFUSED: sent by post"),
    ]


async def test_what_was_asked_for_can_be_dropped_and_asked_anew(refused_gift: World) -> None:
    """By whoever asked, too; what the process says no more cannot be asked for."""
    async with refused_gift.steering() as (_, steering):
        assert await reason(steering.reject(key(1), "no", "olga")) == "NOT_ASKED"
        assert await reason(steering.ask(key(1), "MONEY_IN_SUSPENSE", "x", "olga")) == "ATTENTION_CHANGED"
        assert await reason(steering.ask(key(2), "GIFT_REFUSED", "x", "olga")) == "PROCESS_NOT_FOUND"
        await steering.ask(key(1), "GIFT_REFUSED", "sent by psot", "olga")
        await steering.reject(key(1), "misspelt", "olga")
        await steering.ask(key(1), "GIFT_REFUSED", "sent by post", "olga")
        await steering.confirm(key(1), "otto")
    assert [note[0] for note in await notes(refused_gift, 1)] == ["ask", "reject", "ask", "confirm"]


async def test_a_confirmation_is_for_what_was_asked(world: World) -> None:
    """The process says something else by now: the confirmation is refused, and another may ask anew."""
    world.write.decide = lambda command: frozen(command) if command.amount_minor == 500 else Unavailable("AWAY", "away")
    world.open(1)
    async with world.steering() as (_, steering), world.running():

        async def says(word: str) -> None:
            async def said() -> bool:
                return bool(await world.query("SELECT FROM processes WHERE attention = %s", word))

            await eventually(said)

        await says("GIFT_REFUSED")
        await steering.ask(key(1), "GIFT_REFUSED", "sent by post", "olga")
        world.freeze(1)
        await says("")
        assert await reason(steering.confirm(key(1), "otto")) == "ATTENTION_CHANGED"
        world.write.decide = frozen
        await are(world, ended=1)
        await says("GIFT_REFUSED")
        await steering.confirm(key(1), "otto")


async def test_of_two_who_confirm_at_once_one_does(refused_gift: World) -> None:
    """The other finds nothing asked for."""
    async with refused_gift.steering() as (_, first), refused_gift.steering() as (_, second):
        await first.ask(key(1), "GIFT_REFUSED", "sent by post", "olga")
        calls = (first.confirm(key(1), "otto"), second.confirm(key(1), "otto"), second.reject(key(1), "no", "otto"))
        both: Sequence[Any] = await asyncio.gather(*calls, return_exceptions=True)
        assert sorted(getattr(it, "reason", "done") for it in both) == ["NOT_ASKED", "NOT_ASKED", "done"]


# Many


async def test_many_parked_processes_are_retried_at_once(world: World) -> None:
    """Those that are parked; one whose fold still raises is parked again, and each command is carried out once."""
    gifts.DEFECTS.accounts.update({uid(1), uid(2)})
    world.write.decide = lambda command: InternalError()
    world.open(*range(1, 31))
    async with world.steering() as (desk, steering), world.running():
        await are(world, parked=30)
        world.write.decide = lambda command: None
        gifts.DEFECTS.accounts.discard(uid(1))
        failed = await desk.find(100, None, status="parked", trouble="COMMAND_FAILED")
        assert len(failed) == 28
        found = [process.key for process in await desk.find(100, None, status="parked")]
        assert await steering.retry_all(found, "olga") == (30, 1)
        await are(world, ended=29, parked=1)
        assert await steering.retry_all(found, "olga") == (1, 1)
        gifts.DEFECTS.accounts.clear()
        assert await steering.retry_all(found, "olga") == (1, 0)
        await are(world, ended=30)
    assert len(world.write.carried_out) == 60
    assert set(world.write.carried_out.values()) == {1}
