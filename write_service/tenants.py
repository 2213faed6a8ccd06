"""The RPCs that export and delete tenants. ROLES says which roles may call them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from foldline.v1 import tenant_pb2, tenant_pb2_grpc
from shared.commands import export, purging
from shared.commands.bus import CommandBus
from shared.commands.closed import closed_among, refuse_closed
from shared.commands.purging import Purge
from shared.folds.errors import Invalid, NotFound
from shared.folds.moments import timestamp_or_none
from shared.line import event_store
from shared.line.archive import Archive
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.platform.postgres import Reads
from shared.platform.telemetry import logger
from write_service.schedules import shown

OPERATORS = frozenset({Role.OPERATOR})
EXPORT = "foldline.v1.TenantService/ExportTenant"

ROLES: dict[str, frozenset[Role]] = {
    "foldline.v1.TenantService/DescribeTenant": OPERATORS,
    EXPORT: OPERATORS,
    "foldline.v1.TenantService/PurgeTenant": OPERATORS,
    "foldline.v1.TenantService/GetTenantPurge": OPERATORS,
}

log = logger(__name__)

STAGES = {
    "closed": tenant_pb2.TENANT_PURGE_STAGE_CLOSED,
    "events": tenant_pb2.TENANT_PURGE_STAGE_EVENTS,
    "rows": tenant_pb2.TENANT_PURGE_STAGE_ROWS,
    "archive": tenant_pb2.TENANT_PURGE_STAGE_ARCHIVE,
    "done": tenant_pb2.TENANT_PURGE_STAGE_DONE,
}


class TenantService(tenant_pb2_grpc.TenantServiceServicer):
    """foldline.v1.TenantService."""

    def __init__(self, commands: CommandBus, reads: Reads, archive: Archive | None, *, shard: int) -> None:
        self._commands = commands
        self._reads = reads
        self._archive = archive
        self._shard = shard

    async def DescribeTenant(self, request: tenant_pb2.DescribeTenantRequest, context: Any) -> tenant_pb2.DescribeTenantResponse:
        async with self._reads.connection() as connection:
            closed = bool(await closed_among(connection, [request.tenant]))
        rows = await purging.counts(self._reads, request.tenant)
        return tenant_pb2.DescribeTenantResponse(tenant=request.tenant, rows=rows, closed=closed)

    async def ExportTenant(
        self, request: tenant_pb2.ExportTenantRequest, context: Any
    ) -> AsyncIterator[tenant_pb2.ExportTenantResponse]:
        async with self._reads.connection() as connection:
            await refuse_closed(connection, request.tenant)
            head = await event_store.read_head(connection)
        await purging.counts(self._reads, request.tenant)  # refuses a tenant of which nothing is stored
        events = commands = schedules = 0

        def part(**more: Any) -> tenant_pb2.ExportTenantResponse:
            return tenant_pb2.ExportTenantResponse(position=head.position, epoch=head.epoch, shard=head.shard, **more)

        async with aclosing(export.events_of(self._reads, self._archive, request.tenant, head.position)) as pages:
            async for page in pages:
                events += len(page)
                yield part(events=map(event_store.envelope, page))
        async with aclosing(export.commands_of(self._reads, request.tenant, head.position)) as rows:
            async for found in rows:
                commands += len(found)
                yield part(commands=map(self._commands.record, found))
        async with aclosing(export.schedules_of(self._reads, request.tenant)) as recurring:
            async for some in recurring:
                schedules += len(some)
                yield part(schedules=map(shown, some))
        # Closed meanwhile, some of it was gone already.
        async with self._reads.connection() as connection:
            await refuse_closed(connection, request.tenant)
        counts = {"events": events, "commands": commands, "schedules": schedules}
        log.info("tenant_exported", exported_tenant=request.tenant, position=head.position, **counts)
        yield part(event_count=events, command_count=commands, schedule_count=schedules)

    async def PurgeTenant(self, request: tenant_pb2.PurgeTenantRequest, context: Any) -> tenant_pb2.PurgeTenantResponse:
        if request.confirmed_tenant != request.tenant:
            violation = ("confirmed_tenant", "must be the same name")
            raise Invalid("TENANT_NOT_CONFIRMED", "a purge names its tenant twice", violations=(violation,))
        await purging.close(self._reads, self._shard, request.tenant, current_call.get().identity.user_id)
        return tenant_pb2.PurgeTenantResponse(purge=await self._purge(request.tenant))

    async def GetTenantPurge(self, request: tenant_pb2.GetTenantPurgeRequest, context: Any) -> tenant_pb2.GetTenantPurgeResponse:
        return tenant_pb2.GetTenantPurgeResponse(purge=await self._purge(request.tenant))

    async def _purge(self, tenant: str) -> tenant_pb2.TenantPurge:
        found = await purging.read(self._reads, tenant)
        if found is None:
            raise NotFound("TENANT_PURGE_NOT_FOUND", "the tenant is not being purged")
        return _purge_shown(found)


def _purge_shown(purge: Purge) -> tenant_pb2.TenantPurge:
    return tenant_pb2.TenantPurge(
        tenant=purge.tenant,
        asked_by=purge.asked_by,
        closed_at=timestamp(purge.closed_at),
        position=purge.position,
        stage=STAGES[purge.stage],
        gone=purge.gone,
        chain=purge.chain,
        done_at=timestamp_or_none(purge.done_at),
    )
