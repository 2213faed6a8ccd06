"""Runs a small domain as a service in this process: its registry and servicers, the kernel, gRPC, a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from grpc import aio

from deploy.bootstrap import Database
from foldline.v1 import command_pb2, command_pb2_grpc, event_store_pb2, event_store_pb2_grpc
from shared.commands.bus import CommandBus
from shared.commands.committer import Committer
from shared.commands.registry import CommandRegistry
from shared.commands.schedule import Schedule
from shared.platform.clock import utc_now
from shared.platform.identity import Role
from shared.platform.postgres import Reads
from shared.platform.settings import ServerSettings
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import bearer, channel
from shared.rpc.server import Server
from tests.support.clients.bank import new_id, read_refusal
from tests.support.clients.bank import packed as to_any
from tests.support.system.sealing import SEAL
from write_service.api import ROLES, SIZES_MAX, CommandService, EventStoreService

SERVED = ("foldline.v1.CommandService/", "foldline.v1.EventStoreService/")
KERNEL_ROLES = {rpc: roles for rpc, roles in ROLES.items() if rpc.startswith(SERVED)}
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Service:
    """A caller of a running service, in one tenant."""

    channel: aio.Channel
    token: str

    async def send(self, method: Any, request: Any) -> command_pb2.CommandReceipt:
        """The receipt of a command, which gets an id of its own."""
        request.options.command_id = new_id()
        receipt: command_pb2.CommandReceipt = await method(request, metadata=bearer(self.token), timeout=TIMEOUT_S)
        return receipt

    async def refusal(self, method: Any, request: Any) -> str:
        """The reason why a command is refused; empty if it is accepted."""
        try:
            await self.send(method, request)
        except aio.AioRpcError as error:
            return read_refusal(error).reason
        return ""

    async def batch(self, *commands: Any, atomic: bool = False) -> list[command_pb2.CommandReceipt]:
        """The receipts of a batch, whose commands get ids of their own."""
        request = command_pb2.SendBatchRequest(atomic=atomic)
        for command in commands:
            command.options.command_id = new_id()
            request.items.add(command=to_any(command))
        stub = command_pb2_grpc.CommandServiceStub(self.channel)
        answer = await stub.SendBatch(request, metadata=bearer(self.token), timeout=TIMEOUT_S)
        return list(answer.receipts)

    async def stream(self, category: str, aggregate_id: str) -> list[event_store_pb2.EventEnvelope]:
        """The events of an aggregate; none if there is no such stream."""
        request = event_store_pb2.ReadStreamRequest(aggregate_type=category, aggregate_id=aggregate_id)
        call = event_store_pb2_grpc.EventStoreServiceStub(self.channel).ReadStream(
            request, metadata=bearer(self.token), timeout=TIMEOUT_S
        )
        try:
            return [event async for answer in call for event in answer.events]
        except aio.AioRpcError as error:
            assert read_refusal(error).reason == "STREAM_NOT_FOUND"  # noqa: PT017 (nothing else is an empty stream)
            return []

    async def names(self, category: str, aggregate_id: str) -> list[str]:
        """The names of an aggregate's events, without their package."""
        return [event.type.rpartition(".")[2] for event in await self.stream(category, aggregate_id)]


@asynccontextmanager
async def serving(
    database: Database,
    folder: Path,
    registry: CommandRegistry,
    commands: Mapping[str, str],
    add_services: Callable[[Server, CommandBus], None],
) -> AsyncIterator[Service]:
    """A running service with a registry, the commands of its RPCs and its servicers, as `servicers.py` has them."""
    issuer = DevelopmentIssuer(folder)
    reads = Reads(database.app, application_name="small")
    await reads.open()
    committer = Committer(database.app, registry, shard=1, clock=utc_now)
    bus = CommandBus(committer, reads, SEAL, clock=utc_now)
    settings = ServerSettings(jwks_file=issuer.jwks_file)
    server = Server(settings, roles=KERNEL_ROLES | registry.roles(commands), sizes_max=SIZES_MAX)
    add_services(server, bus)
    service = CommandService(bus, reads, registry, Schedule(reads))
    server.add(command_pb2_grpc.add_CommandServiceServicer_to_server, service)
    server.add(event_store_pb2_grpc.add_EventStoreServiceServicer_to_server, EventStoreService(reads, registry, SEAL))
    committing = asyncio.create_task(committer.run())

    async def commit_the_rest() -> None:
        committer.close()
        await committing

    server.on_drained(reads.close)
    server.on_drained(commit_the_rest)
    port = await server.start()
    token = issuer.issue(tenant=f"t-{uuid4().hex[:8]}", user_id="alice", roles=[Role.USER, Role.READER])
    try:
        async with channel(f"127.0.0.1:{port}") as to_server:
            yield Service(to_server, token)
    finally:
        await server.drain()
