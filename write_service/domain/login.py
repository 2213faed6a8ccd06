"""A login name of a tenant.

Its id follows from the folded name, so two that look the same are one aggregate, and only one user can hold it, however
many ask at once.
"""

from __future__ import annotations

import unicodedata
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, Invalid, Rejected
from shared.folds.ids import derived_id
from write_service.domain.login_types import (
    ConfirmLogin,
    LoginConfirmed,
    LoginEvent,
    LoginReleased,
    LoginReserved,
    ReleaseLogin,
    ReserveLogin,
)
from write_service.domain.user_types import UserDeactivated

# Characters that show nothing and are not of a category that says so: Unicode's Default_Ignorable_Code_Point beyond
# the format characters (DerivedCoreProperties.txt).
_IGNORABLE = frozenset((0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0)).union(
    range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)
)


def fold_login(login: str) -> str:
    """The form in which logins are compared: NFKC(casefold(NFKC(x))). Refusals: LOGIN_NOT_ALLOWED."""
    for character in unicodedata.normalize("NFKC", login):
        if unicodedata.category(character)[0] in "CZ" or ord(character) in _IGNORABLE:
            raise Invalid(
                "LOGIN_NOT_ALLOWED",
                "a login may not have spaces, control characters, or characters that are invisible or unassigned",
                violations=(("login", f"may not contain U+{ord(character):04X}"),),
            )
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", login).casefold())


def login_id(tenant: str, login: str) -> str:
    """The id of the login's aggregate. Refusals: LOGIN_NOT_ALLOWED."""
    return derived_id("login", tenant, fold_login(login))


# State


class Login(Struct, frozen=True, kw_only=True):
    holder_id: str = ""
    confirmed: bool = False
    expires_at_ms: int = 0


# Decisions


def reserve(login: Login, command: ReserveLogin, meta: Meta) -> list[LoginEvent]:
    """Refusals: LOGIN_TAKEN. A reservation that was not confirmed in time is free for the next."""
    if login.holder_id == command.user_id:
        return []
    if login.holder_id and (login.confirmed or meta.now.timestamp() * 1000 <= login.expires_at_ms):
        raise AlreadyExists("LOGIN_TAKEN", "the login is taken")
    return [LoginReserved(login_id=command.login_id, user_id=command.user_id, expires_at_ms=command.expires_at_ms)]


def confirm(login: Login, command: ConfirmLogin, meta: Meta) -> list[LoginEvent]:
    """Refusals: LOGIN_NOT_HELD."""
    _refuse_unless_held(login, command.user_id)
    return [] if login.confirmed else [LoginConfirmed(login_id=command.login_id, user_id=command.user_id)]


def release(login: Login, command: ReleaseLogin, meta: Meta) -> list[LoginEvent]:
    """Only its holder can release a login; for anybody else there is nothing to release."""
    if login.holder_id != command.user_id:
        return []
    return [LoginReleased(login_id=command.login_id, user_id=command.user_id)]


def release_with_user(login: Login, event: UserDeactivated, meta: Meta) -> list[LoginEvent]:
    """Follows the deactivation of the login's holder, in its transaction."""
    if login.holder_id != event.user_id:
        return []
    return [LoginReleased(login_id=event.login_id, user_id=event.user_id)]


def _refuse_unless_held(login: Login, user_id: str) -> None:
    if login.holder_id != user_id:
        raise Rejected("LOGIN_NOT_HELD", "the login is not reserved for this user")


# Evolve


def evolve(login: Login, event: LoginEvent) -> Login:
    """The login after the event."""
    match event:
        case LoginReserved():
            return Login(holder_id=event.user_id, expires_at_ms=event.expires_at_ms)
        case LoginConfirmed():
            return replace(login, confirmed=True)
        case LoginReleased():
            return Login()
        case _:
            assert_never(event)


LOGIN = Aggregate(category="login", initial=Login(), evolve=evolve)
