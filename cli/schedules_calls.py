"""The calls behind `foldline schedules`. Every function returns plain data, as `-o json` prints it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from cli.calls import PAGE_SIZE_MAX, caller, plain, told
from cli.endpoints import Endpoints
from deploy.bank_requests import packed
from foldline.v1 import schedule_pb2
from shared.rpc.status import from_status

ACTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "show": ("GetSchedule", schedule_pb2.GetScheduleRequest),
    "pause": ("PauseSchedule", schedule_pb2.PauseScheduleRequest),
    "resume": ("ResumeSchedule", schedule_pb2.ResumeScheduleRequest),
    "end": ("EndSchedule", schedule_pb2.EndScheduleRequest),
}


async def create(endpoints: Endpoints, tenant: str, request: Message, cron: str, zone: str, catch_up: str) -> dict[str, Any]:
    """Creates a schedule. Raises Refused."""
    asked = schedule_pb2.CreateScheduleRequest(
        command=packed(request),
        cron=cron,
        time_zone=zone,
        catch_up=schedule_pb2.CatchUp.Value(f"CATCH_UP_{catch_up.upper()}"),
    )
    async with caller(endpoints, tenant) as bank:
        return _shown((await bank.call(bank.schedules.CreateSchedule, asked)).schedule)


async def one(endpoints: Endpoints, tenant: str, action: str, schedule_id: str) -> dict[str, Any]:
    """A schedule, as it is behind one of ACTIONS. Raises Refused."""
    rpc, request = ACTIONS[action]
    async with caller(endpoints, tenant) as bank:
        return _shown((await bank.call(getattr(bank.schedules, rpc), request(schedule_id=schedule_id))).schedule)


async def list_schedules(endpoints: Endpoints, tenant: str, *, ended: bool, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Schedules, the newest first, and whether there are more than `limit`. Raises Refused."""
    found: list[dict[str, Any]] = []
    following = ""
    async with caller(endpoints, tenant) as bank:
        while len(found) < limit:
            asked = schedule_pb2.ListSchedulesRequest(
                page_size=min(limit - len(found), PAGE_SIZE_MAX), page_token=following, ended=ended
            )
            page = await bank.call(bank.schedules.ListSchedules, asked)
            found += map(_shown, page.schedules)
            following = page.next_page_token
            if not following:
                return found, False
    return found, True


def _shown(schedule: schedule_pb2.Schedule) -> dict[str, Any]:
    made = plain(schedule)
    if schedule.last_firing.HasField("error"):
        made["last_firing"]["error"] = told(from_status(schedule.last_firing.error))
    return made
