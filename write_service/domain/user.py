"""A user of a tenant. Registering one is a process: it succeeds if the login can be had, and fails otherwise.

The password's hash is in the credentials table from the start of the registration until it fails or the user is deactivated.
"""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Credential, Decided, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from shared.folds.ids import step_id
from write_service.domain.login import login_id
from write_service.domain.user_types import (
    ChangeUserEmail,
    ChangeUserRoles,
    ConfirmUserRegistration,
    DeactivateUser,
    FailUserRegistration,
    StartUserRegistration,
    UserDeactivated,
    UserEmailChanged,
    UserEvent,
    UserRegistrationFailed,
    UserRegistrationStarted,
    UserRegistrationSucceeded,
    UserRolesChanged,
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
    deactivated: bool = False
    login_id: str = ""
    email: str = ""
    roles: tuple[str, ...] = ("user",)


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


def fail_registration(user: User, command: FailUserRegistration, meta: Meta) -> Decided[UserEvent]:
    """Deletes the password's hash. Refusals, in order of precedence: USER_NOT_FOUND, REGISTRATION_SUCCEEDED."""
    _refuse_unless_started(user)
    if user.succeeded:
        raise Rejected("REGISTRATION_SUCCEEDED", "the registration has succeeded")
    if user.failed:
        return Decided(events=[])
    failed = UserRegistrationFailed(user_id=command.user_id, reason=command.reason)
    return Decided(events=[failed], credentials=[Credential(subject_id=command.user_id, password_hash=None)])


def change_email(user: User, command: ChangeUserEmail, meta: Meta) -> list[UserEvent]:
    """Refusals, in order of precedence: USER_NOT_FOUND, REGISTRATION_FAILED, REGISTRATION_UNDER_WAY, USER_DEACTIVATED."""
    _refuse_unless_active(user)
    return [] if user.email == command.email else [UserEmailChanged(user_id=command.user_id, email=command.email)]


def change_roles(user: User, command: ChangeUserRoles, meta: Meta) -> list[UserEvent]:
    """Refusals, in order of precedence: USER_NOT_FOUND, REGISTRATION_FAILED, REGISTRATION_UNDER_WAY, USER_DEACTIVATED."""
    _refuse_unless_active(user)
    roles = tuple(sorted(command.roles))
    return [] if user.roles == roles else [UserRolesChanged(user_id=command.user_id, roles=roles)]


def deactivate(user: User, command: DeactivateUser, meta: Meta) -> Decided[UserEvent]:
    """Deletes the password's hash; the login is released by a reaction.

    Refusals, in order of precedence: USER_NOT_FOUND, REGISTRATION_FAILED, REGISTRATION_UNDER_WAY.
    """
    _refuse_unless_registered(user)
    if user.deactivated:
        return Decided(events=[])
    deactivated = UserDeactivated(user_id=command.user_id, login_id=user.login_id)
    return Decided(events=[deactivated], credentials=[Credential(subject_id=command.user_id, password_hash=None)])


def _refuse_unless_started(user: User) -> None:
    if not user.started:
        raise NotFound("USER_NOT_FOUND", "there is no user with this id")


def _refuse_unless_registered(user: User) -> None:
    _refuse_unless_started(user)
    if user.failed:
        raise Rejected("REGISTRATION_FAILED", "the registration has failed")
    if not user.succeeded:
        raise Rejected("REGISTRATION_UNDER_WAY", "the registration has not ended")


def _refuse_unless_active(user: User) -> None:
    _refuse_unless_registered(user)
    if user.deactivated:
        raise Rejected("USER_DEACTIVATED", "the user is deactivated")


# Evolve


def evolve(user: User, event: UserEvent) -> User:
    """The user after the event."""
    match event:
        case UserRegistrationStarted():
            return replace(user, started=True, login_id=event.login_id, email=event.email)
        case UserRegistrationSucceeded():
            return replace(user, succeeded=True)
        case UserRegistrationFailed():
            return replace(user, failed=True)
        case UserEmailChanged():
            return replace(user, email=event.email)
        case UserRolesChanged():
            return replace(user, roles=event.roles)
        case UserDeactivated():
            return replace(user, deactivated=True)
        case _:
            assert_never(event)


USER = Aggregate(category="user", initial=User(), evolve=evolve, schema=2)
