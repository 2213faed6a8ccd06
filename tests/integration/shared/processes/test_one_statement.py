"""Rounds in one statement, on a real database: whatever the runner remembers wrongly, the tables decide."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import Message

from bank.v1 import account_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.delivery import Announcements, Email
from shared.folds.process import Step
from shared.platform.postgres import connect
from shared.processes import one_statement
from shared.processes import runner as runner_module
from shared.processes.dispatcher import Dispatcher
from shared.processes.dispatcher import Told as Answered
from shared.processes.inputs import Inputs
from shared.processes.runner import ProcessRunner
from tests.support.domains import gifts
from tests.support.domains.gifts import World, key
from tests.support.fakes.line import uid
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually

STEPS = ["event", "command", "timer_set", "answer", "command", "answer"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes each round belonged to that was taken from the tables."""
    rounds: list[int] = []
    real = ProcessRunner._from_tables

    async def counted(self: Any, connection: Any, inputs: Any) -> Any:
        rounds.append(len(inputs.keys()))
        return await real(self, connection, inputs)

    monkeypatch.setattr(ProcessRunner, "_from_tables", counted)
    return rounds


def before_a_save(monkeypatch: pytest.MonkeyPatch, *, at: str, do: Callable[[], Awaitable[object]]) -> None:
    """Lets something happen once, when a round with the answer of this step is decided and not saved."""
    real, done = one_statement.save, False

    async def save(*arguments: Any) -> None:
        nonlocal done
        if not done and any(answer.command.step == at for answer in arguments[7]):
            done = True
            await do()
        await real(*arguments)

    monkeypatch.setattr(one_statement, "save", save)


async def ended(world: World, count: int) -> None:
    """Waits for so many processes to have ended."""

    async def they_have() -> bool:
        return (await world.statuses())["ended"] == count

    await eventually(they_have, 20)


async def kinds(world: World, number: int) -> list[str]:
    """The kinds of the entries of a history."""
    return [kind for kind, _ in await world.history(number)]


async def test_nothing_is_read_while_all_goes_well(world: World, read: list[int]) -> None:
    """From begin to end no round of a process needs to read; the tables hold the same as ever."""
    async with world.running() as runner:
        for number in range(1, 6):
            world.open(number)
            await ended(world, number)
        assert runner.at.position > 0
    assert not any(read)
    for number in range(1, 6):
        assert await kinds(world, number) == STEPS
    assert await world.query(
        "SELECT entries, moved_at > started_at, correlation_id FROM processes WHERE process_id = %s", uid(1)
    ) == [(6, True, uid(1_000_001))]
    assert await world.query("SELECT step FROM process_commands") == await world.query("SELECT name FROM process_timers") == []


async def test_what_an_operator_does_before_a_round_is_saved_is_in_its_result(
    world: World, monkeypatch: pytest.MonkeyPatch, read: list[int]
) -> None:
    """The round was decided on an older history of the process: it is taken again, behind the operator's action."""
    async with world.desk() as desk:
        before_a_save(monkeypatch, at="gift", do=lambda: desk.retry(key(1), "olga"))
        world.open(1)
        async with world.running():
            await ended(world, 1)
    assert await kinds(world, 1) == [*STEPS[:3], "operator", *STEPS[3:]]
    assert 1 in read
    assert world.write.carried_out == {(uid(1), 500): 1, (uid(1), 100): 1}


async def test_a_type_that_is_paused_before_a_round_is_saved_sends_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is taken, and the next command waits untried until the type is resumed."""
    async with world.steering() as (_, steering):
        before_a_save(monkeypatch, at="gift", do=lambda: steering.pause("gift", "to look", "olga"))
        world.open(1)
        async with world.running():

            async def waits() -> bool:
                return await world.query("SELECT step, tries FROM process_commands") == [("bonus", 0)]

            await eventually(waits)
            assert world.write.carried_out == {(uid(1), 500): 1}
            await steering.resume("gift")
            await ended(world, 1)
    assert await kinds(world, 1) == STEPS


async def test_a_process_that_is_not_remembered_is_read(world: World, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More processes are under way than are remembered; events and answers of the others are theirs all the same."""
    monkeypatch.setattr(one_statement.Memory.__init__, "__defaults__", (2,))
    hold = asyncio.Event()

    async def wait(request: object) -> None:
        await hold.wait()

    world.write.before = wait
    async with world.running():
        world.open(*range(1, 7))

        async def begun() -> bool:
            return (await world.statuses())["running"] == 6

        await eventually(begun)
        notes = [world.freeze(number).event_id for number in range(1, 7)]

        async def noted() -> bool:
            rows = await world.query("SELECT id FROM process_history WHERE name = 'bank.v1.AccountFrozen' ORDER BY position")
            return [id_ for (id_,) in rows] == notes

        await eventually(noted)
        hold.set()
        await ended(world, 6)
    assert any(read)
    for number in range(1, 7):
        assert await kinds(world, number) == [*STEPS[:3], "event", *STEPS[3:]]
    assert set(world.write.carried_out.values()) == {1}


