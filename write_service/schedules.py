"""The RPCs of recurring schedules. ROLES says which roles may call them."""

from __future__ import annotations

from typing import Any

from google.protobuf.any_pb2 import Any as Packed

from foldline.v1 import command_pb2, schedule_pb2, schedule_pb2_grpc
from shared.commands.bus import CommandBus
from shared.commands.log import StoredCommand
from shared.commands.recurring import Recurring, StoredSchedule
from shared.commands.registry import CommandRegistry
from shared.folds.moments import timestamp_or_none
from shared.platform.clock import timestamp
from shared.platform.identity import Role, current_call
from shared.rpc import pages
from write_service.registry import CALLERS

ROLES: dict[str, frozenset[Role]] = {
    "foldline.v1.ScheduleService/CreateSchedule": CALLERS,
    "foldline.v1.ScheduleService/GetSchedule": CALLERS,
    "foldline.v1.ScheduleService/ListSchedules": CALLERS,
    "foldline.v1.ScheduleService/PauseSchedule": CALLERS,
    "foldline.v1.ScheduleService/ResumeSchedule": CALLERS,
    "foldline.v1.ScheduleService/EndSchedule": CALLERS,
}

STATUSES = {
    "active": schedule_pb2.SCHEDULE_STATUS_ACTIVE,
    "paused": schedule_pb2.SCHEDULE_STATUS_PAUSED,
    "ended": schedule_pb2.SCHEDULE_STATUS_ENDED,
}
CATCH_UP = {"none": schedule_pb2.CATCH_UP_NONE, "one": schedule_pb2.CATCH_UP_ONE, "all": schedule_pb2.CATCH_UP_ALL}

_CATCH_UP_OF = {number: name for name, number in CATCH_UP.items()} | {schedule_pb2.CATCH_UP_UNSPECIFIED: "none"}


class ScheduleService(schedule_pb2_grpc.ScheduleServiceServicer):
    """foldline.v1.ScheduleService."""

    def __init__(self, commands: CommandBus, recurring: Recurring, registry: CommandRegistry) -> None:
        self._commands = commands
        self._recurring = recurring
        self._registry = registry

    async def CreateSchedule(
        self, request: schedule_pb2.CreateScheduleRequest, context: Any
    ) -> schedule_pb2.CreateScheduleResponse:
        command = self._commands.command(request.command, within="command.")
        row = await self._recurring.add(command, request.cron, request.time_zone, _CATCH_UP_OF[request.catch_up])
        return schedule_pb2.CreateScheduleResponse(schedule=await self._shown(row))

    async def GetSchedule(self, request: schedule_pb2.GetScheduleRequest, context: Any) -> schedule_pb2.GetScheduleResponse:
        identity = current_call.get().identity
        row = await self._recurring.get(identity, request.schedule_id.lower())
        self._registry.refuse_reading(row.category, identity.roles)
        return schedule_pb2.GetScheduleResponse(schedule=await self._shown(row))

    async def ListSchedules(self, request: schedule_pb2.ListSchedulesRequest, context: Any) -> schedule_pb2.ListSchedulesResponse:
        identity, size = current_call.get().identity, request.page_size or pages.SIZE_DEFAULT
        query = ("ListSchedules", identity.tenant, identity.user_id, *sorted(identity.roles), str(request.ended))
        keys = pages.decode(query, request.page_token, (int, str))
        rows = await self._recurring.page(
            identity,
            ended=request.ended,
            hidden=self._registry.hidden_from(identity.roles),
            after=(pages.moment_of(keys[0]), pages.uuid_of(keys[1])) if keys else None,
            limit=size + 1,
        )
        page, following = pages.cut(rows, size, query, _place)
        last = await self._recurring.last_firings(page)
        schedules = [self._schedule(row, last.get((row.tenant, row.schedule_id))) for row in page]
        return schedule_pb2.ListSchedulesResponse(schedules=schedules, next_page_token=following)

    async def PauseSchedule(self, request: schedule_pb2.PauseScheduleRequest, context: Any) -> schedule_pb2.PauseScheduleResponse:
        row = await self._recurring.pause(current_call.get().identity, request.schedule_id.lower())
        return schedule_pb2.PauseScheduleResponse(schedule=await self._shown(row))

    async def ResumeSchedule(
        self, request: schedule_pb2.ResumeScheduleRequest, context: Any
    ) -> schedule_pb2.ResumeScheduleResponse:
        row = await self._recurring.resume(current_call.get().identity, request.schedule_id.lower())
        return schedule_pb2.ResumeScheduleResponse(schedule=await self._shown(row))

    async def EndSchedule(self, request: schedule_pb2.EndScheduleRequest, context: Any) -> schedule_pb2.EndScheduleResponse:
        row = await self._recurring.end(current_call.get().identity, request.schedule_id.lower())
        return schedule_pb2.EndScheduleResponse(schedule=await self._shown(row))

    async def _shown(self, row: StoredSchedule) -> schedule_pb2.Schedule:
        last = await self._recurring.last_firings([row])
        return self._schedule(row, last.get((row.tenant, row.schedule_id)))

    def _schedule(self, row: StoredSchedule, last: StoredCommand | None) -> schedule_pb2.Schedule:
        return shown(row, self._commands.receipt(last) if last is not None else None)


def shown(row: StoredSchedule, last_firing: command_pb2.CommandReceipt | None = None) -> schedule_pb2.Schedule:
    """A schedule as clients see it."""
    return schedule_pb2.Schedule(
        schedule_id=row.schedule_id,
        status=STATUSES[row.status],
        cron=row.cron,
        time_zone=row.time_zone,
        catch_up=CATCH_UP[row.catch_up],
        command=Packed(type_url=f"type.googleapis.com/{row.type}", value=row.payload),
        aggregate_type=row.category,
        aggregate_id=row.aggregate_id,
        user_id=row.user_id,
        correlation_id=row.correlation_id,
        created_at=timestamp(row.created_at),
        next_due_at=timestamp_or_none(row.due_at),
        last_due_at=timestamp_or_none(row.fired_at),
        last_firing=last_firing,
        changed_at=timestamp(row.changed_at),
        changed_by=row.changed_by,
        problem=row.problem,
    )


def _place(row: StoredSchedule) -> tuple[int, str]:
    return pages.moment_key(row.created_at), row.schedule_id
