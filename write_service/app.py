"""Builds the write service from its settings. The tests build it the same way."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import Field, model_validator

from bank.v1 import user_pb2_grpc
from foldline.v1 import (
    archive_pb2_grpc,
    audit_pb2_grpc,
    command_pb2_grpc,
    event_store_pb2_grpc,
    history_pb2_grpc,
    override_pb2_grpc,
    retention_pb2_grpc,
    schedule_pb2_grpc,
    tenant_pb2_grpc,
)
from shared.commands.aggregate_purging import AggregatePurger
from shared.commands.boxing import Boxer
from shared.commands.bus import COMMAND_BYTES_MAX, CommandBus
from shared.commands.committer import Committer
from shared.commands.intake import Limits
from shared.commands.purging import Purger
from shared.commands.recurring import Recurring
from shared.commands.retention_plan import Purges
from shared.commands.retention_sweeper import RetentionSweeper
from shared.commands.schedule import Schedule, Scheduler, watch_schedule
from shared.commands.sweeper import Sweeper
from shared.line.archive import open_archive
from shared.line.files import StoreUrl
from shared.line.notifier import Notifier
from shared.platform.clock import utc_now
from shared.platform.leader import LockClass, lead
from shared.platform.postgres import Reads
from shared.platform.seal import Seal, SealKeys
from shared.platform.settings import Bytes, Seconds, ServerSettings, named, refuse_larger
from shared.platform.urls import DatabaseUrl
from shared.rpc.probes import Probes
from shared.rpc.server import Server
from write_service.api import COMMANDS as MORE_COMMANDS
from write_service.api import ROLES, SIZES_MAX, CommandService, EventStoreService, OverrideService, UserService
from write_service.archive import ROLES as ARCHIVE_ROLES
from write_service.archive import ArchiveService
from write_service.audit import ROLES as AUDIT_ROLES
from write_service.audit import AuditService
from write_service.history import ROLES as HISTORY_ROLES
from write_service.history import HistoryService
from write_service.passwords import Passwords, PasswordVerifier
from write_service.registry import ADMINS, build_registry
from write_service.retention import ROLES as RETENTION_ROLES
from write_service.retention import RetentionService
from write_service.schedules import ROLES as SCHEDULE_ROLES
from write_service.schedules import ScheduleService
from write_service.servicers import COMMANDS, add_command_services
from write_service.tenants import EXPORT, TenantService
from write_service.tenants import ROLES as TENANT_ROLES
from write_service.tries import Tries

FIXED_ROLES = ROLES | ARCHIVE_ROLES | AUDIT_ROLES | HISTORY_ROLES | RETENTION_ROLES | SCHEDULE_ROLES | TENANT_ROLES
"""Which roles may call the RPCs that send no command of the registry."""


class WriteSettings(ServerSettings):
    """The write service: takes commands and serves the event store."""

    database_url: DatabaseUrl
    """The write database's URL, as the application role: it reads tables and calls the append function, nothing else."""
    seal_keys: SealKeys
    """The keys that seal consistency and resume tokens, the same for write and read services: 64 hexadecimal digits each,
    separated by commas. The first seals, all open, so a key is changed by adding the new one behind, then in front."""
    shard: int = Field(1, ge=1)
    """The shard whose line this database holds."""
    connections_max: int = Field(8, ge=1)
    """The largest number of pooled connections for reading."""
    gather_wait_s_max: Seconds = Limits().gather_wait_s_max
    """How long a batch waits at most, under load, for the commands that are about to come, in seconds; 0: never."""
    command_size_max: Bytes = COMMAND_BYTES_MAX
    """The largest command, in bytes, in a request of its own or in a batch."""
    archive_url: StoreUrl = ""
    """Where boxed aggregates go: `file:///folder`, which all replicas share, or `s3://bucket/path`; empty: nothing is boxed."""
    export_s_max: float = Field(3600, gt=0)
    """How long the export of a tenant may take, in seconds, in place of `deadline_max_s`."""
    command_log_days: float = Field(0, ge=0)
    """For how many days the command log keeps a command that has ended; 0: for ever."""

    @model_validator(mode="after")
    def _commands_fit(self) -> WriteSettings:
        refuse_larger(self, command_size_max="request_size_max")
        return self

    def prepare(self) -> None:
        """Makes the archive's folder."""
        named("archive_url", lambda: open_archive(self.archive_url))


