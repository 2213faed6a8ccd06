"""The saga service as it is set up to archive processes: one that ended leaves its database and is in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest

from deploy.local.system import SAGA
from tests.support.clients.bank import Bank, channels
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually


@pytest.mark.long
async def test_an_ended_transfer_is_archived_and_leaves(stack: Stack, tmp_path: Path) -> None:
    """By the settings alone, with its whole history."""
    folder = tmp_path / "histories"
    archiving = {"FOLDLINE_PROCESS_ARCHIVE_URL": folder.as_uri(), "FOLDLINE_PROCESS_RETENTION_DAYS": "0.000001"}
    async with channels(stack) as (write, read):
        bank = Bank(write, read, stack.token("acme", "alice"))
        owner, _ = await bank.register("Bill")
        blue, _ = await bank.open(owner)
        red, _ = await bank.open(owner)
        await bank.deposit(blue, 100_00)
        transfer = await bank.transfer(blue, red, 69_00)
        await bank.ended_transfer(transfer)

    async def statuses() -> list[str]:
        async with await psycopg.AsyncConnection.connect(stack.databases.saga.app) as connection:
            cursor = await connection.execute("SELECT status FROM processes")
            return [status for (status,) in await cursor.fetchall()]

    async def has_ended() -> bool:
        return await statuses() == ["ended"]

    await eventually(has_ended)
    await stack.stop(SAGA)
    stack.start(stack.replica(SAGA, settings=archiving))

    async def has_left() -> bool:
        return await statuses() == []

    await eventually(has_left, 60)
    [file] = folder.rglob("processes.jsonl")
    process = json.loads(file.read_bytes())
    assert (process["process_id"], process["phase"]) == (transfer[0], "completed")
    steps = [entry["step"] for entry in process["history"] if entry["kind"] == "answer"]
    assert steps == ["debit", "credit", "complete"]
