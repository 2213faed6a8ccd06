"""One reading of the line for several consumers: each gets each event once, and none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.line import fanout
from shared.line.checkpoint import Checkpoint
from shared.line.fanout import FanOut
from shared.line.follower import EventBatch, Follower, HistoryDiverged
from tests.support.fakes.line import Store, StoreLine, uid
from tests.support.system.waiting import eventually


def line(events: int) -> Store:
    """So many events."""
    store = Store()
    for number in range(events):
        store.person("acme", uid(number + 1), "Alice")
    return store


def place(store: Store, position: int) -> Checkpoint:
    """The checkpoint behind a position."""
    return Checkpoint(store.epoch, position, store.events[position - 1].event_id) if position else Checkpoint()


def over(store: Store, batch_max: int = 3) -> FanOut:
    """The line for several."""

    def follower() -> Follower:
        return Follower(StoreLine(store, page=2), None, batch_max=batch_max, silence_s=0.001)

    return FanOut(follower().follow, lambda: follower().follow)


async def take(fan_out: FanOut, at: Checkpoint, until: int, pause_s: float = 0.0) -> list[int]:
    """The positions that a consumer gets, up to one."""
    seen: list[int] = []
    async with aclosing(fan_out.follow(at)) as batches:
        async for batch in batches:
            assert [event.position for event in batch.events] == list(range(at.position + 1, batch.after.position + 1))
            seen += [event.position for event in batch.events]
            at = batch.after
            if at.position >= until:
                return seen
            await asyncio.sleep(pause_s)
    return seen


async def test_consumers_at_one_place_share_one_reading() -> None:
    """The store is read as often for ten as for one."""

    async def reads(consumers: int) -> int:
        store = line(30)
        fan_out = over(store)
        await asyncio.gather(*(take(fan_out, Checkpoint(), 30) for _ in range(consumers)))
        await fan_out.close()
        return store.reads

    assert await reads(10) == await reads(1)


async def test_a_slow_consumer_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast one is at the end while the slow one has hardly begun; in the end both have seen all."""
    monkeypatch.setattr(fanout, "KEPT_MAX", 2)
    monkeypatch.setattr(fanout, "PATIENCE_S", 0.001)
    store = line(60)
    fan_out = over(store)
    slow = asyncio.create_task(take(fan_out, Checkpoint(), 60, 0.01))
    assert await take(fan_out, Checkpoint(), 60) == list(range(1, 61))
    assert not slow.done()
    assert await slow == list(range(1, 61))
    await fan_out.close()


@settings(max_examples=60, deadline=None)
@given(
    begins=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    batch_max=st.integers(1, 6),
    pauses=st.lists(st.sampled_from([0.0, 0.001, 0.004]), min_size=5, max_size=5),
)
def test_each_gets_each_event_once_wherever_it_begins(begins: list[int], batch_max: int, pauses: list[float]) -> None:
    """Whoever is ahead, behind or slow."""

    async def play() -> None:
        store = line(20)
        fan_out = over(store, batch_max)

        async def grow() -> None:
            for number in range(20):
                await asyncio.sleep(0.001)
                store.person("acme", uid(100 + number), "Bob")

        growing = asyncio.create_task(grow())
        wanted = [take(fan_out, place(store, begin), 40, pause) for begin, pause in zip(begins, pauses, strict=False)]
        async with asyncio.timeout(20):
            assert await asyncio.gather(*wanted) == [list(range(begin + 1, 41)) for begin in begins]
        await growing
        await fan_out.close()

    asyncio.run(play())


