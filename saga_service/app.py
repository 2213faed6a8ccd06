"""Builds the saga service: constructor arguments only. Tests call the same functions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator

from foldline.v1.command_pb2_grpc import CommandServiceStub
from foldline.v1.delivery_pb2_grpc import add_DeliveryServiceServicer_to_server
from foldline.v1.process_pb2_grpc import add_ProcessServiceServicer_to_server
from saga_service.api import ROLES, ProcessService
from saga_service.delivery_api import DeliveryService
from saga_service.overrides import ANNOUNCEMENTS
from saga_service.registry import PROCESSES
from shared.folds.delivery import Announcements
from shared.folds.process import ProcessDefinition
from shared.line.broker_access import Broker
from shared.line.consumer_metrics import watch_consumers
from shared.line.files import StoreUrl, open_files
from shared.line.follower import Follower
from shared.line.lag import Places, consumers_lag
from shared.line.sources import PageFeed, StoreLine
from shared.platform import postgres
from shared.platform.clock import utc_now
from shared.platform.leader import LockClass, lead, until
from shared.platform.peers import BrokerPeer, WriteServicePeer
from shared.platform.postgres import Connection, Reads, refuse_unsafe
from shared.platform.settings import ServerSettings, named
from shared.platform.urls import DatabaseUrl, OverTls
from shared.processes import announce
from shared.processes.admin import ProcessAdmin
from shared.processes.channels import Channel, Contacts, Deferred
from shared.processes.command_stream import CommandStream
from shared.processes.deliveries import DeliveryPolicy, DeliverySender
from shared.processes.delivery_admin import DeliveryAdmin
from shared.processes.delivery_backlog import watch_deliveries
from shared.processes.diagram import refuse_flawed
from shared.processes.dispatcher import Dispatcher
from shared.processes.history_archive import HistoryArchive
from shared.processes.retention import ProcessRetention
from shared.processes.runner import CHECKPOINT, ProcessRunner
from shared.processes.runners import readiness_check, watch_processes
from shared.processes.smtp import Smtp, sender_of, smtp_is_over_tls
from shared.processes.steering import Steering
from shared.rpc.client import channel
from shared.rpc.probes import Probes
from shared.rpc.server import Server
from upcasters import UPCASTERS


class SagaSettings(ServerSettings, WriteServicePeer, BrokerPeer):
    """The saga service: runs processes and serves their operators."""

    database_url: DatabaseUrl
    """The saga database's URL, as the application role and not through a pooler: a session's lock elects the leader."""
    token_file: Path
    """A file with a token of the roles `process` and `reader`, read again for every call, so it can be renewed. Its user
    must stay the same: a command that another user sends again is another command."""
    shard: int = Field(1, ge=1)
    """The shard whose events are followed."""
    connections_max: int = Field(4, ge=1)
    """The largest number of pooled connections for the operator's API."""
    contacts_file: Path | None = None
    """A JSON file of the contacts of tenants, by tenant and name, each with `email`, or with `url`, `secret` and `mode`
    (structured or binary) of a webhook. It is read again when it changes. Without it nothing is delivered."""
    smtp_url: Annotated[SecretStr | None, OverTls(smtp_is_over_tls, "must begin with smtps://, or have starttls=required")] = None
    """The mail server, smtp://user:password@host:587 with STARTTLS (?starttls=required, opportunistic or off), or smtps://.
    Without it no e-mail is sent; they wait, and die after their tries."""
    mail_from: str = "foldline@localhost"
    """The sender of e-mails, bank@example.com or The Bank <bank@example.com>; its domain is that of their Message-IDs."""
    webhooks_private: bool = False
    """Whether webhooks may reach private addresses, and use plain http unless FOLDLINE_TLS_REQUIRED is set: for development."""
    delivery_tries_max: int = Field(20, ge=1)
    """How often a delivery is tried before it is dead: 20 take about nine hours."""
    delivery_retention_days: float = Field(30, gt=0)
    """Sent and discarded deliveries are deleted after so many days."""
    process_retention_days: float = Field(90, gt=0)
    """Processes are deleted so many days after their end, with their histories, unless an operator should look at them."""
    process_archive_url: StoreUrl = ""
    """Where processes with their histories are written before they are deleted: `file:///folder`, which all instances share, or
    `s3://bucket/path`; empty: nowhere."""

    def prepare(self) -> None:
        """Makes the folder of the archive."""
        if self.process_archive_url:
            named("process_archive_url", lambda: open_files(self.process_archive_url))

    @field_validator("smtp_url")
    @classmethod
    def _is_smtp_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            Smtp(value.get_secret_value(), "foldline@localhost")
        return value

    @field_validator("mail_from")
    @classmethod
    def _is_a_sender(cls, value: str) -> str:
        sender_of(value)
        return value


