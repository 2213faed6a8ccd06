"""Processes on a real database: every step once, whatever is killed, doubled, late or away."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from bank.v1 import account_pb2
from deploy.bootstrap import Database
from foldline.v1 import command_pb2
from shared.folds.errors import InternalError, Invalid, NotFound, OverLimit, Refusal, Rejected, Unauthenticated, Unavailable
from shared.folds.ids import step_id
from shared.folds.process import Send, Step
from shared.line import consumer
from shared.line.checkpoint import Checkpoint
from shared.line.follower import EventBatch, Follower
from shared.processes import runner as process_runner
from shared.processes import store as process_store
from shared.processes.dispatcher import Dispatcher
from shared.processes.dispatcher import Told as Answered
from shared.processes.records import CommandResult, DeliveryFailure, PendingCommand
from shared.processes.runner import ProcessRunner
from tests.support.domains import gifts
from tests.support.domains.gifts import GIFT, World, frozen, key, refused_call
from tests.support.fakes.line import ScriptedFeed, StoreLine, delivery, uid
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually

HAPPY = [
    ("event", "AccountOpened"),
    ("command", "gift"),
    ("timer_set", "late"),
    ("answer", "gift"),
    ("command", "bonus"),
    ("answer", "bonus"),
]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with a token that nobody checks."""
    file = tmp_path / "saga.token"
    file.write_text("t0ken\n")
    return file


@pytest.fixture
def world(saga_db: Database, token_file: Path) -> World:
    """A line, a write service, a saga database."""
    return World(saga_db, token_file)


@pytest.fixture(autouse=True)
def no_defects() -> Iterator[None]:
    """Folds are right unless a test breaks them."""
    yield
    gifts.DEFECTS.accounts.clear()


async def all_ended(world: World, count: int, deadline_s: float = 10.0) -> None:
    """Waits for so many processes to have ended."""

    async def ended() -> bool:
        return (await world.statuses())["ended"] == count

    await eventually(ended, deadline_s)


async def everything_once(world: World, *numbers: int) -> None:
    """Each account got its gift and its bonus, once; each process has the history of one that met nothing."""
    assert world.write.carried_out == {(uid(number), amount): 1 for number in numbers for amount in (500, 100)}
    for number in numbers:
        assert await world.history(number) == HAPPY
    assert await world.query("SELECT step FROM process_commands") == []
    assert await world.query("SELECT name FROM process_timers") == []


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


async def test_killed_between_sending_and_the_answer(world: World) -> None:
    """The command was carried out, nobody was told: the next leader sends the same bytes again, and is told then."""
    world.open(1)
    sent, never = asyncio.Event(), asyncio.Event()

    async def swallow(request: command_pb2.SendBatchRequest) -> None:
        sent.set()
        await never.wait()

    world.write.after = swallow
    async with world.running():
        await asyncio.wait_for(sent.wait(), 30)
    assert world.write.carried_out == {(uid(1), 500): 1}
    world.write.after = lambda request: None
    async with world.running():
        await all_ended(world, 1)
    assert [item.command.value for call in world.write.calls[:2] for item in call.items] == [
        world.write.items[str(step_id("gift", uid(1), "gift"))].command.value
    ] * 2
    await everything_once(world, 1)


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


