"""Processes on a real database: events, commands, answers and timers bring them on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from bank.v1 import account_pb2
from foldline.v1 import command_pb2
from shared.folds.errors import InternalError
from shared.folds.ids import step_id
from shared.folds.process import Send, Step
from shared.line import consumer
from shared.line.checkpoint import Checkpoint
from shared.line.follower import EventBatch, Follower
from shared.processes import runner as process_runner
from shared.processes.dispatcher import Dispatcher
from shared.processes.records import CommandResult, DeliveryFailure, PendingCommand
from tests.support.checks.gifts import all_ended, everything_once
from tests.support.domains import gifts
from tests.support.domains.gifts import GIFT, World
from tests.support.fakes.line import StoreLine, uid
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually


async def test_answers_advance_a_process_that_an_event_began(world: World) -> None:
    """Gift, bonus, end; no event but the first is waited for, since the commands answer without any."""
    world.open(1)
    async with world.running():
        await all_ended(world, 1)
    await everything_once(world, 1)
    assert await world.process(1) == ("ended", "", "", "given")


async def test_a_command_says_whose_it_is_and_why(world: World) -> None:
    """Id from process, step and attempt; tenant, user, cause, correlation and trace of what began the process."""
    world.open(1)
    async with world.running():
        await all_ended(world, 1)
    item = world.write.items[str(step_id("gift", uid(1), "gift"))]
    command = account_pb2.DepositMoneyRequest.FromString(item.command.value)
    assert command == account_pb2.DepositMoneyRequest(
        options=command_pb2.CommandOptions(command_id=str(step_id("gift", uid(1), "gift")), correlation_id=uid(1_000_001)),
        account_id=uid(1),
        amount_minor=500,
        currency="USD",
    )
    assert (item.tenant, item.on_behalf_of) == ("acme", "alice")
    assert item.causation_id == world.store.events[0].event_id
    assert item.traceparent == "00-00000000000000000000000000000001-0000000000000001-01"
    assert world.write.tokens == {"Bearer t0ken"}


async def test_many_at_once_travel_in_batches(world: World) -> None:
    """Two thousand processes, far fewer calls, each step once; no more than 256 commands in a call."""
    numbers = range(1, 2001)
    world.open(*numbers)
    async with world.running():
        await all_ended(world, 2000, 60)
    assert set(world.write.carried_out.values()) == {1}
    assert len(world.write.carried_out) == 4000
    assert max(len(call.items) for call in world.write.calls) <= 256
    assert len(world.write.calls) < 1000


@pytest.mark.parametrize("begin", [1, 4])
async def test_a_batch_that_does_not_follow_the_last_is_not_taken(
    world: World, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events again, or behind a gap: none of them begins a process, and the line is followed anew."""
    monkeypatch.setattr(consumer, "RETRY_MIN_S", 0.01)
    world.open(1, 2, 3, 4, 5)

    async def follow(at: Checkpoint) -> AsyncGenerator[EventBatch, None]:
        if at.position == 0:
            for first, last in ((1, 2), (begin, 5)):
                events = world.store.events[first - 1 : last]
                yield EventBatch(events, Checkpoint(world.store.epoch, last, events[-1].event_id))
        async with aclosing(Follower(StoreLine(world.store), None, silence_s=0.01).follow(at)) as batches:
            async for batch in batches:
                yield batch

    runner = world.runner()
    runner._follow = follow
    with capture_logs() as logs:
        async with world.running(runner):
            await all_ended(world, 5)
    assert [log["position"] for log in logs if log["event"] == "consumer_retries"] == [2]
    await everything_once(world, 1, 2, 3, 4, 5)


async def test_no_more_is_taken_from_the_line_than_can_be_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is answered events wait on the line, not in memory; then all of them are taken, each once."""
    monkeypatch.setattr(process_runner, "BACKLOG_MAX", 50)
    hold = asyncio.Event()

    async def wait(request: command_pb2.SendBatchRequest) -> None:
        await hold.wait()

    world.write.before = wait
    follower_batch = 20
    async with world.running(world.runner(batch_max=follower_batch)):
        world.open(*range(1, 301))

        async def some() -> bool:
            return (await world.statuses())["running"] >= 50

        await eventually(some)
        before = await world.statuses()
        await asyncio.sleep(0.2)  # nothing more comes
        assert await world.statuses() == before
        # What is under way, up to a full backlog, and the batch that filled it.
        assert before["running"] <= 4 * 64 + 50 + follower_batch
        hold.set()
        await all_ended(world, 300, 30)
    await everything_once(world, *range(1, 301))


class Told(Dispatcher):
    """A dispatcher that remembers what it sends, and tells what a test says."""

    there: list[Told]

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.sent: dict[str, PendingCommand] = {}
        self.there.append(self)

    def send(self, commands: Iterable[PendingCommand]) -> None:
        commands = list(commands)
        self.sent |= {command.step: command for command in commands}
        super().send(commands)


async def test_a_process_is_relieved_when_the_last_command_it_waits_for_is_answered(world: World) -> None:
    """Two commands were given up. An answer after all to one of them, or a late failure, is not the other's answer."""

    def react(state: gifts.Gift, event: object, envelope: object) -> Step[gifts.Gift]:
        sends = (Send(step="gift", command=gifts.deposit(uid(1), 500)), Send(step="bonus", command=gifts.deposit(uid(1), 100)))
        return Step(state=dataclasses.replace(state, phase="giving", account_id=uid(1)), send=sends)

    both = dataclasses.replace(GIFT, react=react, on_answer=lambda state, answer: Step(state=state))
    dispatchers = Told.there = []
    world.write.decide = lambda command: InternalError()
    world.open(1)

    async def has(*wanted: object) -> None:
        async def it_has() -> bool:
            status, trouble, _, _ = await world.process(1)
            rows = await world.query("SELECT step, given_up FROM process_commands ORDER BY step")
            return (status, trouble, rows) == wanted

        await eventually(it_has)

    async with world.running(world.runner(manager=both, dispatcher=Told)):
        await has("parked", "COMMAND_FAILED", [("bonus", True), ("gift", True)])
        [dispatcher] = dispatchers
        gift, bonus = dispatcher.sent["gift"], dispatcher.sent["bonus"]
        dispatcher._tell([DeliveryFailure(gift, "an earlier try", True, True, "", world.clock()), CommandResult(gift, None, "")])
        await has("parked", "COMMAND_FAILED", [("bonus", True)])
        dispatcher._tell([DeliveryFailure(bonus, "an earlier try", True, True, "", world.clock())])
        await eventually(lambda: world.query("SELECT FROM process_commands WHERE last_error = 'an earlier try'"))
        await has("parked", "COMMAND_FAILED", [("bonus", True)])
        dispatcher._tell([CommandResult(bonus, None, "")])
        await has("running", "", [])


