"""The calls behind `foldline tenant`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from grpc.aio import AioRpcError

from cli.calls import Refused, plain, unary
from cli.endpoints import Endpoints
from cli.status_calls import status
from cli.tenant_export import ExportWriter
from foldline.v1 import (
    process_pb2,
    process_pb2_grpc,
    projection_pb2,
    projection_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
)
from shared.folds.errors import Unavailable
from shared.rpc.client import bearer, channel
from shared.rpc.status import from_rpc_error

LOOK_S = 0.5
EXPORT_TIMEOUT_S = 24 * 3600
"""The service has a limit of its own."""
DONE = "TENANT_PURGE_STAGE_DONE"


async def describe(endpoints: Endpoints, tenant: str) -> dict[str, Any]:
    """What is stored of a tenant. Raises Refused."""
    async with channel(endpoints.write) as write:
        stub = tenant_pb2_grpc.TenantServiceStub(write)
        request = tenant_pb2.DescribeTenantRequest(tenant=tenant)
        return plain(await unary(stub.DescribeTenant, request, endpoints.token("operator")))


async def purge(endpoints: Endpoints, tenant: str) -> dict[str, Any]:
    """Closes a tenant and begins to delete it; returns how far that is. Raises Refused."""
    async with channel(endpoints.write) as write:
        stub = tenant_pb2_grpc.TenantServiceStub(write)
        request = tenant_pb2.PurgeTenantRequest(tenant=tenant, confirmed_tenant=tenant)
        return plain((await unary(stub.PurgeTenant, request, endpoints.token("operator"))).purge)


async def purged(endpoints: Endpoints, tenant: str) -> dict[str, Any]:
    """How far the purge of a tenant is, everywhere. Raises Refused.

    `consumers` has those that have not passed the tenant's end yet, with the position where they are. When the write service is
    done and there are none, `gone_read` and `gone_saga` have the rows of their databases that went, by table (neither is there
    without any), and `sha256` is there: over the other fields as JSON with sorted keys and no spaces.
    """
    async with channel(endpoints.write) as write:
        stub = tenant_pb2_grpc.TenantServiceStub(write)
        request = tenant_pb2.GetTenantPurgeRequest(tenant=tenant)
        found = plain((await unary(stub.GetTenantPurge, request, endpoints.token("operator"))).purge)
    seen = await status(endpoints)
    consumers = {f"read {one['name']}": one["position"] for one in seen["projections"]}
    consumers |= {f"saga {one['name']}": one["position"] for one in seen["runners"]}
    unknown = [name for name in ("projections_error", "processes_error") if name in seen]
    behind = {name: at for name, at in consumers.items() if at < found["position"]} | dict.fromkeys(unknown, 0)
    if found["stage"] != DONE or behind:
        return {**found, "consumers": behind}
    found["passed_by"] = sorted(consumers)
    query, process = await _forgotten(endpoints, tenant)
    return certified(found, query, process)


def certified(found: dict[str, Any], query: dict[str, int], process: dict[str, int]) -> dict[str, Any]:
    """A purge that is done, with the rows that went by table and the hash over all of it.

    Of a purge by a release that did not count them there are none, and no fields for them: its hash is that of the certificate
    which was written then.
    """
    found = {**found, **({"gone_read": query} if query else {}), **({"gone_saga": process} if process else {})}
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return {**found, "sha256": hashlib.sha256(text.encode()).hexdigest()}


async def _forgotten(endpoints: Endpoints, tenant: str) -> tuple[dict[str, int], dict[str, int]]:
    """How many rows of a tenant have gone from the databases of the read and the saga service, by table."""
    token = endpoints.token("operator")
    async with channel(endpoints.read) as read, channel(endpoints.known_saga()) as saga:
        tables = projection_pb2_grpc.ProjectionServiceStub(read)
        processes = process_pb2_grpc.ProcessServiceStub(saga)
        query = await unary(tables.GetForgottenTenant, projection_pb2.GetForgottenTenantRequest(tenant=tenant), token)
        process = await unary(processes.GetForgottenProcesses, process_pb2.GetForgottenProcessesRequest(tenant=tenant), token)
    return dict(query.rows), dict(process.rows)


async def until_purged(endpoints: Endpoints, tenant: str) -> dict[str, Any]:
    """As `purged`, when all is gone. Raises Refused."""
    while True:
        found = await purged(endpoints, tenant)
        if "sha256" in found:
            return found
        await asyncio.sleep(LOOK_S)


async def export(endpoints: Endpoints, tenant: str, folder: Path) -> dict[str, Any]:
    """Writes all that is stored of a tenant into a new folder; returns the manifest. Raises Refused or FileExistsError."""
    writer = ExportWriter(folder, tenant)
    try:
        async with channel(endpoints.write) as write:
            stub = tenant_pb2_grpc.TenantServiceStub(write)
            request = tenant_pb2.ExportTenantRequest(tenant=tenant)
            call = stub.ExportTenant(request, metadata=bearer(endpoints.token("operator")), timeout=EXPORT_TIMEOUT_S)
            read = (0, 0, 0)
            last = tenant_pb2.ExportTenantResponse()
            try:
                async for last in call:
                    for envelope in last.events:
                        writer.event(envelope)
                    for row in last.commands:
                        writer.command(row)
                    for schedule in last.schedules:
                        writer.schedule(schedule)
                    events, commands, schedules = read
                    read = events + len(last.events), commands + len(last.commands), schedules + len(last.schedules)
            except AioRpcError as error:
                raise Refused(from_rpc_error(error)) from None
            finally:
                call.cancel()
        sent = (last.event_count, last.command_count, last.schedule_count)
        if not last.HasField("schedule_count") or sent != read:
            raise Refused(Unavailable("EXPORT_INCOMPLETE", "the export ended too early; the same command may be given again"))
        return writer.end(position=last.position, epoch=last.epoch, shard=last.shard)
    except BaseException:
        writer.discard()
        raise