async def test_a_history_that_was_lost_is_told_to_each_and_then_read_anew() -> None:
    """None waits for ever; what the store holds now is followed from the begin."""
    store = line(5)
    fan_out = over(store)
    elsewhere = Checkpoint(store.epoch, 5, "another event")
    for _ in range(2):
        told = await asyncio.gather(*(take(fan_out, elsewhere, 6) for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in told] == [HistoryDiverged] * 3
    assert await take(fan_out, Checkpoint(), 5) == [1, 2, 3, 4, 5]
    await fan_out.close()


async def test_one_at_a_lost_event_does_not_join_the_others() -> None:
    """The same position of another history is another place."""
    store = line(9)
    fan_out = over(store, batch_max=9)
    assert await take(fan_out, Checkpoint(), 9) == list(range(1, 10))
    with pytest.raises(HistoryDiverged):
        await take(fan_out, Checkpoint(store.epoch, 5, "another event"), 9)
    assert await take(fan_out, place(store, 5), 9) == [6, 7, 8, 9]
    await fan_out.close()


async def test_a_cancelled_consumer_disturbs_no_other() -> None:
    """It was the one for whom the line was read."""
    store = line(3)
    fan_out = over(store)
    first = asyncio.create_task(take(fan_out, Checkpoint(), 9))
    second = asyncio.create_task(take(fan_out, Checkpoint(), 4))
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    store.person("acme", uid(99), "Carol")
    assert await asyncio.wait_for(second, 5) == [1, 2, 3, 4]
    await fan_out.close()


async def test_a_reading_that_ends_late_adds_nothing_to_the_next() -> None:
    """A library swallowed its cancellation, so it hands out a batch when another reading has begun elsewhere."""
    store, ending = line(12), asyncio.Event()

    async def reading(at: Checkpoint) -> AsyncGenerator[EventBatch, None]:
        yield EventBatch((), at)
        if at.position == 9:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await ending.wait()
            yield EventBatch(store.events[9:10], place(store, 10))
        while at.position < 12:
            after = place(store, min(at.position + 2, 12))
            yield EventBatch(store.events[at.position : after.position], after)
            at = after

    fan_out = FanOut(reading, lambda: reading)
    first = asyncio.create_task(take(fan_out, place(store, 9), 12))
    await eventually(lambda: fan_out._proven and fan_out._coming is not None and not fan_out._coming.done())
    late = fan_out._coming
    assert late is not None
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(take(fan_out, place(store, 1), 12))  # it ends the reading that nobody needs any more
    await eventually(lambda: fan_out._source is None)
    async with aclosing(fan_out.follow(place(store, 3))) as slow, aclosing(fan_out.follow(place(store, 3))) as batches:
        for each in (slow, batches):
            assert (await anext(each)).after == place(store, 3)
        at = place(store, 5)
        for each in (slow, batches):
            assert (await anext(each)).after == at
        ending.set()
        await asyncio.wait({late})
        while at.position < 12:
            batch = await asyncio.wait_for(anext(batches), 5)
            assert batch.follows(at)
            at = batch.after
    assert await asyncio.wait_for(second, 5) == list(range(2, 13))
    await fan_out.close()


@pytest.mark.parametrize("joined", ["before", "after"])
async def test_one_that_leaves_the_reading_behind_leaves_no_other_alone(joined: str) -> None:
    """The first to begin was far behind and stopped; the others share a reading all the same, also those that read alone then."""
    store = line(9)
    fan_out = over(store)
    alone: list[Checkpoint] = []
    make = fan_out._alone

    def counted() -> fanout.Follow:
        follow = make()

        def following(at: Checkpoint) -> AsyncGenerator[EventBatch, None]:
            alone.append(at)
            return follow(at)

        return following

    fan_out._alone = counted
    others: list[asyncio.Task[list[int]]] = []
    batches = fan_out.follow(place(store, 1))
    await anext(batches)
    if joined == "before":
        others = [asyncio.create_task(take(fan_out, place(store, 9), 40)) for _ in range(2)]
        await eventually(lambda: len(alone) == 2)
    await batches.aclose()
    if joined == "after":
        others = [asyncio.create_task(take(fan_out, place(store, 9), 40)) for _ in range(2)]
    for number in range(31):
        store.person("acme", uid(100 + number), "Bob")
        await asyncio.sleep(0.001)
    for other in others:
        assert await asyncio.wait_for(other, 5) == list(range(10, 41))
    assert len(alone) == 0 or joined == "before"
    assert fan_out._cursor == place(store, 40)
    await fan_out.close()
