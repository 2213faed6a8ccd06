"""Commands for later: each runs once, by the replica that comes first, or is cancelled; and nothing else changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from deploy.bootstrap import Database
from shared.commands import due as due_commands
from shared.commands import schedule as schedule_module
from shared.commands.append import Batch, NewEvent, append
from shared.commands.decide import Command
from shared.commands.due import read_due
from shared.commands.log import StoredCommand
from shared.commands.schedule import Schedule, Scheduler
from shared.folds.errors import Invalid, NotFound, OverLimit, Rejected
from shared.platform.identity import Identity, Role
from shared.platform.postgres import Reads
from tests.support.checks.history import check_line, commands_of, connected
from tests.support.domains.trial import Add, Blurt, SetPassword, Swell, build_registry
from tests.support.fakes.replica import Replica, make_command, reasons, replica
from tests.support.system.waiting import eventually

REGISTRY = build_registry()
ALICE = Identity(tenant="acme", user_id="alice", roles=frozenset({Role.USER}))
BOB = Identity(tenant="acme", user_id="bob", roles=frozenset({Role.USER}))
ADMIN = Identity(tenant="acme", user_id="ann", roles=frozenset({Role.TENANT_ADMIN}))


def now() -> datetime:
    """The moment."""
    return datetime.now(UTC)


def adding(amount: int = 1, counter_id: str = "a", **more: Any) -> Command:
    """A command of alice's."""
    return make_command(REGISTRY, Add(counter_id=counter_id, amount=amount), **more)


@asynccontextmanager
async def pool(database: Database) -> AsyncIterator[Reads]:
    """What a replica calls functions on."""
    reads = Reads(database.app, application_name="test")
    await reads.open()
    try:
        yield reads
    finally:
        await reads.close()


