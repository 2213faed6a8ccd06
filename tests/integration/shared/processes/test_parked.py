"""Events that no process can be found for: they park their own stream at the runner, and an operator lets it go on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest

from bank.v1 import account_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds import upcasting
from shared.folds.delivery import Announcements, Email
from shared.folds.errors import Refusal
from shared.folds.upcasting import Upcasters
from shared.processes import parked, runner
from shared.processes.admin import ProcessAdmin
from shared.processes.process_type import process_types
from shared.processes.steering import Steering
from tests.support.domains.gifts import GIFT, OWNER, TENANT, World
from tests.support.fakes.line import uid
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually

GARBAGE = b"\xff\xff\xff"
SECRET = "the secret of blue"
nameless: set[str] = set()


def named(event: account_pb2.AccountOpened) -> str:
    """The key of a process, which fails for some accounts."""
    if event.account_id in nameless:
        raise KeyError(SECRET)
    return event.account_id


KEYED = dataclasses.replace(GIFT, key={**GIFT.key, account_pb2.AccountOpened: named})


@pytest.fixture(autouse=True)
def mended() -> Iterator[None]:
    """Every account names its process unless a test breaks it."""
    yield
    nameless.clear()


def steering_of(desk: ProcessAdmin) -> Steering:
    """The operators' side of a release whose key is `named`."""
    return Steering(dataclasses.replace(desk.turns, kinds=process_types([KEYED])))


def spoil(envelope: EventEnvelope) -> None:
    """Makes an event's content something that cannot be decoded."""
    envelope.payload = GARBAGE


def stream(number: int) -> tuple[str, str, str]:
    """The stream of an account."""
    return TENANT, "account", uid(number)


async def reason(call: Awaitable[object]) -> str:
    """Why a call is refused."""
    with pytest.raises(Refusal) as refused:
        await call
    return refused.value.reason


async def ended(world: World, count: int) -> None:
    """Waits for so many processes to have ended."""

    async def reached() -> bool:
        return (await world.statuses())["ended"] == count

    await eventually(reached, 20)


async def positions(world: World) -> list[tuple[int, str]]:
    """What is parked, with its reason."""
    return list(await world.query("SELECT position, reason FROM parked_events ORDER BY position"))


async def test_a_garbage_event_parks_its_stream_and_no_other(world: World) -> None:
    """Other accounts get their gifts; later events of the same account wait behind it, in this batch and in later ones."""
    world.open(1)
    spoil(world.store.events[-1])
    world.open(2)
    world.freeze(1)
    with capture_logs() as logs:
        async with world.running() as runner:
            await ended(world, 1)
            world.freeze(1)
            world.open(3)
            await ended(world, 2)
            assert runner.stopped is None
    assert await positions(world) == [(1, "EVENT_UNREADABLE: DecodeError"), (3, ""), (4, "")]
    assert [log["position"] for log in logs if log["event"] == "event_parked"] == [1]
    async with world.steering() as (desk, steering):
        [found] = await steering.find_parked(9, ("", "", ""), "")
        assert (found.key, found.position, found.type, found.events) == (stream(1), 1, "bank.v1.AccountOpened", 3)
        [seen] = await desk.runners()
        assert (seen.work.parked_streams, seen.work.trouble) == (1, "")
        assert await steering.find_parked(9, found.key, "") == await steering.find_parked(9, ("", "", ""), "umbrella") == []


async def test_an_event_of_a_newer_release_parks_its_stream_until_that_release_runs(world: World) -> None:
    """It may be one that a process should react to; known events that no process reacts to pass by, as ever."""
    world.open(1)
    world.store.events[-1].type = "bank.v9.AccountOpened"
    world.open(2)
    world.store.append(TENANT, uid(2), account_pb2.AccountClosed(account_id=uid(2)))
    world.freeze(1)
    known = {event.type for event in world.store.events} - {"bank.v9.AccountOpened"}
    async with world.running(world.runner(upcasters=Upcasters(known=known))), world.desk() as desk:
        await ended(world, 1)
        assert await positions(world) == [(1, "EVENT_UNKNOWN"), (4, "")]
        old, new = (
            Steering(dataclasses.replace(desk.turns, kinds=process_types([GIFT], Upcasters(known=types))))
            for types in (known, {*known, "bank.v9.AccountOpened"})
        )
        still = await old.retry_parked(stream(1))
        assert (still.events, still.stream is not None and still.stream.reason) == (0, "EVENT_UNKNOWN")
        assert await new.retry_parked(stream(1)) == (2, None)
        assert await positions(world) == []


