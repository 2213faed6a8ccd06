"""The follower's rules: what it takes from the broker, what it asks the store, and when it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from bank.legacy.v1.person_pb2 import PersonAdded
from bank.v1.person_pb2 import PersonRegistered
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.line.checkpoint import Checkpoint
from shared.line.ends import BATCH_BYTES_MAX
from shared.line.follower import GATHER_EVENTS, EventBatch, FeedPage, Follower, HistoryDiverged, LinePage, take
from tests.support.fakes.line import EPOCH, ScriptedFeed, Store, StoreLine, delivery, uid
from tests.support.system.waiting import eventually
from upcasters import UPCASTERS

LATER = EPOCH.replace("/1", "/2")


def store_of(count: int) -> Store:
    """A line of so many events."""
    store = Store()
    for number in range(count):
        store.person("acme", uid(number), f"Person {number}")
    return store


def at(store: Store, position: int, epoch: str = EPOCH) -> Checkpoint:
    """The checkpoint of a consumer that has applied so many of the store's events."""
    return Checkpoint(epoch, position, store.events[position - 1].event_id) if position else Checkpoint()


async def followed(follower: Follower, begin: Checkpoint, until: int) -> list[int]:
    """The positions that the follower hands out, up to the one given."""
    positions: list[int] = []
    async with asyncio.timeout(30), aclosing(follower.follow(begin)) as batches:
        async for batch in batches:
            positions.extend(event.position for event in batch.events)
            if batch.after.position >= until:
                break
    return positions


def positions(events: list[EventEnvelope]) -> list[int]:
    """Where they are in the line."""
    return [event.position for event in events]


def test_what_is_behind_is_dropped_and_what_follows_is_taken() -> None:
    """Repeats of what was applied do no harm, in pages of their own or at the begin of one."""
    store = store_of(6)
    taken, doubt = take(at(store, 2), [delivery(store.events[position - 1]) for position in (1, 2, 3, 2, 3, 4)])
    assert (positions(taken), doubt) == ([3, 4], False)
    taken, doubt = take(at(store, 2), [delivery(*store.events[:4]), delivery(*store.events[1:3]), delivery(*store.events[3:])])
    assert (positions(taken), doubt) == ([3, 4, 5, 6], False)


def test_a_gap_is_a_doubt() -> None:
    """Nothing beyond a gap is taken."""
    store = store_of(5)
    taken, doubt = take(at(store, 2), [delivery(store.events[position - 1]) for position in (3, 5, 4)])
    assert (positions(taken), doubt) == ([3], True)
    taken, doubt = take(at(store, 2), [delivery(*(store.events[position - 1] for position in (3, 5, 4)))])
    assert (positions(taken), doubt) == ([3], True)


def test_a_message_of_another_history_is_a_doubt() -> None:
    """The right position under another epoch is not taken."""
    store = store_of(5)
    taken, doubt = take(at(store, 2), [delivery(store.events[2]), delivery(store.events[3], epoch=LATER)])
    assert (positions(taken), doubt) == ([3], True)


def test_what_is_no_page_is_a_doubt() -> None:
    """A message that nobody can read hides an event that we may lack."""
    assert take(at(store_of(1), 1), [FeedPage("", ())]) == ([], True)


async def test_it_begins_behind_the_checkpoint() -> None:
    """What the tables have is not handed out again."""
    store = store_of(10)
    assert await followed(Follower(StoreLine(store, page=3), None, batch_max=2), at(store, 4), 10) == [5, 6, 7, 8, 9, 10]


async def test_those_who_follow_at_once_are_each_where_they_are() -> None:
    """One that begins at the begin of the line moves no other back, whose tables hold those events already."""
    store = store_of(4)
    follower = Follower(StoreLine(store), None, batch_max=2, silence_s=0.001)
    async with (
        asyncio.timeout(30),
        aclosing(follower.follow(at(store, 4))) as late,
        aclosing(follower.follow(Checkpoint())) as early,
    ):
        assert positions(list((await anext(late)).events)) == []
        assert positions(list((await anext(early)).events)) == [1, 2]
        store.person("acme", uid(5), "Eve")
        assert positions(list((await anext(late)).events)) == [5]
        assert positions(list((await anext(early)).events)) == [3, 4]
        assert positions(list((await anext(early)).events)) == [5]


