"""Reading: states from snapshots and events, streams, the line, its head."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from deploy.bootstrap import Database
from foldline.v1 import event_store_pb2
from shared.commands import log as command_log
from shared.commands.append import Batch, NewEvent, NewSnapshot, append
from shared.commands.registry import CommandRegistry
from shared.commands.states import Unreadable, Versioned, load
from shared.folds.aggregate import Aggregate
from shared.line import event_store
from shared.line.event_store import AggregateKey, Head
from tests.support.checks.history import connected, events_of
from tests.support.domains.trial import COUNTER, Add, Added, Counter, CounterEvent, build_registry, evolve
from tests.support.fakes.replica import reasons, replica
from tests.support.system.engines import Engines

BUS = build_registry()
A: AggregateKey = ("acme", "counter", "a")
B: AggregateKey = ("acme", "counter", "b")


def added(key: AggregateKey, version: int, amount: int = 1, bus: CommandRegistry = BUS) -> NewEvent:
    """An event to append."""
    payload = bus.codecs.of(Added(counter_id="", amount=1)).encode(Added(counter_id=key[2], amount=amount))
    return NewEvent(uuid4(), key, version, "trial.Added", payload, b"")


def snapshot(key: AggregateKey, version: int, total: int, *, schema: int = 1) -> NewSnapshot:
    """A snapshot that says what it likes, so that it can be told from the events which it stands for."""
    return NewSnapshot(key, version, schema, BUS.dump_state(Counter(total=total)))


@dataclass
class Folds:
    """How many events were folded, by a table whose aggregate counts."""

    count: int = 0

    def bus(self, aggregate: Aggregate[Counter, CounterEvent] = COUNTER) -> CommandRegistry:
        """That table."""

        def evolve_and_count(counter: Counter, event: CounterEvent) -> Counter:
            self.count += 1
            return evolve(counter, event)

        return build_registry(dataclasses.replace(aggregate, evolve=evolve_and_count))


async def test_an_absent_aggregate_is_at_version_0(write_db: Database) -> None:
    """In its initial state; also what is there in another tenant or category."""
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(events=[added(("other", "counter", "a"), 1)]))
        assert await load(connection, BUS, [A]) == {A: Versioned(0, Counter())}
        assert await load(connection, BUS, []) == {}


async def test_loading_reads_the_newest_snapshot_and_what_came_after_it(write_db: Database) -> None:
    """Scenario B: 21 events and an interval of 10 make a snapshot at 20, in place of that at 10; loading folds a single event."""
    folds = Folds()
    bus = folds.bus()
    async with replica(write_db, bus) as one:
        for nth in range(1, 22):
            await one.ask_one(Add(counter_id="a", amount=nth))
    folds.count = 0
    async with connected(write_db.app) as connection:
        cursor = await connection.execute("SELECT version, schema FROM snapshots ORDER BY version")
        assert await cursor.fetchall() == [(20, 1)]
        assert await load(connection, bus, [A]) == {A: Versioned(21, Counter(total=231))}
    assert folds.count == 1


async def test_the_snapshot_is_what_is_believed(write_db: Database) -> None:
    """A snapshot with another total than its events have gives that total: the events before it are not read."""
    events = [added(A, version) for version in range(1, 13)]
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(events=events, snapshots=[snapshot(A, 5, 500), snapshot(A, 10, 1000)]))
        assert await load(connection, BUS, [A]) == {A: Versioned(12, Counter(total=1002))}


async def test_a_snapshot_at_the_last_event_needs_no_event(write_db: Database) -> None:
    """There is nothing to fold."""
    folds = Folds()
    async with connected(write_db.app) as connection:
        batch = Batch(events=[added(A, version) for version in range(1, 11)], snapshots=[snapshot(A, 10, 1000)])
        await append(connection, 1, batch)
        assert await load(connection, folds.bus(), [A]) == {A: Versioned(10, Counter(total=1000))}
    assert folds.count == 0


async def test_a_snapshot_of_another_schema_is_passed_over(write_db: Database) -> None:
    """A newer one, and even one that cannot be read; the newest of our own schema is taken."""
    batch = Batch(events=[added(A, version) for version in range(1, 31)])
    batch.snapshots = [snapshot(A, 10, 1000), snapshot(A, 20, 2000, schema=2), NewSnapshot(A, 30, 3, b"\xff not a state")]
    async with connected(write_db.app) as connection:
        await append(connection, 1, batch)
        totals = {}
        for schema in (1, 2, 4):
            bus = build_registry(dataclasses.replace(COUNTER, schema=schema))
            [at] = (await load(connection, bus, [A])).values()
            assert at.version == 30
            totals[schema] = at.state.total
    assert totals == {1: 1020, 2: 2010, 4: 30}


async def test_many_are_loaded_by_one_query_and_not_mixed_up(write_db: Database) -> None:
    """Three hundred, some with snapshots, some absent, some asked for twice."""
    keys: list[AggregateKey] = [("acme", "counter", f"c{nth}") for nth in range(300)]
    batch = Batch()
    for nth, key in enumerate(keys):
        batch.events += [added(key, version, nth) for version in range(1, nth % 4 + 1)]
        if nth % 4 == 3:
            batch.snapshots.append(snapshot(key, 2, nth * 1000))
    async with connected(write_db.app) as connection:
        await append(connection, 1, batch)
        loaded = await load(connection, BUS, [*keys, keys[7], keys[5]])
    factors = (0, 1, 2, 1001)
    assert loaded == {key: Versioned(nth % 4, Counter(total=nth * factors[nth % 4])) for nth, key in enumerate(keys)}


@pytest.fixture(scope="module")
def module_db(engines: Engines) -> Iterator[Database]:
    """One database for all examples."""
    database = engines.clone("write")
    yield database
    engines.drop(database)


_numbers = itertools.count()


@given(
    amounts=st.lists(st.integers(0, 9), max_size=40),
    every=st.integers(1, 15),
    together=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_loading_from_snapshots_equals_the_full_fold(module_db: Database, amounts: list[int], every: int, together: int) -> None:
    """Whatever the interval, and however many events an append has."""
    bus = build_registry(snapshot_every=every)
    counter_id = f"c{next(_numbers)}"
    key: AggregateKey = ("acme", "counter", counter_id)

    async def example() -> None:
        async with replica(module_db, bus) as one:
            for begin in range(0, len(amounts), together):
                part = amounts[begin : begin + together]
                await one.ask(*(one.command(Add(counter_id=counter_id, amount=amount)) for amount in part))
        async with connected(module_db.app) as connection:
            stored = await event_store.read_stream(connection, key, after=0, limit=1000)
            [loaded] = (await load(connection, bus, [key])).values()
            cursor = await connection.execute(
                "SELECT version, state FROM snapshots WHERE aggregate_id = %s ORDER BY version", [counter_id]
            )
            snapshots = await cursor.fetchall()
        contents = [bus.codecs.decode(event.type, event.payload) for event in stored]
        assert loaded == Versioned(len(contents), reduce(evolve, contents, Counter()))
        # The newest alone is kept.
        newest = len(contents) // every * every
        assert [version for version, _ in snapshots] == [newest] * (newest > 0)
        for version, state in snapshots:
            assert bus.load_state("counter", state) == reduce(evolve, contents[:version], Counter())

    asyncio.run(example())


async def test_the_line_is_read_in_pages(write_db: Database) -> None:
    """After a position, so many at the most, in order; nothing beyond the end."""
    keys: list[AggregateKey] = [("acme", "counter", name) for name in "ab"]
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(events=[added(key, version) for version in (1, 2, 3) for key in keys]))

        async def positions(after: int, limit: int) -> list[int]:
            return [event.position for event in await event_store.read_line(connection, after=after, limit=limit)]

        assert await positions(0, 4) == [1, 2, 3, 4]
        assert await positions(4, 4) == [5, 6]
        assert await positions(6, 4) == []
        assert await positions(99, 4) == []

        async def versions(key: AggregateKey, after: int, limit: int) -> list[tuple[int, int]]:
            stream = await event_store.read_stream(connection, key, after=after, limit=limit)
            assert {(event.tenant, event.category, event.aggregate_id) for event in stream} <= {key}
            return [(event.version, event.position) for event in stream]

        assert await versions(keys[1], 0, 2) == [(1, 2), (2, 4)]
        assert await versions(keys[1], 2, 2) == [(3, 6)]
        assert await versions(("other", "counter", "a"), 0, 2) == []


async def test_the_head_names_the_last_event_and_the_history(write_db: Database) -> None:
    """Position 0 and no event on an empty line; the epoch stays the same while the server and the database do."""
    async with connected(write_db.app) as connection:
        empty = await event_store.read_head(connection)
        await append(connection, 1, Batch(events=[added(A, 1), added(A, 2)]))
        head = await event_store.read_head(connection)
    assert empty == Head(0, None, head.epoch, 1)
    assert (head.position, head.event_id) == (2, (await events_of(write_db))[1].event_id)
    history, timeline = head.epoch.split("/")
    assert str(UUID(history)) == history
    assert timeline == "1"


async def test_an_envelope_has_all_of_a_stored_event(write_db: Database) -> None:
    """The payload's bytes are unchanged; the time keeps its microseconds."""
    metadata = event_store_pb2.EventMetadata(command_id="c", user_id="alice", traceparent="00-1-2-01")
    event = replace(added(A, 1), metadata=metadata.SerializeToString())
    async with connected(write_db.app) as connection:
        appended = await append(connection, 1, Batch(events=[event]))
    [stored] = await events_of(write_db)
    envelope = event_store.envelope(stored)
    expected = event_store_pb2.EventEnvelope(
        position=1,
        event_id=str(event.event_id),
        tenant="acme",
        aggregate_type="counter",
        aggregate_id="a",
        version=1,
        type="trial.Added",
        payload=event.payload,
        metadata=metadata,
    )
    expected.recorded_at.FromDatetime(appended.recorded_at)
    assert envelope == expected
    assert envelope.recorded_at.ToDatetime().microsecond == appended.recorded_at.microsecond


