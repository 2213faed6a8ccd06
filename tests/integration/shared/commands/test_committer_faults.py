"""What goes wrong beneath and beside the committer: rows, handlers, connections, the database itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psycopg
import pytest
from psycopg import sql

from deploy.bootstrap import Database
from shared.commands import append as appending
from shared.commands.append import lock
from shared.commands.decide import Command, Outcome
from shared.commands.intake import Limits
from shared.folds.errors import Code, OverLimit, Unavailable
from shared.platform.postgres import Connection
from shared.platform.telemetry import logger
from tests.support.checks.history import check_line, commands_of, connected, events_of
from tests.support.domains.trial import BLURT, COUNTER, Add, Blurt, CounterEvent, Move, build_registry
from tests.support.fakes.replica import Replica, make_command, reasons, refusal, replica
from tests.support.logs import capture_logs
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

BUS = build_registry()
SECRET = "correct horse battery staple"


def adding(amount: int, counter_id: str = "a") -> Command:
    """A command with an id of its own."""
    return make_command(BUS, Add(counter_id=counter_id, amount=amount))


# A row that PostgreSQL refuses


@pytest.mark.parametrize("place", [0, 100, 255])
async def test_a_row_that_is_refused_fails_its_command_alone(write_db: Database, place: int) -> None:
    """A NUL in an id, in a batch of 256: its command gets INTERNAL, the 255 others their answers."""
    heads: list[int] = []
    async with replica(write_db, BUS) as one:
        one.committer._committed = heads.append
        await one.ask(adding(0))
        commands = [adding(1, f"c{nth % 9}") for nth in range(256)]
        commands[place] = adding(1, "nul\0")
        with capture_logs() as logs:
            outcomes = await one.ask(*commands)
        assert [nth for nth, reason in enumerate(reasons(outcomes)) if reason != "completed"] == [place]
        assert (refusal(outcomes[place]).code, refusal(outcomes[place]).reason) == (Code.INTERNAL, "INTERNAL")
        assert "nul" not in refusal(outcomes[place]).text
        assert [line["event"] for line in logs].count("batch_failed") == 1
        assert "nul" not in repr(logs)
        # It was a batch, and the culprit is still refused when it comes alone.
        assert reasons(await one.ask(commands[place])) == ["INTERNAL"]
        assert reasons(await one.ask(*commands[:place])) == ["completed"] * place
    assert len(await check_line(write_db)) == 255
    assert commands[place].key not in await commands_of(write_db)


async def test_a_row_that_is_refused_deep_in_a_unit_undoes_the_unit(write_db: Database) -> None:
    """In an atomic batch nothing is left; what a reaction writes counts too."""
    async with replica(write_db, BUS) as one:
        await one.ask(adding(100))
        good, neighbour = adding(5), adding(7)
        units = [[good, make_command(BUS, Move(counter_id="a", to_id="b\0", amount=1))], [neighbour]]
        [unit, [other]] = await one.committer.submit(units)
        assert (reasons(unit), reasons([other])) == (["INTERNAL", "INTERNAL"], ["completed"])
        assert good.key not in await commands_of(write_db)
        assert reasons(await one.ask(good)) == ["completed"]
    assert [event.aggregate_id for event in await check_line(write_db)] == ["a", "a", "a"]


# A handler that says what it should not


async def everything_in(database: Database) -> bytes:
    """All bytes of all tables, as the owner sees them."""
    found = b""
    async with connected(database.owner) as owner:
        for table in ("line", "events", "commands", "snapshots", "credentials"):
            cursor = await owner.execute(f"TABLE {table}".encode())
            for row in await cursor.fetchall():
                found += b"|".join(value if isinstance(value, bytes) else str(value).encode() for value in row)
    return found


async def test_the_secret_of_a_defect_reaches_nobody(write_db: Database, capfd: pytest.CaptureFixture[str]) -> None:
    """A handler raises it: it is not in the answer, nor in any log or output, nor in any table."""

    def tell(counter: object, command: Blurt, meta: object) -> list[CounterEvent]:
        words = {"password": SECRET}
        raise KeyError(words["password"]) from ValueError(SECRET)

    bus = build_registry()
    bus.rows_of(COUNTER).override(BLURT, tell, tenant="acme", name="other")
    async with replica(write_db, bus) as one:
        with capture_logs() as logs:
            alone = await one.ask_one(Blurt(counter_id="a", text="x"))
            asked = [adding(1), one.command(Blurt(counter_id="a", text="x")), adding(1)]
            outcomes = await one.ask(*asked)
            together = await one.ask_atomic(adding(1), one.command(Blurt(counter_id="a", text="x")))
        logger("test").error("as it would be printed", lines=logs)
        assert reasons(outcomes) == ["completed", "INTERNAL", "completed"]
        assert reasons(together) == ["ATOMIC_BATCH_REFUSED", "INTERNAL"]
        for outcome in (alone, *outcomes, *together):
            assert SECRET not in repr(outcome)
            assert SECRET not in repr(vars(outcome.refusal)) if outcome.refusal else True
        assert (await commands_of(write_db))[asked[1].key].status == "failed"
    assert len([line for line in logs if line["event"] == "command_failed"]) == 3
    printed = capfd.readouterr()
    assert "command_failed" in printed.out + printed.err
    assert SECRET not in printed.out + printed.err
    assert SECRET.encode() not in await everything_in(write_db)


# A connection that is lost


async def end_sessions(database: Database) -> int:
    """Ends the committers' connections, as an administrator may; returns how many there were."""
    async with connected(database.admin) as admin:
        return await end_committers(admin, database)


