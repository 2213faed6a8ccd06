"""Processes after a restore of the line: what began behind the copy is undone, the rest runs again, once each."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable
from datetime import timedelta

import pytest

from bank.v1 import account_pb2
from shared.folds.errors import InternalError, Refusal, Rejected, Unavailable
from shared.line.checkpoint import Checkpoint
from shared.line.standing import State
from shared.processes import history
from shared.processes.history import PARKED, RESTARTED, UNDONE
from tests.support.domains.gifts import World, key
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually

RESTORED = "22222222-2222-4222-8222-222222222222/1"


@pytest.fixture(autouse=True)
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of a test are one clock."""
    monkeypatch.setattr(history, "MARGIN", timedelta())


async def becomes(world: World, number: int, phase: str) -> None:
    """Waits for an account's process to be in a phase."""

    async def there() -> bool:
        return (await world.process(number))[3] == phase

    await eventually(there)


async def refusal_of(call: Awaitable[object]) -> str:
    """Why a call of the desk is refused."""
    with pytest.raises(Rejected) as refused:
        await call
    return refused.value.reason


async def test_a_restore_is_gone_on_from(world: World) -> None:
    """Each process by where the copy was taken in its life; money is given once in the line that there is now."""
    held: set[tuple[str, int]] = set()

    def decide(command: account_pb2.DepositMoneyRequest) -> Refusal | None:
        place = (command.account_id, command.amount_minor)
        if place == (uid(5), 500):
            return InternalError()
        return Unavailable("AWAY", "away") if place in held else None

    world.write.decide = decide
    world.open(1)
    async with world.running(), world.desk() as desk:
        # 1 ended long before the copy. 2 has its gift in the copy. 5 was given up, and an operator cancels after the copy.
        await becomes(world, 1, "given")
        world.clock.ahead = timedelta(hours=2)
        held |= {(uid(2), 100), (uid(4), 500)}
        world.open(2, 5)
        for envelope in world.store.events[1:]:
            envelope.recorded_at.FromDatetime(world.clock() - timedelta(seconds=1))
        await becomes(world, 2, "topping up")
        await eventually(lambda: len(world.write.receipts) == 3)
        kept = copy.deepcopy((world.store.events, world.store._versions, world.write.receipts, world.write.carried_out))
        assert await refusal_of(desk.accept_history("olga")) == "NOT_DIVERGED"

        async def parked() -> bool:
            return (await world.process(5))[0] == "parked"

        await eventually(parked)
        await desk.cancel(key(5), "olga")
        held.discard((uid(2), 100))
        # 3 began behind the copy and ended; 4 began behind it and still waits for its gift.
        world.open(3, 4)
        for number in (2, 3):
            await becomes(world, number, "given")
        await becomes(world, 4, "giving, late")
        await becomes(world, 5, "sorry")

    # The restore. Somebody else has written since: not at once what was there.
    world.store.events, world.store._versions, world.write.receipts, world.write.carried_out = kept
    world.store.epoch = RESTORED
    held.clear()
    world.open(6)
    async with world.running() as runner, world.desk() as desk:
        await eventually(lambda: runner.stopped)
        [runner_] = await desk.runners()
        assert runner_.standing.state is State.DIVERGED
        revision = await desk.accept_history("olga")
        assert await refusal_of(desk.accept_history("olga")) == "NOT_DIVERGED"
        common = revision.common
        assert (revision.before.position, common.at, common.head) == (
            5,
            Checkpoint(RESTORED, 3, world.store.events[2].event_id),
            4,
        )
        assert {(it.key, it.outcome, it.lost_position) for it in revision.processes} == {
            (key(2), RESTARTED, 0),
            (key(3), UNDONE, 4),
            (key(4), UNDONE, 5),
            (key(5), PARKED, 0),
        }
        gone = {(it.key, it.certain) for it in revision.commands}
        assert gone == {(key(2), False), (key(3), True), (key(5), False)}
        assert len([it for it in revision.commands if it.certain]) == 2  # gift and bonus of 3
        # 2 runs again: its gift is in the log, its bonus is given now. 6 is the line's own. 3 comes again, 4 does not.
        await becomes(world, 2, "given")
        await becomes(world, 6, "given")
        world.open(3)
        await becomes(world, 3, "given")
        assert await world.process(4) == ("undone", "", "HISTORY_LOST", "")
        assert await world.process(5) == ("ended", "", "HISTORY_LOST", "sorry")
        assert [row.key for row in await desk.find(10, None, attention=True)] == [key(4), key(5)]
    given = {(uid(number), amount): 1 for number in (1, 2, 3, 6) for amount in (500, 100)}
    assert world.write.carried_out == given
    assert await world.query("SELECT step FROM process_commands") == []


async def test_a_store_without_anything_that_was_seen(world: World) -> None:
    """An empty line: every process is undone, and the same events begin them anew."""
    world.open(1, 2)
    async with world.running(), world.desk() as desk:
        for number in (1, 2):
            await becomes(world, number, "given")
    events = list(world.store.events)
    world.store.events.clear()
    world.write.receipts.clear()
    world.write.carried_out.clear()
    world.store.epoch = RESTORED
    async with world.running() as runner, world.desk() as desk:
        await eventually(lambda: runner.stopped)
        revision = await desk.accept_history("olga")
        assert revision.common.at == Checkpoint(RESTORED, 0, "")
        assert [it.outcome for it in revision.processes] == [UNDONE, UNDONE]
        world.store.events.extend(events)
        for number in (1, 2):
            await becomes(world, number, "given")
    assert world.write.carried_out == {(uid(number), amount): 1 for number in (1, 2) for amount in (500, 100)}


async def test_a_store_that_is_away_changes_nothing(world: World) -> None:
    """The desk says so, and the runner is diverged still."""
    world.open(1)
    async with world.running(), world.desk() as desk:
        await becomes(world, 1, "given")
    world.store.events.clear()
    async with world.running() as runner, world.desk() as desk:
        await eventually(lambda: runner.stopped)
        world.store.away = True
        with pytest.raises(Unavailable) as refused:
            await desk.accept_history("olga")
        assert refused.value.reason == "EVENT_STORE_UNAVAILABLE"
        [runner_] = await desk.runners()
        assert runner_.standing.state is State.DIVERGED
        assert (await world.process(1))[0] == "ended"


async def test_two_operators_at_once(world: World) -> None:
    """One is heard; the other is told that there is nothing to accept any more."""
    world.open(1)
    async with world.running(), world.desk() as desk:
        await becomes(world, 1, "given")
    world.store.events.clear()
    async with world.running() as runner, world.desk() as desk, world.desk() as other:
        await eventually(lambda: runner.stopped)
        told = await asyncio.gather(desk.accept_history("olga"), other.accept_history("olga"), return_exceptions=True)
        refusals = [it.reason for it in told if isinstance(it, Rejected)]
        assert len(refusals) == 1
        assert refusals[0] in ("NOT_DIVERGED", "CHECKPOINT_MOVED")
    assert [name for _, name in await world.history(1)].count("accept-history") == 1
