"""The error table: what is refused, row by row, over gRPC from running services.

A row says the situation, how to get into it, and what the caller is then told: the status code, the reason in its
ErrorInfo, and the fields that its BadRequest names. Tokens have a table of their own, in test_tokens.py.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from bank.v1 import account_pb2, account_query_pb2, person_pb2
from cli.summaries import SUMMARIES
from foldline.v1 import as_of_pb2, audit_pb2, command_pb2, range_pb2, schedule_pb2
from shared.platform.identity import Role
from shared.rpc import pages
from tests.e2e.scene import ACCOUNT_VERSION, BALANCE_MINOR, NIL, Place, Scene, build
from tests.support.clients.bank import (
    Bank,
    Refused,
    channels,
    deposit,
    freeze,
    item,
    open_account,
    packed,
    query,
    read_status,
    refused,
    register,
    rename,
    start_registration,
    unfreeze,
    withdraw,
)
from tests.support.system.sealing import token_with
from tests.support.system.stack import Stack

MessageT = TypeVar("MessageT", bound=Message)

INT64_MAX = 2**63 - 1
MEBIBYTE = 1024 * 1024
NO_ID = "00000000-0000-0000-0000-000000000000"
TOMORROW = Timestamp(seconds=4_000_000_000)
BEYOND = Timestamp(seconds=253_402_300_800)

DEPOSIT = "bank.v1.AccountService/DepositMoney"
SEND_BATCH = "foldline.v1.CommandService/SendBatch"
GET_ACCOUNT = "bank.v1.AccountQueryService/GetAccount"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    situation: str
    call: Callable[[Scene, Place], Awaitable[object]]
    code: str
    # Empty: gRPC itself answers.
    reason: str
    fields: tuple[str, ...] = ()
    waiting_helps: bool = False


def bad(situation: str, call: Callable[[Scene, Place], Awaitable[object]], *fields: str) -> Row:
    """A row of what breaks the rules of fields."""
    return Row(situation, call, "INVALID_ARGUMENT", "INVALID_REQUEST", fields)


async def watch(scene: Scene, name: str, rpc: str, **fields: Any) -> object:
    """The first answer of a Watch RPC of a summary, or how it was refused."""
    method, request = query(scene.bank, name, rpc)
    return await method(request(**fields), metadata=scene.bank.who, timeout=20).read()


def watched(name: str, situation: str, code: str, reason: str, *fields: str, **asked: str) -> Row:
    """A row of a watch; of what is not there unless an id is given."""
    rpc, asked = f"Watch{name.title()}", {f"{name}_id": NIL, **asked}
    return Row(f"{rpc}: {situation}", lambda s, p: watch(s, name, rpc, **asked), code, reason, fields)


def watched_list(name: str, situation: str, reason: str, *fields: str, **asked: Any) -> Row:
    """A row of a watch of a list."""
    rpc = f"Watch{name.title()}s"
    return Row(f"{rpc}: {situation}", lambda s, p: watch(s, name, rpc, **asked), "INVALID_ARGUMENT", reason, fields)


MASKED: dict[str, Callable[..., Awaitable[object]]] = {
    "persons": lambda s, p, **more: s.persons(**more),
    "accounts": lambda s, p, **more: s.accounts(**more),
    "movements": lambda s, p, **more: s.movements(account_id=p.blue, **more),
}
"""Lists whose answers can be masked; Get and the other lists are answered by the same code."""

WATCHED = [
    row
    for name in SUMMARIES
    for row in (
        watched(name, "no UUID", "INVALID_ARGUMENT", "INVALID_REQUEST", f"{name}_id", **{f"{name}_id": "x"}),
        watched(name, "not there", "NOT_FOUND", f"{name.upper()}_NOT_FOUND"),
        watched(name, "nobody's token", "INVALID_ARGUMENT", "RESUME_TOKEN_INVALID", "resume_token", resume_token="e30"),
        watched(
            name,
            "a consistency token of nobody",
            "INVALID_ARGUMENT",
            "CONSISTENCY_TOKEN_MALFORMED",
            "consistency_token",
            consistency_token="e30",
        ),
        watched_list(name, "an absurd filter", "INVALID_REQUEST", "filter.status", filter={"status": 99}),
        watched_list(name, "nobody's token", "RESUME_TOKEN_INVALID", "resume_token", resume_token="e30"),
        watched_list(
            name,
            "a consistency token of nobody",
            "CONSISTENCY_TOKEN_MALFORMED",
            "consistency_token",
            consistency_token="e30",
        ),
    )
]


Asked = Callable[[Scene, Place], dict[str, Any]]


def of_the_past(rpc: str, name: str, situation: str, refusal: str, asked: Asked, *fields: str, role: Role | None = None) -> Row:
    """A row of GetAccount, ExplainAccount and the like; `refusal` is code and reason. With a `role` it is an operator's."""

    async def call(scene: Scene, place: Place) -> object:
        bank = scene.by(role) if role else scene.bank
        return await scene.past(rpc, name, bank, **asked(scene, place))

    code, reason = refusal.split()
    return Row(f"{rpc}{name.title()}: {situation}", call, code, reason, fields)


def as_of(**when: Any) -> dict[str, Any]:
    """The field of a request."""
    return {"as_of": as_of_pb2.AsOf(**when)}


