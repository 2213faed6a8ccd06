"""ProcessService over real gRPC and PostgreSQL, as `saga_service.app.build` makes it, and the world of its processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from deploy.bootstrap import Database
from foldline.v1 import process_pb2, process_pb2_grpc
from foldline.v1.process_pb2 import GetProcessRequest, ListProcessesRequest, ProcessFilter
from saga_service.app import SagaSettings, build
from shared.folds.errors import Refusal
from shared.folds.process import ProcessDefinition
from shared.platform.identity import Role
from shared.platform.postgres import Reads
from shared.platform.startup import until_safe
from shared.platform.tokens import DevelopmentIssuer
from shared.processes.store import TABLES
from shared.rpc.client import bearer
from shared.rpc.server import Server
from shared.rpc.status import from_rpc_error
from tests.support.domains.gifts import GIFT, World
from tests.support.domains.order_process import ORDER
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually


@dataclass
class Service:
    """A running service, its world and its issuer."""

    world: World
    issuer: DevelopmentIssuer
    stub: process_pb2_grpc.ProcessServiceStub
    server: Server

    def of(self, *roles: Role, user: str = "olga") -> Any:
        """The metadata of a caller."""
        return bearer(self.issuer.issue(tenant="operators", user_id=user, roles=roles or (Role.OPERATOR,)))

    async def get(self, number: int) -> process_pb2.GetProcessResponse:
        """An account's process."""
        return await self.stub.GetProcess(GetProcessRequest(**name(number)), metadata=self.of(), timeout=10)

    async def find(self, *, size: int = 0, token: str = "", **wanted: Any) -> process_pb2.ListProcessesResponse:
        """A page of the list."""
        request = ListProcessesRequest(page_size=size, page_token=token, filter=ProcessFilter(**wanted))
        return await self.stub.ListProcesses(request, metadata=self.of(), timeout=10)


def name(number: int) -> dict[str, str]:
    """The fields that name an account's process; ids are taken in any case."""
    return {"tenant": "acme", "type": "gift", "process_id": uid(number).upper()}


def ids(processes: Any) -> list[str]:
    """What is in a list."""
    return [process.process_id for process in processes]


@asynccontextmanager
async def serving(saga_db: Database, tmp_path: Path, *definitions: ProcessDefinition[Any]) -> AsyncIterator[Service]:
    """The service over a fresh database, with the processes of gifts and orders, or with other definitions."""
    issuer = DevelopmentIssuer(tmp_path)
    token_file = tmp_path / "token"
    token_file.write_text("t0ken")
    settings = SagaSettings(  # type: ignore[call-arg]
        database_url=saga_db.app,  # type: ignore[arg-type]
        jwks_file=issuer.jwks_file,
        write_address="127.0.0.1:1",
        nats_url="nats://127.0.0.1:1",  # type: ignore[arg-type]
        token_file=token_file,
    )
    world = World(saga_db, token_file)
    reads = Reads(saga_db.app, application_name="test-saga-api")
    await reads.open()
    await until_safe(reads, written=TABLES)
    server = build(settings, reads, definitions or (GIFT, ORDER), clock=world.clock)
    server.on_drained(reads.close)
    port = await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Service(world, issuer, process_pb2_grpc.ProcessServiceStub(channel), server)
    finally:
        await server.drain()


async def refused(call: Awaitable[Any]) -> Refusal:
    """The refusal that a call is answered with."""
    with pytest.raises(aio.AioRpcError) as error:
        await call
    return from_rpc_error(error.value)


async def moved(service: Service, count: int, status: str) -> None:
    """Waits for so many processes of a status."""

    async def there() -> bool:
        return (await service.world.statuses())[status] == count

    await eventually(there, 30)
