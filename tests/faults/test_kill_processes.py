"""kill -9 of each process, one at a time, under load: nothing acknowledged is lost or doubled, and it heals by itself."""

from __future__ import annotations

import asyncio

import pytest

from deploy.local.system import PROJECTOR, READ, RELAY, WRITE
from tests.support.checks.invariants import check, look
from tests.support.checks.stream import published
from tests.support.clients.bank import Bank, channels, round_trip
from tests.support.clients.traffic import Traffic, running
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

KILLS = 2
# When to give up, not a measurement: it takes a few seconds, most of which are a Python process starting.
GIVE_UP_S = 60.0

# What goes on without the process: commands without all but their own.
GOES_ON = {WRITE: False, RELAY: True, READ: True, PROJECTOR: True}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in (RELAY, READ))) for name in GOES_ON])
async def test_a_process_killed_under_load(stack: Stack, name: str) -> None:
    """Started again, it goes on where it was: a new command is answered and seen by a query."""
    async with running(stack) as traffic:
        for _ in range(KILLS):
            await stack.kill9(name)
            if GOES_ON[name]:
                await traffic.more(50)
            stack.start(name)
            await heal(stack, traffic)
            await traffic.more(50)
    picture = await look(stack)
    check(picture, traffic.acknowledged)
    await published(stack.nats.url, picture.line)
    assert {acknowledged.receipt is None for acknowledged in traffic.acknowledged} == {True, False}


async def heal(stack: Stack, traffic: Traffic) -> None:
    """Returns when a new command is answered and a query has it seen."""
    async with channels(stack) as (write, read):
        bank = Bank(write, read, traffic.banks[0].token)
        await eventually(lambda: round_trip(bank, traffic.accounts[0]), GIVE_UP_S, every_s=0.02)


async def test_everything_killed_at_once(stack: Stack) -> None:
    """All four at the same moment, under load, and started again: as if the machine had been switched off and on."""
    async with running(stack) as traffic:
        await asyncio.gather(*(stack.kill9(name) for name in GOES_ON))
        for name in GOES_ON:
            stack.start(name)
        await traffic.more(100)
    check(await look(stack), traffic.acknowledged)
