"""Relays as processes: stopped, killed, woken, and told to end. The stream stays a faithful copy of the line."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from deploy.bootstrap import Database
from deploy.engines.nats import Nats
from deploy.local.supervisor import Program, Supervisor
from shared.line import broker
from shared.line.broker_access import Broker, connect
from shared.platform.leader import LockClass, hold_lease
from tests.support.fakes.relaying import grow, in_step, position_in, reaches, read_copy
from tests.support.system.proxy import Proxy
from tests.support.system.waiting import eventually


@pytest.fixture
async def relays(nats_server: Nats, write_db: Database, tmp_path: Path) -> AsyncIterator[Supervisor]:
    """Two relay processes, `one` and `two`, not started yet."""
    supervisor = Supervisor(tmp_path / "logs")
    settings = {"FOLDLINE_DATABASE_URL": write_db.app, "FOLDLINE_NATS_URL": nats_server.url}
    for name in ("one", "two"):
        supervisor.add(Program(name=name, module="write_service.relay", settings=settings))
    yield supervisor
    await supervisor.stop_all()


@pytest.fixture
async def streams(nats_server: Nats) -> AsyncIterator[JetStreamContext]:
    """JetStream, as an operator sees it."""
    client = await connect(Broker(nats_server.url), "test")
    yield client.jetstream()
    await client.close()


def said(relays: Supervisor, name: str, what: str) -> int:
    """How often a relay has logged that."""
    log = relays.log(name)
    return log.read_text().count(f'"event":"{what}"') if log.exists() else 0


async def led(relays: Supervisor) -> tuple[str, str]:
    """Starts both relays; returns the leader and the stand-by."""
    relays.start("one")
    await hear(relays, "one", "lease_gained", 1)
    relays.start("two")
    await hear(relays, "two", "lease_stands_by", 1)
    return "one", "two"


async def hear(relays: Supervisor, name: str, what: str, times: int, deadline_s: float = 30) -> None:
    """Waits until a relay has logged that so often."""
    await eventually(lambda: said(relays, name, what) >= times, deadline_s)


@asynccontextmanager
async def growing(database: Database) -> AsyncIterator[None]:
    """Events are appended all the time."""

    async def work() -> None:
        while True:
            await asyncio.to_thread(grow, database, random.randrange(1, 40))
            await asyncio.sleep(0.005)

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_relay_that_is_stopped_past_its_lease_and_woken_does_no_harm(
    relays: Supervisor, write_db: Database, streams: JetStreamContext
) -> None:
    """The stand-by takes over while the other sleeps; what that one finishes when it wakes up is refused.

    Three times and under load, so that it falls asleep with publishes under way. Nothing in the stream is doubled, out
    of order or missing. The test below makes sure that there is something to refuse, and has the control.
    """
    leader, standby = await led(relays)
    await in_step(streams, write_db)
    async with growing(write_db):
        for _ in range(3):
            before = said(relays, standby, "lease_gained"), said(relays, leader, "lease_lost")
            relays.sigstop(leader)
            await hear(relays, standby, "lease_gained", before[0] + 1)
            await reaches(streams, await reaches(streams, 0) + 20)
            relays.sigcont(leader)
            await hear(relays, leader, "lease_lost", before[1] + 1)
            leader, standby = standby, leader
    copy = await in_step(streams, write_db, 30)
    assert sorted(copy.messages) == list(range(1, copy.end + 1))
    assert said(relays, "one", "relay_recreates_stream") == said(relays, "two", "relay_recreates_stream") == 0


@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "control that must fail"])
async def test_what_a_woken_relay_still_had_in_its_buffers(
    relays: Supervisor, nats_server: Nats, write_db: Database, streams: JetStreamContext, fenced: bool
) -> None:
    """A relay is stopped while NATS takes nothing from it, another publishes the same events and more, then it wakes up.

    Its publishes do arrive then: somebody who listens on the subjects sees them. The stream refuses every one, because
    each expects a sequence that has passed. The very same relay without that header doubles them, out of order.
    """
    seen: list[int] = []

    async def listen(message: Msg) -> None:
        seen.append(position_in(message.headers))

    client = await connect(Broker(nats_server.url), "listener")
    async with Proxy(nats_server.url).serving() as proxy:
        module = "write_service.relay" if fenced else "tests.support.fakes.unfenced_relay"
        settings = {"FOLDLINE_DATABASE_URL": write_db.app, "FOLDLINE_NATS_URL": proxy.url}
        relays.add(Program(name="one", module=module, settings=settings))
        await led(relays)
        await in_step(streams, write_db)
        listener = await client.subscribe(broker.stream_subjects(1), cb=listen)
        await client.flush()

        # 1. `one` publishes 60 events of 200 kB, most of which stay in its buffers, and falls asleep.
        proxy.hold_after(1_000_000)
        grow(write_db, 60, 200_000)
        await asyncio.wait_for(proxy.stuck.wait(), 30)
        relays.sigstop("one")
        # 2. `two` takes over, publishes what is missing and more, and ends. Nobody shall mend the stream from now on.
        await hear(relays, "two", "lease_gained", 1)
        grow(write_db, 5)
        await in_step(streams, write_db)
        await relays.stop("two")
        async with hold_lease(write_db.app, LockClass.RELAY, 1):
            # 3. `one` wakes up, and what it had published arrives.
            before = len(seen)
            relays.sigcont("one")
            proxy.release()
            await eventually(lambda: 60 in seen[before:], 30)
            await hear(relays, "one", "lease_lost", 1)
            await client.flush()
            await listener.unsubscribe()
            assert len(seen) - before > 30
            # NATS hands a message to listeners before the stream takes or refuses it, but the stream keeps the order: once
            # it has refused this one, it has judged what was heard so far.
            with pytest.raises(APIError, match="wrong last sequence"):
                await streams.publish(f"{broker.stream_subjects(1)[:-1]}marker", headers={broker.EXPECTED_LAST_SEQUENCE: "1"})
            copy = await read_copy(streams)
            await relays.stop("one")
    await client.close()
    positions = [position_in(copy.messages[sequence].headers) for sequence in sorted(copy.messages)]
    if fenced:
        assert positions == list(range(1, 66))
    else:
        assert positions[:65] == list(range(1, 66))
        assert positions[65:] == seen[before:]


async def test_killed_under_load_another_takes_over(relays: Supervisor, write_db: Database, streams: JetStreamContext) -> None:
    """Without a gap: the stream's end is the only checkpoint."""
    leader, standby = await led(relays)
    await in_step(streams, write_db)
    async with growing(write_db):
        for _ in range(3):
            gained, waited = said(relays, standby, "lease_gained"), said(relays, leader, "lease_stands_by")
            await relays.kill9(leader)
            await hear(relays, standby, "lease_gained", gained + 1)
            relays.start(leader)
            await hear(relays, leader, "lease_stands_by", waited + 1)
            leader, standby = standby, leader
    copy = await in_step(streams, write_db, 30)
    assert sorted(copy.messages) == list(range(1, copy.end + 1))