async def test_an_event_of_a_process_that_an_earlier_leader_began_does_not_begin_it_anew(world: World) -> None:
    """The new leader remembers nothing, takes the process to be new, and is told by its history that it is not."""
    hold = asyncio.Event()

    async def wait(request: object) -> None:
        await hold.wait()

    world.write.before = wait
    world.open(1)
    async with world.running():
        await eventually(lambda: world.write.calls)
    world.freeze(1)
    async with world.running():

        async def noted() -> bool:
            return len(await kinds(world, 1)) == 4

        await eventually(noted)
        hold.set()
        await ended(world, 1)
    assert await kinds(world, 1) == [*STEPS[:3], "event", *STEPS[3:]]


async def test_an_answer_that_comes_again_is_found_to_have_no_row(world: World, read: list[int]) -> None:
    """The statement saves nothing of a round with it, and the round from the tables saves the rest."""
    last: list[Answered] = []

    class Stutters(Dispatcher):
        def take(self) -> list[Answered]:
            told = super().take()
            again = [*last, *told] if told else []
            last[:] = told
            return again

    world.open(1, 2)
    async with world.running(world.runner(dispatcher=Stutters)):
        await ended(world, 2)
        world.open(3)
        await ended(world, 3)
    assert any(read)
    for number in (1, 2, 3):
        assert await kinds(world, number) == STEPS


async def test_deliveries_are_saved_with_their_round(world: World, read: list[int]) -> None:
    """An announced event leaves its message in the transaction of the round, which reads nothing."""
    announcements = Announcements()
    message = Email(to="owner", subject="opened", text="")
    announcements.event("*", "hook", account_pb2.AccountOpened, lambda event, envelope: [message])
    world.open(1, 2)
    async with world.running(world.runner(announcements=announcements)):
        await ended(world, 2)
    assert not any(read)
    assert await world.query("SELECT source, status FROM deliveries ORDER BY number") == [
        (event.event_id, "pending") for event in world.store.events
    ]


async def test_a_fold_that_raises_is_counted_and_logged_once(world: World) -> None:
    """A new leader takes running processes to be new, and folds raise for that: then the tables decide what is parked."""
    bad = {uid(number) for number in range(1, runner_module.PARKED_MAX + 1)}

    def strict(state: gifts.Gift, event: Message, envelope: EventEnvelope) -> Step[gifts.Gift] | None:
        if isinstance(event, account_pb2.AccountFrozen) and (not state.phase or event.account_id in bad):
            raise LookupError
        return gifts.react(state, event, envelope)

    manager = replace(gifts.GIFT, react=strict)
    hold = asyncio.Event()

    async def wait(request: object) -> None:
        await hold.wait()

    world.write.before = wait
    numbers = range(1, len(bad) + 2)
    world.open(*numbers)
    async with world.running():
        await eventually(lambda: world.write.calls)
    for number in numbers:
        world.freeze(number)
    with capture_logs() as logs:
        async with world.running(world.runner(manager=manager)) as runner:
            await eventually(lambda: runner.stopped or runner.at.position == len(world.store.events))
            assert runner.stopped is None
    assert await world.statuses() == {"parked": len(bad), "running": 1}
    assert await kinds(world, len(bad) + 1) == [*STEPS[:3], "event"]
    assert sorted(log["process"][2] for log in logs if log["event"] == "process_parked") == sorted(bad)


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "with a delivery"])
async def test_a_stale_round_leaves_the_connection_as_it_was(world: World, extra: bool) -> None:
    """No transaction is left open, and nothing of the round is there."""
    announcements = Announcements()
    if extra:
        message = Email(to="owner", subject="opened", text="")
        announcements.event("*", "hook", account_pb2.AccountOpened, lambda event, envelope: [message])
    runner = world.runner(announcements=announcements)
    world.open(1)
    async with world.running():
        await ended(world, 1)
    inputs = process_inputs(runner, world)
    async with await connect(world.database.app, application_name="test") as connection:
        assert await runner._from_memory(connection, inputs) is None
        assert connection.info.transaction_status.name == "IDLE"
    assert await kinds(world, 1) == STEPS
    assert await world.query("SELECT FROM deliveries") == []


def process_inputs(runner: ProcessRunner, world: World) -> Any:
    """The line's events as the inputs of a round of this runner."""
    inputs = Inputs(batch=world.store.events)
    runner._route(inputs)
    runner._announce(inputs)
    return inputs
