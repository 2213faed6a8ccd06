"""Purges tenants: closes one, then deletes all that the write database and the archive have of it, step by step.

1. `close_tenant` appends TenantClosed, the tenant's last event, and a row that makes every later append refuse the tenant.
2. `purge_tenant`, again and again: events of the tenant leave holes, the newest first; then rows of the command log, snapshots
   and credentials. Each call is one bounded transaction that also notes how far it came.
3. Once no box of the tenant is being written, its folder of the archive is deleted; `finish_purge` deletes the rows of its boxes.

The services that follow the line delete their own rows at TenantClosed, and the relay the tenant's messages.

Killed anywhere, what is left? A closed tenant, and a row that says where to go on, which the next leader does. Two at once: each
step locks that row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime

from msgspec import Struct
from uuid_utils import uuid7

from foldline.v1 import event_store_pb2, tenant_pb2
from shared.commands.closed import await_archive
from shared.folds.errors import NotFound, Rejected
from shared.line.archive import Archive
from shared.line.ends import CLOSED
from shared.platform.postgres import Connection, Reads, one
from shared.platform.rounds import Hindrances, rounds
from shared.platform.telemetry import logger

EVERY_S = 1.0
PAUSE_S = 0.02
"""Between two steps: purging leaves most of the database's time to others."""
WINDOW_POSITIONS = 10_000
LIMIT_ROWS = 2000
COUNTED_MAX = 100_000
OPEN_MAX = 10_000
"""How many purges one round goes on with."""

COUNTED = ("events", "boxed_events", "commands", "schedules", "snapshots", "credentials", "boxes", "files")

log = logger(__name__)


class Purge(Struct, frozen=True):
    """A row of `tenant_purges`. `gone` has what went, by table, and the files of the archive."""

    tenant: str
    asked_by: str
    closed_at: datetime
    position: int
    stage: str
    chain: bytes
    done_at: datetime | None
    gone: Mapping[str, int]


async def close(reads: Reads, shard: int, tenant: str, asked_by: str) -> None:
    """Closes a tenant for ever. A repeat changes nothing. Raises NotFound (TENANT_NOT_FOUND)."""
    command_id = str(uuid7())
    metadata = event_store_pb2.EventMetadata(command_id=command_id, correlation_id=command_id, user_id=asked_by)
    end = (CLOSED, tenant_pb2.TenantClosed().SerializeToString(), metadata.SerializeToString(), command_id)
    async with reads.connection() as connection:
        (found,) = await one(connection, "SELECT close_tenant(%s, %s, %s, %s, %s, %s, %s)", (shard, tenant, asked_by, *end))
    if not found:
        raise not_found()
    log.warning("tenant_closed", closed_tenant=tenant, user_id=asked_by)


async def read(reads: Reads, tenant: str) -> Purge | None:
    """The purge of a tenant; None if the tenant is not closed."""
    columns = ", ".join(COUNTED)
    async with reads.connection() as connection:
        cursor = await connection.execute(
            f"""SELECT tenant, asked_by, closed_at, position, stage, chain, done_at, {columns}
                FROM tenant_purges WHERE tenant = %s""",  # noqa: S608 (names of ours)
            (tenant,),
        )
        row = await cursor.fetchone()
    if row is None:
        return None
    name, asked_by, closed_at, position, stage, chain, done_at, *gone = row
    return Purge(name, asked_by, closed_at, position, stage, chain, done_at, dict(zip(COUNTED, gone, strict=True)))


async def counts(reads: Reads, tenant: str) -> Mapping[str, int]:
    """How many rows of a tenant each table has, counted up to COUNTED_MAX. Raises NotFound (TENANT_NOT_FOUND)."""
    found: dict[str, int] = {}
    async with reads.connection() as connection:
        for table in ("events", "commands", "schedules", "snapshots", "credentials", "boxes"):
            query = f"SELECT count(*) FROM (SELECT FROM {table} WHERE tenant = %s LIMIT %s) AS counted"  # noqa: S608 (as above)
            (found[table],) = await one(connection, query, (tenant, COUNTED_MAX))
        (found["boxed_events"],) = await one(
            connection,
            """SELECT count(*) FROM (
                 SELECT FROM boxed_events e JOIN boxes b USING (box_id) WHERE b.tenant = %s LIMIT %s) AS counted""",
            (tenant, COUNTED_MAX),
        )
    if not any(found.values()):
        raise not_found()
    return found


class Purger:
    """Deletes what is left of closed tenants. Several may run at once."""

    def __init__(self, reads: Reads, archive: Archive | None) -> None:
        self._reads = reads
        self._archive = archive

    async def run(self) -> None:
        """Goes on with every purge until cancelled. What goes wrong with one is logged and tried again, and holds up no other."""
        hindrances = Hindrances("purge_waits")

        async def one_round() -> None:
            for tenant in await self.open():
                with hindrances.told(tenant, purged_tenant=tenant):
                    await self.purge(tenant)

        await rounds(hindrances, one_round, EVERY_S)

    async def open(self) -> list[str]:
        """The tenants whose purge is not done, the first to be closed first."""
        async with self._reads.connection() as connection:
            cursor = await connection.execute(
                "SELECT tenant FROM tenant_purges WHERE stage <> 'done' ORDER BY closed_at LIMIT %s", (OPEN_MAX,)
            )
            return [tenant for (tenant,) in await cursor.fetchall()]

    async def purge(self, tenant: str) -> None:
        """Takes steps until all is gone, or until nothing can be done now. Raises Rejected or Unavailable of the archive."""
        stage = ""
        while stage != "done":
            before = stage
            async with self._reads.connection() as connection:
                stage = await self._step(connection, tenant)
            if stage == "closed" == before:
                return
            if stage == "archive":
                stage = await self._archived(tenant)
            await asyncio.sleep(PAUSE_S)
        log.warning("tenant_purged", purged_tenant=tenant)

    async def _step(self, connection: Connection, tenant: str) -> str:
        (stage,) = await one(connection, "SELECT purge_tenant(%s, %s, %s)", (tenant, WINDOW_POSITIONS, LIMIT_ROWS))
        return str(stage)

    async def _archived(self, tenant: str) -> str:
        """Deletes the tenant's boxes: first the files, then the rows that know of them.

        Raises Unavailable (DATABASE_BUSY) while a box is being written.
        """
        files = 0
        async with self._reads.connection() as connection:
            await await_archive(connection, tenant)
        if self._archive is not None:
            files = await self._archive.forget(tenant)
        elif await has_boxes(self._reads, tenant):
            raise Rejected("ARCHIVE_NOT_CONFIGURED", "the tenant has boxes, and this service was not told where the archive is")
        async with self._reads.connection() as connection:
            (stage,) = await one(connection, "SELECT finish_purge(%s, %s, %s)", (tenant, files, LIMIT_ROWS))
        return str(stage)


async def has_boxes(reads: Reads, tenant: str) -> bool:
    """Whether there are boxes of a tenant."""
    async with reads.connection() as connection:
        (found,) = await one(connection, "SELECT EXISTS (SELECT FROM boxes WHERE tenant = %s)", (tenant,))
    return bool(found)


def not_found() -> NotFound:
    """The refusal of a tenant of which nothing is stored."""
    return NotFound("TENANT_NOT_FOUND", "there is no such tenant, or nothing is stored of it")
