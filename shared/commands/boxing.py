"""Boxes aggregates and puts them back: their events leave the tables for the archive, and return as they were.

Boxing: (1) the events are read, (2) written to the archive, synced, read back and compared, (3) taken out of the tables by one
call of `box_aggregate`, which compares the hash chain of what was read back with its own of the rows, and appends
AggregateBoxed as the next version. Unboxing: (1) the box is read and every byte of it checked, (2) the rows are put back by one
call of `unbox_aggregate`, which compares the chain again and appends AggregateUnboxed.

Killed before the last call, nothing has happened but that files lie in the archive; in it or behind it, all has. The same
command again finds its row in the log, like any other. A command on the aggregate at the same time: one of the two finds that
the version moved; a command is then decided again, and refused; boxing begins again, TRIES times. Two that box at once: as two
commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psycopg
from msgspec import Raw
from psycopg.errors import DataException, SerializationFailure, UniqueViolation
from uuid_utils import uuid7

from foldline.v1 import archive_pb2
from shared.commands import states
from shared.commands.aggregate_commands import BOX_AGGREGATE, UNBOX_AGGREGATE, NamedAggregate, as_part, command_of_rule, route_of
from shared.commands.box_parts import named_by, read_named
from shared.commands.boxes import Stored, StoredBox, newest_box, read_stored
from shared.commands.bus import command_of
from shared.commands.closed import keep_archive, refuse_closed
from shared.commands.codec import MessageCodec
from shared.commands.decide import Command, aggregate_boxed, aggregate_purged, metadata_of
from shared.commands.intake import id_reused
from shared.commands.log import StoredCommand, read_commands
from shared.commands.registry import CommandRegistry
from shared.folds.errors import NotFound, OverLimit, Refusal, Rejected, Unavailable, VersionMismatch
from shared.line.archive import Archive, Box, Snapshot
from shared.line.ends import AGGREGATE_PURGED
from shared.line.event_store import BOXED, UNBOXED, AggregateKey, StoredEvent, read_stream
from shared.platform import postgres
from shared.platform.fairness import Slots
from shared.platform.identity import Role
from shared.platform.packing import blobs, int8s, texts, timestamps, uuids
from shared.platform.postgres import Connection, Reads
from shared.platform.telemetry import logger

EVENTS_MAX = 50_000
"""How many events one box holds: all are in memory, and moving them holds the shard's lock for about 10 us each."""
TRIES = 3
PAGE_EVENTS = 2000
AT_ONCE_MAX = 1
"""How many boxes one process makes, puts back or checks at once: each is in memory as a whole. Tenants take turns."""
WAITING_MAX = 64

log = logger(__name__)


class _Moved(Exception):
    """The aggregate has another newest event by now."""


