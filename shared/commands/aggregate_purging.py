"""Purges aggregates that have ended, by rules of their tenants: deletes all that the write database and the archive have of them.

1. `purge_aggregates` appends AggregatePurged to an aggregate and to all that goes with it, in one transaction, if each is at the
   version that was looked at. From then on commands on them are refused as AGGREGATE_PURGED. Snapshots and credentials go here.
2. `purge_aggregates_step`, again and again: the events leave holes, the newest first; then the commands of the log and
   the schedules go, but of commands that processes sent the payloads alone. Each call is one bounded transaction that also notes
   how far it came.
3. Once no box of the tenant is being written, the folders of the archive are deleted; then the rows that know of them.

The services that follow the line delete their own rows at AggregatePurged.

Killed anywhere, what is left? Before 1 nothing has happened; behind it a row says where to go on, which the next leader does. Two
at once: the command's id follows from the aggregate and its version, so one begins, and each step locks the row.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from datetime import datetime

from psycopg.errors import ObjectInUse, SerializationFailure, UniqueViolation
from uuid_utils import uuid7

from foldline.v1 import retention_pb2
from shared.commands.aggregate_commands import PURGE_AGGREGATE, command_of_rule
from shared.commands.closed import await_archive
from shared.commands.decide import Command, metadata_of
from shared.commands.intake import id_reused
from shared.commands.log import read_commands
from shared.commands.registry import CommandRegistry
from shared.commands.retention_plan import COMMAND_WAITS, PlannedPurge
from shared.folds.errors import Rejected
from shared.line.archive import Archive
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import AggregateKey
from shared.platform import postgres
from shared.platform.packing import int8s, texts, uuids
from shared.platform.postgres import Reads, one
from shared.platform.rounds import Hindrances, rounds
from shared.platform.telemetry import logger

EVERY_S = 1.0
PAUSE_S = 0.02
"""Between two steps: purging leaves most of the database's time to others."""
LIMIT_ROWS = 2000
OPEN_MAX = 1000
"""How many purges one round goes on with."""
STEPS_A_TURN = 10
TURNS = 10
"""In one round. The oldest purge of each tenant has a turn in any case."""
MOVED = "AGGREGATE_MOVED"
"""Why one is left: it, or what goes with it, had an event since it was looked at, or the tenant was closed."""

_MARK = retention_pb2.AggregatePurged().SerializeToString()

log = logger(__name__)


