"""The committer on a real database: outcomes, caches that are stale, limits, side rows, reactions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import committer
from shared.commands.committer import Committer
from shared.commands.decide import Command, Outcome
from shared.commands.intake import Limits
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate
from shared.folds.errors import Code, OverLimit, Refusal, Unavailable
from tests.support.checks.history import check_line, commands_of, connected, events_of
from tests.support.domains.trial import (
    ADD,
    COUNTER,
    Add,
    Blurt,
    Chain,
    Counter,
    CounterEvent,
    GoOffDuty,
    Move,
    SetPassword,
    Share,
    Swell,
    add,
    build_registry,
    evolve,
    twice_as_much,
)
from tests.support.fakes.replica import make_command, reasons, refusal, replica
from tests.support.system.waiting import eventually

BUS = build_registry()


def adding(amount: int, counter_id: str = "a", *, expected_version: int | None = None, tenant: str = "acme") -> Command:
    """A command with an id of its own."""
    return make_command(BUS, Add(counter_id=counter_id, amount=amount), expected_version=expected_version, tenant=tenant)


async def test_an_outcome_says_where_the_aggregate_and_the_line_are(write_db: Database) -> None:
    """Version, events, position and head of an acceptance, a no-op and a refusal, as the log has them too."""
    commands = [adding(5), make_command(BUS, Move(counter_id="a", to_id="b", amount=2)), adding(0), adding(-9)]
    async with replica(write_db, BUS) as one:
        outcomes = [(await one.ask(command))[0] for command in commands]
    assert outcomes[:3] == [Outcome("completed", 1, 1, 1, 1), Outcome("completed", 2, 2, 3, 3), Outcome("completed", 2, 0, 0, 3)]
    assert (outcomes[3].status, outcomes[3].version, outcomes[3].head) == ("rejected", 2, 3)
    assert (refusal(outcomes[3]).reason, refusal(outcomes[3]).facts) == ("BELOW_ZERO", {"total": "3"})
    log = await commands_of(write_db)
    for command, outcome in zip(commands, outcomes, strict=True):
        row = log[command.key]
        assert (row.status, row.version, row.events_appended, row.position, row.head) == (
            outcome.status, outcome.version, outcome.events_appended, outcome.position, outcome.head,
        )  # fmt: skip
        assert (row.payload, row.fingerprint, row.user_id) == (command.payload, command.fingerprint, "alice")
    await check_line(write_db)


async def test_commands_that_come_together_are_one_batch_in_their_order(write_db: Database) -> None:
    """A hundred on one counter, each seeing those before it: one append, and one moment for all."""
    batches: list[int] = []
    committer = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC), committed=batches.append)
    running = asyncio.create_task(committer.run())
    commands = [adding(1) for _ in range(99)] + [adding(-99)]
    outcomes = await committer.submit([[command] for command in commands])
    committer.close()
    await running
    assert [outcome.version for [outcome] in outcomes] == list(range(1, 101))
    assert {outcome.head for [outcome] in outcomes} == {100}
    assert batches == [100]
    assert len({event.recorded_at for event in await check_line(write_db)}) == 1


async def test_a_batch_is_no_larger_than_it_may_be(write_db: Database) -> None:
    """Neither in commands nor in bytes; an atomic unit that is larger than that goes alone, but whole."""
    heads: list[int] = []
    limits = Limits(batch_commands_max=4, batch_bytes_max=200)
    committer = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC), committed=heads.append, limits=limits)
    running = asyncio.create_task(committer.run())
    await committer.submit([[adding(1)] for _ in range(10)])
    assert heads == [4, 8, 10]
    wide = make_command(BUS, Add(counter_id="c" * 90, amount=1))
    await committer.submit([[replace(wide, key=(wide.key[0], adding(1).key[1]))] for _ in range(4)])
    assert heads[3:] == [12, 14]
    await committer.submit([[adding(1)], [adding(1) for _ in range(6)], [adding(1)]])
    assert heads[5:] == [15, 21, 22]
    committer.close()
    await running


async def test_a_batch_ends_when_it_has_many_events(write_db: Database) -> None:
    """What reactions make of few commands is not one long transaction: the rest follows in the next, in its order."""
    heads: list[int] = []
    limits = Limits(batch_events_max=100)
    committer = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC), committed=heads.append, limits=limits)
    running = asyncio.create_task(committer.run())
    outcomes = await committer.submit([[sharing("a", 39)] for _ in range(7)] + [[sharing("a", 300)], [adding(1)]])
    assert [outcome.version for [outcome] in outcomes] == list(range(1, 10))
    assert heads == [120, 240, 581, 582]
    committer.close()
    await running
    assert len(await check_line(write_db)) == 582


def sharing(counter_id: str, others: int) -> Command:
    """A command whose reactions change so many others."""
    return make_command(BUS, Share(counter_id=counter_id, to_ids=tuple(f"c{nth}" for nth in range(others)), amount=1))


async def test_replicas_that_clash_have_no_larger_batches(write_db: Database) -> None:
    """Under the lock, which is taken after a clash, a batch ends as well; every command is answered, once."""
    limits = Limits(batch_events_max=10)
    async with replica(write_db, BUS, limits=limits) as one, replica(write_db, BUS, limits=limits) as other, asyncio.timeout(60):
        asked = [each.ask(*[sharing(name, 6) for _ in range(20)]) for each, name in ((one, "a"), (other, "b"))]
        both = await asyncio.gather(*asked)
        assert one.committer.observer.conflicts + other.committer.observer.conflicts > 0
    assert reasons([outcome for outcomes in both for outcome in outcomes]) == ["completed"] * 40
    assert len(await check_line(write_db)) == 40 * 7


async def test_a_lone_caller_never_waits_for_company(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, each is a batch of its own at once, however long a batch might wait to grow."""
    monkeypatch.setattr(committer, "GATHER_WAIT_S_EACH", 30)
    async with replica(write_db, BUS, limits=Limits(gather_wait_s_max=30)) as one, asyncio.timeout(10):
        for _ in range(20):
            await one.ask(adding(1))