async def test_a_process_is_relieved_when_all_it_waits_for_is_answered_at_once(world: World) -> None:
    """Two answers in one round, and neither is told that the other is still missing."""
    world.write.decide = lambda command: InternalError()
    world.open(1, 2)
    dispatchers = Told.there = []
    sent: list[PendingCommand] = []
    async with world.running(world.runner(dispatcher=Told)) as runner:

        async def parked() -> bool:
            return (await world.statuses())["parked"] == 2

        await eventually(parked)
        [dispatcher] = dispatchers
        rows = "SELECT process_id, command_id FROM process_commands ORDER BY process_id"
        for process_id, command_id in await world.query(rows):
            sent.append(dispatcher.sent["gift"]._replace(process_id=process_id, command_id=command_id))
        world.write.decide = lambda command: None
        dispatcher._tell([CommandResult(it, None, "") for it in sent])
        await all_ended(world, 2)
        assert runner.at.position > 0
    assert await world.query("SELECT status, trouble FROM processes") == [("ended", "")] * 2


async def test_two_tenants_may_choose_the_same_ids(world: World) -> None:
    """Their processes have commands of the same ids; neither waits for the other, and neither takes the other's answer."""
    world.open(1)
    event = account_pb2.AccountOpened(account_id=uid(1), owner_id=uid(7), currency="USD", name="blue")
    world.store.append("another", uid(1), event).metadata.correlation_id = uid(1_000_001)
    async with world.running():
        await all_ended(world, 2)
    steps = await world.query("SELECT tenant, step FROM process_history WHERE kind = 'answer' ORDER BY tenant, number")
    assert steps == [("acme", "gift"), ("acme", "bonus"), ("another", "gift"), ("another", "bonus")]
    assert await world.query("SELECT FROM process_commands") == []


async def test_a_timer_fires_once_when_it_is_due(world: World) -> None:
    """Late rather than never, after a restart, and once although two look at it."""
    hold = asyncio.Event()

    async def wait(request: command_pb2.SendBatchRequest) -> None:
        await hold.wait()

    world.write.before = wait
    world.open(1)
    async with world.running():

        async def set_() -> bool:
            return len(await world.query("SELECT name FROM process_timers")) == 1

        await eventually(set_)
    world.clock.ahead = timedelta(hours=2)
    async with world.running(), world.running():

        async def late() -> bool:
            return await world.process(1) == ("running", "", "LATE", "giving, late")

        await eventually(late)
        await asyncio.sleep(0)
        hold.set()
        await all_ended(world, 1)
    assert [kind for kind, _ in await world.history(1)].count("timer_fired") == 1
    assert await world.query("SELECT name FROM process_timers") == []


async def test_the_runner_wakes_for_the_next_timer_that_is_due(world: World) -> None:
    """Nothing but the time passes, and it fires; its attention is taken back by the next step."""
    hold = asyncio.Event()

    async def wait(request: command_pb2.SendBatchRequest) -> None:
        await hold.wait()

    world.write.before = wait
    world.open(1)
    world.clock.ahead = timedelta(minutes=59, seconds=55, milliseconds=500)
    async with world.running():

        async def late() -> bool:
            return (await world.process(1))[2] == "LATE"

        await eventually(late)
        hold.set()
        await all_ended(world, 1)
    assert await world.process(1) == ("ended", "", "", "given")


async def test_events_that_concern_no_process_cost_no_transaction(world: World) -> None:
    """The checkpoint follows within a second or so, not with each of them."""
    async with world.running() as runner:
        for number in range(50):
            world.store.withdraw("acme", uid(1), uid(2), 1, number)
            await asyncio.sleep(0.01)
        world.store.person("acme", uid(2), "Ada")
        await eventually(lambda: runner.at.position == 51)
    [(moved,)] = await world.query("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'checkpoints'")
    assert moved < 25


async def test_ids_are_those_of_the_first_attempt(world: World) -> None:
    """What a domain may fix in a first event is what the dispatcher sends."""
    world.open(1)
    async with world.running():
        await all_ended(world, 1)
    ids = await world.query("SELECT id FROM process_history WHERE kind = 'command' ORDER BY number")
    assert [UUID(id_) for (id_,) in ids] == [step_id("gift", uid(1), "gift"), step_id("gift", uid(1), "bonus")]