async def test_unknown_bytes_are_not_read_as_something_else(write_db: Database) -> None:
    """A stream with an event type that this service does not know cannot be loaded; nothing is passed over."""
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(events=[replace(added(A, 1), type="trial.FromTheFuture")]))
        assert await load(connection, BUS, [A]) == {A: Versioned(1, Unreadable(newer=True))}


async def test_commands_are_found_by_tenant_and_id(write_db: Database) -> None:
    """Only those asked for, only of that tenant, and nothing for those that are not there."""
    async with replica(write_db, BUS) as one:
        mine, theirs = one.command(Add(counter_id="a", amount=1)), one.command(Add(counter_id="a", amount=2), tenant="other")
        await one.ask(mine, theirs)
    absent = ("acme", theirs.key[1])
    async with connected(write_db.app) as connection:
        found = await command_log.read_commands(connection, [mine.key, absent, theirs.key])
        assert await command_log.read_commands(connection, []) == {}
    assert {key: (row.tenant, row.payload, row.fingerprint) for key, row in found.items()} == {
        command.key: (command.key[0], command.payload, command.fingerprint) for command in (mine, theirs)
    }


async def test_a_snapshot_of_garbage_is_passed_over(write_db: Database) -> None:
    """The events tell the same; those that are loaded beside it are not disturbed."""
    batch = Batch(events=[*(added(A, version) for version in range(1, 13)), added(B, 1)])
    batch.snapshots = [NewSnapshot(A, 10, 1, b"\xff not a state")]
    async with connected(write_db.app) as connection:
        await append(connection, 1, batch)
        assert await load(connection, BUS, [A, B]) == {A: Versioned(12, Counter(total=12)), B: Versioned(1, Counter(total=1))}