@pytest.mark.long
async def test_sigterm_drains_and_ends_with_zero(relays: Supervisor, write_db: Database, streams: JetStreamContext) -> None:
    """A leader under load ends in order and gives the lease to the stand-by at once; a stand-by just ends."""
    await led(relays)
    async with growing(write_db):
        await reaches(streams, 50)
        assert await relays.stop("one") == 0
        await hear(relays, "two", "lease_gained", 1)
        relays.start("one")
        await hear(relays, "one", "lease_stands_by", 1)
        assert await relays.stop("one") == 0
    copy = await in_step(streams, write_db)
    assert sorted(copy.messages) == list(range(copy.first, copy.end + 1))
    assert await relays.stop("two") == 0


async def test_it_waits_for_what_it_needs_and_says_so(
    relays: Supervisor, nats_server: Nats, write_db: Database, streams: JetStreamContext
) -> None:
    """Started before NATS it comes up by itself; told to end while it waits, it ends with zero."""
    nats_server.stop()
    relays.start("one")
    await hear(relays, "one", "broker_awaited", 1, 15)
    assert await relays.stop("one") == 0
    relays.start("one")
    nats_server.start()
    grow(write_db, 3)
    await in_step(streams, write_db, 30)


async def test_it_ends_with_one_on_a_database_of_another_shard(relays: Supervisor, nats_server: Nats, write_db: Database) -> None:
    """A mistake in the settings is not waited on."""
    settings = {"FOLDLINE_DATABASE_URL": write_db.app, "FOLDLINE_NATS_URL": nats_server.url, "FOLDLINE_SHARD": "2"}
    relays.add(Program(name="wrong", module="write_service.relay", settings=settings))
    relays.start("wrong")
    await eventually(lambda: not relays.alive("wrong"), 30)
    assert await relays.stop("wrong") == 1
    assert said(relays, "wrong", "process_refuses_to_run") == 1
