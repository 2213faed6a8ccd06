"""Every step is taken once: the runner is killed, doubled or late, an input comes twice, the database goes away."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import sql

from foldline.v1 import command_pb2
from shared.folds.errors import Unavailable
from shared.folds.ids import step_id
from shared.line import consumer
from shared.processes import store as process_store
from shared.processes.dispatcher import Dispatcher
from shared.processes.dispatcher import Told as Answered
from shared.processes.runner import ProcessRunner
from tests.support.checks.gifts import all_ended, everything_once
from tests.support.domains.gifts import World, WriteService, refused_call
from tests.support.fakes.line import ScriptedFeed, delivery, uid
from tests.support.logs import capture_logs
from tests.support.system.waiting import eventually


async def test_killed_between_sending_and_the_answer(world: World) -> None:
    """The command was carried out, nobody was told: the next leader sends the same bytes again, and is told then."""
    world.open(1)
    sent, never = asyncio.Event(), asyncio.Event()

    async def swallow(request: command_pb2.SendBatchRequest) -> None:
        sent.set()
        await never.wait()

    world.write.after = swallow
    async with world.running():
        await asyncio.wait_for(sent.wait(), 30)
    assert world.write.carried_out == {(uid(1), 500): 1}
    world.write.after = lambda request: None
    async with world.running():
        await all_ended(world, 1)
    assert [item.command.value for call in world.write.calls[:2] for item in call.items] == [
        world.write.items[str(step_id("gift", uid(1), "gift"))].command.value
    ] * 2
    await everything_once(world, 1)


@pytest.mark.parametrize("place", ["before the write", "before the commit"])
async def test_killed_in_the_middle_of_a_round(world: World, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a round is no round: the next leader begins where the last whole one ended."""
    real, reached = process_store.write, asyncio.Event()

    async def forgets(*args: object) -> None:
        return None

    monkeypatch.setattr(ProcessRunner, "_from_memory", forgets)

    async def write(*args: object, **more: object) -> None:
        if place == "before the commit":
            await real(*args, **more)  # type: ignore[arg-type]
        reached.set()
        await asyncio.Event().wait()

    world.open(1)
    monkeypatch.setattr(process_store, "write", write)
    async with world.running():
        await asyncio.wait_for(reached.wait(), 30)
    monkeypatch.setattr(process_store, "write", real)
    assert await world.query("SELECT process_id FROM processes") == []
    async with world.running():
        await all_ended(world, 1)
    await everything_once(world, 1)


async def test_two_runners_at_once(world: World) -> None:
    """No correctness rests on the lease: two that both believe to lead carry out every step once."""
    async with world.running(), world.running():
        for number in range(1, 61):
            world.open(number)
            if number % 10 == 0:
                await asyncio.sleep(0.02)
        await all_ended(world, 60, 30)
    await everything_once(world, *range(1, 61))


async def test_an_old_leader_that_wakes_up_writes_nothing(world: World) -> None:
    """Stopped with an answer in its hands; another has taken over and ended the process; it wakes up and is fenced."""
    world.open(1)
    asleep, wake = asyncio.Event(), asyncio.Event()

    async def sleep(request: command_pb2.SendBatchRequest) -> None:
        if not asleep.is_set():
            asleep.set()
            await wake.wait()

    world.write.after = sleep
    async with world.running():
        await asyncio.wait_for(asleep.wait(), 30)
        async with world.running():
            await all_ended(world, 1)
            world.open(2)
            await all_ended(world, 2)
        wake.set()
        world.open(3)
        await all_ended(world, 3)
    await everything_once(world, 1, 2, 3)