async def end_committers(admin: Connection, database: Database) -> int:
    """The same, by an administrator who is there already."""
    cursor = await admin.execute(
        """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
           WHERE application_name = 'foldline-committer' AND datname = %s""",
        [database.name],
    )
    return len(await cursor.fetchall())


@dataclass
class Load:
    """Callers that keep asking; whoever is told to come again does, with the same id. Nothing else may be answered."""

    one: Replica
    limit: int = 10**9
    acknowledged: dict[Command, Outcome] = field(default_factory=dict)
    unavailable: int = 0
    over: bool = False

    async def call(self, caller: int) -> None:
        """One caller."""
        while not self.over and len(self.acknowledged) < self.limit:
            # Half of them write two aggregates, so that a half-done command would show.
            name = f"c{caller % 5}"
            command = adding(1, name) if caller % 2 else make_command(BUS, Move(counter_id=name, to_id="sink", amount=0))
            while not self.over:
                try:
                    [outcome] = await self.one.ask(command)
                except OverLimit:
                    await asyncio.sleep(0.01)
                    continue
                if outcome.refusal is None:
                    self.acknowledged[command] = outcome
                    break
                assert isinstance(outcome.refusal, Unavailable), outcome
                self.unavailable += 1
                await asyncio.sleep(0.01)

    async def check(self, database: Database) -> None:
        """Everything acknowledged is there once, as it was told; everything else entirely or not at all."""
        await check_line(database)
        log = await commands_of(database)
        for command, outcome in self.acknowledged.items():
            row = log[command.key]
            assert (row.status, row.version, row.events_appended, row.position, row.head) == (
                outcome.status, outcome.version, outcome.events_appended, outcome.position, outcome.head,
            )  # fmt: skip
        assert len({outcome.position for outcome in self.acknowledged.values()}) == len(self.acknowledged)


@asynccontextmanager
async def under_load(one: Replica, callers: int = 20) -> AsyncIterator[Load]:
    """Callers at work, until the end."""
    load = Load(one)
    async with asyncio.TaskGroup() as group:
        for caller in range(callers):
            group.create_task(load.call(caller))
        try:
            yield load
        finally:
            load.over = True


async def more(load: Load, count: int, deadline_s: float = 20) -> None:
    """Waits until so many more are acknowledged."""
    target = len(load.acknowledged) + count
    await eventually(lambda: len(load.acknowledged) >= target, deadline_s)


async def test_a_connection_that_is_ended_under_load(write_db: Database) -> None:
    """Twenty times and more: nothing acknowledged is lost or doubled, and the committer goes on by itself."""
    async with replica(write_db, BUS) as one:
        ended = 0
        async with under_load(one) as load:
            # Until it has hit somebody: a connection that ends between two batches is noticed by nobody.
            while ended < 20 or not load.unavailable:
                await more(load, 20, 60)
                ended += await end_sessions(write_db)
            await more(load, 50, 60)
        await load.check(write_db)


