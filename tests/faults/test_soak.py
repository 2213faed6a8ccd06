"""Ten minutes of ordinary life: the memory of no process grows with what it has done, and all holds at the end."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from deploy.local.system import PROJECTOR, READ, RELAY, SAGA, WRITE
from tests.faults.test_paused import rss
from tests.support.checks.invariants import check, look
from tests.support.clients.bank import Bank, channels
from tests.support.clients.steady import steady
from tests.support.clients.traffic import running
from tests.support.system.stack import Stack

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

WARM_S, SOAK_S = 120, 600
GROWTH_MAX = 24 * 1024 * 1024
"""What Python's and PostgreSQL's allocators and caches that are not full yet may still take after two minutes."""


async def test_ten_minutes_of_load(stack: Stack) -> None:
    """Commands, queries, transfers and refusals, without a pause."""
    names = (WRITE, RELAY, READ, PROJECTOR, SAGA)
    async with channels(stack) as (write, read), running(stack) as traffic, steady(Bank(write, read, stack.token("acme"))):
        warm: dict[str, int] = {}
        begun = time.monotonic()
        while (past := time.monotonic() - begun) < SOAK_S:
            if past >= WARM_S and not warm:
                warm = {name: rss(stack.pid(name)) for name in names}
            await asyncio.sleep(1)
        grown = {name: rss(stack.pid(name)) - warm[name] for name in names}
    told = {name: f"{warm[name] >> 20} MiB {more >> 10:+} KiB" for name, more in grown.items()}
    logging.getLogger(__name__).info("%s commands, %s", len(traffic.acknowledged), told)
    assert all(more < GROWTH_MAX for more in grown.values()), grown
    check(await look(stack, within_s=120), traffic.acknowledged)