class AggregatePurger:
    """Begins purges, and goes on with those that are open. Several may run at once."""

    def __init__(
        self,
        reads: Reads,
        registry: CommandRegistry,
        archive: Archive | None,
        *,
        shard: int,
        clock: Callable[[], datetime],
        committed: Callable[[int], None] = lambda head: None,
    ) -> None:
        """`committed` is told the head of the line after each purge has begun."""
        self._reads = reads
        self._registry = registry
        self._archive = archive
        self._shard = shard
        self._clock = clock
        self._committed = committed

    async def begin(self, planned: PlannedPurge) -> None:
        """Appends the ends of a planned aggregate and of what goes with it. A repeat changes nothing.

        Raises Rejected (AGGREGATE_MOVED, COMMAND_WAITS), Invalid (COMMAND_ID_REUSED) or Unavailable.
        """
        command = self._command(planned)
        group = [*planned.parts, planned]
        async with self._reads.connection() as connection:
            try:
                (head, _) = await one(
                    connection,
                    "SELECT * FROM purge_aggregates(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                    (
                        self._shard,
                        planned.key[0],
                        texts([each.key[1] for each in group]),
                        texts([each.key[2] for each in group]),
                        int8s([each.version for each in group]),
                        texts([each.key[2] for each in group if self._registry.has_credentials(each.key[1])]),
                        uuids([uuid7() for _ in group]),
                        AGGREGATE_PURGED,
                        _MARK,
                        metadata_of(command),
                        command.key[1],
                        command.type,
                        command.fingerprint,
                        command.payload,
                        command.sender.user_id,
                        command.correlation_id,
                        "",
                        command.received_at,
                    ),
                )
            except SerializationFailure as error:
                raise Rejected(MOVED, "the aggregate, or what goes with it, had an event since") from error
            except ObjectInUse as error:
                raise Rejected(COMMAND_WAITS, "a scheduled command or a recurring schedule is for it") from error
            except UniqueViolation as error:
                if error.diag.constraint_name != "commands_pkey":
                    raise
                row = (await read_commands(connection, [command.key])).get(command.key)
                if row is not None and row.fingerprint != command.fingerprint:
                    raise id_reused(row) from error
                return  # somebody else has begun it
        self._committed(head)
        tenant, category, aggregate_id = planned.key
        log.warning("aggregate_purged", tenant=tenant, category=category, aggregate_id=aggregate_id, parts=len(planned.parts))

    async def run(self) -> None:
        """Goes on with every purge until cancelled. What goes wrong with one is logged and tried again, and holds up no other.

        Purges take turns, so that one of millions of events does not make another tenant's wait until it is done.
        """
        hindrances = Hindrances("aggregate_purge_waits")
        pause_s = EVERY_S

        async def one_round() -> None:
            nonlocal pause_s
            pause_s, turns = EVERY_S, 0
            for purge_id, nth in await self._open():
                if nth > 1 and turns >= TURNS:
                    break
                with hindrances.told(str(purge_id), purge_id=purge_id):
                    if not await self.purge(purge_id, STEPS_A_TURN):
                        pause_s = PAUSE_S
                    turns += 1

        await rounds(hindrances, one_round, lambda: pause_s)

    async def open(self) -> list[int]:
        """The purges that are not done: the oldest of each tenant, then the second, and so on."""
        return [purge_id for purge_id, _ in await self._open()]

    async def _open(self) -> list[tuple[int, int]]:
        """Each with which one of its tenant's it is, counted from 1."""
        async with self._reads.connection() as connection:
            cursor = await connection.execute(
                """SELECT purge_id, row_number() OVER (PARTITION BY tenant ORDER BY purge_id) AS nth FROM aggregate_purges a
                   WHERE stage <> 'done' AND NOT EXISTS (SELECT FROM tenant_purges t WHERE t.tenant = a.tenant)
                   ORDER BY nth, purge_id LIMIT %s""",
                (OPEN_MAX,),
            )
            return [(purge_id, nth) for purge_id, nth in await cursor.fetchall()]

    async def purge(self, purge_id: int, steps_max: int = sys.maxsize) -> bool:
        """Takes steps; whether all is gone. Raises Rejected or Unavailable of the archive."""
        for _ in range(steps_max):
            stage = await self._step(purge_id)
            if stage == "archive":
                await self._archived(purge_id)
                return True
            if stage == "done":
                return True
            await asyncio.sleep(PAUSE_S)
        return False

    async def _step(self, purge_id: int) -> str:
        async with self._reads.connection() as connection:
            (stage,) = await one(connection, "SELECT purge_aggregates_step(%s, %s)", (purge_id, LIMIT_ROWS))
        return str(stage)

    async def _archived(self, purge_id: int) -> None:
        """Deletes the boxes: first the files, then the rows that know of them.

        Raises Unavailable (DATABASE_BUSY) while a box of the tenant is being written.
        """
        async with self._reads.connection() as connection:
            tenant, keys, boxed = await self._boxed(connection, purge_id)
            await await_archive(connection, tenant)
        files = 0
        if self._archive is not None:
            files = await self._forgotten(self._archive, keys)
        elif boxed:
            raise Rejected("ARCHIVE_NOT_CONFIGURED", "it has boxes, and this service was not told where the archive is")
        async with self._reads.connection() as connection:
            await one(connection, "SELECT finish_purge_of_aggregates(%s, %s)", (purge_id, files))

    async def _forgotten(self, archive: Archive, keys: Sequence[AggregateKey]) -> int:
        return sum([await archive.forget_aggregate(key) for key in keys])

    async def _boxed(self, connection: postgres.Connection, purge_id: int) -> tuple[str, list[AggregateKey], bool]:
        """Tenant and aggregates of a purge, and whether any of these has a box."""
        tenant, categories, ids, boxed = await one(
            connection,
            """SELECT p.tenant, p.categories, p.aggregate_ids, EXISTS (
                 SELECT FROM unnest(p.categories, p.aggregate_ids) AS a(category, aggregate_id)
                 JOIN boxes b ON b.tenant = p.tenant AND b.category = a.category AND b.aggregate_id = a.aggregate_id
                 WHERE b.location <> '')
               FROM aggregate_purges p WHERE p.purge_id = %s""",
            (purge_id,),
        )
        return tenant, [(tenant, category, id_) for category, id_ in zip(categories, ids, strict=True)], boxed

    def _command(self, planned: PlannedPurge) -> Command:
        key = planned.key
        aggregate = self._registry.aggregate_of(key[1])
        return command_of_rule("purge", PURGE_AGGREGATE, aggregate, key, planned.version, self._clock())
