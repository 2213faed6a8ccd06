"""Consistency tokens and waiting for them."""

from __future__ import annotations

import asyncio
import base64
import time

import pytest

from shared.folds.errors import Invalid, Rejected, Unavailable
from shared.line.consistency import FRESH_S, ConsistencyGate, Reached, Token, decode, encode
from tests.support.system.sealing import SEAL
from tests.support.system.waiting import eventually

EPOCH = "6f1c3f0e-0000-4000-8000-000000000000/1"
LATER = "6f1c3f0e-0000-4000-8000-000000000000/2"
OTHER = "aaaaaaaa-0000-4000-8000-000000000000/1"


class Table:
    """A checkpoint that the test moves, and how often it was read."""

    def __init__(self, epoch: str = EPOCH, position: int = 0) -> None:
        self.at = Reached(epoch, position)
        self.reads = 0
        self.error: Exception | None = None

    async def progress(self) -> Reached:
        """As the database would tell it."""
        self.reads += 1
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return self.at


def waiter(table: Table) -> ConsistencyGate:
    """A waiter on the table."""
    return ConsistencyGate(1, table.progress, SEAL, wait_max_s=30)


def test_a_token_comes_back_as_it_was() -> None:
    """What was encoded is decoded."""
    assert decode(encode(Token(3, EPOCH, 9_007_199_254_740_993), SEAL, "acme"), SEAL, "acme") == Token(
        3, EPOCH, 9_007_199_254_740_993
    )


