"""How a user's registration begins and ends."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from shared.folds.aggregate import Credential, Decided
from shared.folds.errors import Refusal
from shared.folds.ids import step_id
from tests.support.checks.scenario import META, given
from write_service.domain.login import login_id
from write_service.domain.user import (
    USER,
    User,
    change_email,
    change_roles,
    confirm_registration,
    deactivate,
    fail_registration,
    start_registration,
)
from write_service.domain.user_types import (
    ChangeUserEmail,
    ChangeUserRoles,
    ConfirmUserRegistration,
    DeactivateUser,
    FailUserRegistration,
    StartUserRegistration,
    UserDeactivated,
    UserEmailChanged,
    UserRegistrationFailed,
    UserRegistrationStarted,
    UserRegistrationSucceeded,
    UserRolesChanged,
)

U1 = "7d1c0a5e-0000-4000-8000-000000000001"
HASH = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$aGFzaA"


def start_of(login: str = "Tweedle", password: str = HASH) -> StartUserRegistration:
    """The wish to become a user, with the password as the decision gets it."""
    return StartUserRegistration(user_id=U1, login=login, email="tweedle@example.com", password=password)


started = UserRegistrationStarted(
    user_id=U1,
    login="Tweedle",
    email="tweedle@example.com",
    login_id=login_id("acme", "tweedle"),
    reserve_command_id=str(step_id("registration", U1, "reserve")),
    confirm_command_id=str(step_id("registration", U1, "confirm")),
    fail_command_id=str(step_id("registration", U1, "fail")),
    hold_command_id=str(step_id("registration", U1, "hold")),
    release_command_id=str(step_id("registration", U1, "release")),
    # Five minutes after META's moment.
    expires_at_ms=1_767_323_345_000,
)
succeeded = UserRegistrationSucceeded(user_id=U1)
failed = UserRegistrationFailed(user_id=U1, reason="LOGIN_TAKEN")
email_changed = UserEmailChanged(user_id=U1, email="dum@example.com")
roles_changed = UserRolesChanged(user_id=U1, roles=("tenant_admin", "user"))
deactivated = UserDeactivated(user_id=U1, login_id=login_id("acme", "tweedle"))
active, gone = [started, succeeded], [started, succeeded, deactivated]
change_it = ChangeUserEmail(user_id=U1, email="dum@example.com")
change_roles_to = {roles: ChangeUserRoles(user_id=U1, roles=roles) for roles in (("user",), ("user", "tenant_admin"))}
promote = change_roles_to["user", "tenant_admin"]
deactivate_it = DeactivateUser(user_id=U1)
confirm_it = ConfirmUserRegistration(user_id=U1)
fail_it = FailUserRegistration(user_id=U1, reason="LOGIN_TAKEN")


def test_starting_fixes_the_ids_of_all_later_steps_and_saves_the_hash_beside_the_event() -> None:
    """The event has the login as it was written, the id of its folded form, and nothing of the password."""
    decided = start_registration(User(), start_of(), META)
    assert decided == Decided(events=[started], credentials=[Credential(subject_id=U1, password_hash=HASH)])
    assert HASH not in repr(decided)
    assert HASH not in repr(decided.events[0])


@pytest.mark.parametrize("history", [[started], [started, succeeded], [started, failed]], ids=["started", "succeeded", "failed"])
def test_a_user_registers_once(history: list[Any]) -> None:
    """Refused before the login is looked at: an id names one registration, whatever became of it."""
    with pytest.raises(Refusal) as refused:
        start_registration(given(USER, *history).state, start_of("not allowed"), META)
    assert refused.value.reason == "USER_ALREADY_REGISTERED"


def test_a_login_that_cannot_be_is_refused() -> None:
    """Before anything is saved."""
    with pytest.raises(Refusal) as refused:
        start_registration(User(), start_of("not allowed"), META)
    assert refused.value.reason == "LOGIN_NOT_ALLOWED"


def test_a_password_that_was_not_hashed_is_a_defect() -> None:
    """It is neither saved nor told."""
    with pytest.raises(ValueError, match="was not hashed") as raised:
        start_registration(User(), start_of(password="correct horse"), META)
    assert "correct horse" not in str(raised.value)


def test_a_command_does_not_show_its_password() -> None:
    """Whoever prints it."""
    assert "correct horse" not in repr(start_of(password="correct horse"))
    assert HASH not in repr(start_of())


# (what happened, decision, command, the events it gives)
ACCEPTED: dict[str, tuple[list[Any], Any, Any, list[Any]]] = {
    "confirm": ([started], confirm_registration, confirm_it, [succeeded]),
    "confirm again: nothing": ([started, succeeded], confirm_registration, confirm_it, []),
    "fail again: nothing": ([started, failed], fail_registration, fail_it, []),
    "change the e-mail": (active, change_email, change_it, [email_changed]),
    "the same e-mail: nothing": ([*active, email_changed], change_email, change_it, []),
    "change the e-mail back": (
        [*active, email_changed],
        change_email,
        ChangeUserEmail(user_id=U1, email="tweedle@example.com"),
        [UserEmailChanged(user_id=U1, email="tweedle@example.com")],
    ),
    "change roles, whatever their order": (active, change_roles, promote, [roles_changed]),
    "the first role: nothing": (active, change_roles, change_roles_to["user",], []),
    "the same roles: nothing": ([*active, roles_changed], change_roles, promote, []),
    "fewer roles": (
        [*active, roles_changed],
        change_roles,
        change_roles_to["user",],
        [UserRolesChanged(user_id=U1, roles=("user",))],
    ),
    "deactivate again: nothing": (gone, deactivate, deactivate_it, []),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """These commands give exactly these events, or none where nothing changes."""
    history, decide, command, events = ACCEPTED[name]
    given(USER, *history).when(decide, command).then(*events)


def test_whoever_fails_or_is_deactivated_leaves_no_password() -> None:
    """The hash goes with the event; a repeat deletes nothing."""
    forgotten = Credential(subject_id=U1, password_hash=None)
    given(USER, started).when(fail_registration, fail_it).then(failed, credentials=[forgotten])
    given(USER, *active).when(deactivate, deactivate_it).then(deactivated, credentials=[forgotten])


# (what happened, decision, command, reason)
REFUSED: dict[str, tuple[list[Any], Any, Any, str]] = {
    "confirm: 1. no such user": ([], confirm_registration, confirm_it, "USER_NOT_FOUND"),
    "confirm: 2. failed": ([started, failed], confirm_registration, confirm_it, "REGISTRATION_FAILED"),
    "fail: 1. no such user": ([], fail_registration, fail_it, "USER_NOT_FOUND"),
    "fail: 2. succeeded": ([started, succeeded], fail_registration, fail_it, "REGISTRATION_SUCCEEDED"),
    "fail: 2. deactivated": (gone, fail_registration, fail_it, "REGISTRATION_SUCCEEDED"),
    "e-mail: 1. no such user": ([], change_email, change_it, "USER_NOT_FOUND"),
    "e-mail: 2. failed": ([started, failed], change_email, change_it, "REGISTRATION_FAILED"),
    "e-mail: 3. not yet": ([started], change_email, change_it, "REGISTRATION_UNDER_WAY"),
    "e-mail: 4. deactivated": (gone, change_email, change_it, "USER_DEACTIVATED"),
    "roles: 1. no such user": ([], change_roles, promote, "USER_NOT_FOUND"),
    "roles: 2. failed": ([started, failed], change_roles, promote, "REGISTRATION_FAILED"),
    "roles: 3. not yet": ([started], change_roles, promote, "REGISTRATION_UNDER_WAY"),
    "roles: 4. deactivated, though they are the same": (gone, change_roles, change_roles_to["user",], "USER_DEACTIVATED"),
    "deactivate: 1. no such user": ([], deactivate, deactivate_it, "USER_NOT_FOUND"),
    "deactivate: 2. failed": ([started, failed], deactivate, deactivate_it, "REGISTRATION_FAILED"),
    "deactivate: 3. not yet": ([started], deactivate, deactivate_it, "REGISTRATION_UNDER_WAY"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """A registration that has ended one way does not end the other."""
    history, decide, command, reason = REFUSED[name]
    given(USER, *history).when(decide, command).then_refused(reason)


def test_the_state_is_the_fold_of_the_events() -> None:
    """Every event of the kind leaves its trace."""
    new = User(started=True, login_id=login_id("acme", "tweedle"), email="tweedle@example.com", roles=("user",))
    assert given(USER, started).state == new
    assert given(USER, started, succeeded).state == replace(new, succeeded=True)
    assert given(USER, started, failed).state == replace(new, failed=True)
    changed = replace(new, succeeded=True, email="dum@example.com", roles=("tenant_admin", "user"))
    assert given(USER, *active, email_changed, roles_changed).state == changed
    assert given(USER, *active, email_changed, roles_changed, deactivated).state == replace(changed, deactivated=True)
