"""Two replicas of the write service on the same accounts, one of them killed: no duplicate, no loss."""

from __future__ import annotations

import pytest

from deploy.local.system import WRITE
from tests.support.checks.invariants import check, look
from tests.support.clients.traffic import running
from tests.support.system.stack import Stack


async def test_two_replicas_and_one_is_killed(stack: Stack) -> None:
    """Callers of both write to the same accounts; those of the killed one go on with the other, under the same ids."""
    second = stack.replica(WRITE)
    stack.start(second)
    await stack.wait_ready(second)
    async with running(stack, (WRITE, second), accounts=2) as traffic:
        await traffic.more(200)
        for victim in (second, WRITE):
            await stack.kill9(victim)
            await traffic.more(100)
            stack.start(victim)
            await stack.wait_ready(victim)
            await traffic.more(100)
    check(await look(stack), traffic.acknowledged)


@pytest.mark.long
async def test_every_command_sent_to_both_replicas_at_once(stack: Stack) -> None:
    """The same id at the same moment on two replicas, while one is killed: one outcome, and both tell the same."""
    second = stack.replica(WRITE)
    stack.start(second)
    await stack.wait_ready(second)
    async with running(stack, (WRITE, second), callers=8, accounts=2, everywhere=True) as traffic:
        await traffic.more(200)
        await stack.kill9(second)
        await traffic.more(100)
    check(await look(stack), traffic.acknowledged)
