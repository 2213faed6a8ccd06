"""A committer whose cache is behind the line: what the append finds, and what nobody is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands.decide import Outcome
from shared.commands.intake import Limits
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate
from shared.folds.errors import Code
from tests.integration.shared.commands.counters import BUS, adding
from tests.support.checks.history import check_line, commands_of
from tests.support.domains.trial import ADD, COUNTER, Add, Blurt, Counter, CounterEvent, GoOffDuty, add, build_registry, evolve
from tests.support.fakes.replica import make_command, reasons, refusal, replica

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
