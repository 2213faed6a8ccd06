"""The folds of users: given a row, when an event, then the row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from bank.v1 import user_pb2
from foldline.v1.event_store_pb2 import EventEnvelope
from read_service.projections import users
from read_service.projections.users import USERS, UserRow

NINE = datetime(2026, 3, 4, 9, 0, 0, 123456, tzinfo=UTC)
TEN = NINE + timedelta(hours=1)
ROW = UserRow("acme", "u-1", "Tweedle", "tweedle@example.com", "started", "", NINE, None, "user", None)


def at(moment: datetime) -> EventEnvelope:
    """What is known about an event of acme."""
    made = EventEnvelope(tenant="acme", version=1)
    made.recorded_at.FromDatetime(moment)
    return made


def test_a_registration_is_started() -> None:
    """The login is shown as it was written."""
    event = user_pb2.UserRegistrationStarted(user_id="u-1", login="Tweedle", email="tweedle@example.com", login_id="l-1")
    assert users.started(None, event, at(NINE)) == ROW
    assert USERS.key(event, at(NINE)) == ("u-1",)


def test_a_registration_succeeds() -> None:
    """The status and the time of its end."""
    event = user_pb2.UserRegistrationSucceeded(user_id="u-1")
    assert users.succeeded(ROW, event, at(TEN)) == ROW._replace(status="succeeded", ended_at=TEN)


def test_a_registration_fails() -> None:
    """The reason is told."""
    event = user_pb2.UserRegistrationFailed(user_id="u-1", reason="LOGIN_TAKEN")
    assert users.failed(ROW, event, at(TEN)) == ROW._replace(status="failed", reason="LOGIN_TAKEN", ended_at=TEN)


def test_a_user_is_kept_up() -> None:
    """Another address, other roles, and in the end none: the rest stays as it was."""
    active = ROW._replace(status="succeeded", ended_at=NINE)
    email = user_pb2.UserEmailChanged(user_id="u-1", email="d\0m@example.com")
    assert users.email_changed(active, email, at(TEN)) == active._replace(email="d\ufffdm@example.com")
    roles = user_pb2.UserRolesChanged(user_id="u-1", roles=["tenant_admin", "user"])
    promoted = users.roles_changed(active, roles, at(TEN))
    assert promoted == active._replace(roles="tenant_admin,user")
    gone = users.deactivated(promoted, user_pb2.UserDeactivated(user_id="u-1", login_id="l-1"), at(TEN))
    assert gone == promoted._replace(deactivated_at=TEN)
    shown = users.USER.view(gone)
    assert (list(shown.roles), shown.deactivated_at.ToDatetime(tzinfo=UTC)) == (["tenant_admin", "user"], TEN)
    assert not users.USER.view(active).HasField("deactivated_at")


def test_what_postgresql_cannot_hold_is_changed_rather_than_stopping_us() -> None:
    """NUL passes protobuf but no text column."""
    event = user_pb2.UserRegistrationStarted(user_id="u-1", login="Twee\0dle", email="a\0@example.com")
    row = users.started(None, event, at(NINE))
    assert (row.login, row.email) == ("Twee\ufffddle", "a\ufffd@example.com")
    assert users.failed(row, user_pb2.UserRegistrationFailed(reason="A\0"), at(TEN)).reason == "A\ufffd"


def test_nothing_ends_that_has_not_begun() -> None:
    """Such an event stops the projection."""
    with pytest.raises(ValueError, match="not there"):
        users.succeeded(None, user_pb2.UserRegistrationSucceeded(), at(TEN))
    with pytest.raises(ValueError, match="not there"):
        users.failed(None, user_pb2.UserRegistrationFailed(), at(TEN))
