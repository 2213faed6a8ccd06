"""Callers of one running system. Each test takes a tenant of its own, so that no test sees another's data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import pytest

from deploy.local.system import READ, SAGA, WRITE
from foldline.v1 import process_pb2, process_pb2_grpc
from shared.platform.identity import Role
from shared.rpc.client import bearer
from tests.support.clients.bank import INSIDER, Bank, channels
from tests.support.system import forked
from tests.support.system.stack import Stack
from tests.support.system.waiting import eventually

Caller = Callable[..., Bank]
Foldline = Callable[..., tuple[int, Any]]


@pytest.fixture
def tenant() -> str:
    """A tenant that nobody else has."""
    return f"t-{uuid4().hex[:12]}"


@pytest.fixture
async def caller(shared_stack: Stack, tenant: str) -> AsyncIterator[Caller]:
    """Makes callers: `caller(tenant="other", user_id="bob", roles=[Role.USER])`."""
    async with channels(shared_stack) as (write, read):

        def make(
            *,
            tenant: str = tenant,
            user_id: str = "alice",
            roles: Iterable[Role] = (Role.USER, Role.TENANT_ADMIN),
            token: str | None = None,
        ) -> Bank:
            return Bank(write, read, shared_stack.token(tenant, user_id, roles) if token is None else token)

        yield make


@pytest.fixture
def bank(caller: Caller) -> Bank:
    """A user of the test's tenant who may also freeze accounts."""
    return caller()


@pytest.fixture
def insider(caller: Caller) -> Bank:
    """The same, who may also read the line of all tenants, and so sees positions."""
    return caller(roles=INSIDER)


class ProcessAdmin:
    """An operator's, or somebody else's, look at the processes."""

    def __init__(self, stub: process_pb2_grpc.ProcessServiceStub, token: str) -> None:
        self.stub = stub
        self.who = bearer(token)

    async def get(self, tenant: str, type_: str, process_id: str) -> process_pb2.GetProcessResponse:
        """All about a process."""
        request = process_pb2.GetProcessRequest(tenant=tenant, type=type_, process_id=process_id)
        told: process_pb2.GetProcessResponse = await self.stub.GetProcess(request, metadata=self.who, timeout=20)
        return told

    async def find(self, **wanted: Any) -> list[process_pb2.ProcessSummary]:
        """The processes of a filter."""
        request = process_pb2.ListProcessesRequest(page_size=500, filter=process_pb2.ProcessFilter(**wanted))
        told: process_pb2.ListProcessesResponse = await self.stub.ListProcesses(request, metadata=self.who, timeout=20)
        return list(told.processes)

    async def ended(self, tenant: str, type_: str, process_id: str) -> process_pb2.GetProcessResponse:
        """All about a process when it has ended: a moment after its last command was carried out."""

        async def told() -> process_pb2.GetProcessResponse | None:
            try:
                answer = await self.get(tenant, type_, process_id)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:  # its first event is still on its way
                    return None
                raise
            return answer if answer.process.status == process_pb2.PROCESS_STATUS_ENDED else None

        answer = await eventually(told, 20, every_s=0.05)
        assert answer is not None
        return answer


@asynccontextmanager
async def desk_of(stack: Stack, roles: Iterable[Role] = (Role.OPERATOR,)) -> AsyncIterator[ProcessAdmin]:
    """A desk with a channel of its own."""
    async with stack.channel(SAGA) as channel:
        yield ProcessAdmin(process_pb2_grpc.ProcessServiceStub(channel), stack.token("operators", "olga", roles))


@pytest.fixture
async def desk(shared_stack: Stack) -> AsyncIterator[ProcessAdmin]:
    """An operator's desk."""
    async with desk_of(shared_stack) as desk:
        yield desk


def foldline_of(stack: Stack, tenant: str, folder: Path) -> Foldline:
    """Runs the command in a folder as `foldline dev` leaves it; returns the exit code and the JSON that it printed.

    `user` is the operator's name. A command is a process that has all imports already, or with `anew` one as a user starts it.
    """
    programs = stack.programs
    addresses = {"write": programs[WRITE].address, "read": programs[READ].address, "saga": programs[SAGA].address}
    addresses["saga_database_url"] = stack.databases.saga.app
    addresses["saga_token_file"] = programs[SAGA].settings["FOLDLINE_TOKEN_FILE"]
    environment = {**os.environ, "FOLDLINE_DATA": str(folder)}

    def run(*words: str, output: str = "json", typed: str = "", user: str = "olga", anew: bool = False) -> tuple[int, Any]:
        tokens = {
            "acme": stack.token(tenant, "alice", [Role.USER, Role.TENANT_ADMIN]),
            "operator": stack.token("operators", user, [Role.OPERATOR, Role.READER]),
        }
        file = folder / "endpoints.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, **addresses, "tokens": tokens}))
        said = [*words, "-o", output]
        if anew:
            command = [sys.executable, "-m", "cli.main", *said]
            done = subprocess.run(  # noqa: S603 (ours)
                command, capture_output=True, text=True, env=environment, cwd=folder, timeout=60, check=False, input=typed
            )
        else:
            done = forked.run("cli.main", said, cwd=folder, env=environment, typed=typed)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout) if output == "json" else done.stdout + done.stderr

    return run


@pytest.fixture
def foldline(shared_stack: Stack, tenant: str, tmp_path: Path) -> Foldline:
    """Runs the command for a tenant of the shared system."""
    return foldline_of(shared_stack, tenant, tmp_path)
