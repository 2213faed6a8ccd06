"""Rows of watches and of questions about the past, of each summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from cli.summaries import SUMMARIES
from foldline.v1 import as_of_pb2
from shared.platform.identity import Role
from tests.e2e.errors.row import BEYOND, INT64_MAX, TOMORROW, Row, bad, token_of, watch
from tests.e2e.scene import NIL, Place, Scene


def watched(name: str, situation: str, code: str, reason: str, *fields: str, **asked: str) -> Row:
    """A row of a watch; of what is not there unless an id is given."""
    rpc, asked = f"Watch{name.title()}", {f"{name}_id": NIL, **asked}
    return Row(f"{rpc}: {situation}", lambda s, p: watch(s, name, rpc, **asked), code, reason, fields)


def watched_list(name: str, situation: str, reason: str, *fields: str, **asked: Any) -> Row:
    """A row of a watch of a list."""
    rpc = f"Watch{name.title()}s"
    return Row(f"{rpc}: {situation}", lambda s, p: watch(s, name, rpc, **asked), "INVALID_ARGUMENT", reason, fields)


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
            lambda s, p: as_of(token=token_of(s, p, epoch=f"{NIL}/1")),
        ),
        of_the_past(
            rpc,
            name,
            "as of a token that is ahead",
            "FAILED_PRECONDITION TOKEN_OF_ANOTHER_HISTORY",
            lambda s, p: as_of(token=token_of(s, p, position=INT64_MAX)),
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
        lambda s, p: s.read_streams(("account", p.blue), after_token=token_of(s, p, epoch=f"{NIL}/1")),
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