async def test_a_batch_tells_what_it_follows() -> None:
    """The events directly behind a checkpoint, all of them up to where it ends."""
    store = store_of(6)

    def batch(begin: int, end: int, after: int) -> EventBatch:
        return EventBatch(store.events[begin - 1 : end], at(store, after))

    assert batch(3, 4, 4).follows(at(store, 2))
    assert EventBatch((), at(store, 2, LATER)).follows(at(store, 2))
    for wrong in (batch(1, 4, 4), batch(4, 5, 5), batch(3, 4, 5), batch(3, 3, 4), EventBatch((), at(store, 3))):
        assert not wrong.follows(at(store, 2))
    assert not EventBatch(store.events[2:4], Checkpoint(EPOCH, 4, "another")).follows(at(store, 2))
    assert not EventBatch((), Checkpoint(EPOCH, 2, "another")).follows(at(store, 2))


class CountedLine(StoreLine):
    """Counts the pages that were read."""

    pages = 0

    async def read(self, from_position: int, events_max: int = 0) -> AsyncGenerator[LinePage, None]:
        """As StoreLine."""
        async for page in super().read(from_position, events_max):
            self.pages += 1
            yield page


@pytest.mark.parametrize("by", ["store", "broker"])
async def test_a_batch_of_large_events_is_cut_by_its_bytes(by: str) -> None:
    """And whoever reads the store keeps no more of it than makes a batch."""
    store = Store()
    for number in range(20):
        store.person("acme", uid(number), "x" * 300_000)
    line = CountedLine(store, page=1)
    begin = Checkpoint() if by == "store" else at(store, 1)
    feed = None if by == "store" else ScriptedFeed([[delivery(event)] for event in store.events[1:]])
    sizes: list[int] = []
    read_first = 0
    async with asyncio.timeout(30), aclosing(Follower(line, feed).follow(begin)) as batches:
        async for batch in batches:
            sizes.append(len(batch.events))
            read_first = read_first or line.pages
            if batch.after.position == 20:
                break
    assert max(sizes) == BATCH_BYTES_MAX // 300_000
    assert read_first < 10


async def test_the_broker_is_not_needed() -> None:
    """With a broker that is away for ever, the line is read again and again."""
    store, feed = store_of(3), ScriptedFeed()
    feed.away = True
    follower = Follower(StoreLine(store), feed, silence_s=0.01)
    seen: list[int] = []
    async with asyncio.timeout(30), aclosing(follower.follow(Checkpoint())) as batches:
        async for batch in batches:
            seen.extend(positions(list(batch.events)))
            if batch.after.position < 6:
                store.person("acme", uid(batch.after.position + 100), "later")
            else:
                break
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("events", "gathers"), [(GATHER_EVENTS - 1, False), (GATHER_EVENTS, True), (500, False)])
async def test_under_load_events_come_together(events: int, gathers: bool) -> None:
    """Behind a batch of many events more are awaited, but not if it was full; and few events are handed out at once."""
    store = store_of(events + 1)
    behind = Store()
    feed = ScriptedFeed([[delivery(*store.events[:-1])], [delivery(store.events[-1])]])
    handed_out: list[tuple[int, float]] = []
    async with (
        asyncio.timeout(30),
        aclosing(Follower(StoreLine(behind), feed, gather_s=0.3).follow(Checkpoint(EPOCH))) as batches,
    ):
        async for batch in batches:
            handed_out.append((len(batch.events), time.monotonic()))
            if batch.after.position == events + 1:
                break
    (_, _), (first, first_at), (second, second_at) = handed_out
    assert (first, second) == (events, 1)
    assert (second_at - first_at >= 0.3) == gathers