async def test_an_event_that_names_no_process_is_parked_until_a_release_that_can(world: World) -> None:
    """A key that raises or gives none; retried, all its events are taken in order, and the process runs."""
    nameless.add(uid(1))
    world.open(1)
    world.freeze(1)
    world.store.append(TENANT, uid(2), account_pb2.AccountOpened(name="blue"))
    with capture_logs() as logs:
        async with world.running(world.runner(manager=KEYED)), world.desk() as desk:
            steering = steering_of(desk)
            await eventually(lambda: _three(world))
            assert await positions(world) == [(1, "NO_PROCESS_NAMED: KeyError"), (2, ""), (3, "NO_PROCESS_NAMED")]
            still = await steering.retry_parked(stream(1))
            assert (still.events, still.stream is not None and still.stream.position) == (0, 1)
            nameless.clear()
            assert await steering.retry_parked(stream(1)) == (2, None)
            assert await reason(steering.retry_parked(stream(1))) == "PARKED_NOT_FOUND"
            await ended(world, 1)
            assert ("event", "AccountFrozen") in await world.history(1)
            world.open(1, 3)  # the runner knows that the stream goes on
            await ended(world, 2)
            assert await positions(world) == [(3, "NO_PROCESS_NAMED")]
    assert SECRET not in str(logs)
    assert world.write.carried_out == {(uid(number), amount): 1 for number in (1, 3) for amount in (500, 100)}


async def _three(world: World) -> bool:
    return len(await positions(world)) == 3


async def test_a_discarded_event_is_given_up_and_the_later_ones_are_taken(world: World) -> None:
    """By its position: of another the first is not lost by mistake. The log says who gave it up."""
    world.freeze(1)
    spoil(world.store.events[-1])
    world.open(1)
    world.freeze(1)
    spoil(world.store.events[-1])
    with capture_logs() as logs:
        async with world.running(), world.steering() as (_, steering):
            await eventually(lambda: _three(world))
            assert await reason(steering.discard_parked(stream(1), 2, "olga")) == "PARKED_CHANGED"
            assert await reason(steering.discard_parked(stream(2), 1, "olga")) == "PARKED_NOT_FOUND"
            replayed = await steering.discard_parked(stream(1), 1, "olga")
            assert (replayed.events, replayed.stream is not None and replayed.stream.position) == (2, 3)
            await ended(world, 1)
            assert await positions(world) == [(3, "EVENT_UNREADABLE: DecodeError")]
            assert await steering.discard_parked(stream(1), 3, "olga") == (1, None)
    told = [(log["user_id"], log["position"]) for log in logs if log["event"] == "parked_event_discarded"]
    assert told == [("olga", 1), ("olga", 3)]


async def test_of_two_who_retry_or_discard_at_once_one_does(world: World) -> None:
    """The process begins once."""
    nameless.add(uid(1))
    world.open(1)
    async with world.running(world.runner(manager=KEYED)), world.desk() as desk:
        await eventually(lambda: positions(world))
        nameless.clear()
        steering = steering_of(desk)
        calls = (
            steering.retry_parked(stream(1)),
            steering.retry_parked(stream(1)),
            steering.discard_parked(stream(1), 1, "otto"),
        )
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert sorted(type(it).__name__ for it in told) == ["NotFound", "NotFound", "Replayed"]
        await ended(world, 1)
    assert set(world.write.carried_out.values()) == {1}