class Boxer:
    """Carries out the commands that box and unbox."""

    def __init__(
        self,
        database_url: str,
        reads: Reads,
        registry: CommandRegistry,
        archive: Archive | None,
        *,
        shard: int,
        clock: Callable[[], datetime],
        committed: Callable[[int], None] = lambda head: None,
        roles: frozenset[Role],
    ) -> None:
        """`committed` is told the head of the line after each. `roles` may send the commands."""
        self._database_url = database_url
        self._reads = reads
        self._registry = registry
        self._archive = archive
        self._shard = shard
        self._clock = clock
        self._committed = committed
        self._roles = roles
        self._slots = Slots(AT_ONCE_MAX, WAITING_MAX, _too_many)

    @property
    def archive(self) -> Archive:
        """The archive; raises Rejected (ARCHIVE_NOT_CONFIGURED) if there is none."""
        if self._archive is None:
            raise Rejected("ARCHIVE_NOT_CONFIGURED", "this service was not told where the archive is")
        return self._archive

    async def box(self, request: archive_pb2.BoxAggregateRequest) -> StoredCommand:
        """Boxes what the current caller names; returns the command's row in the log. Refusals: see ArchiveService."""
        command = self._command(BOX_AGGREGATE, request)
        if not self._registry.is_boxable(command.aggregate[1]):
            raise Rejected("NEVER_BOXED", "aggregates of this type are needed at any time")
        return await self._carry_out(command, self._box_one, skips="AGGREGATE_BOXED")

    async def unbox(self, request: archive_pb2.UnboxAggregateRequest) -> StoredCommand:
        """Puts back what the current caller names; returns the command's row in the log. Refusals: see ArchiveService."""
        command = self._command(UNBOX_AGGREGATE, request)
        return await self._carry_out(command, self._unbox_one, skips="AGGREGATE_NOT_BOXED")

    async def box_idle(self, key: AggregateKey, version: int) -> StoredCommand:
        """Boxes an aggregate, and what goes with it, by a rule of its tenant, if its newest event still has this version.

        The command's id follows from aggregate and version: a repeat finds it done. Raises as `box` does, and VersionMismatch.
        """
        aggregate = self._registry.aggregate_of(key[1])
        command = command_of_rule("box", BOX_AGGREGATE, aggregate, key, version, self._clock())
        return await self._carry_out(command, self._box_one, skips="AGGREGATE_BOXED")

    async def verify(self, key: AggregateKey, box: StoredBox) -> None:
        """Reads a box of an aggregate and checks every byte of it. Refusals: see ArchiveService."""
        archive = self.archive
        async with self._slots.one(key[0]):
            await archive.read(box.location, key, box.chain)

    def _command(self, codec: MessageCodec[NamedAggregate], request: Any) -> Command:
        aggregate = self._registry.aggregate_or_none(request.aggregate_type)
        if aggregate is None:
            raise NotFound("AGGREGATE_NOT_FOUND", "there is no such aggregate")
        command = command_of(route_of(codec, aggregate, self._roles), request, self._clock())
        self._registry.refuse_reading(command.aggregate[1], command.sender.roles)
        return command

    async def _carry_out(self, command: Command, one: Callable[[Command, Connection], Any], *, skips: str) -> StoredCommand:
        """The row of a command that has been carried out before; else first what goes with the aggregate, then the aggregate.

        What goes with it is skipped if it is where it should be already. A command that must be refused moves none of them.
        """
        _ = self.archive
        if (known := await self._known(command)) is not None:
            return known
        async with self._slots.one(command.aggregate[0]), await self._connect(command.aggregate[0]) as connection:
            try:
                parts = await self._parts(command)
            except Refusal:
                # The same command may have been carried out by another replica meanwhile.
                if (known := await self._known(command)) is not None:
                    return known
                raise
            for key in parts:
                try:
                    await self._one(as_part(command, key), connection, one)
                except (Rejected, NotFound) as refusal:
                    if refusal.reason not in (skips, "AGGREGATE_NOT_FOUND", "AGGREGATE_PURGED"):
                        raise
            await self._one(command, connection, one)
        done = await self._known(command)
        assert done is not None
        return done

    async def _one(self, command: Command, connection: Connection, one: Callable[[Command, Connection], Any]) -> None:
        if await self._known(command) is not None:
            return
        for _ in range(TRIES):
            try:
                self._committed(await one(command, connection))
                return
            except _Moved:
                if await self._known(command) is not None:
                    return
                continue
            except Refusal:
                # The same command may have been carried out by another replica meanwhile.
                if await self._known(command) is not None:
                    return
                raise
            except UniqueViolation as error:
                # Somebody else has carried it out meanwhile, or used its id for something else: `_known` tells.
                if error.diag.constraint_name == "commands_pkey" and await self._known(command) is not None:
                    return
                raise
            except psycopg.Error as error:
                if postgres.is_trouble(error):
                    raise postgres.unavailable(error) from error
                raise
        raise Unavailable("AGGREGATE_BUSY", "commands on the aggregate came in between; the same call may be made again")

    async def _known(self, command: Command) -> StoredCommand | None:
        """The row of the command if it has been carried out. Raises Rejected (TENANT_CLOSED) or Invalid (COMMAND_ID_REUSED)."""
        async with self._reads.connection() as connection:
            await refuse_closed(connection, command.key[0])
            row = (await read_commands(connection, [command.key])).get(command.key)
        if row is not None and row.fingerprint != command.fingerprint:
            raise id_reused(row)
        return row

    async def _connect(self, tenant: str) -> Connection:
        """A connection that has the purge of the tenant's archive wait: no box is written behind it."""
        try:
            connection = await postgres.connect(self._database_url, application_name="foldline-boxer")
            await keep_archive(connection, tenant)
            return connection
        except psycopg.Error as error:
            raise postgres.unavailable(error) from error

    async def _parts(self, command: Command) -> Sequence[AggregateKey]:
        """What goes with the command's aggregate.

        Raises before anything has moved what moving that aggregate would raise, and BOX_TOO_LARGE for one that goes with it.
        """
        boxes = command.route.codec is BOX_AGGREGATE
        _refuse(command, (await read_stored(self._reads, [command.aggregate])).get(command.aggregate), boxes=boxes)
        parts = await self._parts_of(command.aggregate)
        if boxes and parts:
            for key, stored in (await read_stored(self._reads, parts)).items():
                if not (stored.boxed or stored.purged) and stored.version > EVENTS_MAX:
                    raise _too_large(key)
        return parts

    async def parts_of(self, key: AggregateKey) -> Sequence[AggregateKey]:
        """The aggregates that are boxed with one, in the order in which its events named them.

        Waits for a turn, as boxing does, since what is boxed is read as a whole. Raises OverLimit (TOO_MANY_BOXINGS), NotFound
        (AGGREGATE_NOT_FOUND) or Rejected (BOX_TOO_LARGE, ARCHIVE_DAMAGED).
        """
        if not self._registry.boxed_with(key[1]):
            return []
        async with self._slots.one(key[0]):
            return await self._parts_of(key)

    async def _parts_of(self, key: AggregateKey) -> Sequence[AggregateKey]:
        if not self._registry.boxed_with(key[1]):
            return []
        named = await read_named(self._reads, self._registry, key, version_max=EVENTS_MAX)
        if named is None:
            raise NotFound("AGGREGATE_NOT_FOUND", "there is no such aggregate")
        if named.boxed:
            box = await newest_box(self._reads, key)
            assert box is not None
            events = (await self.archive.read(box.location, key, box.chain)).events
            return named_by(self._registry, key, ((event.type, event.payload) for event in events))
        if named.version > EVENTS_MAX:
            raise _too_large(key)
        return named.parts

    async def _events(self, key: AggregateKey) -> Sequence[StoredEvent]:
        """All events of an aggregate that is not boxed. Raises NotFound or Rejected (AGGREGATE_BOXED, BOX_TOO_LARGE)."""
        events: list[StoredEvent] = []
        while len(events) <= EVENTS_MAX:
            async with self._reads.connection() as connection:
                page = await read_stream(connection, key, after=events[-1].version if events else 0, limit=PAGE_EVENTS)
            events += page
            if len(page) < PAGE_EVENTS:
                break
        if len(events) > EVENTS_MAX:
            raise _too_large(key)
        if not events:
            raise NotFound("AGGREGATE_NOT_FOUND", "there is no such aggregate")
        if events[-1].type == AGGREGATE_PURGED:
            raise aggregate_purged()
        if events[-1].type == BOXED or len(events) != events[-1].version:
            raise aggregate_boxed()
        return events

    async def _box_one(self, command: Command, connection: Connection) -> int:
        """Boxes one aggregate; returns the head. Raises _Moved if a command came in between."""
        key = command.aggregate
        events = await self._events(key)
        _refuse_stale(command, events[-1].version)
        snapshot = await asyncio.to_thread(_snapshot, self._registry, key[1], events)
        location, chain = await self.archive.write(key, events, snapshot)
        mark = archive_pb2.AggregateBoxed(location=location, events=len(events), chain=chain)
        statement = "SELECT box_aggregate(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        parameters = (self._shard, *key, events[-1].version, location, chain)
        head = await _call(connection, statement, (*parameters, *_row(command), *_mark(command, BOXED, mark)))
        log.info("aggregate_boxed", tenant=key[0], category=key[1], aggregate_id=key[2], events=len(events))
        return head

    async def _unbox_one(self, command: Command, connection: Connection) -> int:
        """Puts back one aggregate; returns the head. Raises _Moved if it is in another box by now."""
        key = command.aggregate
        box = await newest_box(self._reads, key)
        if box is not None and not box.location:
            raise aggregate_purged()
        if box is None or box.unboxed_at is not None:
            async with self._reads.connection() as reader:
                if box is None and not await read_stream(reader, key, after=0, limit=1):
                    raise NotFound("AGGREGATE_NOT_FOUND", "there is no such aggregate")
            raise _not_boxed()
        _refuse_stale(command, box.version + 1)
        found = await self.archive.read(box.location, key, box.chain)
        mark = archive_pb2.AggregateUnboxed(location=box.location)
        statement = (
            "SELECT unbox_aggregate(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, "
            "%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        )
        parameters = (self._shard, *key, box.version, *_columns(found))
        head = await _call(connection, statement, (*parameters, *_row(command), *_mark(command, UNBOXED, mark)))
        log.info("aggregate_unboxed", tenant=key[0], category=key[1], aggregate_id=key[2], events=len(found.events))
        return head


async def _call(connection: Connection, statement: Any, parameters: Sequence[Any]) -> int:
    """Calls one of the two functions. Raises _Moved, or Rejected (ARCHIVE_DAMAGED) if the chains differ."""
    try:
        head: int = (await postgres.one(connection, statement, parameters))[0]
        return head
    except SerializationFailure as error:
        raise _Moved from error
    except DataException as error:
        raise Rejected("ARCHIVE_DAMAGED", "the archive and the line do not have the same events") from error


def _snapshot(registry: CommandRegistry, category: str, events: Sequence[StoredEvent]) -> Snapshot:
    state = states.fold(registry, category, events)
    return Snapshot(events[-1].version, registry.aggregate_of(category).schema, Raw(registry.dump_state(state)))


def _row(command: Command) -> tuple[Any, ...]:
    return (
        command.key[1],
        command.type,
        command.fingerprint,
        command.payload,
        command.sender.user_id,
        command.correlation_id,
        command.sender.traceparent,
        command.received_at,
    )


def _mark(command: Command, type_name: str, mark: Any) -> tuple[Any, ...]:
    return str(uuid7()), type_name, mark.SerializeToString(), metadata_of(command)


def _columns(box: Box) -> tuple[Any, ...]:
    events = box.events
    return (
        int8s([event.position for event in events]),
        uuids([event.event_id for event in events]),
        texts([event.type for event in events]),
        blobs([event.payload for event in events]),
        timestamps([event.recorded_at for event in events]),
        blobs([event.metadata for event in events]),
        box.snapshot.schema,
        bytes(box.snapshot.state),
    )


def _refuse(command: Command, stored: Stored | None, *, boxes: bool) -> None:
    """Raises what boxing or unboxing the command's aggregate would raise after others have moved."""
    if stored is None:
        raise NotFound("AGGREGATE_NOT_FOUND", "there is no such aggregate")
    if stored.purged:
        raise aggregate_purged()
    if stored.boxed == boxes:
        raise aggregate_boxed() if boxes else _not_boxed()
    if boxes and stored.version > EVENTS_MAX:
        raise _too_large(command.aggregate)
    _refuse_stale(command, stored.version)


def _too_large(key: AggregateKey) -> Rejected:
    text = f"a box holds {EVENTS_MAX} events, the aggregate has more"
    return Rejected("BOX_TOO_LARGE", text, aggregate_type=key[1], aggregate_id=key[2])


def _too_many() -> OverLimit:
    return OverLimit("TOO_MANY_BOXINGS", "too many aggregates are being boxed, unboxed or verified", retry_after_s=2.0)


def _not_boxed() -> Rejected:
    return Rejected("AGGREGATE_NOT_BOXED", "the aggregate is not boxed")


def _refuse_stale(command: Command, version: int) -> None:
    if command.expected_version not in (None, version):
        raise VersionMismatch(command.expected_version or 0, version)