@asynccontextmanager
async def firing(database: Database, one: Replica, reads: Reads) -> AsyncIterator[None]:
    """A replica whose scheduler runs."""
    running = asyncio.create_task(Scheduler(reads, one.committer).run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_an_idle_scheduler_asks_one_question_a_round(write_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next one is due; of what is due, it reads when something is."""
    read: list[int] = []

    async def noting(*arguments: Any, **more: Any) -> Any:
        read.append(len(arguments))
        return await read_due(*arguments, **more)

    monkeypatch.setattr(schedule_module, "read_due", noting)
    later, soon = adding(), adding(counter_id="b")
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        scheduler = Scheduler(reads, one.committer)
        assert await scheduler._fire() == schedule_module.POLL_S
        await Schedule(reads).add(later, now() + timedelta(hours=1))
        assert await scheduler._fire() == schedule_module.POLL_S
        assert read == []
        await Schedule(reads).add(soon, now() + timedelta(milliseconds=50))
        assert 0 <= await scheduler._fire() < schedule_module.POLL_S
        async with firing(write_db, one, reads):
            assert await ended(write_db, soon) == ["completed"]
    assert read != []
    assert (await row_of(write_db, later)).status == "scheduled"


async def row_of(database: Database, command: Command) -> StoredCommand:
    """What the log says of a command."""
    return (await commands_of(database))[command.key]


async def ended(database: Database, *commands: Command) -> list[str]:
    """The statuses of commands once none of them waits any more."""

    async def statuses() -> list[str] | None:
        log = await commands_of(database)
        found = [log[command.key].status for command in commands]
        return None if "scheduled" in found else found

    found = await eventually(statuses, 20, every_s=0.05)
    assert found is not None
    return found


async def test_a_command_runs_at_its_time_as_its_sender_sent_it(write_db: Database) -> None:
    """Under its own id, user, cause and trace; the log keeps when it was due, and it was not late."""
    cause, due_at = str(uuid4()), now() + timedelta(milliseconds=400)
    command = adding(5, user_id="alice", on_behalf_of="bob", causation_id=cause, traceparent="00-1-2-01")
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one, firing(write_db, one, reads):
        row = await Schedule(reads).add(command, due_at)
        assert (row.status, row.due_at, row.finished_at) == ("scheduled", due_at, None)
        assert await ended(write_db, command) == ["completed"]
    row = await row_of(write_db, command)
    assert (row.user_id, row.on_behalf_of, row.causation_id, row.traceparent) == ("alice", "bob", cause, "00-1-2-01")
    assert (row.due_at, row.version, row.events_appended, row.position) == (due_at, 1, 1, 1)
    assert row.finished_at is not None
    assert row.finished_at >= due_at
    [event] = await check_line(write_db)
    assert command.key[1].encode() in event.metadata


async def test_a_repeat_changes_nothing(write_db: Database) -> None:
    """Before it runs and after; the same id for another content is refused, and sending it runs it no sooner."""
    command, due_at = adding(5), now() + timedelta(days=1)
    other = adding(6, id=command.key[1])
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = Schedule(reads)
        first = await schedule.add(command, due_at)
        assert await schedule.add(command, due_at + timedelta(days=1)) == first
        with pytest.raises(Invalid, match="another content"):
            await schedule.add(other, due_at)
        assert reasons(await one.ask(command, other)) == ["scheduled", "COMMAND_ID_REUSED"]
        assert await row_of(write_db, command) == first
        await schedule.move(ALICE, command.key[1], now() - timedelta(days=1))
        async with firing(write_db, one, reads):
            assert await ended(write_db, command) == ["completed"]
        ran = await row_of(write_db, command)
        assert await schedule.add(command, due_at) == ran
        assert reasons(await one.ask(command, other)) == ["completed", "COMMAND_ID_REUSED"]
    assert len(await check_line(write_db)) == 1


async def test_the_past_is_now(write_db: Database) -> None:
    """A moment that has passed, even before 1970, becomes the present one."""
    command = adding()
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one, firing(write_db, one, reads):
        before = now() - timedelta(seconds=5)
        row = await Schedule(reads).add(command, datetime(1, 1, 1, tzinfo=UTC))
        assert row.due_at is not None
        assert row.due_at > before
        assert await ended(write_db, command) == ["completed"]


async def test_three_replicas_run_each_command_once_and_in_order(write_db: Database) -> None:
    """All of them fire, without the lease that usually spares them that: three hundred due at one instant, and in the past."""
    commands = [adding(1, received) for received in ("a", "b", "c") * 100]
    async with (
        pool(write_db) as reads,
        replica(write_db, REGISTRY) as one,
        replica(write_db, REGISTRY) as two,
        replica(write_db, REGISTRY) as three,
    ):
        due_at = now()
        for nth, command in enumerate(commands):
            await Schedule(reads).add(command, due_at + timedelta(microseconds=nth))
        async with firing(write_db, one, reads), firing(write_db, two, reads), firing(write_db, three, reads):
            assert set(await ended(write_db, *commands)) == {"completed"}
    assert len(await check_line(write_db)) == 300


async def test_what_was_due_while_nothing_ran_runs_in_order(write_db: Database) -> None:
    """The events are in the order of the due times, not of the scheduling."""
    commands = [adding(1, f"c{nth}") for nth in range(50)]
    async with pool(write_db) as reads:
        schedule = Schedule(reads)
        for nth, command in reversed(list(enumerate(commands))):
            await schedule.add(command, now() + timedelta(days=1, seconds=nth))
        async with connected(write_db.owner) as owner:  # the days pass
            await owner.execute("UPDATE commands SET due_at = due_at - interval '2 days'")
        async with replica(write_db, REGISTRY) as one, firing(write_db, one, reads):
            assert set(await ended(write_db, *commands)) == {"completed"}
    assert [event.aggregate_id for event in await check_line(write_db)] == [f"c{nth}" for nth in range(50)]


async def test_of_cancelling_and_firing_exactly_one_wins(write_db: Database) -> None:
    """Two hundred times: a command that was cancelled has no events, one that ran cannot be cancelled."""
    outcomes: dict[str, int] = {"completed": 0, "cancelled": 0}
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one, replica(write_db, REGISTRY) as two:
        schedule, schedulers = Schedule(reads), [Scheduler(reads, each.committer) for each in (one, two)]
        for nth in range(200):
            command = adding(1, f"c{nth}")
            await schedule.add(command, now())
            firings = [asyncio.create_task(scheduler._fire()) for scheduler in schedulers]
            for _ in range(nth % 23):  # at another step of the firing each time
                await asyncio.sleep(0)
            try:
                await schedule.cancel(ALICE, command.key[1])
                told = "cancelled"
            except Rejected as refusal:
                told = refusal.facts["status"]
            await asyncio.gather(*firings)
            await asyncio.gather(*(scheduler._fire() for scheduler in schedulers))
            row = await row_of(write_db, command)
            assert (row.status, row.events_appended) == (told, 1 if told == "completed" else 0)
            outcomes[told] += 1
    assert outcomes["completed"] == len(await check_line(write_db))
    assert min(outcomes.values()) > 0, outcomes


async def test_a_command_that_was_put_off_while_it_was_fired_waits(write_db: Database) -> None:
    """The firing had read the old time: its append finds the row changed, and keeps its hands off."""
    command = adding()
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        schedule = Schedule(reads)
        await schedule.add(command, now())
        async with connected(write_db.app) as connection:
            [due], _ = await read_due(connection, 10)
        later = now() + timedelta(days=1)
        moved = await schedule.move(ALICE, command.key[1], later)
        assert moved.due_at == later
        scheduler = Scheduler(reads, one.committer)
        assert await scheduler._submit([scheduler._command(due)]) == []
        assert (await row_of(write_db, command)).status == "scheduled"
        assert await scheduler._fire() > 0
    assert await check_line(write_db) == []


async def test_a_refusal_is_final_and_stands_in_the_log(write_db: Database) -> None:
    """By a rule, by a defect, by its size: each outcome is there, with its reason, and nothing is fired again."""
    commands = [
        adding(-1),
        make_command(REGISTRY, Blurt(counter_id="a", text="secret")),
        make_command(REGISTRY, Swell(counter_id="a", amount=300_000)),
        adding(1, "b", expected_version=7),
    ]
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        for command in commands:
            await Schedule(reads).add(command, now())
        async with firing(write_db, one, reads):
            assert await ended(write_db, *commands) == ["rejected", "failed", "rejected", "rejected"]
        errors = [(await row_of(write_db, command)).error or b"" for command in commands]
        wanted = (b"BELOW_ZERO", b"INTERNAL", b"EVENT_TOO_LARGE", b"VERSION_MISMATCH")
        assert all(reason in error for reason, error in zip(wanted, errors, strict=True))
        # A defect may be tried again under the same id, at another time too.
        row = await Schedule(reads).add(commands[1], now() + timedelta(days=1))
        assert (row.status, row.error, row.finished_at) == ("scheduled", None, None)
    assert await check_line(write_db) == []


async def test_what_can_no_longer_be_sent_ends_with_its_reason(write_db: Database) -> None:
    """Its bytes cannot be read, its role no longer suffices: each ends alone, others run."""
    broken, powerless, good = adding(), adding(), adding()
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        for command in (broken, powerless, good):
            await Schedule(reads).add(command, now())
        async with connected(write_db.owner) as owner:
            change = "UPDATE commands SET {} WHERE command_id = %s"
            await owner.execute(change.format(r"payload = '\xff'"), [broken.key[1]])
            await owner.execute(change.format("roles = '{reader}'"), [powerless.key[1]])
        async with firing(write_db, one, reads):
            assert await ended(write_db, broken, powerless, good) == ["failed", "rejected", "completed"]
        assert b"ROLE_MISSING" in ((await row_of(write_db, powerless)).error or b"")


async def test_a_due_command_of_a_newer_release_waits_for_a_replica_of_that(
    write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its type, a field, or an event of its aggregate is not known: it waits, others run, and a newer scheduler sends it.

    After an hour of that it ends by name: perhaps no release knows it any more.
    """
    monkeypatch.setattr("shared.commands.schedule.BATCH_MAX", 2)
    monkeypatch.setattr("shared.commands.schedule.RETRY_S", 0.02)
    typed, fielded, later, gone = adding(1, "b"), adding(1, "c"), adding(1, "d"), adding(1, "e")
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        for command in (typed, fielded, later, gone):
            await Schedule(reads).add(command, now())
        async with connected(write_db.owner) as owner:
            change = "UPDATE commands SET {} WHERE command_id = %s"
            await owner.execute(change.format("type = 'trial.Newer'"), [typed.key[1]])
            await owner.execute(change.format(r"payload = payload || '\xf03f01'"), [fielded.key[1]])
            await owner.execute(change.format("type = 'trial.Gone'"), [gone.key[1]])
            unknown = NewEvent(uuid4(), ("acme", "counter", "d"), 1, "trial.Unheard", b"", b"")
            await append(owner, 1, Batch(events=[unknown]))
        async with firing(write_db, one, reads):
            good = adding()
            await Schedule(reads).add(good, now())
            assert await ended(write_db, good) == ["completed"]
        waiting = [(await row_of(write_db, command)).status for command in (typed, fielded, later, gone)]
        assert waiting == ["scheduled"] * 4
        newer = build_registry()
        newer.routes["trial.Newer"] = newer.routes["trial.Add"]
        codec = newer.codecs._by_type.pop("trial.Added")
        newer.codecs._by_type |= {"trial.Added": codec, "trial.Unheard": codec}
        async with connected(write_db.owner) as owner:
            await owner.execute("UPDATE commands SET payload = %s WHERE command_id = %s", [fielded.payload, fielded.key[1]])
        async with replica(write_db, newer) as two, firing(write_db, two, reads):
            assert await ended(write_db, typed, fielded, later) == ["completed"] * 3
        monkeypatch.setattr("shared.commands.schedule.NEWER_WAITS_S", 0.1)
        async with firing(write_db, one, reads):
            assert await ended(write_db, gone) == ["failed"]
        assert b"UNKNOWN_COMMAND" in ((await row_of(write_db, gone)).error or b"")


async def test_any_number_of_due_commands_of_a_newer_release_hold_up_no_other(
    write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when there are more than are remembered, as after a rollback of a release; all of them end in time.

    Nor does one hold up the command of another tenant that has the same id.
    """
    for name, value in {"BATCH_MAX": 2, "NEWER_MAX": 1, "RETRY_S": 0.02}.items():
        monkeypatch.setattr(f"shared.commands.schedule.{name}", value)
    unknown, good = [adding(1, f"u{number}") for number in range(6)], adding()
    async with pool(write_db) as reads, replica(write_db, REGISTRY) as one:
        for command in (*unknown, good):
            await Schedule(reads).add(command, now())
        async with connected(write_db.owner) as owner:
            change = "UPDATE commands SET type = 'trial.Newer' WHERE command_id = ANY (%s::uuid[])"
            await owner.execute(change, [[command.key[1] for command in unknown]])
        async with firing(write_db, one, reads):
            assert await ended(write_db, good) == ["completed"]
            other = adding(id=unknown[0].key[1], tenant="umbrella")
            await Schedule(reads).add(other, now())
            assert await ended(write_db, other) == ["completed"]
            assert {(await row_of(write_db, command)).status for command in unknown} == {"scheduled"}
            monkeypatch.setattr("shared.commands.schedule.NEWER_WAITS_S", 0.02)
            assert await ended(write_db, *unknown) == ["failed"] * 6


async def test_only_its_sender_and_administrators_steer_a_command(write_db: Database) -> None:
    """For anybody else, of this tenant or another, it is not there."""
    command = adding()
    stranger = Identity(tenant="umbrella", user_id="alice", roles=frozenset({Role.TENANT_ADMIN}))
    async with pool(write_db) as reads:
        schedule = Schedule(reads)
        await schedule.add(command, now() + timedelta(days=1))
        for identity in (BOB, stranger):
            with pytest.raises(NotFound):
                await schedule.cancel(identity, command.key[1])
            with pytest.raises(NotFound):
                await schedule.move(identity, command.key[1], now())
        cancelled = await schedule.cancel(ADMIN, command.key[1])
        assert b"ann" in (cancelled.error or b"")
        assert await schedule.cancel(ALICE, command.key[1]) == cancelled
        with pytest.raises(Rejected, match="cancelled"):
            await schedule.move(ALICE, command.key[1], now())
    async with replica(write_db, REGISTRY) as one:
        assert reasons(await one.ask(command)) == ["COMMAND_CANCELLED"]


async def test_secrets_are_not_scheduled(write_db: Database) -> None:
    """The log would have to keep them."""
    command = make_command(REGISTRY, SetPassword(counter_id="a", subject_id="s", word="secret"))
    async with pool(write_db) as reads:
        with pytest.raises(Invalid) as refused:
            await Schedule(reads).add(command, now())
    assert refused.value.reason == "HOLDS_A_SECRET"
    assert await commands_of(write_db) == {}


async def test_a_tenant_schedules_so_many_and_no_more(write_db: Database) -> None:
    """Another tenant is not held up by that; what ran or was cancelled makes room."""
    async with pool(write_db) as reads:
        schedule = Schedule(reads, pending_max=3)
        commands = [adding() for _ in range(4)]
        for command in commands[:3]:
            await schedule.add(command, now() + timedelta(days=1))
        with pytest.raises(OverLimit) as refused:
            await schedule.add(commands[3], now() + timedelta(days=1))
        assert refused.value.reason == "TOO_MANY_SCHEDULED"
        await schedule.add(adding(tenant="umbrella"), now() + timedelta(days=1))
        await schedule.cancel(ALICE, commands[0].key[1])
        await schedule.add(commands[3], now() + timedelta(days=1))


async def test_a_hundred_thousand_that_wait_cost_nothing(write_db: Database) -> None:
    """Looking for what is due reads the first entry of an index and no row."""
    async with connected(write_db.owner) as owner:
        await owner.execute(
            """INSERT INTO commands (tenant, command_id, type, category, aggregate_id, fingerprint, payload, status, user_id,
                 on_behalf_of, correlation_id, traceparent, received_at, version, events_appended, position, head, due_at, roles)
               SELECT 'acme', gen_random_uuid(), 'trial.Add', 'counter', 'a', '', '', 'scheduled', 'alice', '',
                 gen_random_uuid(), '', now(), 0, 0, 0, 0, now() + interval '1 day', '{user}' FROM generate_series(1, 100000)"""
        )
        await owner.execute("ANALYZE commands")
    async with connected(write_db.app) as connection:
        assert (await read_due(connection, 256))[0] == []
        cursor = await connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {due_commands._FIRST_DUE}", ([], [], 256))
        [(plan,)] = await cursor.fetchall()
    found = plan[0]["Plan"]["Plans"][0]
    assert (found["Index Name"], found["Actual Rows"]) == ("commands_due", 0), plan
