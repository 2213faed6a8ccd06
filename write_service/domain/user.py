"""A user of a tenant. Registering one is a process: it succeeds if the login can be had, and fails otherwise."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Credential, Decided, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from shared.folds.ids import step_id
from write_service.domain.login import login_id
from write_service.domain.user_types import (
    ConfirmUserRegistration,
    FailUserRegistration,
    StartUserRegistration,
    UserEvent,
    UserRegistrationFailed,
    UserRegistrationStarted,
    UserRegistrationSucceeded,
)

PROCESS = "registration"
"""The type of the process that takes it on: the ids of the later steps are made of it."""

RESERVATION_MS = 5 * 60_000
"""How long a login is kept for a registration that does not go on."""

HASH_PREFIX = "$argon2id$"


# State


class User(Struct, frozen=True, kw_only=True):
    started: bool = False
    succeeded: bool = False
    failed: bool = False


# Decisions


def start_registration(user: User, command: StartUserRegistration, meta: Meta) -> Decided[UserEvent]:
    """Fixes the ids of all later steps, and saves the password's hash beside the event.

    Refusals, in order of precedence: USER_ALREADY_REGISTERED, LOGIN_NOT_ALLOWED.
    """
    if user.started:
        raise AlreadyExists("USER_ALREADY_REGISTERED", "a user with this id has been registered")
    held = login_id(meta.tenant, command.login)
    if not command.password.startswith(HASH_PREFIX):
        raise ValueError("the password was not hashed")
    started = UserRegistrationStarted(
        user_id=command.user_id,
        login=command.login,
        email=command.email,
        login_id=held,
        reserve_command_id=str(step_id(PROCESS, command.user_id, "reserve")),
        confirm_command_id=str(step_id(PROCESS, command.user_id, "confirm")),
        fail_command_id=str(step_id(PROCESS, command.user_id, "fail")),
        hold_command_id=str(step_id(PROCESS, command.user_id, "hold")),
        release_command_id=str(step_id(PROCESS, command.user_id, "release")),
        expires_at_ms=int(meta.now.timestamp() * 1000) + RESERVATION_MS,
    )
    return Decided(events=[started], credentials=[Credential(subject_id=command.user_id, password_hash=command.password)])


def confirm_registration(user: User, command: ConfirmUserRegistration, meta: Meta) -> list[UserEvent]:
    """Refusals, in order of precedence: USER_NOT_FOUND, REGISTRATION_FAILED."""
    _refuse_unless_started(user)
    if user.failed:
        raise Rejected("REGISTRATION_FAILED", "the registration has failed")
    return [] if user.succeeded else [UserRegistrationSucceeded(user_id=command.user_id)]


def fail_registration(user: User, command: FailUserRegistration, meta: Meta) -> list[UserEvent]:
    """Refusals, in order of precedence: USER_NOT_FOUND, REGISTRATION_SUCCEEDED."""
    _refuse_unless_started(user)
    if user.succeeded:
        raise Rejected("REGISTRATION_SUCCEEDED", "the registration has succeeded")
    return [] if user.failed else [UserRegistrationFailed(user_id=command.user_id, reason=command.reason)]


def _refuse_unless_started(user: User) -> None:
    if not user.started:
        raise NotFound("USER_NOT_FOUND", "there is no user with this id")


# Evolve


def evolve(user: User, event: UserEvent) -> User:
    """The user after the event."""
    match event:
        case UserRegistrationStarted():
            return replace(user, started=True)
        case UserRegistrationSucceeded():
            return replace(user, succeeded=True)
        case UserRegistrationFailed():
            return replace(user, failed=True)
        case _:
            assert_never(event)


USER = Aggregate(category="user", initial=User(), evolve=evolve)
