"""Many append at once: nothing is skipped, doubled, out of order or decided on what has changed since.

Each race has its control: the same race against the usual solution, which must lose.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands.append import AppendConflict, Batch, NewEvent, append, lock
from shared.commands.decide import Command, Plan, decide
from shared.commands.log import read_commands
from shared.commands.states import load
from shared.line.event_store import AggregateKey
from shared.platform.postgres import Connection, one
from tests.support.checks.history import check_line, commands_of, connected, events_of, somebody_waits
from tests.support.domains.trial import Add, Counter, GoOffDuty, build_registry, lone
from tests.support.fakes.replica import NOW, make_command, reasons
from tests.support.system.waiting import eventually

BUS = build_registry()
WRITERS = 6
ROUNDS = 25

Write = Callable[[Connection, random.Random, int, int], Awaitable[None]]
Read = Callable[[Connection, int], Awaitable[list[int]]]


class Regret(Exception):
    """A transaction that is rolled back."""


async def pause(chance: random.Random) -> None:
    """Up to two milliseconds, in which others go on."""
    await asyncio.sleep(chance.random() * 0.002)


# Three ways to write to a line and follow it


async def write_ours(connection: Connection, chance: random.Random, writer: int, nth: int) -> None:
    """By the append function, in a transaction that stays open for a while and may be rolled back."""
    key = ("acme", "counter", f"{writer}-{nth}")
    async with connection.transaction():
        await pause(chance)
        events = [NewEvent(uuid4(), key, version, "trial.Added", b"", b"") for version in (1, 2)]
        await append(connection, 1, Batch(reads={key: 0}, events=events))
        await pause(chance)
        if chance.random() < 0.3:
            raise Regret


async def write_ones(connection: Connection, chance: random.Random, writer: int, nth: int) -> None:
    """As commands of lone callers, each with its event."""
    key = ("acme", "counter", f"{writer}-{nth}")
    async with connection.transaction():
        for version in (1, 2):
            await pause(chance)
            await append(connection, 1, lone(key, version))
        await pause(chance)
        if chance.random() < 0.3:
            raise Regret


async def read_ours(connection: Connection, checkpoint: int) -> list[int]:
    """What comes after the checkpoint, as every follower reads it."""
    cursor = await connection.execute("SELECT position FROM events WHERE position > %s ORDER BY position", (checkpoint,))
    return [position for (position,) in await cursor.fetchall()]


async def write_numbered(connection: Connection, chance: random.Random, writer: int, nth: int) -> None:
    """By an identity column, which hands out numbers before the commit."""
    async with connection.transaction():
        await pause(chance)
        await connection.execute("INSERT INTO numbered DEFAULT VALUES")
        await pause(chance)
        if chance.random() < 0.3:
            raise Regret


async def write_numbered_then_locked(connection: Connection, chance: random.Random, writer: int, nth: int) -> None:
    """Under a lock, but with a number drawn before it was held."""
    async with connection.transaction():
        position, *_ = await one(connection, "SELECT nextval('numbered_position_seq')")
        await pause(chance)
        await lock(connection, 1)
        await connection.execute("INSERT INTO numbered OVERRIDING SYSTEM VALUE VALUES (%s)", (position,))
        if chance.random() < 0.3:
            raise Regret


async def read_numbered(connection: Connection, checkpoint: int) -> list[int]:
    """What comes after the checkpoint."""
    cursor = await connection.execute("SELECT position FROM numbered WHERE position > %s ORDER BY position", (checkpoint,))
    return [position for (position,) in await cursor.fetchall()]


@asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[list[Connection]]:
    """So many, as the services have them."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(url)) for _ in range(count)]


