"""What operators ask of projections is in the log: who asked for what."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from grpc import aio

from foldline.v1 import projection_pb2
from shared.platform.identity import Role
from tests.support.system.query_service import Service, bank

DIVERGED = "UPDATE checkpoints SET state = 'stopped', reason = 'HISTORY_DIVERGED: x' WHERE name = 'people'"


async def test_rebuilds_and_refills_that_are_asked_for_are_logged(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """With the user's id, and also if they are refused then."""
    await service.holds(bank())
    with psycopg.connect(service.database.app) as app:
        app.execute(DIVERGED)
    stub, who = service.projections, service.of("acme", Role.OPERATOR)
    await stub.StartRebuild(projection_pb2.StartRebuildRequest(name="accounts"), metadata=who)
    await stub.RefillProjection(projection_pb2.RefillProjectionRequest(name="people"), metadata=who)
    refusals: list[Any] = [
        stub.SwitchRebuild(projection_pb2.SwitchRebuildRequest(name="accounts"), metadata=who),
        stub.DropFormer(projection_pb2.DropFormerRequest(name="accounts"), metadata=who),
    ]
    for call in refusals:
        with pytest.raises(aio.AioRpcError):
            await call
    await stub.CancelRebuild(projection_pb2.CancelRebuildRequest(name="accounts"), metadata=who)
    printed = capfd.readouterr()
    lines = [json.loads(line) for line in (printed.out + printed.err).splitlines() if '_asked"' in line]
    told = [(it["event"], it.get("action"), it["projection"], it["user_id"], it["level"]) for it in lines]
    assert told == [
        ("rebuild_asked", "start", "accounts", "tester", "warning"),
        ("refill_asked", None, "people", "tester", "warning"),
        ("rebuild_asked", "switch", "accounts", "tester", "warning"),
        ("rebuild_asked", "drop", "accounts", "tester", "warning"),
        ("rebuild_asked", "cancel", "accounts", "tester", "warning"),
    ]
