"""How many commands the committer takes together, whom it waits for, and what it has no room for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from deploy.bootstrap import Database
from shared.commands import committer
from shared.commands.committer import Committer
from shared.commands.decide import Command
from shared.commands.intake import Limits
from shared.folds.errors import OverLimit, Refusal, Unavailable
from tests.integration.shared.commands.counters import BUS, adding
from tests.support.checks.history import check_line
from tests.support.domains.trial import Add, Share
from tests.support.fakes.replica import make_command, reasons, replica
from tests.support.system.waiting import eventually


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