async def test_a_connection_that_is_ended_while_idle(write_db: Database) -> None:
    """The next caller may be told to come again, no more than once."""
    async with replica(write_db, BUS) as one:
        await one.ask(adding(1))
        await end_sessions(write_db)
        asked = adding(1)
        assert reasons(await one.ask(asked))[0] in ("DATABASE_UNAVAILABLE", "completed")
        assert reasons(await one.ask(asked)) == ["completed"]
    assert len(await check_line(write_db)) == 2


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "while nobody looked"])
async def test_a_database_that_was_set_back(write_db: Database, noticed: bool) -> None:
    """A restore, with the same epoch: versions that are lower than what is cached are found by no collision."""
    async with replica(write_db, BUS) as one:
        await one.ask(adding(10))
        async with connected(write_db.owner) as owner, connected(write_db.admin) as admin:
            await admin.execute(f"ALTER DATABASE {write_db.name} CONNECTION LIMIT 0".encode())
            await end_committers(admin, write_db)
            if noticed:
                assert reasons(await one.ask(adding(1))) == ["DATABASE_UNAVAILABLE"]
            await admin.execute(f"ALTER DATABASE {write_db.name} CONNECTION LIMIT -1".encode())
            await owner.execute("ALTER TABLE events DISABLE TRIGGER USER")
            await owner.execute("DELETE FROM events")
            await owner.execute("DELETE FROM commands")
        [outcome] = await one.ask(adding(-5))
        assert (reasons([outcome]), refusal(outcome).facts) == (["BELOW_ZERO"], {"total": "0"})
        assert reasons(await one.ask(adding(1))) == ["completed"]
    assert len(await check_line(write_db)) == 1