async def test_a_gap_is_filled_from_the_store() -> None:
    """Delivered 1, 3, 4, 5, 2 of what is new, with the store ahead: handed out in order, once each."""
    store = store_of(5)
    script = [[delivery(event)] for event in (store.events[2], store.events[0], store.events[4], store.events[3])]
    later = list(store.events)
    del store.events[2:]
    feed = ScriptedFeed(script)
    follower = Follower(StoreLine(store), feed, silence_s=0.01)
    seen: list[int] = []
    async with asyncio.timeout(30), aclosing(follower.follow(at(store, 2))) as batches:
        async for batch in batches:
            seen.extend(positions(list(batch.events)))
            if len(store.events) == 2:
                store.events[:] = later
            if batch.after.position == 5:
                break
    assert seen == [3, 4, 5]


async def test_silence_asks_the_store() -> None:
    """An event that the broker lost comes within the time of silence."""
    store, feed = store_of(2), ScriptedFeed()
    follower = Follower(StoreLine(store), feed, silence_s=0.01)
    async with asyncio.timeout(30), aclosing(follower.follow(at(store, 2))) as batches:
        assert (await anext(batches)).events == ()
        store.person("acme", uid(3), "lost by the broker")
        assert positions(list((await anext(batches)).events)) == [3]
        following = asyncio.ensure_future(anext(batches))
        await eventually(lambda: feed.opened == 2)
        store.person("acme", uid(4), "lost as well")
        assert positions(list((await following).events)) == [4]


async def test_repeats_do_not_keep_it_from_the_store() -> None:
    """A broker that repeats old pages without end, and loses the new one, delays the event by the time of silence."""
    store = store_of(2)
    old = delivery(*store.events)

    class Repeating(ScriptedFeed):
        async def fetch(self, timeout_s: float) -> list[FeedPage]:
            await asyncio.sleep(min(timeout_s, 0.002))
            return [old]

    follower = Follower(StoreLine(store), Repeating(), silence_s=0.05)
    async with asyncio.timeout(3), aclosing(follower.follow(at(store, 2))) as batches:
        assert (await anext(batches)).events == ()
        store.person("acme", uid(3), "lost by the broker")
        assert positions(list((await anext(batches)).events)) == [3]


async def test_silence_with_nothing_lost_keeps_the_feed() -> None:
    """An idle broker is not asked anew every second."""
    store, feed = store_of(1), ScriptedFeed()
    follower = Follower(StoreLine(store), feed, silence_s=0.005)

    async def idle() -> None:
        async with aclosing(follower.follow(at(store, 1))) as batches:
            async for _ in batches:
                pass

    idling = asyncio.create_task(idle())
    await eventually(lambda: store.reads > 3)
    idling.cancel()
    await asyncio.wait([idling])
    assert feed.opened == 1


async def test_a_store_that_is_away_is_waited_for() -> None:
    """Start order does not matter."""
    store = store_of(2)
    store.away = True
    waiting = asyncio.create_task(followed(Follower(StoreLine(store), None), Checkpoint(), 2))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    store.away = False
    assert await waiting == [1, 2]


async def test_a_store_that_went_away_does_not_stop_the_broker() -> None:
    """While nothing was missed, what the broker delivers in order is applied without the store."""
    store = store_of(4)
    feed = ScriptedFeed([[], [delivery(store.events[2])], [], [delivery(store.events[3])]])
    later = store.events[2:]
    del store.events[2:]
    follower = Follower(StoreLine(store), feed, silence_s=0.01)
    seen: list[int] = []
    async with asyncio.timeout(30), aclosing(follower.follow(at(store, 2))) as batches:
        async for batch in batches:
            store.away = True
            seen.extend(positions(list(batch.events)))
            if batch.after.position == 4:
                break
    assert seen == positions(later)


