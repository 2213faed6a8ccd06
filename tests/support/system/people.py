"""A server of PersonService whose handler is the test's, and a caller of it."""

# ruff: noqa: N802 (methods are named as the RPCs are)

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from bank.v1 import person_pb2, person_pb2_grpc
from foldline.v1 import command_pb2
from shared.folds.errors import Refusal
from shared.platform import telemetry
from shared.platform.identity import Role
from shared.platform.settings import ServerSettings
from shared.platform.tokens import DevelopmentIssuer
from shared.rpc.client import bearer, channel
from shared.rpc.server import Server
from shared.rpc.status import from_rpc_error

ID = "0190e4a0-0000-7000-8000-000000000000"


REGISTER, RENAME, CLOSE = (f"bank.v1.PersonService/{rpc}" for rpc in ("RegisterPerson", "RenamePerson", "ClosePerson"))


USERS = frozenset({Role.USER})


SECRET = "hunter2-is-a-secret"


REGISTER_ROUTE = f"/{REGISTER}"


OPTIONS = command_pb2.CommandOptions(command_id=ID)


Handler = Callable[[Any], Awaitable[command_pb2.CommandReceipt]]


async def receipt(request: Any) -> command_pb2.CommandReceipt:
    """The plainest handler."""
    return command_pb2.CommandReceipt(command_id=request.options.command_id)


class People(person_pb2_grpc.PersonServiceServicer):
    """Does what the test says."""

    def __init__(self) -> None:
        self.handle: Handler = receipt

    async def RegisterPerson(self, request: person_pb2.RegisterPersonRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self.handle(request)

    async def RenamePerson(self, request: person_pb2.RenamePersonRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self.handle(request)

    async def ClosePerson(self, request: person_pb2.ClosePersonRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self.handle(request)


class World:
    """A server with its issuer, its log and a channel to it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.issuer = DevelopmentIssuer(folder)
        self.log = io.BytesIO()
        telemetry.configure("info", service="test", stream=self.log)
        self.people = People()
        self.settings = ServerSettings(jwks_file=self.issuer.jwks_file, **settings)
        self.server = Server(self.settings, roles={REGISTER: USERS, RENAME: USERS, CLOSE: USERS})
        self.server.add(person_pb2_grpc.add_PersonServiceServicer_to_server, self.people)
        self.channel: aio.Channel

    async def start(self) -> None:
        await self.server.start()
        self.channel = channel(f"127.0.0.1:{self.server.port}", retries=False)
        self.stub = person_pb2_grpc.PersonServiceStub(self.channel)

    def token(self, *roles: Role) -> str:
        return self.issuer.issue(tenant="acme", user_id="alice", roles=roles or USERS)

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["event"] == event]

    async def register(self, name: str = "Alice", *, token: str | None = None, **call: Any) -> command_pb2.CommandReceipt:
        call.setdefault("timeout", 5)
        call.setdefault("metadata", bearer(self.token() if token is None else token))
        request = person_pb2.RegisterPersonRequest(options=OPTIONS, person_id=ID, name=name)
        return await self.stub.RegisterPerson(request, **call)

    async def send_bytes(self, raw: bytes) -> bytes:
        method: aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(REGISTER_ROUTE)
        return await method(raw, metadata=bearer(self.token()), timeout=20)


MakeWorld = Callable[..., Awaitable[World]]


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, Refusal]:
    """What a call is refused with."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc_error(caught.value)
