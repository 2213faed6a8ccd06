"""The write service's RPCs, without those that send one command (`servicers.py`). ROLES says which roles may call them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from bank.v1 import user_pb2
from foldline.v1 import (
    command_pb2,
    command_pb2_grpc,
    event_store_pb2,
    event_store_pb2_grpc,
    override_pb2,
    override_pb2_grpc,
)
from shared.commands import listing, overrides, retention
from shared.commands import log as command_log
from shared.commands.bus import CommandBus
from shared.commands.closed import refuse_closed
from shared.commands.registry import CommandRegistry
from shared.commands.schedule import Schedule, may_see
from shared.folds.errors import NotFound, Rejected
from shared.line import event_store, streams
from shared.line.archive import Archive
from shared.line.consistency import encode_places
from shared.line.read_through import read_through
from shared.platform.clock import timestamp
from shared.platform.fairness import Room
from shared.platform.identity import Role, current_call, seen_position, seen_user
from shared.platform.postgres import Reads
from shared.platform.seal import Seal
from shared.platform.telemetry import logger
from shared.rpc.server import BATCH_SIZE_MAX
from shared.rpc.validation import moment_of
from write_service import servicers
from write_service.bounds import bounds_of, in_messages
from write_service.passwords import PasswordVerifier
from write_service.registry import ADMINS, CALLERS

READERS = frozenset({Role.READER})
OPERATORS = frozenset({Role.OPERATOR})

ROLES: dict[str, frozenset[Role]] = {
    "bank.v1.UserService/VerifyPassword": ADMINS,
    "foldline.v1.CommandService/Send": CALLERS,
    "foldline.v1.CommandService/SendBatch": CALLERS,
    "foldline.v1.CommandService/SendStream": CALLERS,
    "foldline.v1.CommandService/GetCommand": CALLERS,
    "foldline.v1.CommandService/ListCommands": CALLERS,
    "foldline.v1.CommandService/Schedule": CALLERS,
    "foldline.v1.CommandService/Reschedule": CALLERS,
    "foldline.v1.CommandService/Cancel": CALLERS,
    "foldline.v1.OverrideService/ListOverrides": ADMINS,
    "foldline.v1.EventStoreService/ReadStream": CALLERS,
    "foldline.v1.EventStoreService/ReadStreams": CALLERS,
    "foldline.v1.EventStoreService/ReadAll": READERS,
    "foldline.v1.EventStoreService/MarkRestored": OPERATORS,
}

# Beside those that are generated (`servicers.py`): the command that each RPC sends.
COMMANDS = {
    "foldline.v1.OverrideService/SwitchOverride": overrides.SWITCH_OVERRIDE.type_name,
    "foldline.v1.RetentionService/SetRetention": retention.SET_RETENTION.type_name,
}

# Requests that may be larger than those of single commands.
SIZES_MAX = {"foldline.v1.CommandService/SendBatch": BATCH_SIZE_MAX}

CHUNK_EVENTS = 500

log = logger(__name__)


class UserService(servicers.UserService):
    """bank.v1.UserService."""

    def __init__(self, commands: CommandBus, verifier: PasswordVerifier) -> None:
        super().__init__(commands)
        self._verifier = verifier

    async def VerifyPassword(self, request: user_pb2.VerifyPasswordRequest, context: Any) -> user_pb2.VerifyPasswordResponse:
        tenant = current_call.get().identity.tenant
        return user_pb2.VerifyPasswordResponse(user_id=await self._verifier.verify(tenant, request.login, request.password))


class CommandService(command_pb2_grpc.CommandServiceServicer):
    """foldline.v1.CommandService."""

    def __init__(self, commands: CommandBus, reads: Reads, registry: CommandRegistry, schedule: Schedule) -> None:
        self._commands = commands
        self._reads = reads
        self._registry = registry
        self._schedule = schedule

    async def Send(self, request: command_pb2.SendRequest, context: Any) -> command_pb2.SendResponse:
        return command_pb2.SendResponse(receipt=await self._commands.send_packed(request.command))

    async def SendBatch(self, request: command_pb2.SendBatchRequest, context: Any) -> command_pb2.SendBatchResponse:
        receipts = await self._commands.send_batch(request.items, atomic=request.atomic)
        return command_pb2.SendBatchResponse(receipts=receipts)

    async def SendStream(
        self, request_iterator: AsyncIterator[command_pb2.SendStreamRequest], context: Any
    ) -> AsyncIterator[command_pb2.SendStreamResponse]:
        async with aclosing(self._commands.send_stream(request_iterator)) as receipts:
            async for receipt in receipts:
                yield command_pb2.SendStreamResponse(receipt=receipt)

    async def GetCommand(self, request: command_pb2.GetCommandRequest, context: Any) -> command_pb2.GetCommandResponse:
        identity = current_call.get().identity
        key = (identity.tenant, request.command_id.lower())
        async with self._reads.connection() as connection:
            found = await command_log.read_commands(connection, [key])
        if key not in found or not may_see(identity, found[key]):
            raise NotFound("COMMAND_NOT_FOUND", "there is no command with this id")
        self._registry.refuse_reading(found[key].category, identity.roles)
        return command_pb2.GetCommandResponse(command=self._commands.record(found[key]))

    async def ListCommands(self, request: command_pb2.ListCommandsRequest, context: Any) -> command_pb2.ListCommandsResponse:
        return await listing.list_for(current_call.get().identity, request, self._commands, self._registry, self._reads)

    async def Schedule(self, request: command_pb2.ScheduleRequest, context: Any) -> command_pb2.ScheduleResponse:
        due_at = moment_of(request.due_at, "due_at")
        row = await self._schedule.add(self._commands.command(request.command, within="command."), due_at)
        return command_pb2.ScheduleResponse(receipt=self._commands.receipt(row), due_at=_due_at(row))

    async def Reschedule(self, request: command_pb2.RescheduleRequest, context: Any) -> command_pb2.RescheduleResponse:
        due_at, identity = moment_of(request.due_at, "due_at"), current_call.get().identity
        row = await self._schedule.move(identity, request.command_id.lower(), due_at)
        return command_pb2.RescheduleResponse(receipt=self._commands.receipt(row), due_at=_due_at(row))

    async def Cancel(self, request: command_pb2.CancelRequest, context: Any) -> command_pb2.CancelResponse:
        row = await self._schedule.cancel(current_call.get().identity, request.command_id.lower())
        return command_pb2.CancelResponse(receipt=self._commands.receipt(row))


def _due_at(row: command_log.StoredCommand) -> Timestamp | None:
    return timestamp(row.due_at) if row.due_at else None


class OverrideService(override_pb2_grpc.OverrideServiceServicer):
    """foldline.v1.OverrideService."""

    def __init__(self, commands: CommandBus, reads: Reads, registry: CommandRegistry) -> None:
        self._commands = commands
        self._reads = reads
        self._registry = registry

    async def SwitchOverride(self, request: override_pb2.SwitchOverrideRequest, context: Any) -> command_pb2.CommandReceipt:
        return await self._commands.send(request)

    async def ListOverrides(self, request: override_pb2.ListOverridesRequest, context: Any) -> override_pb2.ListOverridesResponse:
        tenant = current_call.get().identity.tenant
        return override_pb2.ListOverridesResponse(overrides=await overrides.current(self._registry, self._reads, tenant))


class EventStoreService(event_store_pb2_grpc.EventStoreServiceServicer):
    """foldline.v1.EventStoreService."""

    def __init__(self, reads: Reads, registry: CommandRegistry, seal: Seal, archive: Archive | None = None) -> None:
        self._reads = reads
        self._registry = registry
        self._seal = seal
        self._archive = archive
        self._room = Room()

    async def ReadStream(
        self, request: event_store_pb2.ReadStreamRequest, context: Any
    ) -> AsyncIterator[event_store_pb2.ReadStreamResponse]:
        identity = current_call.get().identity
        self._registry.refuse_reading(request.aggregate_type, identity.roles)
        key = (identity.tenant, request.aggregate_type, request.aggregate_id.lower())
        after, left = max(request.from_version, 1) - 1, request.events_max or sys.maxsize
        while left:
            async with self._reads.connection() as connection:
                events = await event_store.read_stream(connection, key, after=after, limit=min(left, CHUNK_EVENTS))
            if not events and after == max(request.from_version, 1) - 1:
                raise NotFound("STREAM_NOT_FOUND", "there is no such stream, or no event of it from there on")
            if not events:
                return
            yield event_store_pb2.ReadStreamResponse(events=map(_as_seen, self._shown(events)))
            after, left = events[-1].version, left - len(events)

    async def ReadStreams(
        self, request: event_store_pb2.ReadStreamsRequest, context: Any
    ) -> AsyncIterator[event_store_pb2.ReadStreamsResponse]:
        identity = current_call.get().identity
        for name in request.aggregates:
            self._registry.refuse_reading(name.aggregate_type, identity.roles)
        names = [*dict.fromkeys((name.aggregate_type, name.aggregate_id.lower()) for name in request.aggregates)]
        async with self._room.slots.one(identity.tenant), self._reads.connection() as connection:
            head = await event_store.read_head(connection)
            bounds = bounds_of(request, head, self._seal)
            positions = await streams.positions_of(
                connection, identity.tenant, names, after=bounds.after, upto=bounds.upto, limit=request.events_max
            )
            # Of a tenant that is not closed yet nothing has been purged, so all its events were found.
            await refuse_closed(connection, identity.tenant)
        async with aclosing(streams.pages_of(self._reads, self._archive, identity.tenant, positions)) as pages:
            async for page in pages:
                events = [event for event in page if bounds.moment is None or event.recorded_at <= bounds.moment]
                for shown in in_messages(self._shown(events)):
                    places = encode_places(head.epoch, [envelope.position for envelope in shown], self._seal, identity.tenant)
                    yield event_store_pb2.ReadStreamsResponse(events=map(_as_seen, shown), sealed_positions=places)
                if len(events) < len(page):  # times never decrease along the line
                    return

    async def ReadAll(
        self, request: event_store_pb2.ReadAllRequest, context: Any
    ) -> AsyncIterator[event_store_pb2.ReadAllResponse]:
        async with self._reads.connection() as connection:
            head = await event_store.read_head(connection)
        if request.shard not in (0, head.shard):
            raise NotFound("SHARD_NOT_FOUND", f"this is shard {head.shard}")
        after, left = max(request.from_position, 1) - 1, request.events_max or sys.maxsize
        first = True
        while first or (left and after < head.position):
            events = await read_through(self._reads, self._archive, after=after, limit=min(left, CHUNK_EVENTS))
            yield event_store_pb2.ReadAllResponse(
                events=self._shown(events),
                head_position=head.position,
                epoch=head.epoch,
                shard=head.shard,
            )
            first = False
            if events:
                after, left = events[-1].position, left - len(events)

    def _shown(self, events: Sequence[event_store.StoredEvent]) -> list[event_store_pb2.EventEnvelope]:
        """The events with the contracts of today."""
        envelopes = [event_store.envelope(event) for event in events]
        self._registry.codecs.upcasters.update(envelopes)
        return envelopes

    async def MarkRestored(
        self, request: event_store_pb2.MarkRestoredRequest, context: Any
    ) -> event_store_pb2.MarkRestoredResponse:
        async with self._reads.connection() as connection:
            head = await event_store.mark_restored(connection, request.epoch)
        if head is None:
            raise Rejected("EPOCH_CHANGED", "the line's epoch is another one by now: look again whether this is still needed")
        log.warning(
            "line_marked_restored",
            user_id=current_call.get().identity.user_id,
            before=request.epoch,
            epoch=head.epoch,
            position=head.position,
        )
        return event_store_pb2.MarkRestoredResponse(epoch=head.epoch, head_position=head.position)


def _as_seen(envelope: event_store_pb2.EventEnvelope) -> event_store_pb2.EventEnvelope:
    """The envelope, without what the caller may not see."""
    by = envelope.metadata
    envelope.position = seen_position(envelope.position)
    by.user_id, by.on_behalf_of = seen_user(by.user_id), seen_user(by.on_behalf_of)
    return envelope