async def test_a_restored_store_that_ends_before_the_checkpoint_stops_it() -> None:
    """The tables have seen what the store has lost: HISTORY_DIVERGED."""
    store = store_of(5)
    begin = at(store, 5)
    del store.events[3:]
    with pytest.raises(HistoryDiverged, match="ends at 3"):
        await followed(Follower(StoreLine(store), None), begin, 6)


async def test_another_event_at_the_checkpoint_stops_it() -> None:
    """The store has gone on along another way: HISTORY_DIVERGED, and nothing is handed out."""
    store = store_of(5)
    begin = at(store, 3)
    del store.events[2:]
    for number in range(5):
        store.person("acme", uid(50 + number), "of another history")
    with pytest.raises(HistoryDiverged, match="position 3"):
        await followed(Follower(StoreLine(store), None), begin, 6)


async def test_it_stops_while_running_too() -> None:
    """A store that is restored under a running follower is noticed at the next doubt, here silence."""
    store = store_of(5)
    follower = Follower(StoreLine(store), ScriptedFeed(), silence_s=0.01)

    async def restored_meanwhile() -> None:
        async with asyncio.timeout(30), aclosing(follower.follow(at(store, 5))) as batches:
            async for _ in batches:
                del store.events[3:]

    with pytest.raises(HistoryDiverged):
        await restored_meanwhile()


async def test_a_new_epoch_of_the_same_history_is_adopted() -> None:
    """After a failover that lost nothing the checkpoint takes the new epoch, even without a new event."""
    store = store_of(3)
    begin = at(store, 3)
    store.epoch = LATER
    async with asyncio.timeout(30), aclosing(Follower(StoreLine(store), None).follow(begin)) as batches:
        batch = await anext(batches)
    assert (list(batch.events), batch.after) == ([], Checkpoint(LATER, 3, begin.event_id))


async def test_a_message_of_a_new_epoch_is_verified_first() -> None:
    """The broker cannot move us to another history; the store can."""
    store = store_of(2)
    begin = at(store, 2)
    fourth = Store()
    for number in range(3):
        fourth.person("acme", uid(number), "forged")
    feed = ScriptedFeed([[delivery(fourth.events[2], epoch=LATER)], [delivery(fourth.events[2], epoch=LATER)]])
    follower = Follower(StoreLine(store), feed, silence_s=0.01)
    async with asyncio.timeout(30), aclosing(follower.follow(begin)) as batches:
        async for batch in batches:
            if not batch.events and not feed.script:
                break
            if batch.events:
                assert batch.events[0].event_id == store.events[2].event_id
                break
            if len(feed.script) == 2:
                asyncio.get_running_loop().call_later(0.05, store.person, "acme", uid(9), "true")


@pytest.mark.parametrize("begin", [0, 3])
async def test_the_first_batch_comes_even_if_it_is_empty(begin: int) -> None:
    """Whoever was stopped is told that the history is proven."""
    store = store_of(begin)
    async with asyncio.timeout(30), aclosing(Follower(StoreLine(store), None).follow(at(store, begin))) as batches:
        assert (await anext(batches)).after.position == begin


@pytest.mark.parametrize("by_broker", [True, False], ids=["broker", "store"])
async def test_older_events_are_handed_out_as_those_of_today(by_broker: bool) -> None:
    """Whoever brings them: the broker carries what was stored."""
    store = store_of(1)
    behind, begin = store_of(1), at(store, 1)
    behind.events[:] = store.events
    old = store.append("acme", uid(9), PersonAdded(person_id=uid(9), last_and_first_name="Cooper, Alice"), category="person")
    feed = ScriptedFeed([[delivery(old)]]) if by_broker else None
    follower = Follower(StoreLine(behind if by_broker else store), feed, upcasters=UPCASTERS, silence_s=0.01)
    async with asyncio.timeout(30), aclosing(follower.follow(begin)) as batches:
        async for batch in batches:
            for event in batch.events:
                assert event.type == "bank.v1.PersonRegistered"
                assert PersonRegistered.FromString(event.payload) == PersonRegistered(person_id=uid(9), name="Alice Cooper")
                return