async def followed(url: str, write: Write, read: Read) -> tuple[list[int], list[int]]:
    """What a follower saw while writers wrote and rolled back, and what was there in the end."""
    seen: list[int] = []

    async def writing(connection: Connection, writer: int) -> None:
        chance = random.Random(writer)
        for nth in range(ROUNDS):
            try:
                await write(connection, chance, writer, nth)
            except Regret:
                continue

    async def follow(connection: Connection, until: asyncio.Event) -> None:
        last = False
        while not last:
            last = until.is_set()
            seen.extend(await read(connection, seen[-1] if seen else 0))

    async with connections(url, WRITERS + 1) as (reader, *writers):
        done = asyncio.Event()
        following = asyncio.create_task(follow(reader, done))
        await asyncio.gather(*(writing(connection, nth) for nth, connection in enumerate(writers)))
        done.set()
        await following
        return seen, await read(reader, 0)


@pytest.mark.parametrize("write", [write_ours, write_ones])
async def test_a_follower_of_our_line_skips_nothing(write_db: Database, write: Write) -> None:
    """It sees every position once, in order, while writers hold their transactions open and roll a third of them back."""
    seen, there = await followed(write_db.app, write, read_ours)
    assert seen == there
    assert there == list(range(1, len(there) + 1))
    assert len(there) > WRITERS * ROUNDS
    times = [event.recorded_at for event in await events_of(write_db)]
    assert times == sorted(times)


@pytest.mark.parametrize("write", [write_numbered, write_numbered_then_locked])
async def test_control_a_follower_of_sequence_numbers_skips(write_db: Database, write: Write) -> None:
    """The same race, followed by numbers that were handed out before the commit or before the lock: events are missed."""
    async with connected(write_db.owner) as owner:
        await owner.execute("CREATE TABLE numbered (position bigint GENERATED ALWAYS AS IDENTITY)")
    seen, there = await followed(write_db.owner, write, read_numbered)
    assert set(seen) < set(there)


async def decided(connection: Connection, *commands: Command) -> Plan:
    """A plan on what is in the database now."""
    keys = {("acme", "counter", name) for name in "ab"}
    return decide(BUS, [[command] for command in commands], (await load(connection, BUS, keys)).get, NOW)


def adding(amount: int) -> Command:
    """A command on counter a."""
    return make_command(BUS, Add(counter_id="a", amount=amount))


@pytest.mark.parametrize("committed", [True, False], ids=["who commits", "who rolls back"])
async def test_who_waited_for_the_lock_sees_what_was_committed_meanwhile(write_db: Database, committed: bool) -> None:
    """Its check runs on a snapshot taken after the lock; one taken before would miss the first append."""
    async with connections(write_db.app, 3) as (first, second, third):
        plans = [await decided(connection, adding(1)) for connection in (first, second)]
        try:
            async with first.transaction():
                await append(first, 1, plans[0].batch)
                waits = asyncio.create_task(append(second, 1, plans[1].batch))
                blocked: Callable[[], bool | Awaitable[bool]] = partial(somebody_waits, third)
                await eventually(blocked)
                if not committed:
                    raise Regret
        except Regret:
            pass
        if committed:
            with pytest.raises(AppendConflict):
                await waits
        else:
            assert (await waits).head == 1
    assert len(await check_line(write_db)) == 1


async def test_opposite_orders_never_deadlock(write_db: Database) -> None:
    """Two that write the same aggregates the other way round wait for each other's lock and nothing else."""
    a: AggregateKey = ("acme", "counter", "a")
    b: AggregateKey = ("acme", "counter", "b")

    async def write(connection: Connection, keys: tuple[AggregateKey, AggregateKey]) -> None:
        done = 0
        while done < 30:
            reads = {key: at.version for key, at in (await load(connection, BUS, keys)).items()}
            added = BUS.codecs.of(Add(counter_id="", amount=1)).message().SerializeToString()
            events = [NewEvent(uuid4(), key, reads[key] + 1, "trial.Added", added, b"") for key in keys]
            with suppress(AppendConflict):
                await append(connection, 1, Batch(reads=reads, events=events))
                done += 1

    async with connections(write_db.app, 2) as (first, second):
        await asyncio.gather(write(first, (a, b)), write(second, (b, a)))
    events = await events_of(write_db)
    assert [event.position for event in events] == list(range(1, 121))


# Write skew: each of two may leave if the other stays