def build(settings: WriteSettings, reads: Reads) -> Server:
    """The server with its services, on a running event loop; the committer runs until the server is drained.

    `reads` is opened and closed by the caller, the latter when the server is drained.
    """
    database_url = settings.database_url.get_secret_value()
    notifier = Notifier(database_url)
    passwords = Passwords()
    registry = build_registry(passwords)
    archive = open_archive(settings.archive_url)
    committer = Committer(
        database_url,
        registry,
        shard=settings.shard,
        clock=utc_now,
        committed=notifier.notify,
        limits=Limits(gather_wait_s_max=settings.gather_wait_s_max),
    )
    kept = timedelta(days=settings.command_log_days) if settings.command_log_days else None
    seal = Seal(settings.seal_keys.get_secret_value())
    commands = CommandBus(committer, reads, seal, clock=utc_now, kept=kept, size_max=settings.command_size_max)
    scheduler = Scheduler(reads, committer)

    server = Server(
        settings,
        sizes_max=SIZES_MAX | dict.fromkeys(COMMANDS | MORE_COMMANDS, settings.command_size_max),
        deadlines_max={EXPORT: settings.export_s_max},
        roles=FIXED_ROLES | registry.roles(COMMANDS | MORE_COMMANDS),
        probes=Probes(settings, "write_service"),
    )
    probe = server.probes.needs_database(database_url)
    watch_schedule(server.probes.metrics, probe)
    committer.observer.register(server.probes.metrics, settings.tenants_told_apart, probe, committer.waiting)
    add_command_services(server, commands)
    server.add(
        user_pb2_grpc.add_UserServiceServicer_to_server,
        UserService(commands, PasswordVerifier(registry, reads, passwords, Tries(reads))),
    )
    service = CommandService(commands, reads, registry, Schedule(reads))
    server.add(command_pb2_grpc.add_CommandServiceServicer_to_server, service)
    server.add(event_store_pb2_grpc.add_EventStoreServiceServicer_to_server, EventStoreService(reads, registry, seal, archive))
    boxer = Boxer(
        database_url,
        reads,
        registry,
        archive,
        shard=settings.shard,
        clock=utc_now,
        committed=notifier.notify,
        roles=ADMINS,
    )
    server.add(archive_pb2_grpc.add_ArchiveServiceServicer_to_server, ArchiveService(boxer, commands, reads, registry))
    purges = Purges(boxer, reads, registry)
    retention = RetentionService(commands, boxer, purges, reads, registry, clock=utc_now)
    server.add(retention_pb2_grpc.add_RetentionServiceServicer_to_server, retention)
    purger = AggregatePurger(reads, registry, archive, shard=settings.shard, clock=utc_now, committed=notifier.notify)
    sweeper = RetentionSweeper(boxer, purges, purger, reads, registry, clock=utc_now, boxes=archive is not None)
    sweeper.register(server.probes.metrics)
    server.add(history_pb2_grpc.add_HistoryServiceServicer_to_server, HistoryService(reads, registry, committer.is_cached))
    server.add(audit_pb2_grpc.add_AuditServiceServicer_to_server, AuditService(commands, reads, registry))
    server.add(schedule_pb2_grpc.add_ScheduleServiceServicer_to_server, ScheduleService(commands, Recurring(reads), registry))
    server.add(tenant_pb2_grpc.add_TenantServiceServicer_to_server, TenantService(commands, reads, archive, shard=settings.shard))
    server.add(override_pb2_grpc.add_OverrideServiceServicer_to_server, OverrideService(commands, reads, registry))

    server.on_drained(passwords.close)
    stopping = asyncio.Event()
    notifying, committing = asyncio.create_task(notifier.run()), asyncio.create_task(committer.run())

    async def alone() -> None:
        """Fires due commands, sweeps old ones, boxes and purges by the tenants' rules, and purges tenants.

        One replica does it, which saves work; several would be correct as well.
        """
        async with asyncio.TaskGroup() as group:
            for work in (scheduler, Purger(reads, archive), purger, sweeper):
                group.create_task(work.run())
            if kept is not None:
                group.create_task(Sweeper(reads, kept, clock=utc_now).run())

    others = [notifying, asyncio.create_task(lead(database_url, LockClass.SCHEDULER, settings.shard, alone, stopping))]

    async def commit_the_rest() -> None:
        stopping.set()
        committer.close()
        await committing
        for other in others:
            other.cancel()
        await asyncio.wait(others)

    server.on_drained(commit_the_rest)
    return server
