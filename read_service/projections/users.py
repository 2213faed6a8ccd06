"""Users, and what became of their registrations.

The row, then folds, then the table of which event goes to which fold.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from bank.v1 import user_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.projection import Projection, existing, recorded_at, storable
from shared.folds.table import Column, Table, Type

STARTED, SUCCEEDED, FAILED = "started", "succeeded", "failed"

users = Table(
    "users",
    Column("tenant", Type.TEXT_C, primary_key=True),
    Column("user_id", Type.TEXT_C, primary_key=True),
    Column("login", Type.TEXT),
    Column("email", Type.TEXT),
    Column("status", Type.TEXT_C),
    Column("reason", Type.TEXT),
    Column("started_at", Type.TIMESTAMP),
    Column("ended_at", Type.TIMESTAMP, nullable=True),
)


class UserRow(NamedTuple):
    """A row of `users`."""

    tenant: str
    user_id: str
    login: str
    email: str
    status: str
    reason: str
    started_at: datetime
    ended_at: datetime | None


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
    )


def succeeded(row: UserRow | None, _: user_pb2.UserRegistrationSucceeded, envelope: EventEnvelope) -> UserRow:
    """The login is theirs."""
    return existing(row)._replace(status=SUCCEEDED, ended_at=recorded_at(envelope))


def failed(row: UserRow | None, event: user_pb2.UserRegistrationFailed, envelope: EventEnvelope) -> UserRow:
    """The login was not to be had."""
    return existing(row)._replace(status=FAILED, reason=storable(event.reason), ended_at=recorded_at(envelope))


USERS = Projection(
    table=users,
    row=UserRow,
    key=lambda event, _: (event.user_id,),
    on={
        user_pb2.UserRegistrationStarted: started,
        user_pb2.UserRegistrationSucceeded: succeeded,
        user_pb2.UserRegistrationFailed: failed,
    },
)