@pytest.mark.parametrize("place", ["before the write", "before the commit"])
async def test_killed_in_the_middle_of_a_round(world: World, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a round is no round: the next leader begins where the last whole one ended."""
    real, reached = process_store.write, asyncio.Event()

    async def forgets(*args: object) -> None:
        return None

    monkeypatch.setattr(ProcessRunner, "_from_memory", forgets)

    async def write(*args: object, **more: object) -> None:
        if place == "before the commit":
            await real(*args, **more)  # type: ignore[arg-type]
        reached.set()
        await asyncio.Event().wait()

    world.open(1)
    monkeypatch.setattr(process_store, "write", write)
    async with world.running():
        await asyncio.wait_for(reached.wait(), 30)
    monkeypatch.setattr(process_store, "write", real)
    assert await world.query("SELECT process_id FROM processes") == []
    async with world.running():
        await all_ended(world, 1)
    await everything_once(world, 1)


async def test_two_runners_at_once(world: World) -> None:
    """No correctness rests on the lease: two that both believe to lead carry out every step once."""
    async with world.running(), world.running():
        for number in range(1, 61):
            world.open(number)
            if number % 10 == 0:
                await asyncio.sleep(0.02)
        await all_ended(world, 60, 30)
    await everything_once(world, *range(1, 61))


async def test_an_old_leader_that_wakes_up_writes_nothing(world: World) -> None:
    """Stopped with an answer in its hands; another has taken over and ended the process; it wakes up and is fenced."""
    world.open(1)
    asleep, wake = asyncio.Event(), asyncio.Event()

    async def sleep(request: command_pb2.SendBatchRequest) -> None:
        if not asleep.is_set():
            asleep.set()
            await wake.wait()

    world.write.after = sleep
    async with world.running():
        await asyncio.wait_for(asleep.wait(), 30)
        async with world.running():
            await all_ended(world, 1)
            world.open(2)
            await all_ended(world, 2)
        wake.set()
        world.open(3)
        await all_ended(world, 3)
    await everything_once(world, 1, 2, 3)


async def test_an_answer_that_comes_twice_is_one_answer(world: World) -> None:
    """Twice in one round, and again in the next: its row is gone, so nothing changes."""
    last: list[Answered] = []

    class Stutters(Dispatcher):
        def take(self) -> list[Answered]:
            told = super().take()
            again = [*told, *told, *last]
            last[:] = told
            return again

    world.open(1, 2)
    async with world.running(world.runner(dispatcher=Stutters)):
        await all_ended(world, 2)
        world.open(3)
        await all_ended(world, 3)
    await everything_once(world, 1, 2, 3)


async def test_an_event_that_is_delivered_again_is_one_event(world: World) -> None:
    """The broker repeats and reorders: the process begins once."""
    world.open(1, 2, 3)
    one, two, three = world.store.events
    world.store.events = [one]
    feed = ScriptedFeed([[delivery(one), delivery(one)]])
    async with world.running(world.runner(feed=feed)):
        await all_ended(world, 1)
        world.store.events = [one, two, three]
        feed.script += [[delivery(two), delivery(one), delivery(two)], [delivery(three), delivery(three)]]
        await all_ended(world, 3)
    await everything_once(world, 1, 2, 3)


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


async def test_a_history_that_is_another_stops_the_runner(world: World) -> None:
    """The store was restored to before our checkpoint: nothing is applied and nothing is sent, not even what waits."""
    away = True

    def gone(request: command_pb2.SendBatchRequest) -> None:
        if away:
            raise refused_call(Unavailable("AWAY", "away"))

    world.write.before = gone
    world.open(1, 2)
    async with world.running():

        async def begun() -> bool:
            return await world.statuses() == {"running": 2}

        await eventually(begun)
    away, calls = False, len(world.write.calls)
    world.store.events.clear()
    world.open(3, 4)
    world.store.away = True
    async with world.running() as runner:
        await asyncio.sleep(0.3)  # the store has not answered: what waits is due, and stays where it is
        assert len(world.write.calls) == calls
        world.store.away = False
        await eventually(lambda: runner.stopped)
    assert runner.stopped is not None
    assert runner.stopped.startswith("HISTORY_DIVERGED")
    assert world.write.carried_out == {}
    [(state, reason)] = await world.query("SELECT state, reason FROM checkpoints")
    assert state == "stopped"
    assert reason.startswith("HISTORY_DIVERGED")


async def test_the_saga_database_goes_away_and_comes_back(world: World) -> None:
    """All its sessions are ended, again and again, while commands are under way: every step is carried out once."""
    world.open(*range(1, 101))
    async with world.running():
        async with await psycopg.AsyncConnection.connect(world.database.admin, autocommit=True) as admin:
            for number in range(101, 111):
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                    (world.database.name,),
                )
                world.open(number)
                await asyncio.sleep(0.05)
        await all_ended(world, 110, 30)
    await everything_once(world, *range(1, 111))


@pytest.mark.parametrize(
    ("bad", "mended"),
    [
        ("ALTER DATABASE {database} SET default_transaction_read_only = on", "ALTER DATABASE {database} RESET ALL"),
        ("REVOKE INSERT ON process_history FROM {app}", "GRANT INSERT ON process_history TO {app}"),
        ("ALTER TABLE processes ALTER COLUMN phase TYPE varchar(5000)", ""),
    ],
    ids=["read-only", "no right", "a changed type"],
)
async def test_whatever_the_database_says_passes(world: World, bad: str, mended: str) -> None:
    """A bad moment of the saga database stops nothing: when it is over every step is carried out, once."""
    names = {"database": sql.Identifier(world.database.name), "app": sql.Identifier("foldline_saga_app")}
    world.open(*range(1, 6))
    async with world.running() as runner:
        await all_ended(world, 5)
        async with await psycopg.AsyncConnection.connect(world.database.admin, autocommit=True) as admin:
            await admin.execute(sql.SQL(bad).format(**names))
            if "read_only" in bad:  # which is for new sessions
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                    (world.database.name,),
                )
            with capture_logs() as logs:
                world.open(*range(6, 11))
                if mended:
                    await eventually(lambda: len([log for log in logs if log["event"] == "consumer_retries"]) > 1)
                    assert {log["log_level"] for log in logs if log["event"] == "consumer_retries"} == {"error"}
                    await admin.execute("SET default_transaction_read_only = off")
                    await admin.execute(sql.SQL(mended).format(**names))
                await all_ended(world, 10, 30)
        assert runner.stopped is None
    await everything_once(world, *range(1, 11))
    assert await world.query("SELECT state, reason FROM checkpoints") == [("running", "")]


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
