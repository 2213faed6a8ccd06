"""The export of a tenant over real gRPC and PostgreSQL, as `write_service.app.build` serves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from grpc import aio

from deploy.bootstrap import Database
from foldline.v1 import tenant_pb2, tenant_pb2_grpc
from shared.platform.identity import Role
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import bearer
from shared.rpc.status import from_rpc_error
from tests.integration.shared.commands.test_purging import filled
from tests.support.domains.trial import Add, build_registry
from tests.support.fakes.replica import replica
from tests.support.system.boxing import TENANT
from tests.support.system.waiting import eventually
from tests.support.system.write_server import write_server

LARGE = 90
"""So many commands have the largest payload."""
DEADLINE_S = 0.5


@dataclass
class Service:
    """A running write service whose calls may take DEADLINE_S, and an operator's token."""

    database: Database
    tenants: tenant_pb2_grpc.TenantServiceStub
    who: Any

    async def export(self) -> list[tenant_pb2.ExportTenantResponse]:
        """All messages of an export."""
        request = tenant_pb2.ExportTenantRequest(tenant=TENANT)
        return [message async for message in self.tenants.ExportTenant(request, metadata=self.who, timeout=60)]

    async def describe(self) -> Any:
        """A call with the usual limit of time."""
        return await self.tenants.DescribeTenant(tenant_pb2.DescribeTenantRequest(tenant=TENANT), metadata=self.who, timeout=60)

    async def waiting(self) -> int:
        """How many connections wait for a lock to count a tenant's commands, as an export does first."""
        async with await psycopg.AsyncConnection.connect(self.database.admin) as connection:
            cursor = await connection.execute(
                """SELECT count(*) FROM pg_stat_activity
                   WHERE wait_event_type = 'Lock' AND query LIKE 'SELECT count(*) FROM (SELECT FROM commands%'"""
            )
            [(count,)] = await cursor.fetchall()
        return int(count)


@pytest.fixture
async def service(write_db: Database, tmp_path: Path) -> AsyncIterator[Service]:
    """The service over a database with two tenants, and large commands of the first."""
    await filled(write_db, tmp_path / "archive")
    async with replica(write_db, build_registry()) as one:
        for _ in range(LARGE):
            await one.ask_one(Add(counter_id="large", amount=1))
    async with await psycopg.AsyncConnection.connect(write_db.admin) as connection:
        for table in ("commands", "schedules"):
            query = f"UPDATE {table} SET payload = convert_to(repeat('x', 65536), 'UTF8') WHERE aggregate_id IN ('large', 'r')"
            await connection.execute(query.encode())
    issuer = DevelopmentIssuer(tmp_path)
    settings = {"deadline_max_s": DEADLINE_S, "deadline_default_s": DEADLINE_S}
    async with write_server(write_db, issuer, archive_url=f"file://{tmp_path / 'archive'}", **settings) as to_it:
        token = issuer.issue(tenant="operators", user_id="otto", roles=[Role.OPERATOR])
        yield Service(write_db, tenant_pb2_grpc.TenantServiceStub(to_it), bearer(token))


async def test_an_export_outlasts_other_calls_and_is_whole(service: Service) -> None:
    """While a lock holds both up, another call is cut off; the export goes on, in messages that fit, and has large payloads."""
    async with await psycopg.AsyncConnection.connect(service.database.admin) as holder:
        await holder.execute("LOCK TABLE commands IN ACCESS EXCLUSIVE MODE")
        exporting = asyncio.create_task(service.export())
        await eventually(service.waiting)
        with pytest.raises(aio.AioRpcError) as cut:
            await service.describe()
        assert from_rpc_error(cut.value).reason == "DEADLINE_EXCEEDED"
    messages = await exporting
    rows = (await service.describe()).rows
    events, commands, schedules = (
        [row for message in messages for row in getattr(message, name)] for name in ("events", "commands", "schedules")
    )
    last = messages[-1]
    assert (last.event_count, last.command_count, last.schedule_count) == (len(events), len(commands), len(schedules))
    assert (len(events), len(commands)) == (rows["events"] + rows["boxed_events"], rows["commands"])
    assert sum(len(row.command.value) == 65536 for row in commands) == LARGE
    [schedule] = schedules
    assert (schedule.cron, schedule.aggregate_id, len(schedule.command.value)) == ("0 0 1 1 *", "r", 65536)
    assert max(message.ByteSize() for message in messages) < 2**21