async def test_an_old_leader_writes_nothing_though_its_successor_has_not_either(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped with an answer in its hands; another has taken over and stands where it stood. Nothing of its round is saved."""
    monkeypatch.setattr(consumer, "REPLACED_S", 3600.0)
    world.open(1)
    asleep, wake, never = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def sleep(request: command_pb2.SendBatchRequest) -> None:
        asleep.set()
        await wake.wait()

    async def silent(request: command_pb2.SendBatchRequest) -> None:
        await never.wait()

    world.write.after = sleep
    with capture_logs() as logs:
        async with world.running():
            await asyncio.wait_for(asleep.wait(), 30)
            async with world.running(world.runner(write=WriteService(before=silent))) as other:
                await eventually(other.follows.is_set, 30)
                before = [await world.history(1), await world.query("SELECT * FROM process_commands")]
                wake.set()
                await eventually(lambda: "consumer_fenced" in [log["event"] for log in logs], 30)
                assert [await world.history(1), await world.query("SELECT * FROM process_commands")] == before
    async with world.running():
        await all_ended(world, 1)
    await everything_once(world, 1)


async def test_an_answer_that_comes_twice_is_one_answer(world: World) -> None:
    """Twice in one round, and again in the next: its row is gone, so nothing changes."""
    last: list[Answered] = []

    class Stutters(Dispatcher):
        def take(self) -> list[Answered]:
            told = super().take()
            again = [*told, *told, *last]
            last[:] = told
            return again

    world.open(1, 2)
    async with world.running(world.runner(dispatcher=Stutters)):
        await all_ended(world, 2)
        world.open(3)
        await all_ended(world, 3)
    await everything_once(world, 1, 2, 3)


async def test_an_event_that_is_delivered_again_is_one_event(world: World) -> None:
    """The broker repeats and reorders: the process begins once."""
    world.open(1, 2, 3)
    one, two, three = world.store.events
    world.store.events = [one]
    feed = ScriptedFeed([[delivery(one), delivery(one)]])
    async with world.running(world.runner(feed=feed)):
        await all_ended(world, 1)
        world.store.events = [one, two, three]
        feed.script += [[delivery(two), delivery(one), delivery(two)], [delivery(three), delivery(three)]]
        await all_ended(world, 3)
    await everything_once(world, 1, 2, 3)


async def test_a_history_that_is_another_stops_the_runner(world: World) -> None:
    """The store was restored to before our checkpoint: nothing is applied and nothing is sent, not even what waits."""
    away = True

    def gone(request: command_pb2.SendBatchRequest) -> None:
        if away:
            raise refused_call(Unavailable("AWAY", "away"))

    world.write.before = gone
    world.open(1, 2)
    async with world.running():

        async def begun() -> bool:
            return await world.statuses() == {"running": 2}

        await eventually(begun)
    away, calls = False, len(world.write.calls)
    world.store.events.clear()
    world.open(3, 4)
    world.store.away = True
    async with world.running() as runner:
        await asyncio.sleep(0.3)  # the store has not answered: what waits is due, and stays where it is
        assert len(world.write.calls) == calls
        world.store.away = False
        await eventually(lambda: runner.stopped)
    assert runner.stopped is not None
    assert runner.stopped.startswith("HISTORY_DIVERGED")
    assert world.write.carried_out == {}
    [(state, reason)] = await world.query("SELECT state, reason FROM checkpoints")
    assert state == "stopped"
    assert reason.startswith("HISTORY_DIVERGED")


async def test_the_saga_database_goes_away_and_comes_back(world: World) -> None:
    """All its sessions are ended, again and again, while commands are under way: every step is carried out once."""
    world.open(*range(1, 101))
    async with world.running():
        async with await psycopg.AsyncConnection.connect(world.database.admin, autocommit=True) as admin:
            for number in range(101, 111):
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                    (world.database.name,),
                )
                world.open(number)
                await asyncio.sleep(0.05)
        await all_ended(world, 110, 30)
    await everything_once(world, *range(1, 111))


@pytest.mark.parametrize(
    ("bad", "mended"),
    [
        ("ALTER DATABASE {database} SET default_transaction_read_only = on", "ALTER DATABASE {database} RESET ALL"),
        ("REVOKE INSERT ON process_history FROM {app}", "GRANT INSERT ON process_history TO {app}"),
        ("ALTER TABLE processes ALTER COLUMN phase TYPE varchar(5000)", ""),
    ],
    ids=["read-only", "no right", "a changed type"],
)
async def test_whatever_the_database_says_passes(world: World, bad: str, mended: str) -> None:
    """A bad moment of the saga database stops nothing: when it is over every step is carried out, once."""
    names = {"database": sql.Identifier(world.database.name), "app": sql.Identifier("foldline_saga_app")}
    world.open(*range(1, 6))
    async with world.running() as runner:
        await all_ended(world, 5)
        async with await psycopg.AsyncConnection.connect(world.database.admin, autocommit=True) as admin:
            await admin.execute(sql.SQL(bad).format(**names))
            if "read_only" in bad:  # which is for new sessions
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                    (world.database.name,),
                )
            with capture_logs() as logs:
                world.open(*range(6, 11))
                if mended:
                    await eventually(lambda: len([log for log in logs if log["event"] == "consumer_retries"]) > 1)
                    assert {log["log_level"] for log in logs if log["event"] == "consumer_retries"} == {"error"}
                    await admin.execute("SET default_transaction_read_only = off")
                    await admin.execute(sql.SQL(mended).format(**names))
                await all_ended(world, 10, 30)
        assert runner.stopped is None
    await everything_once(world, *range(1, 11))
    assert await world.query("SELECT state, reason FROM checkpoints") == [("running", "")]