async def test_callers_that_come_back_are_waited_for(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten callers, each asking again as soon as it is answered: they stay in step, ten to a batch."""
    monkeypatch.setattr(committer, "GATHER_WAIT_S_EACH", 5)
    heads: list[int] = []
    async with replica(write_db, BUS, limits=Limits(gather_wait_s_max=5)) as one:
        one.committer._committed = heads.append

        async def ask_ten_times() -> None:
            for _ in range(10):
                await one.ask(adding(1))

        async with asyncio.timeout(60):
            await asyncio.gather(*(ask_ten_times() for _ in range(10)))
    assert heads == list(range(10, 101, 10))


async def test_a_crowd_that_comes_in_slowly_is_waited_for(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten came, and come back one by one: each time that the wait is over there is one more, until all ten are there."""
    monkeypatch.setattr(committer, "GATHER_WAIT_S_EACH", 5)
    heads: list[int] = []
    came: list[asyncio.Task[Any]] = []
    async with replica(write_db, BUS, limits=Limits(gather_wait_s_max=60)) as one:
        one.committer._committed = heads.append
        await one.ask(*(adding(1) for _ in range(10)))

        def comes() -> None:
            came.append(asyncio.create_task(one.ask(adding(1))))

        def over_soon(when: float) -> asyncio.Timeout:
            if len(came) < 10:
                comes()
            return asyncio.timeout(0.01)

        monkeypatch.setattr(asyncio, "timeout_at", over_soon)
        comes()
        async with asyncio.timeout(60):
            await eventually(lambda: len(came) == 10)
            await asyncio.gather(*came)
    assert heads == [10, 20]


async def test_who_comes_when_the_crowd_is_gone_does_not_wait_for_it(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten callers came once; what they might have come back in is over when the next one comes."""
    waits: list[float] = []
    async with replica(write_db, BUS, limits=Limits(gather_wait_s_max=0.1)) as one:
        monkeypatch.setattr(committer, "GATHER_WAIT_S_EACH", 1)
        await one.ask(*(adding(1) for _ in range(10)))
        over = asyncio.get_running_loop().time() + 0.11
        await eventually(lambda: asyncio.get_running_loop().time() > over)
        timeout_at = asyncio.timeout_at

        def noted(when: float) -> asyncio.Timeout:
            waits.append(when)
            return timeout_at(when)

        monkeypatch.setattr(asyncio, "timeout_at", noted)
        await one.ask(adding(1))
    assert not waits


# Caches that are stale: another replica has written


async def test_a_stale_cache_is_found_by_the_append(write_db: Database) -> None:
    """Decided on 5, but there are 105: accepted on the state of now, not of then."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(adding(5))
        await other.ask(adding(100))
        [outcome] = await one.ask(adding(-5))
        assert outcome == Outcome("completed", 3, 1, 3, 3)
        [outcome] = await other.ask(adding(-100))
        assert outcome == Outcome("completed", 4, 1, 4, 4)
    await check_line(write_db)


async def test_a_refusal_on_a_stale_cache_is_never_answered(write_db: Database) -> None:
    """Too little in the cache, enough in truth: accepted; nor is the mistaken refusal in the log."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(adding(5))
        await other.ask(adding(100))
        asked = adding(-50)
        assert reasons(await one.ask(asked)) == ["completed"]
        assert (await commands_of(write_db))[asked.key].status == "completed"


async def test_a_refusal_tells_the_facts_of_now(write_db: Database) -> None:
    """Refused in any case: but with what there is, not with what was cached."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(adding(5))
        await other.ask(adding(100))
        [outcome] = await one.ask(adding(-500))
        assert (refusal(outcome).facts, outcome.version, outcome.head) == ({"total": "105"}, 2, 2)


async def test_a_no_op_on_a_stale_cache_is_never_answered(write_db: Database) -> None:
    """Nothing to do by the cache, but something in truth; a tenant's own decision adds up to a hundred."""

    def up_to(counter: Counter, command: Add, meta: object) -> list[CounterEvent]:
        return add(counter, replace(command, amount=command.amount - counter.total), meta)  # type: ignore[arg-type]

    bus = build_registry()
    bus.rows_of(COUNTER).override(ADD, up_to, tenant="acme", name="other")
    async with replica(write_db, bus) as one, replica(write_db, BUS) as other:
        assert (await one.ask_one(Add(counter_id="a", amount=100))).events_appended == 1
        assert (await one.ask_one(Add(counter_id="a", amount=100))).events_appended == 0
        await other.ask(adding(-30))
        outcome = await one.ask_one(Add(counter_id="a", amount=100))
        assert (outcome.events_appended, outcome.version) == (1, 3)


async def test_an_expected_version_is_held_against_the_truth(write_db: Database) -> None:
    """Whatever the cache says: right by the cache is refused with the actual version, right in truth is accepted."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(adding(5))
        await other.ask(adding(100))
        [stale] = await one.ask(adding(1, expected_version=1))
        assert (refusal(stale).code, refusal(stale).facts) == (Code.ABORTED, {"expected": "1", "actual": "2"})
        await other.ask(adding(100))
        [right] = await one.ask(adding(1, expected_version=3))
        assert (right.status, right.version) == ("completed", 4)
        [early] = await other.ask(adding(1, expected_version=9))
        assert refusal(early).facts == {"expected": "9", "actual": "4"}
        [absent] = await other.ask(adding(1, "new", expected_version=1))
        assert refusal(absent).facts == {"expected": "1", "actual": "0"}
        assert reasons(await one.ask(adding(1, "new", expected_version=0))) == ["completed"]
    await check_line(write_db)


async def test_what_was_only_read_may_be_stale_too(write_db: Database) -> None:
    """The colleague is on duty by the cache, and off in truth."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(adding(1, "a"), adding(1, "b"))
        assert reasons([await other.ask_one(GoOffDuty(counter_id="b", colleague_id="a"))]) == ["completed"]
        assert reasons([await one.ask_one(GoOffDuty(counter_id="a", colleague_id="b"))]) == ["NOBODY_ON_DUTY"]


async def test_a_clash_of_one_command_spoils_nothing_for_its_batch(write_db: Database) -> None:
    """Fifty on as many counters, one of them stale: all as if nothing had been cached."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(*(adding(5, f"c{nth}") for nth in range(50)))
        await other.ask(adding(-5, "c7"))
        outcomes = await one.ask(*(adding(-5, f"c{nth}") for nth in range(50)))
        assert [nth for nth, reason in enumerate(reasons(outcomes)) if reason != "completed"] == [7]
    await check_line(write_db)


@dataclass
class Loads:
    """Counts events folded, so that a test sees what came from the cache: only what was new is folded then."""

    count: int = 0
    bus: CommandRegistry = field(init=False)

    def __post_init__(self) -> None:
        def evolve_and_count(counter: Counter, event: CounterEvent) -> Counter:
            self.count += 1
            return evolve(counter, event)

        self.bus = build_registry(Aggregate(category="counter", initial=Counter(), evolve=evolve_and_count), snapshot_every=1000)


async def test_what_was_used_last_is_in_the_cache_and_the_cache_is_bounded(write_db: Database) -> None:
    """Of three counters with room for two, the one not used for longest is read again."""
    loads = Loads()
    async with replica(write_db, loads.bus, limits=Limits(cached_aggregates_max=2)) as one:

        async def folds(counter_id: str) -> int:
            loads.count = 0
            await one.ask_one(Add(counter_id=counter_id, amount=1))
            return loads.count

        assert [await folds(name) for name in "aabb"] == [1, 1, 1, 1]
        assert await folds("a") == 1
        assert await folds("c") == 1  # b goes
        assert await folds("a") == 1
        assert await folds("b") == 3
    await check_line(write_db)


async def test_what_was_rolled_back_is_not_in_the_cache(write_db: Database) -> None:
    """After a clash, a refusal or a defect the next command sees the truth."""
    async with replica(write_db, BUS) as one, replica(write_db, BUS) as other:
        await one.ask(adding(5))
        await other.ask(adding(100))
        await one.ask_atomic(adding(7), adding(-500))
        await one.ask(make_command(BUS, Blurt(counter_id="a", text="x")))
        [outcome] = await one.ask(adding(-105))
        assert outcome.status == "completed"
        assert reasons(await one.ask(adding(-1))) == ["BELOW_ZERO"]
    await check_line(write_db)


# Limits


async def refused_at_once(committer: Committer, *commands: Command) -> Refusal:
    """Why these were not taken."""
    with pytest.raises(Refusal) as refused:
        await committer.submit([[command] for command in commands])
    return refused.value


async def test_a_full_queue_takes_nothing_more(write_db: Database) -> None:
    """One tenant may fill it alone; others within their share are taken all the same. A batch is not taken in part."""
    limits = Limits(queue_commands_max=10, queue_bytes_max=200)
    committer = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC), limits=limits)
    # Nothing runs yet: what is taken waits.
    taken = [committer.submit([[adding(1)] for _ in range(9)])]
    no = await refused_at_once(committer, adding(1), adding(1))
    assert (type(no), no.reason, no.retry_after_s) == (OverLimit, "QUEUE_FULL", 0.5)
    taken.append(committer.submit([[adding(1, tenant="other")] for _ in range(5)]))
    no = await refused_at_once(committer, adding(1, tenant="other"))
    assert (type(no), no.reason, no.retry_after_s) == (OverLimit, "TENANT_OVER_QUOTA", 0.5)
    taken.append(committer.submit([[adding(1, tenant="third")] for _ in range(3)]))
    assert (await refused_at_once(committer, adding(1, tenant="third"))).reason == "TENANT_OVER_QUOTA"

    running = asyncio.create_task(committer.run())
    await asyncio.gather(*taken)
    large = make_command(BUS, Add(counter_id="c" * 201, amount=1))
    assert (await refused_at_once(committer, large)).reason == "QUEUE_FULL"
    # Everything is answered: there is room for as many again, for the same tenant too.
    assert len(await committer.submit([[adding(1)] for _ in range(10)])) == 10
    # What is announced counts as waiting until it is submitted, or given up.
    with committer.announced("acme", 10):
        assert (await refused_at_once(committer, adding(1))).reason == "QUEUE_FULL"
        with pytest.raises(OverLimit, match="waiting"), committer.announced("acme", 1):
            raise AssertionError
        with committer.announced("other", 5):
            assert len(await committer.submit([[adding(1, tenant="third")]])) == 1
    committer.close()
    no = await refused_at_once(committer, adding(1))
    assert (type(no), no.reason) == (Unavailable, "SHUTTING_DOWN")
    await running
    assert len(await check_line(write_db)) == 28


async def test_closing_answers_what_was_taken(write_db: Database) -> None:
    """A committer that is told to end while a thousand wait commits them all first."""
    committer = Committer(write_db.app, BUS, shard=1, clock=lambda: datetime.now(UTC))
    running = asyncio.create_task(committer.run())
    waiting = committer.submit([[adding(1)] for _ in range(1000)])
    committer.close()
    await running
    assert {outcome.status for [outcome] in await waiting} == {"completed"}
    assert len(await check_line(write_db)) == 1000


async def test_an_idle_committer_ends_when_closed(write_db: Database) -> None:
    """Whether or not it ever had anything to do."""
    for asked in (0, 1):
        async with replica(write_db, BUS) as one:
            for _ in range(asked):
                await one.ask(adding(1))


async def test_an_event_that_is_too_large_is_refused_before_anything_is_stored(write_db: Database) -> None:
    """RESOURCE_EXHAUSTED, with its neighbours unharmed and nothing of it in any table."""
    async with replica(write_db, BUS) as one:
        too_large = one.command(Swell(counter_id="a", amount=300_000))
        outcomes = await one.ask(adding(1), too_large, adding(1))
        assert reasons(outcomes) == ["completed", "EVENT_TOO_LARGE", "completed"]
        assert refusal(outcomes[1]).code is Code.RESOURCE_EXHAUSTED
        assert too_large.key not in await commands_of(write_db)
        alone = await one.ask(one.command(Swell(counter_id="a", amount=300_000)))
        assert reasons(alone) == ["EVENT_TOO_LARGE"]
    assert len(await check_line(write_db)) == 2


# Side rows, reactions, tenants


async def hashes(database: Database) -> dict[str, str]:
    """The stored credentials."""
    async with connected(database.owner) as owner:
        cursor = await owner.execute("SELECT tenant || '/' || subject_id, password_hash FROM credentials")
        return dict(await cursor.fetchall())


async def test_a_hash_is_saved_with_its_command_or_not_at_all(write_db: Database) -> None:
    """In the same transaction; not for a refused command, nor for an undone one; the last of two in one batch stays."""

    def password(subject: str, word: str) -> Command:
        return make_command(BUS, SetPassword(counter_id="a", subject_id=subject, word=word))

    async with replica(write_db, BUS) as one:
        assert reasons(await one.ask(password("u1", "one"), password("u2", ""), password("u3", "three"))) == [
            "completed", "WEAK", "completed",
        ]  # fmt: skip
        assert await hashes(write_db) == {"acme/u1": "hash(one)", "acme/u3": "hash(three)"}
        await one.ask_atomic(password("u4", "four"), adding(-1))
        assert await hashes(write_db) == {"acme/u1": "hash(one)", "acme/u3": "hash(three)"}
        assert reasons(await one.ask_atomic(password("u1", "five"), password("u1", "six"))) == ["completed", "completed"]
        assert (await hashes(write_db))["acme/u1"] == "hash(six)"
    rows = await commands_of(write_db)
    kept = b"".join(row.payload + (row.error or b"") for row in rows.values())
    kept += b"".join(event.payload + event.metadata for event in await events_of(write_db))
    for word in (b"one", b"three", b"four", b"five", b"six"):
        assert word not in kept


async def test_a_refusal_of_a_reaction_undoes_everything(write_db: Database) -> None:
    """The money that left did not leave; the refusal is the command's own."""
    async with replica(write_db, BUS) as one:
        await one.ask(adding(900, "a"), adding(500, "b"))
        moving = one.command(Move(counter_id="a", to_id="b", amount=600))
        [outcome] = await one.ask(moving)
        assert reasons([outcome]) == ["FULL"]
        assert (await commands_of(write_db))[moving.key].status == "rejected"
        assert reasons([await one.ask_one(Move(counter_id="a", to_id="b", amount=500))]) == ["completed"]
    events = await check_line(write_db)
    assert [(event.type, event.aggregate_id) for event in events[2:]] == [("trial.Moved", "a"), ("trial.Added", "b")]


async def test_endless_reactions_are_a_defect_of_their_command_alone(write_db: Database) -> None:
    """They end, nothing of them is kept, others go on."""
    async with replica(write_db, BUS) as one, asyncio.timeout(60):
        endless = one.command(Chain(counter_id="a", links=-1))
        assert reasons(await one.ask(adding(1), endless, adding(1))) == ["completed", "INTERNAL", "completed"]
        assert (await commands_of(write_db))[endless.key].status == "failed"
        assert reasons([await one.ask_one(Chain(counter_id="a", links=5))]) == ["completed"]
    assert len(await check_line(write_db)) == 8


async def test_tenants_are_apart(write_db: Database) -> None:
    """Same ids of aggregates and of commands, other states; a tenant's own decision is its own."""
    bus = build_registry()
    bus.rows_of(COUNTER).override(ADD, twice_as_much, tenant="umbrella", name="other")
    async with replica(write_db, bus) as one:
        mine = one.command(Add(counter_id="a", amount=5), tenant="umbrella")
        theirs = one.command(Add(counter_id="a", amount=5), id=mine.key[1])
        outcomes = await one.ask(mine, theirs)
        assert [(outcome.status, outcome.version) for outcome in outcomes] == [("completed", 1)] * 2
        assert reasons(await one.ask(one.command(Move(counter_id="a", to_id="b", amount=10), tenant="umbrella"))) == ["completed"]
        assert reasons(await one.ask(one.command(Move(counter_id="a", to_id="b", amount=10)))) == ["BELOW_ZERO"]
    assert {event.tenant for event in await check_line(write_db)} == {"acme", "umbrella"}


async def test_a_database_of_another_shard_is_not_written_to(write_db: Database) -> None:
    """Its lock is another: the lines would mix. The connection it was found out on is not left behind."""
    committer = Committer(write_db.app, BUS, shard=2, clock=lambda: datetime.now(UTC))
    running = asyncio.create_task(committer.run())
    [[outcome]] = await committer.submit([[adding(1)]])
    assert reasons([outcome]) == ["DATABASE_UNAVAILABLE"]
    async with connected(write_db.admin) as admin:

        async def gone() -> bool:
            query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'foldline-committer' AND datname = %s"
            return not await (await admin.execute(query, [write_db.name])).fetchall()

        await eventually(gone)
    committer.close()
    await running
    assert await events_of(write_db) == []
