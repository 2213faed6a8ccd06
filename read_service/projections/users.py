"""Users, and what became of their registrations.

The row, then folds, then the table of which event goes to which fold, then the summary that is shown.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import user_pb2, user_query_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.moments import set_moment
from shared.folds.projection import Projection, Purge, existing, on, recorded_at, storable
from shared.folds.summary import History, Summary, equals, has, moment_between, rows_of
from shared.folds.table import Code, Table, by

STARTED, SUCCEEDED, FAILED = "started", "succeeded", "failed"


class UserRow(NamedTuple):
    """A row of `users`. `roles` has them with commas between."""

    tenant: Code
    user_id: Code
    login: str
    email: str
    status: Code
    reason: str
    started_at: datetime
    ended_at: datetime | None
    roles: Code
    deactivated_at: datetime | None


users = Table(
    "users",
    UserRow,
    keys=2,
    indexes=[
        by("started_at"),
        by("status", "started_at"),
        by("started_at", only="deactivated_at IS NOT NULL"),
        by("status", "started_at", only="deactivated_at IS NOT NULL"),
    ],
    filled=80,
)


def started(_: UserRow | None, event: user_pb2.UserRegistrationStarted, envelope: EventEnvelope) -> UserRow:
    """Somebody asks to become a user."""
    return UserRow(
        tenant=envelope.tenant,
        user_id=event.user_id,
        login=storable(event.login),
        email=storable(event.email),
        status=STARTED,
        reason="",
        started_at=recorded_at(envelope),
        ended_at=None,
        roles="user",
        deactivated_at=None,
    )


def succeeded(row: UserRow | None, _: user_pb2.UserRegistrationSucceeded, envelope: EventEnvelope) -> UserRow:
    """The login is theirs."""
    return existing(row)._replace(status=SUCCEEDED, ended_at=recorded_at(envelope))


def failed(row: UserRow | None, event: user_pb2.UserRegistrationFailed, envelope: EventEnvelope) -> UserRow:
    """The login was not to be had."""
    return existing(row)._replace(status=FAILED, reason=storable(event.reason), ended_at=recorded_at(envelope))


def email_changed(row: UserRow | None, event: user_pb2.UserEmailChanged, _: EventEnvelope) -> UserRow:
    """Another address."""
    return existing(row)._replace(email=storable(event.email))


def roles_changed(row: UserRow | None, event: user_pb2.UserRolesChanged, _: EventEnvelope) -> UserRow:
    """These roles and no other."""
    return existing(row)._replace(roles=",".join(event.roles))


def deactivated(row: UserRow | None, _: user_pb2.UserDeactivated, envelope: EventEnvelope) -> UserRow:
    """A user no more."""
    return existing(row)._replace(deactivated_at=recorded_at(envelope))


USERS = Projection(
    table=users,
    key=lambda event, _: (event.user_id,),
    on=[
        on(user_pb2.UserRegistrationStarted, started),
        on(user_pb2.UserRegistrationSucceeded, succeeded),
        on(user_pb2.UserRegistrationFailed, failed),
        on(user_pb2.UserEmailChanged, email_changed),
        on(user_pb2.UserRolesChanged, roles_changed),
        on(user_pb2.UserDeactivated, deactivated),
    ],
    purges=[Purge("user", "user_id")],
)

STATUSES = {
    user_query_pb2.REGISTRATION_STATUS_STARTED: STARTED,
    user_query_pb2.REGISTRATION_STATUS_SUCCEEDED: SUCCEEDED,
    user_query_pb2.REGISTRATION_STATUS_FAILED: FAILED,
}
STATUS_OF = {text: status for status, text in STATUSES.items()}


def show(row: UserRow, shown: user_query_pb2.UserSummary) -> None:
    """A user as they are shown."""
    shown.user_id = row.user_id
    shown.login = row.login
    shown.email = row.email
    shown.status = STATUS_OF[row.status]
    shown.reason = row.reason
    set_moment(shown.started_at, row.started_at)
    set_moment(shown.ended_at, row.ended_at)
    shown.roles.extend(row.roles.split(","))
    set_moment(shown.deactivated_at, row.deactivated_at)


USER = Summary(
    name="user",
    source=rows_of(users),
    show=show,
    history=History("user"),
    orders={"started_at": "started_at"},
    filters={
        "status": equals("status", STATUSES),
        "deactivated": has("deactivated_at"),
        "started_at": moment_between("started_at"),
    },
)