@pytest.mark.parametrize(
    "text",
    ["x", "!!!!", "é", "MSAy", base64.urlsafe_b64encode(b"2 1 5 e").decode(), base64.urlsafe_b64encode(b"1 1 five e").decode()],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    """A token that is not ours is bad input, with the field named."""
    with pytest.raises(Invalid) as refusal:
        decode(text, SEAL, "acme")
    assert refusal.value.reason == "CONSISTENCY_TOKEN_MALFORMED"
    assert refusal.value.violations[0][0] == "consistency_token"


async def test_no_token_asks_nothing() -> None:
    """A query without a token does not look at the checkpoint."""
    table = Table()
    await waiter(table).wait("", "acme", 1.0)
    assert table.reads == 0


async def test_a_wait_ends_when_the_tables_are_there() -> None:
    """The waiting query goes on with the checkpoint's move."""
    table = Table(position=6)
    waiting = asyncio.create_task(waiter(table).wait(encode(Token(1, EPOCH, 7), SEAL, "acme"), "acme", 30.0))
    await eventually(lambda: table.reads >= 3)
    assert not waiting.done()
    table.at = Reached(EPOCH, 7)
    moved = time.monotonic()
    await waiting
    assert time.monotonic() - moved < 15


async def test_a_hundred_waits_are_one_poller() -> None:
    """However many wait, the checkpoint is read by one; when nobody waits it is not read at all."""
    table = Table()
    shared = waiter(table)
    waits = [asyncio.create_task(shared.wait(encode(Token(1, EPOCH, 1), SEAL, "acme"), "acme", 30.0)) for _ in range(100)]
    await eventually(lambda: table.reads >= 5)
    table.at = Reached(EPOCH, 1)
    await asyncio.gather(*waits)
    assert table.reads < 100
    await asyncio.sleep(0.05)
    settled = table.reads
    await asyncio.sleep(0.05)
    assert table.reads == settled


async def test_what_was_seen_once_needs_no_second_look() -> None:
    """A position that the tables have reached is remembered."""
    table = Table(position=10)
    shared = waiter(table)
    await shared.wait(encode(Token(1, EPOCH, 10), SEAL, "acme"), "acme", 1.0)
    reads = table.reads
    await shared.wait(encode(Token(1, EPOCH, 9), SEAL, "acme"), "acme", 1.0)
    assert table.reads <= reads + 1  # the poller may have been at its last look
    assert table.reads - reads == 0 or reads == 1


async def test_too_late_is_told_before_the_deadline_with_the_lag() -> None:
    """The answer is FAILED_PRECONDITION NOT_YET_CONSISTENT, in time, and says how many events are missing."""
    table = Table(position=40)
    begun = time.monotonic()
    with pytest.raises(Rejected) as refusal:
        await waiter(table).wait(encode(Token(1, EPOCH, 50), SEAL, "acme"), "acme", 3.0)
    assert time.monotonic() - begun < 3.0
    assert refusal.value.reason == "NOT_YET_CONSISTENT"
    assert (refusal.value.facts, refusal.value.retry_after_s) == ({"lag": "16"}, 0.1)


async def test_who_lacks_more_than_can_come_in_time_is_told_so_at_once() -> None:
    """And when to ask again: not before the tables can be there."""
    begun = time.monotonic()
    with pytest.raises(Rejected) as refusal:
        await waiter(Table(position=100)).wait(encode(Token(1, EPOCH, 10_000_100), SEAL, "acme"), "acme", 60.0)
    assert time.monotonic() - begun < 30
    assert (refusal.value.reason, refusal.value.facts) == ("NOT_YET_CONSISTENT", {"lag": "16777216"})
    assert refusal.value.retry_after_s == 167.77216


async def test_another_history_never_counts_as_reached() -> None:
    """A position of one epoch says nothing about another's; one that can still come is waited for."""
    table = Table(epoch=EPOCH, position=100)
    with pytest.raises(Rejected):
        await waiter(table).wait(encode(Token(1, LATER, 50), SEAL, "acme"), "acme", 0.1)
    waiting = asyncio.create_task(waiter(table).wait(encode(Token(1, LATER, 50), SEAL, "acme"), "acme", 30.0))
    await asyncio.sleep(0.01)
    table.at = Reached(LATER, 100)
    await waiting


@pytest.mark.parametrize(
    ("epoch", "token", "reason"),
    [
        (LATER, Token(1, EPOCH, 50), "TOKEN_OF_ANOTHER_HISTORY"),
        (EPOCH, Token(1, OTHER, 50), "TOKEN_OF_ANOTHER_HISTORY"),
        (EPOCH, Token(1, "forged", 50), "TOKEN_OF_ANOTHER_HISTORY"),
        (EPOCH, Token(1, EPOCH, 2**62), "TOKEN_UNREACHABLE"),
        (EPOCH, Token(1, LATER, 2**62), "TOKEN_UNREACHABLE"),
        ("", Token(1, OTHER, 2**62), "TOKEN_UNREACHABLE"),
    ],
)
async def test_a_token_that_cannot_be_reached_is_refused_at_once(epoch: str, token: Token, reason: str) -> None:
    """Of before a failover, of another history, of none, or further away than any line: asking again does not help."""
    begun = time.monotonic()
    with pytest.raises(Rejected) as refusal:
        await waiter(Table(epoch, 100)).wait(encode(token, SEAL, "acme"), "acme", 60.0)
    assert time.monotonic() - begun < 30
    assert (refusal.value.reason, refusal.value.retry_after_s, refusal.value.facts) == (reason, None, {})


async def test_a_token_that_is_newer_than_the_tables_history_is_taken_when_they_follow_it() -> None:
    """The write database was replaced by one with another history: before that is noticed, until an operator acts, and after."""
    table, refused = Table(EPOCH, 100), []
    shared, text = waiter(table), encode(Token(1, OTHER, 5), SEAL, "acme")
    for diverged in (False, True):
        table.at = Reached(EPOCH, 100, diverged=diverged)
        with pytest.raises(Rejected) as refusal:
            await shared.wait(text, "acme", 30.0)
        refused.append(refusal.value)
        while shared._poller is not None and not shared._poller.done():  # noqa: ASYNC110 (the very moment is what is tried)
            await asyncio.sleep(0)  # So the next query comes in the moment in which the poller ends: it sees nothing of before
    assert [it.reason for it in refused] == ["TOKEN_OF_ANOTHER_HISTORY", "HISTORY_DIVERGED"]
    assert refused[0].text.endswith("ask without it, or again if they follow that one")
    table.at = Reached(OTHER, 5)
    await shared.wait(text, "acme", 30.0)


async def test_tables_that_have_seen_nothing_can_follow_any_history() -> None:
    """A new read database waits for its first event."""
    table = Table(epoch="")
    waiting = asyncio.create_task(waiter(table).wait(encode(Token(1, OTHER, 50), SEAL, "acme"), "acme", 30.0))
    await eventually(lambda: table.reads >= 2)
    table.at = Reached(OTHER, 50)
    await waiting


async def test_tables_of_a_lost_history_are_told_at_once() -> None:
    """No waiting helps, and what the tables hold is not what the token names, wherever they are."""
    table = Table()
    table.at = Reached(EPOCH, 100, diverged=True)
    begun = time.monotonic()
    for position in (50, 150):
        with pytest.raises(Rejected) as refusal:
            await waiter(table).wait(encode(Token(1, EPOCH, position), SEAL, "acme"), "acme", 30.0)
        assert (refusal.value.reason, refusal.value.retry_after_s) == ("HISTORY_DIVERGED", None)
    assert time.monotonic() - begun < 15


async def test_what_was_seen_once_is_looked_at_again_after_a_second() -> None:
    """Else tables that were found to be of a lost history meanwhile would be believed for ever."""
    table = Table(position=10)
    shared = waiter(table)
    await shared.wait(encode(Token(1, EPOCH, 10), SEAL, "acme"), "acme", 30.0)
    table.at = Reached(EPOCH, 10, diverged=True)
    shared._seen_at -= FRESH_S
    with pytest.raises(Rejected) as refusal:
        await shared.wait(encode(Token(1, EPOCH, 9), SEAL, "acme"), "acme", 30.0)
    assert refusal.value.reason == "HISTORY_DIVERGED"


async def test_another_shard_is_bad_input() -> None:
    """Positions of two shards cannot be compared."""
    with pytest.raises(Invalid) as refusal:
        await waiter(Table()).wait(encode(Token(2, EPOCH, 1), SEAL, "acme"), "acme", 1.0)
    assert refusal.value.reason == "CONSISTENCY_TOKEN_OF_ANOTHER_SHARD"


async def test_a_database_that_is_away_is_told_to_all_and_then_tried_again() -> None:
    """A failure ends the waits as UNAVAILABLE; the next wait starts afresh."""
    table = Table(position=5)
    shared = waiter(table)
    table.error = ConnectionError("away")
    with pytest.raises(Unavailable):
        await shared.wait(encode(Token(1, EPOCH, 5), SEAL, "acme"), "acme", 5.0)
    table.error = None
    await shared.wait(encode(Token(1, EPOCH, 5), SEAL, "acme"), "acme", 5.0)


async def test_a_caller_that_goes_away_leaves_the_others_waiting() -> None:
    """Cancelling one wait cancels nobody else's."""
    table = Table()
    shared = waiter(table)
    first = asyncio.create_task(shared.wait(encode(Token(1, EPOCH, 1), SEAL, "acme"), "acme", 5.0))
    second = asyncio.create_task(shared.wait(encode(Token(1, EPOCH, 1), SEAL, "acme"), "acme", 5.0))
    await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    table.at = Reached(EPOCH, 1)
    await second


async def test_a_reading_that_hangs_is_given_up() -> None:
    """The waits end as UNAVAILABLE, long before their deadline, and the next one reads anew."""
    table, hangs = Table(position=5), True

    async def progress() -> Reached:
        if hangs:
            await asyncio.Event().wait()
        return await table.progress()

    shared = ConsistencyGate(1, progress, SEAL, wait_max_s=30, read_max_s=0.05)
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable):
            await shared.wait(encode(Token(1, EPOCH, 5), SEAL, "acme"), "acme", 60.0)
        hangs = False
        await shared.wait(encode(Token(1, EPOCH, 5), SEAL, "acme"), "acme", 60.0)


async def test_a_poller_that_ends_is_followed_by_another() -> None:
    """Whatever ended it: here somebody cancels it, while a query waits."""
    table = Table(position=5)
    shared = waiter(table)
    waiting = asyncio.create_task(shared.wait(encode(Token(1, EPOCH, 6), SEAL, "acme"), "acme", 60.0))
    await eventually(lambda: table.reads >= 1)
    assert shared._poller is not None
    shared._poller.cancel()
    reads = table.reads
    await eventually(lambda: table.reads > reads + 1)
    table.at = Reached(EPOCH, 6)
    async with asyncio.timeout(30):
        await waiting