async def test_a_commit_whose_answer_was_lost_is_acknowledged_all_the_same(
    write_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement went through, the connection broke before the answer: the log is asked, and knows."""

    async def append_and_lose(connection: Connection, shard: int, batch: appending.Batch) -> appending.Appended:
        monkeypatch.undo()
        await appending.append(connection, shard, batch)
        await connection.close()
        raise psycopg.OperationalError("the connection is lost")

    async with replica(write_db, BUS) as one:
        await one.ask(adding(1))
        monkeypatch.setattr(appending, "append", append_and_lose)
        outcomes = await one.ask(adding(5), adding(-100))
        assert appending.append is not append_and_lose
        assert reasons(outcomes) == ["completed", "BELOW_ZERO"]
        assert outcomes[0] == Outcome("completed", 2, 1, 2, 2)
        assert reasons(await one.ask(adding(-6))) == ["completed"]
    assert len(await check_line(write_db)) == 3


async def test_a_lock_that_somebody_holds_is_not_waited_for_without_end(write_db: Database) -> None:
    """Callers get UNAVAILABLE in time; when it is free again the same ids go through, once."""
    async with replica(write_db, BUS, limits=Limits(commit_timeout_s=0.3)) as one, connected(write_db.owner) as other:
        await one.ask(adding(1))
        asked = [adding(1), adding(1, "b")]
        async with other.transaction():
            await lock(other, 1)
            async with asyncio.timeout(5):
                outcomes = await one.ask(*asked)
            assert reasons(outcomes) == ["DATABASE_UNAVAILABLE"] * 2
            assert {refusal(outcome).code for outcome in outcomes} == {Code.UNAVAILABLE}
            assert refusal(outcomes[0]).retry_after_s == 1
        assert reasons(await one.ask(*asked)) == ["completed"] * 2
    assert len(await check_line(write_db)) == 3


@pytest.mark.parametrize(
    ("bad", "mended", "reason"),
    [
        (
            "REVOKE EXECUTE ON FUNCTION append_one, append_batch FROM {}",
            "GRANT EXECUTE ON FUNCTION append_one, append_batch TO {}",
            "DATABASE_UNAVAILABLE",
        ),
        ("ALTER TABLE events RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO events", "SCHEMA_TOO_OLD"),
    ],
    ids=["no right", "no table"],
)
async def test_whatever_the_database_cannot_for_a_moment(write_db: Database, bad: str, mended: str, reason: str) -> None:
    """Is no defect of a command: UNAVAILABLE, nothing is stored of it, and the same id goes through when it is over."""
    app = sql.Identifier("foldline_write_app")
    async with replica(write_db, BUS) as one, connected(write_db.owner) as owner:
        await one.ask(adding(1))
        await owner.execute(sql.SQL(bad).format(app))
        asked = [adding(1), adding(1, "b")]
        assert reasons(await one.ask(*asked)) == [reason] * 2
        await owner.execute(sql.SQL(mended).format(app))
        assert reasons(await one.ask(*asked)) == ["completed"] * 2
    assert len(await check_line(write_db)) == 3


async def test_what_was_never_committed_is_not_in_the_cache(write_db: Database) -> None:
    """Not even of an aggregate that a reaction changed, and whose version another replica then gives to something else."""
    async with (
        replica(write_db, BUS, limits=Limits(commit_timeout_s=0.3)) as one,
        replica(write_db, BUS) as other,
        connected(write_db.owner) as owner,
    ):
        await one.ask(adding(10, "a"), adding(1, "b"))
        async with owner.transaction():
            await lock(owner, 1)
            moved = await one.ask_one(Move(counter_id="a", to_id="b", amount=5))
            assert reasons([moved]) == ["DATABASE_UNAVAILABLE"]
        await other.ask(adding(1, "b"))
        [outcome] = await one.ask(adding(-6, "b"))
        assert (reasons([outcome]), refusal(outcome).facts) == (["BELOW_ZERO"], {"total": "2"})
    assert len(await check_line(write_db)) == 3


async def test_a_statement_that_is_cancelled_by_an_administrator(write_db: Database) -> None:
    """It is the database's doing and no defect of the command: nothing was stored, so it is tried once more."""
    async with replica(write_db, BUS) as one, connected(write_db.admin) as other:
        await one.ask(adding(1))
        asked = adding(1)
        async with other.transaction():
            await lock(other, 1)
            asking = asyncio.create_task(one.ask(asked))
            async with connected(write_db.admin) as admin:

                async def cancelled() -> int:
                    cursor = await admin.execute(
                        """SELECT pg_cancel_backend(pid) FROM pg_stat_activity
                           WHERE wait_event = 'advisory' AND datname = %s AND state = 'active'""",
                        [write_db.name],
                    )
                    return len(await cursor.fetchall())

                await eventually(cancelled)
        assert reasons(await asking) == ["completed"]
        assert reasons(await one.ask(asked)) == ["completed"]
    assert len(await check_line(write_db)) == 2


async def test_a_database_that_cannot_write_now(write_db: Database) -> None:
    """Read-only, as a primary is after it was demoted: UNAVAILABLE for all, and on when it is writable again."""
    read_only = "ALTER DATABASE {} SET default_transaction_read_only = {}"
    async with replica(write_db, BUS) as one, connected(write_db.owner) as owner:
        await one.ask(adding(1))
        await owner.execute(read_only.format(write_db.name, "on").encode())
        await end_sessions(write_db)
        asked = [adding(1), adding(1, "b")]
        for _ in range(3):
            assert reasons(await one.ask(*asked)) == ["DATABASE_UNAVAILABLE"] * 2
        await owner.execute("SET default_transaction_read_only = off")
        await owner.execute(read_only.format(write_db.name, "off").encode())
        await one.ask(*asked)  # may be told to come again once more: the session is from before
        assert reasons(await one.ask(*asked)) == ["completed", "completed"]
    assert len(await check_line(write_db)) == 3


# A database that dies


async def test_postgresql_killed_and_stopped_under_load(private_engines: Engines) -> None:
    """Kill -9, then a stop, under load: UNAVAILABLE meanwhile, then on without a restart of the committer.

    Everything acknowledged is there exactly once; everything else is there entirely, or not at all.
    """
    postgres, database = private_engines.postgres, private_engines.clone("write")
    async with replica(database, BUS, limits=Limits(commit_timeout_s=2)) as one:
        epochs = set()
        async with under_load(one) as load:
            for end in (postgres.kill, postgres.stop):
                await more(load, 200)
                epochs.add(one.committer.epoch)
                await asyncio.to_thread(end)
                refused = load.unavailable
                await eventually(lambda: load.unavailable >= refused + 20, 30)  # noqa: B023 (waited for here)
                await asyncio.to_thread(postgres.start)
                await more(load, 1)
            await more(load, 200)
        assert len(epochs) == 1  # the same history goes on
        await load.check(database)
        last = adding(1)
        first_answer = await one.ask(last)
    async with replica(database, BUS) as restarted:
        assert await restarted.ask(last) == first_answer
        some = list(load.acknowledged)[::50]
        assert await restarted.ask(*some) == [load.acknowledged[command] for command in some]


async def test_postgresql_away_from_the_start(private_engines: Engines) -> None:
    """A committer that starts first says so to its callers, and works as soon as there is a database."""
    database = private_engines.clone("write")
    await asyncio.to_thread(private_engines.postgres.stop)
    async with replica(database, BUS, limits=Limits(commit_timeout_s=2)) as one:
        asked = adding(1)
        assert reasons(await one.ask(asked)) == ["DATABASE_UNAVAILABLE"]
        await asyncio.to_thread(private_engines.postgres.start)
        assert reasons(await one.ask(asked)) == ["completed"]
    assert len(await events_of(database)) == 1