class Leading:
    """The part of the service that one instance does at a time: follows the line, runs processes, sends commands."""

    def __init__(
        self,
        settings: SagaSettings,
        definitions: Iterable[ProcessDefinition[Any]] = PROCESSES,
        announcements: Announcements = ANNOUNCEMENTS,
    ) -> None:
        self._settings = settings
        self._definitions = tuple(definitions)
        self._announcements = announcements
        self._runner: ProcessRunner | None = None
        self._sender: DeliverySender | None = None

    def wake(self) -> None:
        """Makes runner and sender, if this instance leads, look for what an operator made due."""
        if self._runner is not None:
            self._runner.wake()
        if self._sender is not None:
            self._sender.wake()

    def places(self) -> dict[str, int]:
        """How far the runner has followed the line, if this instance leads and knows."""
        runner = self._runner
        return {CHECKPOINT: runner.at.position} if runner is not None and runner.at.epoch else {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Leads or stands by until `stopping` is set. Then an open round is rolled back; the next leader does it again."""
        database_url = self._settings.database_url.get_secret_value()
        await lead(database_url, LockClass.SAGA, self._settings.shard, lambda: self._run_until(stopping), stopping)

    async def _run_until(self, stopping: asyncio.Event) -> None:
        # Built for every lease anew: nothing that was read under an earlier lease may be used.
        settings = self._settings
        url = settings.process_archive_url
        archive = HistoryArchive(open_files(url), settings.shard) if url else None
        async with AsyncExitStack() as stack:
            feed = PageFeed(Broker.of(settings), settings.shard, f"saga-{settings.shard}")
            stack.push_async_callback(feed.close)
            write = await stack.enter_async_context(channel(settings.write_address, retries=False, tls=settings.write_tls))
            commands = CommandServiceStub(write)
            self._runner = ProcessRunner(
                self._definitions,
                settings.shard,
                follow=Follower(StoreLine(write, settings.token_file, settings.shard), feed, upcasters=UPCASTERS).follow,
                connect=self._connect,
                dispatcher=lambda news: Dispatcher(
                    commands.SendBatch,
                    settings.token_file,
                    clock=utc_now,
                    news=news,
                    stream=CommandStream(commands.SendStream, settings.token_file),
                ),
                clock=utc_now,
                announcements=self._announcements,
                upcasters=UPCASTERS,
                on_deliveries=lambda: self._sender.wake() if self._sender is not None else None,
                archive=archive,
            )
            self._sender = self._make_sender(self._runner.follows)
            retention = ProcessRetention(
                settings.shard,
                connect=self._connect,
                retention=timedelta(days=settings.process_retention_days),
                clock=utc_now,
                archive=archive,
            )
            await until(stopping, _all(self._runner.run(), self._sender.run(), retention.run()))

    def _make_sender(self, may_send: asyncio.Event) -> DeliverySender:
        settings = self._settings
        channels: dict[str, Channel] = {announce.WEBHOOK: Deferred(lambda: _webhooks(settings))}
        if settings.smtp_url is not None:
            channels[announce.EMAIL] = Smtp(settings.smtp_url.get_secret_value(), settings.mail_from)
        policy = DeliveryPolicy(tries_max=settings.delivery_tries_max, retention=timedelta(days=settings.delivery_retention_days))
        return DeliverySender(
            settings.shard,
            connect=self._connect,
            channels=channels,
            contacts=Contacts(settings.contacts_file),
            may_send=may_send,
            policy=policy,
            clock=utc_now,
        )

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
    announcements: Announcements = ANNOUNCEMENTS,
    *,
    wake: Callable[[], None] = lambda: None,
    places: Places = dict,
    clock: Callable[[], datetime] = utc_now,
) -> Server:
    """The server with its services; `reads` is opened and closed by the caller, the latter when the server is drained.

    `wake` is called when an operator made something due; `places` are those of the runner, if this instance leads.
    Raises TypeError for a definition that misses a state.
    """
    definitions = tuple(definitions)
    refuse_flawed(definitions)
    server = Server(settings, roles=ROLES, probes=Probes(settings, "saga_service"))
    probe = server.probes.needs_database(settings.database_url.get_secret_value())
    # Whichever instance leads: an operator must hear of a runner that does not go on from whoever asks any of them.
    server.probes.readiness.add("processes", readiness_check(probe, settings.shard, clock))
    watch_consumers(server.probes.metrics, probe, LockClass.SAGA, settings.shard, (CHECKPOINT,))
    watch_processes(server.probes.metrics, probe, settings.shard, clock, [it.type for it in definitions])
    watch_deliveries(server.probes.metrics, probe, clock)
    events = channel(settings.write_address, retries=False, tls=settings.write_tls)
    server.on_drained(lambda: events.close(None))
    line = StoreLine(events, settings.token_file, settings.shard)
    consumers_lag(server.probes.metrics, places, lambda: line, settings.shard)
    admin = ProcessAdmin(
        reads,
        definitions,
        settings.shard,
        clock=clock,
        wake=wake,
        announcements=announcements,
        line=line,
        upcasters=UPCASTERS,
    )
    server.add(add_ProcessServiceServicer_to_server, ProcessService(admin, Steering(admin.turns, wake=wake)))
    deliveries = DeliveryAdmin(reads, announcements, settings.shard, clock=clock, wake=wake)
    server.add(add_DeliveryServiceServicer_to_server, DeliveryService(deliveries))
    return server


def _webhooks(settings: SagaSettings) -> Channel:
    from shared.processes.webhook import WebhookChannel  # noqa: PLC0415 (see Deferred)

    return WebhookChannel("/foldline", allow_private=settings.webhooks_private, allow_plain=not settings.tls_required)


async def _all(*work: Coroutine[None, None, None]) -> None:
    """Runs all coroutines until cancelled. If one raises, the others end."""
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)