async def test_an_event_of_an_unknown_type_stops_its_aggregate_alone(write_db: Database) -> None:
    """Its commands are told why, and may come again under the same id when a release knows the event; others go on at once.

    What only a newer release can decide has no row in the log: to callers it is unavailable, so they ask another replica.
    """
    unknown = replace(added(A, 2), type="trial.Unheard")
    broken = replace(added(B, 1), payload=b"\xff\xff not an event")
    async with connected(write_db.app) as connection:
        await append(connection, 1, Batch(events=[added(A, 1), unknown, broken]))
    async with replica(write_db, BUS) as one:
        commands = [one.command(Add(counter_id=name, amount=1)) for name in "abc"]
        outcomes = await one.ask(*commands)
        assert reasons(outcomes) == ["RELEASE_TOO_OLD", "AGGREGATE_UNREADABLE", "completed"]
        async with connected(write_db.app) as connection:
            stored = await command_log.read_commands(connection, [command.key for command in commands])
        assert {key[1]: row.status for key, row in stored.items()} == {
            commands[1].key[1]: "failed",
            commands[2].key[1]: "completed",
        }
    learned = build_registry()
    codec = learned.codecs._by_type.pop("trial.Added")
    learned.codecs._by_type |= {"trial.Added": codec, "trial.Unheard": codec}
    async with replica(write_db, learned) as newer:
        assert reasons(await newer.ask(commands[0])) == ["completed"]
