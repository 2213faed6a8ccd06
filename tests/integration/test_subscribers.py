"""The example subscribers over an event store in this process and without a broker: what each does, in any language."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

from examples.subscriber.__main__ import TRIES, add_deposit, follow
from examples.subscriber.inbox import Event, Inbox, Overtaken, Place
from examples.subscriber.line import Line
from tests.support.clients.subscribers import PYTHON_AND_NODE, NodeSubscriber, PythonSubscriber, Subscriber, installed
from tests.support.domains.gifts import WriteService
from tests.support.fakes.line import EPOCH, Store, uid
from tests.support.fakes.write_server import writing
from tests.support.system.waiting import eventually

NOWHERE = "nats://127.0.0.1:1"
WITHIN_S = 60.0


@pytest.fixture
async def store() -> Store:
    """A line of five deposits: 1, 2, 4, 8 and 16."""
    store = Store()
    for number in range(5):
        store.deposit("acme", uid(1), uid(2), 2**number, 0)
    return store


@pytest.fixture
async def address(store: Store) -> AsyncIterator[str]:
    """Where the line is read."""
    async with writing(store, WriteService()) as address:
        yield address


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Where the subscriber in JavaScript is, which is installed once."""
    made: list[Path] = []

    def once() -> Path:
        if not made:
            made.append(installed(tmp_path_factory.mktemp("node") / "program"))
        return made[0]

    return once


@pytest.fixture(params=PYTHON_AND_NODE)
def subscriber(request: pytest.FixtureRequest, address: str, tmp_path: Path, program: Callable[[], Path]) -> Subscriber:
    """One in each language, which has seen nothing."""
    where = {"write": address, "nats": NOWHERE, "token": "t0ken", "tenant": "acme"}
    return PythonSubscriber(tmp_path, **where) if request.param == "python" else NodeSubscriber(program(), tmp_path, **where)


async def followed(it: Subscriber, totals: tuple[int, int], *more: str) -> None:
    """Follows until it has these totals."""
    process = it.start("follow", *more)
    try:
        await eventually(lambda: it.totals() == totals, WITHIN_S, every_s=0.05)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


async def test_events_are_handled_anew_from_any_position(subscriber: Subscriber, store: Store) -> None:
    """The effects are those of the events from there on, each once; a position that is none is refused and changes nothing."""
    it = subscriber
    await followed(it, (5, 31))
    await followed(it, (3, 28), "--from=3")
    for start, code in (("9", 3), ("0", 2), ("1.5", 2)):
        assert await it.run("follow", f"--from={start}") == code
    assert it.totals() == (3, 28)
    store.deposit("acme", uid(1), uid(2), 32, 0)
    await followed(it, (6, 63), "--from=1")


async def test_an_event_that_cannot_be_read_is_put_aside(subscriber: Subscriber, store: Store) -> None:
    """It is tried three times, those behind it are handled, and the replay gives it its effect when it can be read; once."""
    it, broken = subscriber, store.events[2]
    payload, broken.payload = broken.payload, b"\xff\xff"
    await followed(it, (4, 27))
    assert (it.dead_letters(), it.tries(3)) == ([3], TRIES)
    assert await it.run("replay") == 1
    assert (it.dead_letters(), it.totals()) == ([3], (4, 27))
    broken.payload = payload
    for _ in range(2):
        assert await it.run("replay") == 0
        assert (it.dead_letters(), it.totals()) == ([], (5, 31))
    store.deposit("acme", uid(1), uid(2), 32, 0)
    await followed(it, (6, 63))


@pytest.mark.parametrize("place", [Place(EPOCH, 1, "another"), Place(EPOCH, 10**9, "later")], ids=lambda place: place.event_id)
async def test_a_lost_history_stops_it_by_name(subscriber: Subscriber, place: Place) -> None:
    """What was handled is not what the store holds: nobody but a person can say what that means."""
    subscriber.begin_at(place)
    assert await subscriber.run() == 3
    assert "stopped: " in subscriber.log.read_text()
    assert subscriber.totals() == (0, 0)


async def test_of_two_on_one_file_one_stops(subscriber: Subscriber, store: Store) -> None:
    """By name; the other one goes on, and each event has its effect once."""
    it = subscriber
    await followed(it, (5, 31))
    both = [it.start(), it.start()]
    try:

        def one_ended() -> bool:
            if all(process.poll() is None for process in both):
                store.deposit("acme", uid(1), uid(2), 1, 0)
            return any(process.poll() is not None for process in both)

        await eventually(one_ended, WITHIN_S, every_s=0.2)
        number = len(store.events)
        await eventually(lambda: it.totals() == (number, number + 26), WITHIN_S, every_s=0.05)
        assert sorted(str(process.poll()) for process in both) == ["3", "None"]
        assert "stopped: " in it.log.read_text()
    finally:
        for process in both:
            process.kill()
            process.wait()


async def test_beginning_anew_forgets_dead_letters_and_overtakes_who_goes_on(address: str, tmp_path: Path) -> None:
    """A letter that is handled again is none; another subscriber on the file finds itself overtaken, and changes nothing."""
    it = PythonSubscriber(tmp_path, write=address, nats=NOWHERE, token="t0ken", tenant="acme")
    inbox, other = Inbox(it.file), Inbox(it.file)
    async with grpc.aio.insecure_channel(address) as channel:
        line = Line(channel, "t0ken", NOWHERE)
        for number in (1, 2):
            inbox.handle(EPOCH, await line.one(number), add_deposit)
        inbox.give_up(EPOCH, await line.one(3), ValueError("no"))
        assert inbox.dead_letters() == [3]
        fourth: Event = await line.one(4)
        inbox.begin_anew(await line.before(1))
        with pytest.raises(Overtaken):
            other.handle(EPOCH, fourth, add_deposit)
        following = asyncio.create_task(follow(line, inbox))
        await eventually(lambda: inbox.place().position == 5, WITHIN_S)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert (inbox.dead_letters(), it.totals()) == ([], (5, 31))
    inbox.close()
    other.close()
