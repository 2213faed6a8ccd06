"""Builds the saga service: constructor arguments only. Tests call the same functions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr

from foldline.v1.command_pb2_grpc import CommandServiceStub
from foldline.v1.process_pb2_grpc import add_ProcessServiceServicer_to_server
from saga_service.api import ROLES, ProcessService
from saga_service.registry import PROCESSES
from shared.folds.process import ProcessDefinition
from shared.line.follower import Follower
from shared.line.sources import StoreLine, StreamFeed
from shared.platform import postgres
from shared.platform.clock import utc_now
from shared.platform.leader import LockClass, lead, until
from shared.platform.postgres import Connection, Reads, refuse_unsafe
from shared.platform.settings import ServerSettings
from shared.processes.admin import ProcessAdmin
from shared.processes.dispatcher import Dispatcher
from shared.processes.runner import ProcessRunner
from shared.rpc.client import channel
from shared.rpc.server import Server


class SagaSettings(ServerSettings):
    """The saga service: runs processes and serves their operators."""

    database_url: SecretStr
    """The saga database's URL, as the application role and not through a pooler: a session's lock elects the leader."""
    write_address: str
    """The write service's address, host:port, where events are read and commands are sent."""
    nats_url: SecretStr
    """The NATS servers, nats://user:password@host:port, several separated by commas."""
    token_file: Path
    """A file with a token of the roles `process` and `reader`, read again for every call, so it can be renewed. Its user
    must stay the same: a command that another user sends again is another command."""
    shard: int = Field(1, ge=1)
    """The shard whose events are followed."""
    connections_max: int = Field(4, ge=1)
    """The largest number of pooled connections for the operator's API."""


class Leading:
    """The part of the service that one instance does at a time: follows the line, runs processes, sends commands."""

    def __init__(self, settings: SagaSettings, definitions: Iterable[ProcessDefinition[Any]] = PROCESSES) -> None:
        self._settings = settings
        self._definitions = tuple(definitions)
        self._runner: ProcessRunner | None = None

    def wake(self) -> None:
        """Lets the runner, if we lead, look for what an operator made due."""
        if self._runner is not None:
            self._runner.wake()

    async def run(self, stopping: asyncio.Event) -> None:
        """Leads or stands by until `stopping` is set. A round under way is then rolled back: nothing is lost."""
        database_url = self._settings.database_url.get_secret_value()
        await lead(database_url, LockClass.SAGA, self._settings.shard, lambda: self._run_until(stopping), stopping)

    async def _run_until(self, stopping: asyncio.Event) -> None:
        # Built for every lease anew: nothing that was read under an earlier lease may be used.
        settings = self._settings
        async with AsyncExitStack() as stack:
            feed = StreamFeed(settings.nats_url.get_secret_value(), settings.shard, f"saga-{settings.shard}")
            stack.push_async_callback(feed.close)
            write = await stack.enter_async_context(channel(settings.write_address, retries=False))
            self._runner = ProcessRunner(
                self._definitions,
                settings.shard,
                follow=Follower(StoreLine(write, settings.token_file, settings.shard), feed).follow,
                connect=self._connect,
                dispatcher=lambda news: Dispatcher(
                    CommandServiceStub(write).SendBatch, settings.token_file, clock=utc_now, news=news
                ),
                clock=utc_now,
            )
            await until(stopping, self._runner.run())

    async def _connect(self) -> Connection:
        connection = await postgres.connect(self._settings.database_url.get_secret_value(), application_name="foldline-saga")
        try:
            await refuse_unsafe(connection, tables=())
        except BaseException:
            await connection.close()
            raise
        return connection


def build(
    settings: SagaSettings,
    reads: Reads,
    definitions: Iterable[ProcessDefinition[Any]] = PROCESSES,
    *,
    wake: Callable[[], None] = lambda: None,
    clock: Callable[[], datetime] = utc_now,
) -> Server:
    """The server with its services; `reads` is opened and closed by the caller, the latter when the server is drained.

    `wake` is called when an operator made something due.
    """
    server = Server(settings, roles=ROLES)
    admin = ProcessAdmin(reads, definitions, settings.shard, clock=clock, wake=wake)
    server.add(add_ProcessServiceServicer_to_server, ProcessService(admin))
    return server