NOW = as_of(moment=TOMORROW)
INVALID = "INVALID_ARGUMENT INVALID_REQUEST"
PAST = [
    row
    for name in SUMMARIES
    for rpc in ("Get", "Explain")
    for row in (
        of_the_past(rpc, name, "as of nothing", INVALID, lambda s, p: as_of(), "as_of"),
        of_the_past(rpc, name, "as of position 0", INVALID, lambda s, p: as_of(position=0), "as_of.position"),
        of_the_past(rpc, name, "as of the year 10000", INVALID, lambda s, p: as_of(moment=BEYOND), "as_of.moment"),
        of_the_past(
            rpc,
            name,
            "as of nobody's token",
            "INVALID_ARGUMENT CONSISTENCY_TOKEN_MALFORMED",
            lambda s, p: as_of(token="e30"),
            "as_of.token",
        ),
        of_the_past(
            rpc,
            name,
            "as of a token of another history",
            "FAILED_PRECONDITION TOKEN_OF_ANOTHER_HISTORY",
            lambda s, p: as_of(token=_token(s, p, epoch=f"{NIL}/1")),
        ),
        of_the_past(
            rpc,
            name,
            "as of a token that is ahead",
            "FAILED_PRECONDITION TOKEN_OF_ANOTHER_HISTORY",
            lambda s, p: as_of(token=_token(s, p, position=INT64_MAX)),
        ),
        of_the_past(rpc, name, "as of a position, by a user", "PERMISSION_DENIED ROLE_MISSING", lambda s, p: as_of(position=1)),
        of_the_past(
            rpc,
            name,
            "as of a position behind the last",
            "FAILED_PRECONDITION POSITION_NOT_REACHED",
            lambda s, p: as_of(position=INT64_MAX),
            role=Role.OPERATOR,
        ),
        of_the_past(rpc, name, "not there", f"NOT_FOUND {name.upper()}_NOT_FOUND", lambda s, p: as_of(moment=TOMORROW)),
        of_the_past(rpc, name, "reader", "PERMISSION_DENIED ROLE_MISSING", lambda s, p: as_of(moment=TOMORROW), role=Role.READER),
    )
]
PAST += [
    row
    for name in SUMMARIES
    for row in (
        of_the_past("Explain", name, "no UUID", INVALID, lambda s, p, name=name: {f"{name}_id": "x"}, f"{name}_id"),  # type: ignore[misc]
        of_the_past(
            "Explain", name, "a field of nobody", f"NOT_FOUND {name.upper()}_NOT_FOUND", lambda s, p: {"field": "status"}
        ),
        of_the_past("Explain", name, "a field that is none", INVALID, lambda s, p: {"field": "stale"}, "field"),
        of_the_past("Explain", name, "negative page size", INVALID, lambda s, p: {"page_size": -1}, "page_size"),
        of_the_past(
            "Explain",
            name,
            "nobody's page token",
            "INVALID_ARGUMENT PAGE_TOKEN_INVALID",
            lambda s, p: {"page_token": "e30"},
            "page_token",
        ),
    )
]
PAST += [
    Row(
        "an account before it was there",
        lambda s, p: s.past("Get", "account", account_id=p.blue, **as_of(moment=Timestamp(seconds=1))),
        "NOT_FOUND",
        "ACCOUNT_NOT_FOUND",
    ),
    Row(
        "why an account before it was there",
        lambda s, p: s.past("Explain", "account", account_id=p.blue, **as_of(moment=Timestamp(seconds=1))),
        "NOT_FOUND",
        "ACCOUNT_NOT_FOUND",
    ),
    bad("movements as of nothing", lambda s, p: s.movements(account_id=p.blue, **as_of()), "as_of"),
    Row(
        "movements before the account was there",
        lambda s, p: s.movements(account_id=p.blue, **as_of(moment=Timestamp(seconds=1))),
        "NOT_FOUND",
        "ACCOUNT_NOT_FOUND",
    ),
    bad("streams: of nothing", lambda s, p: s.read_streams(), "aggregates"),
    bad("streams: of 501", lambda s, p: s.read_streams(*[("account", p.blue)] * 501), "aggregates"),
    bad("streams: no type", lambda s, p: s.read_streams(("", p.blue)), "aggregates[0].aggregate_type"),
    bad("streams: no events", lambda s, p: s.read_streams(("account", p.blue), events_max=0), "events_max"),
    bad("streams: as of nothing", lambda s, p: s.read_streams(("account", p.blue), **as_of()), "as_of"),
    Row(
        "streams: behind nobody's token",
        lambda s, p: s.read_streams(("account", p.blue), after_token="e30"),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_MALFORMED",
        ("after_token",),
    ),
    Row(
        "streams: behind a token of another history",
        lambda s, p: s.read_streams(("account", p.blue), after_token=_token(s, p, epoch=f"{NIL}/1")),
        "FAILED_PRECONDITION",
        "TOKEN_OF_ANOTHER_HISTORY",
    ),
    Row(
        "streams: of users, by a user",
        lambda s, p: s.read_streams(("account", p.blue), ("user", NIL), bank=s.by(Role.USER)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
]


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
    bad("recurring: no command id", lambda s, p: s.create_schedule(_without_options(p)), "command.options"),
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

MALFORMED = [
    bad("amount: zero", lambda s, p: s.bank.deposit(p.blue, 0), "amount_minor"),
    bad("amount: negative", lambda s, p: s.bank.deposit(p.blue, -1), "amount_minor"),
    bad("amount: the lowest of 64 bits", lambda s, p: s.bank.withdraw(p.blue, -(2**63)), "amount_minor"),
    bad("amount and account: every bad field is named", lambda s, p: s.bank.deposit("x", 0), "account_id", "amount_minor"),
    bad("currency: none", lambda s, p: s.bank.deposit(p.blue, 1, ""), "currency"),
    bad("currency: a word", lambda s, p: s.bank.withdraw(p.blue, 1, "DOLLARS"), "currency"),
    bad("currency: not of ISO 4217", lambda s, p: s.bank.open(p.alice, "XXX"), "currency"),
    bad("currency: lower case", lambda s, p: s.bank.open(p.alice, "usd"), "currency"),
    bad("person id: nil", lambda s, p: s.bank.register("A", NO_ID), "person_id"),
    bad(
        "command id: nil",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(p.blue, 1, command_id=NO_ID)),
        "options.command_id",
    ),
    bad("account id: no UUID", lambda s, p: s.bank.deposit("blue", 1), "account_id"),
    bad("account id: a UUID in braces", lambda s, p: s.bank.deposit(f"{{{p.blue}}}", 1), "account_id"),
    bad("account id: a UUID without hyphens", lambda s, p: s.bank.freeze(p.blue.replace("-", "")), "account_id"),
    bad("account id: a UUID with a line's end", lambda s, p: s.bank.unfreeze(p.blue + "\n"), "account_id"),
    bad("person id: none", lambda s, p: s.bank.rename("", "Bob"), "person_id"),
    bad("person to close: no UUID", lambda s, p: s.bank.close_person("alice"), "person_id"),
    bad("owner id: no UUID", lambda s, p: s.bank.open("alice"), "owner_id"),
    bad("name: none", lambda s, p: s.bank.rename(p.alice, ""), "name"),
    bad("name: 201 characters", lambda s, p: s.bank.rename(p.alice, "ä" * 201), "name"),
    bad("account's name: 101 characters", lambda s, p: s.bank.open(p.alice, name="b" * 101), "name"),
    bad("options: none", lambda s, p: s.bank.call(s.bank.people.RenamePerson, _without_options(p)), "options"),
    bad(
        "command id: none",
        lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, _with_options(p, command_pb2.CommandOptions())),
        "options.command_id",
    ),
    bad(
        "command id: no UUID",
        lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, freeze(p.blue, command_id="1")),
        "options.command_id",
    ),
    bad(
        "correlation id: no UUID",
        lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, freeze(p.blue, correlation_id="1")),
        "options.correlation_id",
    ),
    bad(
        "expected version: negative",
        lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, freeze(p.blue, expected_version=-1)),
        "options.expected_version",
    ),
    bad("user: no UUID", lambda s, p: s.bank.deactivate("alice"), "user_id"),
    bad("e-mail: none of a user", lambda s, p: s.bank.change_email("", "a@example.com"), "user_id"),
    bad("e-mail: a word", lambda s, p: s.bank.change_email(NIL, "alice"), "email"),
    bad("e-mail: 255 characters", lambda s, p: s.bank.change_email(NIL, "a" * 243 + "@example.com"), "email"),
    bad("roles: none", lambda s, p: s.bank.change_roles(NIL), "roles"),
    bad("roles: twice the same", lambda s, p: s.bank.change_roles(NIL, "user", "user"), "roles"),
    bad(
        "roles: those of operators and services",
        lambda s, p: s.bank.change_roles(NIL, "operator", "process"),
        "roles[0]",
        "roles[1]",
    ),
    bad("command to look up: no UUID", lambda s, p: s.bank.command("1"), "command_id"),
    bad("schedule: no command", lambda s, p: _schedule(s, None), "command"),
    bad("schedule: no time", lambda s, p: _schedule(s, freeze(p.blue), due_at=None), "due_at"),
    bad("schedule: beyond the year 9999", lambda s, p: _schedule(s, freeze(p.blue), due_at=BEYOND), "due_at"),
    bad("schedule: no command id", lambda s, p: _schedule(s, _without_options(p)), "command.options"),
    bad("cancel: no UUID", lambda s, p: s.bank.cancel("1"), "command_id"),
    bad("list: aggregate without a type", lambda s, p: s.bank.list_commands(aggregate_id=p.blue), "filter.aggregate_type"),
    bad("list: a type with NUL", lambda s, p: s.bank.list_commands(type="bank\0"), "filter.type"),
    bad("list: correlation id: no UUID", lambda s, p: s.bank.list_commands(correlation_id="1"), "filter.correlation_id"),
    bad("list: 501 a page", lambda s, p: s.bank.list_commands(501), "page_size"),
    Row(
        "list: a page token of nobody",
        lambda s, p: s.bank.list_commands(0, "e30"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row("cancel: what was never scheduled", lambda s, p: s.bank.cancel(NIL), "NOT_FOUND", "COMMAND_NOT_FOUND"),
    Row(
        "reschedule: what was never scheduled",
        lambda s, p: s.bank.reschedule(NIL, datetime(2030, 1, 1, tzinfo=UTC)),
        "NOT_FOUND",
        "COMMAND_NOT_FOUND",
    ),
    Row(
        "schedule: a command that is none",
        lambda s, p: _schedule(s, command_pb2.GetCommandRequest(command_id=NIL)),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row("list: another tenant's", lambda s, p: s.bank.list_commands(tenant="other"), "PERMISSION_DENIED", "ROLE_MISSING"),
    bad("override: a name that none can have", lambda s, p: s.bank.switch_override("no such", False), "name"),
    Row("override: no such", lambda s, p: s.bank.switch_override("renaming-disabled", False), "NOT_FOUND", "OVERRIDE_NOT_FOUND"),
    bad("stream: no aggregate", lambda s, p: s.read_stream("", ""), "aggregate_type", "aggregate_id"),
    bad("stream: a type with NUL", lambda s, p: s.read_stream("acc\0unt", p.blue), "aggregate_type"),
    bad("stream: an id with NUL", lambda s, p: s.read_stream("account", "\0"), "aggregate_id"),
    bad("stream: negative version", lambda s, p: s.read_stream("account", p.blue, from_version=-1), "from_version"),
    bad("describe: no aggregate", lambda s, p: s.describe("", ""), "aggregate_type", "aggregate_id"),
    bad("describe: a type with NUL", lambda s, p: s.describe("acc\0unt", p.blue), "aggregate_type"),
    bad("history: version zero", lambda s, p: s.state("account", p.blue, version=0), "version"),
    bad("history: beyond the year 9999", lambda s, p: s.state("account", p.blue, moment=BEYOND), "moment"),
    bad("diff: no versions", lambda s, p: s.diff("account", p.blue, 0, 0), "from_version", "to_version"),
    bad("box: nothing", lambda s, p: s.box("", ""), "aggregate_type", "aggregate_id"),
    bad("box: no command id", lambda s, p: s.box("account", p.blue, command_id=""), "options.command_id"),
    bad("unbox: a type with NUL", lambda s, p: s.unbox("acc\0unt", p.blue), "aggregate_type"),
    bad("unbox: no command id", lambda s, p: s.unbox("account", p.blue, command_id="x"), "options.command_id"),
    bad("boxes: an id without a type", lambda s, p: s.boxes(aggregate_id=p.blue), "aggregate_type"),
    bad("boxes: 501 a page", lambda s, p: s.boxes(page_size=501), "page_size"),
    Row(
        "boxes: a page token of nobody",
        lambda s, p: s.boxes(page_token="e30"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    bad("retention: no type", lambda s, p: s.set_retention("", 1), "aggregate_type"),
    bad("retention: negative days", lambda s, p: s.set_retention("person", -1), "box_after_days"),
    bad("retention: more than a hundred years", lambda s, p: s.set_retention("person", 36_501), "box_after_days"),
    bad("retention: purge before now", lambda s, p: s.set_retention("person", 0, purge=-1), "purge_after_days"),
    bad("retention: purge in a century", lambda s, p: s.set_retention("person", 0, purge=36_501), "purge_after_days"),
    bad("retention plan: days of no type", lambda s, p: s.plan_retention(box_after_days=1), "aggregate_type"),
    bad("retention plan: purge of no type", lambda s, p: s.plan_retention(purge_after_days=1), "aggregate_type"),
    bad(
        "retention plan: negative days",
        lambda s, p: s.plan_retention(aggregate_type="person", box_after_days=-1),
        "box_after_days",
    ),
    bad("retention plan: a page of 501", lambda s, p: s.plan_retention(page_size=501), "page_size"),
    Row(
        "retention plan: a page token of nobody",
        lambda s, p: s.plan_retention(page_token="e30"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    *(
        bad(f"{rpc}: {what}", lambda s, p, rpc=rpc, name=name: s.tenants(rpc, name), "tenant")  # type: ignore[misc]
        for rpc in ("DescribeTenant", "ExportTenant", "PurgeTenant", "GetTenantPurge")
        for what, name in (("no name", ""), ("a name of 64 characters", "t" * 64))
    ),
    Row(
        "purge: not confirmed",
        lambda s, p: s.tenants("PurgeTenant", p.tenant),
        "INVALID_ARGUMENT",
        "TENANT_NOT_CONFIRMED",
        ("confirmed_tenant",),
    ),
    Row(
        "purge: confirmed with another name",
        lambda s, p: s.tenants("PurgeTenant", p.tenant, confirmed_tenant=p.other_tenant),
        "INVALID_ARGUMENT",
        "TENANT_NOT_CONFIRMED",
        ("confirmed_tenant",),
    ),
    bad("verify: a negative version", lambda s, p: s.verify_box("account", p.blue, -1), "version"),
    bad("line: negative position", lambda s, p: s.read_all(s.by(Role.READER), from_position=-1), "from_position"),
    bad("line: negative count", lambda s, p: s.read_all(s.by(Role.READER), events_max=-1), "events_max"),
    Row(
        "bytes that are no message",
        lambda s, p: s.raw(DEPOSIT, b"\xff\xff\xff"),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        ("",),
    ),
    Row(
        "a message that ends too early",
        lambda s, p: s.raw(DEPOSIT, deposit(p.blue, 1).SerializeToString()[:-1]),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        ("",),
    ),
    Row(
        "text that is not UTF-8",
        lambda s, p: s.raw(DEPOSIT, b"\x12\x02\xc3\x28"),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        ("",),
    ),
    Row(
        "bytes that are no query",
        lambda s, p: s.raw(GET_ACCOUNT, b"\xff\xff\xff", channel=s.read),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        ("",),
    ),
    bad("an empty request", lambda s, p: s.raw(GET_ACCOUNT, b"", channel=s.read), "account_id"),
]

ABSENT = [
    Row("deposit: unknown account", lambda s, p: s.bank.deposit(NIL, 1), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("deposit: another tenant's account", lambda s, p: s.bank.deposit(p.theirs, 1), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("withdraw: unknown account", lambda s, p: s.bank.withdraw(NIL, 1), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("freeze: unknown account", lambda s, p: s.bank.freeze(NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("unfreeze: unknown account", lambda s, p: s.bank.unfreeze(NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("a person's id is no account's", lambda s, p: s.bank.freeze(p.alice), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("rename: unknown person", lambda s, p: s.bank.rename(NIL, "Bob"), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("rename: another tenant's", lambda s, p: s.bank.rename(p.foreigner, "Bob"), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("close a person: unknown", lambda s, p: s.bank.close_person(NIL), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("close a person: another tenant's", lambda s, p: s.bank.close_person(p.foreigner), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("deactivate: unknown user", lambda s, p: s.bank.deactivate(NIL), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("e-mail: unknown user", lambda s, p: s.bank.change_email(NIL, "a@example.com"), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("roles: unknown user", lambda s, p: s.bank.change_roles(NIL, "user"), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("roles: a person is no user", lambda s, p: s.bank.change_roles(p.alice, "user"), "NOT_FOUND", "USER_NOT_FOUND"),
    Row("open: unknown owner", lambda s, p: s.bank.open(NIL), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("open: another tenant's person", lambda s, p: s.bank.open(p.foreigner), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("look up: unknown command", lambda s, p: s.bank.command(NIL), "NOT_FOUND", "COMMAND_NOT_FOUND"),
    Row("look up: another tenant's", lambda s, p: s.bank.command(p.their_command), "NOT_FOUND", "COMMAND_NOT_FOUND"),
    Row("stream: unknown aggregate", lambda s, p: s.read_stream("account", NIL), "NOT_FOUND", "STREAM_NOT_FOUND"),
    Row("stream: another tenant's", lambda s, p: s.read_stream("account", p.theirs), "NOT_FOUND", "STREAM_NOT_FOUND"),
    Row("stream: unknown type", lambda s, p: s.read_stream("zebra", p.blue), "NOT_FOUND", "STREAM_NOT_FOUND"),
    Row(
        "stream: beyond its end",
        lambda s, p: s.read_stream("account", p.blue, from_version=INT64_MAX),
        "NOT_FOUND",
        "STREAM_NOT_FOUND",
    ),
    Row("describe: unknown aggregate", lambda s, p: s.describe("account", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("describe: another tenant's", lambda s, p: s.describe("account", p.theirs), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("describe: unknown type", lambda s, p: s.describe("zebra", p.blue), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("history: another tenant's", lambda s, p: s.state("person", p.foreigner), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row(
        "history: beyond the last version",
        lambda s, p: s.state("account", p.blue, version=INT64_MAX),
        "NOT_FOUND",
        "VERSION_NOT_FOUND",
    ),
    Row(
        "history: before there was any event",
        lambda s, p: s.state("account", p.blue, moment=Timestamp(seconds=1)),
        "NOT_FOUND",
        "VERSION_NOT_FOUND",
    ),
    Row("diff: another tenant's", lambda s, p: s.diff("account", p.theirs, 1, 2), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("diff: beyond the last version", lambda s, p: s.diff("account", p.blue, 1, 3), "NOT_FOUND", "VERSION_NOT_FOUND"),
    Row("box: unknown aggregate", lambda s, p: s.box("account", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("box: unknown type", lambda s, p: s.box("zebra", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("box: another tenant's", lambda s, p: s.box("account", p.theirs), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("retention: unknown type", lambda s, p: s.set_retention("zebra", 1), "NOT_FOUND", "AGGREGATE_TYPE_NOT_FOUND"),
    Row(
        "retention plan: unknown type",
        lambda s, p: s.plan_retention(aggregate_type="zebra"),
        "NOT_FOUND",
        "AGGREGATE_TYPE_NOT_FOUND",
    ),
    Row("tenant: nobody's", lambda s, p: s.tenants("DescribeTenant", "no-such"), "NOT_FOUND", "TENANT_NOT_FOUND"),
    Row("export: nobody's", lambda s, p: s.tenants("ExportTenant", "no-such"), "NOT_FOUND", "TENANT_NOT_FOUND"),
    Row(
        "purge: nobody's",
        lambda s, p: s.tenants("PurgeTenant", "no-such", confirmed_tenant="no-such"),
        "NOT_FOUND",
        "TENANT_NOT_FOUND",
    ),
    Row("purge: none", lambda s, p: s.tenants("GetTenantPurge", p.tenant), "NOT_FOUND", "TENANT_PURGE_NOT_FOUND"),
    Row("unbox: unknown aggregate", lambda s, p: s.unbox("account", NIL), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("unbox: another tenant's", lambda s, p: s.unbox("account", p.theirs), "NOT_FOUND", "AGGREGATE_NOT_FOUND"),
    Row("verify: no box", lambda s, p: s.verify_box("account", p.blue, 0), "NOT_FOUND", "BOX_NOT_FOUND"),
    Row("verify: another tenant's", lambda s, p: s.verify_box("account", p.theirs, 0), "NOT_FOUND", "BOX_NOT_FOUND"),
    Row("line: unknown shard", lambda s, p: s.read_all(s.by(Role.READER), shard=7), "NOT_FOUND", "SHARD_NOT_FOUND"),
    Row("query: unknown person", lambda s, p: s.bank.person(NIL), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("query: another tenant's person", lambda s, p: s.bank.person(p.foreigner), "NOT_FOUND", "PERSON_NOT_FOUND"),
    Row("query: unknown account", lambda s, p: s.bank.account(NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("query: another tenant's account", lambda s, p: s.bank.account(p.theirs), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("statement: unknown account", lambda s, p: s.movements(account_id=NIL), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
    Row("statement: another tenant's", lambda s, p: s.movements(account_id=p.theirs), "NOT_FOUND", "ACCOUNT_NOT_FOUND"),
]

AGAINST_A_RULE = [
    Row("register twice", lambda s, p: s.bank.register("A", p.alice), "ALREADY_EXISTS", "PERSON_ALREADY_REGISTERED"),
    Row(
        "open twice",
        lambda s, p: s.bank.call(s.bank.accounts.OpenAccount, open_account(p.blue, p.alice)),
        "ALREADY_EXISTS",
        "ACCOUNT_ALREADY_OPEN",
    ),
    Row("close who holds money", lambda s, p: s.bank.close_person(p.alice), "FAILED_PRECONDITION", "PERSON_HOLDS_MONEY"),
    Row("rename who is closed", lambda s, p: s.bank.rename(p.gone, "Bob"), "FAILED_PRECONDITION", "PERSON_CLOSED"),
    Row("open for who is closed", lambda s, p: s.bank.open(p.gone), "FAILED_PRECONDITION", "PERSON_CLOSED"),
    Row("register who is closed", lambda s, p: s.bank.register("A", p.gone), "ALREADY_EXISTS", "PERSON_ALREADY_REGISTERED"),
    Row("unbox what is not boxed", lambda s, p: s.unbox("account", p.blue), "FAILED_PRECONDITION", "AGGREGATE_NOT_BOXED"),
    Row("box a login", lambda s, p: s.box("login", NIL), "FAILED_PRECONDITION", "NEVER_BOXED"),
    Row("retention of logins", lambda s, p: s.set_retention("login", 1), "FAILED_PRECONDITION", "NEVER_BOXED"),
    Row("purge of accounts alone", lambda s, p: s.set_retention("account", 1, purge=1), "FAILED_PRECONDITION", "NEVER_PURGED"),
    Row("purge of transfers", lambda s, p: s.set_retention("transfer", 0, purge=1), "FAILED_PRECONDITION", "NEVER_PURGED"),
    Row(
        "plan of a purge of rules",
        lambda s, p: s.plan_retention(aggregate_type="retention", purge_after_days=1),
        "FAILED_PRECONDITION",
        "NEVER_PURGED",
    ),
    Row("box the switches", lambda s, p: s.box("overrides", "overrides"), "FAILED_PRECONDITION", "NEVER_BOXED"),
    Row(
        "box at a stale version",
        lambda s, p: s.box("account", p.blue, expected_version=1),
        "ABORTED",
        "VERSION_MISMATCH",
    ),
    Row(
        "box with a used command id",
        lambda s, p: s.box("account", p.blue, command_id=p.used_command),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row(
        "unbox with a used command id",
        lambda s, p: s.unbox("account", p.blue, command_id=p.used_command),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row("withdraw too much", lambda s, p: s.bank.withdraw(p.blue, INT64_MAX), "FAILED_PRECONDITION", "INSUFFICIENT_FUNDS"),
    Row("deposit beyond 64 bits", lambda s, p: s.bank.deposit(p.blue, INT64_MAX), "FAILED_PRECONDITION", "BALANCE_OVERFLOW"),
    Row("deposit on a frozen account", lambda s, p: s.bank.deposit(p.ice, 1), "FAILED_PRECONDITION", "ACCOUNT_FROZEN"),
    Row("withdraw from a frozen account", lambda s, p: s.bank.withdraw(p.ice, 1), "FAILED_PRECONDITION", "ACCOUNT_FROZEN"),
    Row("deposit euros on dollars", lambda s, p: s.bank.deposit(p.blue, 1, "EUR"), "FAILED_PRECONDITION", "CURRENCY_MISMATCH"),
    Row("withdraw yen", lambda s, p: s.bank.withdraw(p.blue, 1, "JPY"), "FAILED_PRECONDITION", "CURRENCY_MISMATCH"),
    Row("a currency of NULs", lambda s, p: s.bank.deposit(p.blue, 1, "\0" * 3), "FAILED_PRECONDITION", "CURRENCY_MISMATCH"),
    Row(
        "stale expected version",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(p.blue, 1, expected_version=1)),
        "ABORTED",
        "VERSION_MISMATCH",
    ),
    Row(
        "expected version of what is not there",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(NIL, 1, expected_version=INT64_MAX)),
        "ABORTED",
        "VERSION_MISMATCH",
    ),
    Row(
        "command id used with another amount",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(p.blue, 2, command_id=p.used_command)),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row(
        "command id used for another command",
        lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, freeze(p.blue, command_id=p.used_command)),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
    Row(
        "command id used by another user",
        lambda s, p: s.by(user_id="bob").call(
            s.bank.accounts.DepositMoney, deposit(p.blue, BALANCE_MINOR, command_id=p.used_command)
        ),
        "INVALID_ARGUMENT",
        "COMMAND_ID_REUSED",
    ),
]

PACKED = [
    bad("Send: no command", lambda s, p: s.send(command_pb2.SendRequest()), "command"),
    Row(
        "Send: an empty Any",
        lambda s, p: s.send(command_pb2.SendRequest(command=Packed())),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "Send: an unknown type",
        lambda s, p: s.send(command_pb2.SendRequest(command=Packed(type_url="type.googleapis.com/bank.v1.RobBank"))),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "Send: an event is no command",
        lambda s, p: s.send(command_pb2.SendRequest(command=packed(account_pb2.MoneyDeposited(account_id=p.blue)))),
        "INVALID_ARGUMENT",
        "UNKNOWN_COMMAND",
        ("command.type_url",),
    ),
    Row(
        "Send: malformed inside",
        lambda s, p: s.send(
            command_pb2.SendRequest(command=Packed(type_url="type.googleapis.com/bank.v1.DepositMoneyRequest", value=b"\xff\xff"))
        ),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        ("command.value",),
    ),
    bad(
        "Send: a bad field inside",
        lambda s, p: s.send(command_pb2.SendRequest(command=packed(deposit(p.blue, 0)))),
        "command.amount_minor",
    ),
    bad("SendBatch: empty", lambda s, p: s.bank.batch(), "items"),
    bad("SendBatch: 257 items", lambda s, p: s.bank.batch(*[item(freeze(p.blue))] * 257), "items"),
    bad("SendBatch: an item without command", lambda s, p: s.bank.batch(command_pb2.BatchItem()), "items[0].command"),
    bad(
        "SendBatch: a tenant that is none",
        lambda s, p: s.by(Role.PROCESS).batch(item(freeze(p.blue)), item(freeze(p.blue), tenant="Not A Tenant")),
        "items[1].tenant",
    ),
    bad(
        "SendBatch: a causation id that is no UUID",
        lambda s, p: s.by(Role.PROCESS).batch(item(freeze(p.blue), causation_id="1")),
        "items[0].causation_id",
    ),
    bad(
        "SendBatch: a user with NUL in the name",
        lambda s, p: s.by(Role.PROCESS).batch(item(freeze(p.blue), on_behalf_of="bo\0b")),
        "items[0].on_behalf_of",
    ),
    bad("SendStream: no item", lambda s, p: s.stream(command_pb2.BatchItem()), "item.command"),
    bad(
        "SendStream: a user with NUL in the name",
        lambda s, p: s.stream(item(freeze(p.blue), on_behalf_of="\0"), bank=s.by(Role.PROCESS)),
        "item.on_behalf_of",
    ),
]

FORBIDDEN = [
    Row(
        "a user names a tenant",
        lambda s, p: s.bank.batch(item(deposit(p.theirs, 1), tenant=p.other_tenant)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "a user names the own tenant",
        lambda s, p: s.bank.batch(item(deposit(p.blue, 1), tenant=p.tenant)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "a user speaks for another",
        lambda s, p: s.bank.batch(item(deposit(p.blue, 1), on_behalf_of="bob")),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "a user names a cause",
        lambda s, p: s.bank.batch(item(deposit(p.blue, 1), causation_id=NIL)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "an operator names a tenant in a stream",
        lambda s, p: s.stream(item(deposit(p.blue, 1), tenant=p.other_tenant), bank=s.by(Role.OPERATOR)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row("a user closes a person", lambda s, p: s.by(Role.USER).close_person(p.alice), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user deactivates", lambda s, p: s.by(Role.USER).deactivate(NIL), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row(
        "a user gives another e-mail",
        lambda s, p: s.by(Role.USER).change_email(NIL, "a@example.com"),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row("a user gives roles", lambda s, p: s.by(Role.USER).change_roles(NIL, "user"), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row(
        "a user switches an override",
        lambda s, p: s.by(Role.USER).switch_override("renaming-disabled", False),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row("a user lists overrides", lambda s, p: s.by(Role.USER).list_overrides(), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user sets a rule", lambda s, p: s.set_retention("person", 1, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user lists rules", lambda s, p: s.retention_rules(Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user plans", lambda s, p: s.plan_retention(Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    *(
        Row(
            f"an administrator of a tenant calls {rpc}",
            lambda s, p, rpc=rpc: s.tenants(rpc, p.tenant, Role.TENANT_ADMIN),  # type: ignore[misc]
            "PERMISSION_DENIED",
            "ROLE_MISSING",
        )
        for rpc in ("DescribeTenant", "ExportTenant", "PurgeTenant", "GetTenantPurge")
    ),
    Row("a user asks for totals", lambda s, p: s.totals(Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    bad("totals: a token of 513", lambda s, p: s.totals(consistency_token="x" * 513), "consistency_token"),
    Row(
        "totals: a consistency token of nobody",
        lambda s, p: s.totals(consistency_token="e30"),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_MALFORMED",
        ("consistency_token",),
    ),
    Row("a user freezes", lambda s, p: s.by(Role.USER).freeze(p.blue), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user unfreezes", lambda s, p: s.by(Role.USER).unfreeze(p.ice), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader describes", lambda s, p: s.describe("person", p.alice, Role.READER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader looks back", lambda s, p: s.state("person", p.alice, Role.READER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader compares", lambda s, p: s.diff("person", p.alice, 1, 2, Role.READER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user describes a user", lambda s, p: s.describe("user", NIL, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user looks back at a user", lambda s, p: s.state("user", NIL, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user compares a user", lambda s, p: s.diff("user", NIL, 1, 2, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user boxes", lambda s, p: s.box("person", p.alice, roles=[Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user unboxes", lambda s, p: s.unbox("person", p.alice, roles=[Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user lists boxes", lambda s, p: s.boxes(roles=[Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user verifies", lambda s, p: s.verify_box("person", NIL, 0, [Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user reads the line", lambda s, p: s.read_all(s.by(Role.USER)), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("an operator reads the line", lambda s, p: s.read_all(s.by(Role.OPERATOR)), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader deposits", lambda s, p: s.by(Role.READER).deposit(p.blue, 1), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader asks queries", lambda s, p: s.by(Role.READER).account(p.blue), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row(
        "a user packs what only a warden may send",
        lambda s, p: s.by(Role.USER).call(s.bank.commands.Send, command_pb2.SendRequest(command=packed(unfreeze(p.ice)))),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
]

TOO_MUCH = [
    Row(
        "a command of more than 64 KiB",
        lambda s, p: s.bank.rename(p.alice, "x" * 64 * 1024),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row(
        "a packed command of more than 64 KiB",
        lambda s, p: s.send(command_pb2.SendRequest(command=packed(rename(p.alice, "x" * 64 * 1024)))),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row(
        "a streamed command of 2 MiB",
        lambda s, p: s.stream(item(rename(p.alice, "x" * 2 * MEBIBYTE))),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    bad("2,000,000 empty items", lambda s, p: s.raw(SEND_BATCH, b"\n\0" * 2_000_000), "items"),
    Row(
        "a query of 2 MiB",
        lambda s, p: s.bank.account("x" * 2 * MEBIBYTE),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row(
        "a batch of a little over 4 MiB",
        lambda s, p: s.bank.batch(*[item(rename(p.alice, "x" * (MEBIBYTE // 2)))] * 8),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    ),
    Row("a batch of 6 MiB: gRPC itself refuses", lambda s, p: s.raw(SEND_BATCH, b"x" * 6 * MEBIBYTE), "RESOURCE_EXHAUSTED", ""),
]

CONSISTENT: dict[str, Callable[[Scene, str], Awaitable[object]]] = {
    "an account": lambda s, token: s.bank.account(s.place.blue, token),
    "accounts": lambda s, token: s.accounts(consistency_token=token),
    "movements": lambda s, token: s.movements(account_id=s.place.blue, consistency_token=token),
    "totals": lambda s, token: s.totals(consistency_token=token),
    "a watch": lambda s, token: watch(s, "account", "WatchAccount", account_id=s.place.blue, consistency_token=token),
    "a watched list": lambda s, token: watch(s, "account", "WatchAccounts", consistency_token=token),
}


def newer(message: MessageT) -> MessageT:
    """The message with a field that only a later release knows, number 999."""
    return type(message).FromString(message.SerializeToString() + b"\xb8\x3e\x01")


def unknown(situation: str, call: Callable[[Scene, Place], Awaitable[object]], field: str) -> Row:
    """A row of a field that this release does not know."""
    return Row(f"unknown field: {situation}", call, "INVALID_ARGUMENT", "UNKNOWN_FIELD", (field,))


def filtered(rpc: str, name: str) -> Row:
    """A row of a filter that would be passed over by a List or a Watch of a list."""

    async def call(scene: Scene, _: Place) -> object:
        method, request = query(scene.bank, name, f"{rpc}{name.title()}s")
        asked = request()
        asked.filter.CopyFrom(newer(type(asked.filter)()))
        answer = method(asked, metadata=scene.bank.who, timeout=20)
        return await (answer.read() if rpc == "Watch" else answer)

    return unknown(f"filter of {rpc}{name.title()}s", call, "filter.999")


UNKNOWN = [
    *(filtered(rpc, name) for rpc in ("List", "Watch") for name in SUMMARIES),
    unknown(
        "in a range", lambda s, p: s.accounts(filter={"balance_minor": newer(range_pb2.WholeRange())}), "filter.balance_minor.999"
    ),
    unknown(
        "Get",
        lambda s, p: s.bank.call(s.bank.account_queries.GetAccount, newer(_get(p, ""))),
        "999",
    ),
    unknown("when", lambda s, p: s.past("Get", "account", account_id=p.blue, as_of=newer(as_of_pb2.AsOf())), "as_of.999"),
    unknown("command", lambda s, p: s.bank.call(s.bank.accounts.FreezeAccount, newer(freeze(p.blue))), "999"),
    unknown(
        "options of a command",
        lambda s, p: s.bank.call(
            s.bank.accounts.FreezeAccount, _with_options(p, newer(command_pb2.CommandOptions(command_id=NO_ID[:-1] + "7")))
        ),
        "options.999",
    ),
    unknown("packed command", lambda s, p: s.send(command_pb2.SendRequest(command=packed(newer(freeze(p.blue))))), "command.999"),
    unknown("scheduled command", lambda s, p: _schedule(s, newer(freeze(p.blue))), "command.999"),
    unknown("recurring command", lambda s, p: s.create_schedule(newer(freeze(p.blue))), "command.999"),
    unknown("item of a batch", lambda s, p: s.bank.batch(item(freeze(p.blue)), newer(item(freeze(p.blue)))), "items[1].999"),
    unknown("streamed item", lambda s, p: s.stream(newer(item(freeze(p.blue)))), "item.999"),
    unknown("what is audited", lambda s, p: s.bank.call(s.bank.audit.ListAudit, newer(audit_pb2.ListAuditRequest())), "999"),
]

QUERIES = [
    bad("page: negative size", lambda s, p: s.persons(page_size=-1), "page_size"),
    bad("page: more than 500", lambda s, p: s.accounts(page_size=501), "page_size"),
    *(
        bad(f"read_mask of {what}: {why}", lambda s, p, ask=ask, paths=paths: ask(s, p, read_mask={"paths": paths}), "read_mask")  # type: ignore[misc]
        for what, ask in MASKED.items()
        for why, paths in (("no field", ["version", "nonsense"]), ("too many", ["version"] * 65))
    ),
    bad("statement: by amount", lambda s, p: s.movements(account_id=p.blue, order_by="amount_minor"), "order_by"),
    bad(
        "statement: no moment",
        lambda s, p: s.movements(account_id=p.blue, filter={"moved_at": {"since": BEYOND}}),
        "filter.moved_at",
    ),
    bad("statement: more than 500", lambda s, p: s.movements(account_id=p.blue, page_size=501), "page_size"),
    bad("order: unknown", lambda s, p: s.persons(order_by="shoe_size"), "order_by"),
    bad("order: a column that is not offered", lambda s, p: s.accounts(order_by="tenant"), "order_by"),
    bad("order: SQL", lambda s, p: s.accounts(order_by="opened_at; DROP TABLE accounts"), "order_by"),
    bad("filter: owner that is no UUID", lambda s, p: s.accounts(filter={"owner_id": "alice"}), "filter.owner_id"),
    bad("filter: unknown status", lambda s, p: s.accounts(filter={"status": 99}), "filter.status"),
    bad("filter: currency of two letters", lambda s, p: s.accounts(filter={"currency": "US"}), "filter.currency"),
    bad("filter: currency of NULs", lambda s, p: s.accounts(filter={"currency": "\0" * 3}), "filter.currency"),
    bad("filter: prefix of 201", lambda s, p: s.persons(filter={"name_prefix": "x" * 201}), "filter.name_prefix"),
    bad("filter: no moment", lambda s, p: s.persons(filter={"registered_at": {"since": BEYOND}}), "filter.registered_at"),
    Row(
        "filter: in an order that no index gives",
        lambda s, p: s.persons(filter={"name_prefix": "a"}, order_by="registered_at"),
        "INVALID_ARGUMENT",
        "FILTER_NEEDS_ORDER",
        ("order_by",),
    ),
    bad("page token: 17 KB", lambda s, p: s.persons(page_token="x" * 17_000), "page_token"),
    bad("page token of accounts: 3 KB", lambda s, p: s.accounts(page_token="x" * 3000), "page_token"),
    Row(
        "page token: garbage",
        lambda s, p: s.persons(page_token="?!"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another order",
        lambda s, p: _paged(s, {"order_by": "opened_at"}, {"order_by": "opened_at desc"}),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another filter",
        lambda s, p: _paged(s, {}, {"filter": {"currency": "USD"}}),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another tenant",
        lambda s, p: _paged(s, {}, {"bank": s.by(tenant=p.other_tenant)}),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: of another list",
        lambda s, p: _paged(s, {}, {}, then=s.persons),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: forged, a time beyond all calendars",
        lambda s, p: s.accounts(page_token=pages.encode(_accounts_query(p), (INT64_MAX, p.blue))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: forged, an id with NUL",
        lambda s, p: s.accounts(page_token=pages.encode(_accounts_query(p), (0, "\0"))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    Row(
        "page token: forged, a version beyond 64 bits",
        lambda s, p: s.movements(account_id=p.blue, page_token=pages.encode(_statement(p), (2**64 - 1, 0))),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        ("page_token",),
    ),
    bad("consistency token: 600 characters", lambda s, p: s.bank.account(p.blue, "x" * 600), "consistency_token"),
    Row(
        "consistency token: garbage",
        lambda s, p: s.bank.account(p.blue, "garbage"),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_MALFORMED",
        ("consistency_token",),
    ),
    Row(
        "consistency token: of another shard",
        lambda s, p: s.bank.person(p.alice, _token(s, p, shard=7)),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_OF_ANOTHER_SHARD",
        ("consistency_token",),
    ),
    Row(
        "consistency token: the tables are not there yet",
        lambda s, p: s.bank.account(p.blue, _token(s, p, position=10**9)),
        "FAILED_PRECONDITION",
        "NOT_YET_CONSISTENT",
        waiting_helps=True,
    ),
    *(
        Row(f"consistency token of {what}: {why}", lambda s, p, ask=ask, made=made: ask(s, _token(s, p, **made)), *refusal)  # type: ignore[misc]
        for what, ask in CONSISTENT.items()
        for why, made, refusal in (
            ("beyond all lines", {"position": INT64_MAX}, ("FAILED_PRECONDITION", "TOKEN_UNREACHABLE")),
            ("of another history", {"epoch": f"{NIL}/1"}, ("FAILED_PRECONDITION", "TOKEN_OF_ANOTHER_HISTORY")),
        )
    ),
]

ODDITIES = [
    Row("unknown method", lambda s, p: s.raw("bank.v1.AccountService/RobBank", b""), "UNIMPLEMENTED", ""),
    Row("unknown service", lambda s, p: s.raw("bank.v1.LoanService/Lend", b""), "UNIMPLEMENTED", ""),
    Row("a command sent to the read service", lambda s, p: s.raw(DEPOSIT, b"", channel=s.read), "UNIMPLEMENTED", ""),
    Row(
        "a deadline that has passed",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(NIL, 1), timeout_s=-1),
        "DEADLINE_EXCEEDED",
        "",
    ),
]

TABLE = [
    *MALFORMED,
    *SCHEDULES,
    *AUDIT,
    *WATCHED,
    *PAST,
    *ABSENT,
    *AGAINST_A_RULE,
    *PACKED,
    *FORBIDDEN,
    *TOO_MUCH,
    *UNKNOWN,
    *QUERIES,
    *ODDITIES,
]


@pytest.fixture(scope="session")
def place(shared_stack: Stack) -> Place:
    """What all rows of this worker find there. No row changes it."""
    return build(shared_stack)


@pytest.fixture
async def scene(shared_stack: Stack, place: Place) -> AsyncIterator[Scene]:
    """The place with channels to it."""
    async with channels(shared_stack) as (write, read):
        yield Scene(shared_stack, place, write, read)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.situation)
async def test_the_table_of_errors(scene: Scene, place: Place, row: Row) -> None:
    """Each situation is refused with its code, reason, fields and, where waiting helps, when to come back."""
    told = await refused(row.call(scene, place))
    assert (told.code, told.reason, told.fields) == (row.code, row.reason, row.fields)
    assert (told.retry_after_s is not None) == row.waiting_helps
    assert "Traceback" not in told.text


def test_every_situation_has_its_own_name() -> None:
    """A row that is named like another would be taken for it."""
    names = [row.situation for row in TABLE]
    assert len(names) == len(set(names))


async def test_a_stale_version_is_told_with_the_actual_one(scene: Scene, place: Place) -> None:
    """Expected and actual are in the metadata, so a caller can decide anew."""
    bank = scene.bank
    told = await refused(bank.call(bank.accounts.DepositMoney, deposit(place.blue, 1, expected_version=9)))
    assert (told.code, told.facts["expected"], told.facts["actual"]) == ("ABORTED", "9", str(ACCOUNT_VERSION))


@pytest.mark.parametrize(
    ("absent", "foreign"),
    [
        (lambda s, p: s.bank.deposit(NIL, 1), lambda s, p: s.bank.deposit(p.theirs, 1)),
        (lambda s, p: s.bank.rename(NIL, "Bob"), lambda s, p: s.bank.rename(p.foreigner, "Bob")),
        (lambda s, p: s.bank.close_person(NIL), lambda s, p: s.bank.close_person(p.foreigner)),
        (lambda s, p: s.bank.open(NIL), lambda s, p: s.bank.open(p.foreigner)),
        (lambda s, p: s.bank.command(NIL), lambda s, p: s.bank.command(p.their_command)),
        (lambda s, p: s.read_stream("person", NIL), lambda s, p: s.read_stream("person", p.foreigner)),
        (lambda s, p: s.describe("person", NIL), lambda s, p: s.describe("person", p.foreigner)),
        (lambda s, p: s.state("person", NIL), lambda s, p: s.state("person", p.foreigner)),
        (lambda s, p: s.bank.person(NIL), lambda s, p: s.bank.person(p.foreigner)),
        (lambda s, p: s.bank.account(NIL), lambda s, p: s.bank.account(p.theirs)),
        (lambda s, p: s.movements(account_id=NIL), lambda s, p: s.movements(account_id=p.theirs)),
        (lambda s, p: s.past("Get", "account", **NOW), lambda s, p: s.past("Get", "account", account_id=p.theirs, **NOW)),
        (lambda s, p: s.past("Explain", "person"), lambda s, p: s.past("Explain", "person", person_id=p.foreigner)),
    ],
    ids=[
        "deposit",
        "rename",
        "close",
        "open",
        "GetCommand",
        "ReadStream",
        "Describe",
        "GetAggregate",
        "GetPerson",
        "GetAccount",
        "ListMovements",
        "GetAccount as of now",
        "ExplainPerson",
    ],
)
async def test_another_tenants_thing_is_told_as_an_absent_one_is(
    scene: Scene,
    place: Place,
    absent: Callable[[Scene, Place], Awaitable[object]],
    foreign: Callable[[Scene, Place], Awaitable[object]],
) -> None:
    """Same code, reason, text and facts: nobody learns that another tenant has it."""
    one, other = await refused(absent(scene, place)), await refused(foreign(scene, place))
    assert _without_ids(one) == _without_ids(other)


async def test_a_refused_item_says_in_its_receipt_what_a_call_would_have_said(bank: Bank) -> None:
    """In a batch each row of the table travels in a receipt, beside those that were accepted."""
    alice, registered = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    receipts = await bank.batch(
        item(deposit(blue, 1)),
        item(withdraw(blue, INT64_MAX)),
        item(deposit(blue, 0)),
        command_pb2.BatchItem(command=Packed(type_url="type.googleapis.com/bank.v1.RobBank")),
        item(deposit(NIL, 1)),
        item(deposit(blue, 2, command_id=registered.command_id)),
        item(rename(alice, "x" * 64 * 1024)),
        item(register(alice, "Alice")),
        item(newer(deposit(blue, 1))),
        item(withdraw(blue, 1)),
    )
    told = [(one.code, one.reason, one.fields) for one in map(read_status, (receipt.error for receipt in receipts))]
    assert told == [
        ("OK", "", ()),
        ("FAILED_PRECONDITION", "INSUFFICIENT_FUNDS", ()),
        ("INVALID_ARGUMENT", "INVALID_REQUEST", ("items[2].command.amount_minor",)),
        ("INVALID_ARGUMENT", "UNKNOWN_COMMAND", ("items[3].command.type_url",)),
        ("NOT_FOUND", "ACCOUNT_NOT_FOUND", ()),
        ("INVALID_ARGUMENT", "COMMAND_ID_REUSED", ()),
        ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", ()),
        ("ALREADY_EXISTS", "PERSON_ALREADY_REGISTERED", ()),
        ("INVALID_ARGUMENT", "UNKNOWN_FIELD", ("items[8].command.999",)),
        ("OK", "", ()),
    ]


def _without_ids(told: Refused) -> Refused:
    """The refusal without what only repeats the question, and without the moment at which it was asked."""
    facts = {name: value for name, value in told.facts.items() if name != "consistency_token"}
    return replace(told, text=re.sub(r"[0-9a-f-]{36}", "<id>", told.text), facts=facts)


async def _schedule(scene: Scene, command: Message | None, *, due_at: Timestamp | None = TOMORROW) -> object:
    request = command_pb2.ScheduleRequest(command=packed(command) if command else None, due_at=due_at)
    return await scene.bank.call(scene.bank.commands.Schedule, request)


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


def _without_options(place: Place) -> person_pb2.RenamePersonRequest:
    return person_pb2.RenamePersonRequest(person_id=place.alice, name="Bob")


def _with_options(place: Place, given: command_pb2.CommandOptions) -> account_pb2.FreezeAccountRequest:
    return account_pb2.FreezeAccountRequest(options=given, account_id=place.blue)


def _get(place: Place, token: str) -> account_query_pb2.GetAccountRequest:
    return account_query_pb2.GetAccountRequest(account_id=place.blue, consistency_token=token)


def _token(scene: Scene, place: Place, **changes: Any) -> str:
    """A real consistency token with something changed in it."""
    return token_with(scene.stack.seal_keys, place.tenant, place.consistency_token, **changes)


def _statement(place: Place) -> tuple[str, ...]:
    """What a page token of a statement is bound to."""
    return ("ListMovements", place.tenant, place.blue, "False", "", "")


def _accounts_query(place: Place) -> tuple[str, ...]:
    """What the read service binds the page tokens of a plain ListAccounts to."""
    return ("ListAccounts", place.tenant, "opened_at", "False", "", "", "")


async def _paged(
    scene: Scene,
    first: dict[str, Any],
    second: dict[str, Any],
    then: Callable[..., Awaitable[object]] | None = None,
) -> object:
    """Takes the page token of one query of accounts to another."""
    page = await scene.accounts(page_size=1, consistency_token=scene.place.consistency_token, **first)
    assert page.next_page_token
    return await (then or scene.accounts)(page_size=1, page_token=page.next_page_token, **second)