@pytest.fixture
async def both_off(write_db: Database) -> AsyncIterator[tuple[Connection, Connection, Plan, Plan]]:
    """Two replicas, each of which has decided that one of two colleagues may go, having seen the other on duty."""
    async with connections(write_db.app, 2) as (first, second):
        a = await decided(first, make_command(BUS, GoOffDuty(counter_id="a", colleague_id="b")))
        b = await decided(second, make_command(BUS, GoOffDuty(counter_id="b", colleague_id="a")))
        assert [len(plan.batch.events) for plan in (a, b)] == [1, 1]
        yield first, second, a, b


async def off_duty(connection: Connection) -> list[bool]:
    """Who went."""
    states = await load(connection, BUS, [("acme", "counter", "a"), ("acme", "counter", "b")])
    return [at.state.off_duty for at in states.values()]


async def test_two_that_read_each_others_aggregates_cannot_both_commit(
    both_off: tuple[Connection, Connection, Plan, Plan],
) -> None:
    """The second finds that what it read has moved, though it writes to something else, and then is refused."""
    first, second, a, b = both_off
    await append(first, 1, a.batch)
    with pytest.raises(AppendConflict):
        await append(second, 1, b.batch)
    again = await decided(second, make_command(BUS, GoOffDuty(counter_id="b", colleague_id="a")))
    assert reasons(list(again.outcomes.values())) == ["NOBODY_ON_DUTY"]
    assert await off_duty(first) == [True, False]


async def test_control_checking_only_what_is_written_lets_both_commit(
    both_off: tuple[Connection, Connection, Plan, Plan],
) -> None:
    """The usual optimistic check, of written aggregates alone: nobody is left on duty."""
    first, second, a, b = both_off
    for connection, plan in ((first, a), (second, b)):
        written = {event.key for event in plan.batch.events}
        plan.batch.reads = {key: version for key, version in plan.batch.reads.items() if key in written}
        await append(connection, 1, plan.batch)
    assert await off_duty(first) == [True, True]


# The same command at two replicas


async def total(connection: Connection) -> int:
    """Of counter a."""
    states = await load(connection, BUS, [("acme", "counter", "a")])
    [at] = states.values()
    assert isinstance(at.state, Counter)
    return at.state.total


async def test_a_command_id_that_two_replicas_carry_out_at_once_has_one_effect(write_db: Database) -> None:
    """Even where no version gives it away: of two appends with the id, the second is told."""
    asked = adding(5)
    async with connections(write_db.app, 2) as (first, second):
        plans = [await decided(connection, asked) for connection in (first, second)]
        # As if it were decided on another aggregate.
        plans[1].batch.reads.clear()
        plans[1].batch.events.clear()
        await append(first, 1, plans[0].batch)
        with pytest.raises(AppendConflict):
            await append(second, 1, plans[1].batch)
        assert await total(first) == 5


async def test_control_looking_for_the_id_before_the_append_is_too_early(write_db: Database) -> None:
    """Both look, both find nothing, both append: the command is carried out twice."""
    asked: Command = adding(5)

    async def carry_out(connection: Connection, looked: asyncio.Barrier) -> None:
        assert not await read_commands(connection, [asked.key])
        await looked.wait()
        while True:
            batch = (await decided(connection, asked)).batch
            batch.commands.clear()
            with suppress(AppendConflict):
                await append(connection, 1, batch)
                return

    async with connections(write_db.app, 2) as both:
        looked = asyncio.Barrier(2)
        await asyncio.gather(*(carry_out(connection, looked) for connection in both))
        assert await total(both[0]) == 10


async def test_the_command_id_is_unique_even_for_who_does_not_look(write_db: Database) -> None:
    """The last line of defence: within one batch, the primary key of the command log."""
    asked: Command = adding(5)
    async with connected(write_db.app) as connection:
        batch = (await decided(connection, asked)).batch
        batch.commands *= 2
        with pytest.raises(AppendConflict):
            await append(connection, 1, batch)
    assert await commands_of(write_db) == {}
