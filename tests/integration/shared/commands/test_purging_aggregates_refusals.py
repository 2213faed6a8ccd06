"""What is asked of aggregates that are purged: refused for ever, by name, but for answers that were given before."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import aggregate_purging, history, states
from shared.commands.append import AppendConflict, append
from shared.commands.schedule import Schedule, Scheduler
from shared.commands.states import Purged, Versioned
from shared.folds.ids import is_of_processes, step_id
from shared.line.ends import AGGREGATE_PURGED
from shared.platform.fairness import Room
from tests.integration.shared.commands.test_boxing import online
from tests.integration.shared.commands.test_purging import refusal_of
from tests.support.checks.history import connected
from tests.support.domains.trial import Add, GoOffDuty, Move, lone
from tests.support.fakes.replica import reasons, replica
from tests.support.system.aggregate_purges import BUS, later, planned, purged
from tests.support.system.boxing import TENANT, boxer, files_in, move
from tests.support.system.retention import purger_of


async def test_whatever_concerns_it_is_refused_for_ever(write_db: Database, tmp_path: Path) -> None:
    """By replicas with its newest state in memory, an older one, or none; by commands, reactions, readings, schedules."""
    async with (
        replica(write_db, BUS) as first,
        replica(write_db, BUS) as second,
        boxer(write_db.app, files_in(tmp_path), BUS) as mover,
    ):
        scheduler = Scheduler(mover._reads, first.committer)
        await second.ask_one(Add(counter_id="a", amount=5))  # the second remembers version 1
        for amount in (1, -6):
            await first.ask_one(Add(counter_id="a", amount=amount))
        await first.ask_one(Add(counter_id="live", amount=5))
        await purged(mover)
        for one in (first, second):
            assert reasons([await one.ask_one(Add(counter_id="a", amount=1))]) == ["AGGREGATE_PURGED"]
        async with replica(write_db, BUS) as third:
            assert reasons([await third.ask_one(Add(counter_id="a", amount=1))]) == ["AGGREGATE_PURGED"]
            assert reasons([await third.ask_one(Move(counter_id="live", to_id="a", amount=1))]) == ["AGGREGATE_PURGED"]
            assert reasons([await third.ask_one(GoOffDuty(counter_id="live", colleague_id="a"))]) == ["AGGREGATE_PURGED"]
            late = third.command(Add(counter_id="a", amount=1))
            await Schedule(mover._reads).add(late, datetime.now(UTC))
            await scheduler._fire()
            assert reasons(await third.ask(late)) == ["AGGREGATE_PURGED"]
        async with connected(write_db.app) as connection:
            cursor = await connection.execute("SELECT type, payload FROM commands WHERE aggregate_id = 'a'")
            logged = dict(await cursor.fetchall())
        assert logged.keys() == {"foldline.v1.PurgeAggregateRequest", "trial.Add"}
        assert logged["trial.Add"] == b""
        for way in ("box", "unbox"):
            assert await refusal_of(move(mover, way, "a", str(uuid4()))) == "AGGREGATE_PURGED"
        key = (TENANT, "counter", "a")
        assert await refusal_of(history.past_state(BUS, mover._reads, Room(), key)) == "AGGREGATE_PURGED"
        told = await history.describe(BUS, mover._reads, key, cached=False)
        assert (told.purged, told.boxed, told.version) == (True, False, 4)
        assert [event.type for event in await online(write_db, "a")] == [AGGREGATE_PURGED]


async def test_a_command_on_what_is_being_purged_reads_the_mark_alone(write_db: Database, tmp_path: Path) -> None:
    """However many of its events are still there, and without a snapshot."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (*[1] * 11, -11):
            await one.ask_one(Add(counter_id="a", amount=amount))
        await purger_of(mover, BUS).begin((await planned(mover))[0])
        read = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'events'"
        key = (TENANT, "counter", "a")
        async with connected(write_db.app) as connection, connection.transaction():
            await connection.execute("SET LOCAL enable_seqscan = off")
            before = await (await connection.execute(read)).fetchone()
            found = await states.load(connection, BUS, [key])
            after = await (await connection.execute(read)).fetchone()
        assert found == {key: Versioned(13, Purged())}
        assert before is not None
        assert after is not None
        assert after[0] - before[0] <= 2  # to see that it is the mark, and then the mark
        assert len(await online(write_db, "a")) == 13


async def test_a_process_that_was_away_gets_its_first_answers(
    write_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the log, without the payloads, however many there are to a step; what others sent is gone."""
    monkeypatch.setattr(aggregate_purging, "LIMIT_ROWS", 2)
    monkeypatch.setattr(aggregate_purging, "PAUSE_S", 0)
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        sent = []
        for nth, amount in enumerate((1, 2, 3, 4, -10)):
            step = str(step_id("transfer", str(UUID(int=nth)), "debit"))
            sent.append(replace(one.command(Add(counter_id="a", amount=amount), id=step), received_at=later(-nth)))
            await one.ask_one(Add(counter_id="a", amount=1))
            first = await one.ask(*sent[-1:])
            assert reasons(first) == ["completed"]
        await one.ask_one(Add(counter_id="a", amount=-5))
        refused = one.command(Add(counter_id="a", amount=-1), id=str(step_id("transfer", str(UUID(int=9)), "debit")))
        assert reasons(await one.ask(refused)) == ["BELOW_ZERO"]
        answers = [await one.ask(command) for command in sent]
        await purged(mover)
        async with replica(write_db, BUS) as other:
            assert [await other.ask(command) for command in sent] == answers
            assert reasons(await other.ask(refused)) == ["BELOW_ZERO"]
        async with connected(write_db.app) as connection:
            cursor = await connection.execute("SELECT payload FROM commands WHERE tenant = %s AND type = 'trial.Add'", (TENANT,))
            assert await cursor.fetchall() == [(b"",)] * 6
            assert await (await connection.execute("SELECT commands FROM aggregate_purges")).fetchall() == [(6,)]


async def test_nobody_can_keep_it_by_the_id_of_its_purge(write_db: Database, tmp_path: Path) -> None:
    """Users may not use it, for it is in the space of processes; if it is taken all the same, the refusal is named."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (1, -1):
            await one.ask_one(Add(counter_id="a", amount=amount))
        purger = purger_of(mover, BUS)
        [goes] = await planned(mover)
        command_id = purger._command(goes).key[1]
        assert is_of_processes(command_id)
        await one.ask_one(Add(counter_id="live", amount=1), id=command_id)
        assert await refusal_of(purger.begin(goes)) == "COMMAND_ID_REUSED"
        assert await purger.open() == []


@pytest.mark.parametrize("version", [2, 3, 4])
async def test_no_append_of_an_older_state_takes_a_version_that_is_gone(write_db: Database, tmp_path: Path, version: int) -> None:
    """Nor that of the mark. Who decides on such a state is told that it moved."""
    async with replica(write_db, BUS) as one, boxer(write_db.app, files_in(tmp_path), BUS) as mover:
        for amount in (1, 1, -2):
            await one.ask_one(Add(counter_id="a", amount=amount))
        await purged(mover)
        key = (TENANT, "counter", "a")
        async with connected(write_db.app) as connection:
            with pytest.raises(AppendConflict):
                await append(connection, 1, lone(key, version))
        assert len(await online(write_db, "a")) == 1