async def test_a_runner_that_does_not_know_yet_of_a_retry_overtakes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is parked and let go while the runner is about to take a batch: it sorts the batch again before it folds it."""
    nameless.add(uid(1))
    world.open(1)
    turn = asyncio.Event()
    begun = asyncio.Event()
    take = runner.ProcessRunner._round

    async def held(self: Any, connection: Any, inputs: Any) -> Any:
        begun.set()
        await turn.wait()
        return await take(self, connection, inputs)

    async with world.running(world.runner(manager=KEYED)) as running, world.desk() as desk:
        await eventually(lambda: positions(world))
        await running.follows.wait()
        monkeypatch.setattr(runner.ProcessRunner, "_round", held)
        world.freeze(1)
        await begun.wait()
        nameless.clear()
        assert await steering_of(desk).retry_parked(stream(1)) == (1, None)
        turn.set()
        await ended(world, 1)

        async def seen() -> bool:
            return ("event", "AccountFrozen") in await world.history(1)

        await eventually(seen)
    assert await positions(world) == []


async def test_many_events_behind_one_are_taken_page_by_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, however many there are."""
    monkeypatch.setattr(parked, "EVENTS_MAX", 3)
    nameless.add(uid(1))
    world.open(1)
    events = [world.freeze(1).event_id for _ in range(10)]
    async with world.running(world.runner(manager=KEYED)), world.desk() as desk:
        await eventually(lambda: positions(world))
        nameless.clear()
        assert await steering_of(desk).retry_parked(stream(1)) == (11, None)
        await ended(world, 1)
    rows = await world.query("SELECT id FROM process_history WHERE kind = 'event' ORDER BY number")
    assert [id_ for (id_,) in rows][1:] == events[: len(rows) - 1]


async def test_more_than_twenty_parked_streams_in_a_minute_stop_the_runner(world: World) -> None:
    """That is a bad release, not bad events: nothing of the batch is written."""
    world.open(*range(1, 22))
    for envelope in world.store.events:
        spoil(envelope)
    async with world.running() as running:
        await eventually(lambda: running.stopped)
        assert running.stopped == "PROCESSES_FAILED: more than 20 processes or streams were parked within a minute"
    assert await positions(world) == []


async def test_an_announced_event_that_concerns_no_process_is_delivered(world: World) -> None:
    """A round may have deliveries alone."""
    announcements = Announcements()
    message = Email(to="owner", subject="opened", text="")
    announcements.event("*", "hook", account_pb2.AccountClosed, lambda event, envelope: [message])
    world.store.append(TENANT, uid(1), account_pb2.AccountClosed(account_id=uid(1)))
    async with world.running(world.runner(announcements=announcements)):
        await eventually(lambda: world.query("SELECT name FROM deliveries"))
    assert await world.query("SELECT name, channel, status FROM deliveries") == [("hook", "email", "pending")]


def opened_of(event: account_pb2.AccountUnfrozen) -> account_pb2.AccountOpened:
    """An upcaster that is right for accounts of the list."""
    if event.account_id in nameless:
        raise ValueError(SECRET)
    return account_pb2.AccountOpened(account_id=event.account_id, owner_id=OWNER, currency="USD", name="blue")


OLD = Upcasters(upcasting.Step(account_pb2.AccountUnfrozen, account_pb2.AccountOpened, opened_of))


async def test_an_old_event_that_cannot_be_upcast_is_parked_and_not_passed_over(world: World) -> None:
    """It would have been one that a process reacts to; retried by a release that can upcast it, the process begins."""
    nameless.add(uid(1))
    for number in (1, 2):
        world.store.append(TENANT, uid(number), account_pb2.AccountUnfrozen(account_id=uid(number), owner_id=OWNER))
    async with world.running(world.runner(upcasters=OLD)), world.desk() as desk:
        await ended(world, 1)
        assert await positions(world) == [(1, "EVENT_UNREADABLE: ValueError")]
        nameless.clear()
        steering = Steering(dataclasses.replace(desk.turns, kinds=process_types([GIFT], OLD)))
        assert await steering.retry_parked(stream(1)) == (1, None)
        await ended(world, 2)
    assert world.write.carried_out == {(uid(number), amount): 1 for number in (1, 2) for amount in (500, 100)}
