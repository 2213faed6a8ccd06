"""Rows of commands for later, of schedules, and of the audit."""

from __future__ import annotations

from google.protobuf.message import Message

from foldline.v1 import command_pb2, schedule_pb2
from shared.platform.identity import Role
from tests.e2e.errors.row import BEYOND, Row, bad, without_options
from tests.e2e.scene import NIL, Scene
from tests.support.clients.bank import (
    freeze,
    start_registration,
)


def steering(action: str) -> tuple[Row, ...]:
    """The rows of what is done with a schedule that is there, or not."""
    code, reason = "NOT_FOUND", "SCHEDULE_NOT_FOUND"
    return (
        bad(f"{action}Schedule: no UUID", lambda s, p: s.steer_schedule(action, "1"), "schedule_id"),
        Row(f"{action}Schedule: not there", lambda s, p: s.steer_schedule(action, NIL), code, reason),
        Row(f"{action}Schedule: another user's", lambda s, p: _of_another(s, freeze(p.ice), action), code, reason),
    )


SCHEDULES = [
    bad("recurring: nothing", lambda s, p: s.create_schedule(None, "", ""), "command", "cron", "time_zone"),
    bad("recurring: no command id", lambda s, p: s.create_schedule(without_options(p)), "command.options"),
    bad("recurring: 129 characters of cron", lambda s, p: s.create_schedule(freeze(p.blue), "0" * 129), "cron"),
    bad("recurring: a rule that is none", lambda s, p: s.create_schedule(freeze(p.blue), catch_up=9), "catch_up"),
    bad(
        "recurring: an expected version",
        lambda s, p: s.create_schedule(freeze(p.blue, expected_version=3)),
        "command.options.expected_version",
    ),
    bad("recurring: 501 a page", lambda s, p: s.list_schedules(page_size=501), "page_size"),
    Row(
        "recurring: a page token of nobody",
        lambda s, p: s.list_schedules(page_token="e30"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "recurring: four fields",
        lambda s, p: s.create_schedule(freeze(p.blue), "* * * *"),
        "INVALID_ARGUMENT",
        "CRON_INVALID",
        ("cron",),
    ),
    Row(
        "recurring: every ten seconds",
        lambda s, p: s.create_schedule(freeze(p.blue), "*/10 * * * * *"),
        "INVALID_ARGUMENT",
        "CRON_INVALID",
        ("cron",),
    ),
    Row(
        "recurring: the thirtieth of February",
        lambda s, p: s.create_schedule(freeze(p.blue), "0 0 30 2 *"),
        "INVALID_ARGUMENT",
        "CRON_NEVER_FIRES",
        ("cron",),
    ),
    Row(
        "recurring: no such zone",
        lambda s, p: s.create_schedule(freeze(p.blue), "* * * * *", "Europe/Atlantis"),
        "INVALID_ARGUMENT",
        "TIME_ZONE_UNKNOWN",
        ("time_zone",),
    ),
    Row(
        "recurring: a command with a secret",
        lambda s, p: s.create_schedule(start_registration(NIL, "alice", "correct horse")),
        "INVALID_ARGUMENT",
        "HOLDS_A_SECRET",
        ("command.type_url",),
    ),
    Row(
        "recurring: a command that is none",
        lambda s, p: s.create_schedule(command_pb2.GetCommandRequest(command_id=NIL)),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "recurring: an id of a process",
        lambda s, p: s.create_schedule(freeze(p.blue, command_id="84345d27-f2eb-8b66-b13e-8e19e56d7d27")),
        "INVALID_ARGUMENT",
        "COMMAND_ID_RESERVED",
        ("options.command_id",),
    ),
    Row(
        "recurring: the same id for other times",
        lambda s, p: _scheduled_twice(s, freeze(p.ice)),
        "INVALID_ARGUMENT",
        "SCHEDULE_ID_REUSED",
    ),
    Row(
        "recurring: paused after its end",
        lambda s, p: _ended_and(s, freeze(p.ice), "Pause"),
        "FAILED_PRECONDITION",
        "SCHEDULE_ENDED",
    ),
    Row(
        "recurring: resumed after its end",
        lambda s, p: _ended_and(s, freeze(p.ice), "Resume"),
        "FAILED_PRECONDITION",
        "SCHEDULE_ENDED",
    ),
    *[row for action in ("Get", "Pause", "Resume", "End") for row in steering(action)],
]

AUDIT = [
    bad("audit: 501 a page", lambda s, p: s.audit(page_size=501), "page_size"),
    bad(
        "audit: ids that are none",
        lambda s, p: s.audit(correlation_id="1", causation_id="2"),
        "filter.correlation_id",
        "filter.causation_id",
    ),
    bad("audit: a user with NUL", lambda s, p: s.audit(user_id="al\0ice"), "filter.user_id"),
    bad("audit: a tenant that none can be", lambda s, p: s.audit(tenant="no such"), "filter.tenant"),
    bad("audit: beyond the year 9999", lambda s, p: s.audit(received_from=BEYOND), "filter.received_from"),
    Row(
        "audit: a page token of nobody",
        lambda s, p: s.audit(page_token="e30"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row("audit: as a user, of oneself", lambda s, p: s.audit(Role.USER, user_id="alice"), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("audit: another tenant's", lambda s, p: s.audit(tenant="other"), "PERMISSION_DENIED", "ROLE_MISSING"),
]


async def _scheduled_twice(scene: Scene, command: Message) -> object:
    """Creates a schedule, and another under the same id."""
    await _once(scene, command)
    return await scene.create_schedule(command, "0 10 * * *")


async def _ended_and(scene: Scene, command: Message, action: str) -> object:
    return await scene.steer_schedule(action, (await _once(scene, command)).schedule_id)


async def _of_another(scene: Scene, command: Message, action: str) -> object:
    """What a user is told about the schedule of another."""
    schedule = await _once(scene, command)
    return await scene.steer_schedule(action, schedule.schedule_id, bank=scene.by(Role.USER, user_id="bob"))


async def _once(scene: Scene, command: Message) -> schedule_pb2.Schedule:
    """A schedule that has ended, so that nothing of it is left to run."""
    created = await scene.create_schedule(command)
    ended: schedule_pb2.EndScheduleResponse = await scene.steer_schedule("End", created.schedule.schedule_id)
    return ended.schedule
