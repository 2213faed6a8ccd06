"""One caller sends as much as it can; what the others see of that. Nothing is timed: the order of commands is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest

from deploy.bootstrap import Databases
from deploy.local.system import WRITE, System
from foldline.v1 import command_pb2
from tests.support.clients.bank import Bank, item, new_id, register
from tests.support.system.engines import Engines
from tests.support.system.waiting import eventually

FLOODERS, BATCH = 16, 256


@pytest.fixture
async def system(engines: Engines, databases: Databases, tmp_path: Path) -> AsyncIterator[System]:
    """A write service alone."""
    system = System(tmp_path / "system", databases, engines.nats_url)
    try:
        system.start(WRITE)
        await system.wait_ready(WRITE)
        yield system
    finally:
        await system.stop_all()


async def test_a_tenant_within_its_share_is_not_delayed_by_a_flood(system: System) -> None:
    """16 callers of one tenant keep batches of 256 under way; of 20 commands of another, few are preceded by many of them.

    In one queue, 4,096 would stand before each.
    """
    async with system.channel(WRITE) as to_flood, system.channel(WRITE) as channel:
        flooder, other = Bank(to_flood, to_flood, system.token("flood")), Bank(channel, channel, system.token("other"))
        await other.register("Ada")
        ended = False

        async def flood() -> int:
            sent = 0
            while not ended:
                items = [item(register(new_id(), "f")) for _ in range(BATCH)]
                answer = await flooder.call(flooder.commands.SendBatch, command_pb2.SendBatchRequest(items=items), timeout_s=60)
                assert all(receipt.status == command_pb2.COMMAND_STATUS_COMPLETED for receipt in answer.receipts)
                sent += len(items)
            return sent

        floods = [asyncio.create_task(flood()) for _ in range(FLOODERS)]
        async with await psycopg.AsyncConnection.connect(system.databases.write.admin, autocommit=True) as watch:

            async def head() -> int:
                cursor = await watch.execute("SELECT coalesce(max(position), 0) FROM events")
                row = await cursor.fetchone()
                assert row is not None  # an aggregate has a row
                return int(row[0])

            async def flooded() -> bool:
                return await head() > FLOODERS * BATCH

            await eventually(flooded, 60)
            before = []
            for _ in range(20):
                first = await head()
                person_id, _ = await other.register("Bob")
                before.append(await position_of(watch, person_id) - first)
                await asyncio.sleep(0.05)  # 20 a second, and less
        ended = True
        assert sum(await asyncio.gather(*floods)) > FLOODERS * BATCH
        assert sorted(before)[10] <= 3 * BATCH, before
        assert max(before) <= FLOODERS * BATCH // 2, before


async def position_of(watch: psycopg.AsyncConnection, person_id: str) -> int:
    """Where on the line the person was registered."""
    cursor = await watch.execute("SELECT position FROM events WHERE aggregate_id = %s", [person_id])
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
