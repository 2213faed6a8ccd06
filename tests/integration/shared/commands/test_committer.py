"""The committer on a real database: outcomes, the end of a committer, side rows, reactions."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from deploy.bootstrap import Database
from shared.commands.committer import Committer
from shared.commands.decide import Command, Outcome
from shared.folds.errors import Code
from tests.integration.shared.commands.counters import BUS, adding
from tests.support.checks.history import check_line, commands_of, connected, events_of
from tests.support.domains.trial import ADD, COUNTER, Add, Chain, Move, SetPassword, Swell, build_registry, twice_as_much
from tests.support.fakes.replica import make_command, reasons, refusal, replica
from tests.support.system.waiting import eventually


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
