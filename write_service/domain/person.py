"""A person, the bank's customer."""

from __future__ import annotations

from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from shared.folds.aggregate import Aggregate, Meta
from shared.folds.errors import AlreadyExists, NotFound, Rejected
from write_service.domain.account_types import AccountClosed, AccountOpened
from write_service.domain.person_types import (
    AccountAttached,
    AccountDetached,
    ClosePerson,
    PersonClosed,
    PersonEvent,
    PersonRegistered,
    PersonRenamed,
    RegisterPerson,
    RenamePerson,
)

ACCOUNTS_MAX = 1000
"""How many accounts one person may have: the state names them all."""


# State


class Person(Struct, frozen=True, kw_only=True):
    registered: bool = False
    closed: bool = False
    name: str = ""
    account_ids: tuple[str, ...] = ()


# Decisions


def register(person: Person, command: RegisterPerson, meta: Meta) -> list[PersonEvent]:
    """Refusals: PERSON_ALREADY_REGISTERED."""
    if person.registered:
        raise AlreadyExists("PERSON_ALREADY_REGISTERED", "a person with this id is registered")
    return [PersonRegistered(person_id=command.person_id, name=command.name)]


def rename(person: Person, command: RenamePerson, meta: Meta) -> list[PersonEvent]:
    """Refusals: PERSON_NOT_FOUND, PERSON_CLOSED."""
    _refuse_unless_active(person)
    if person.name == command.name:
        return []
    return [PersonRenamed(person_id=command.person_id, name=command.name)]


def refuse_renaming(person: Person, command: RenamePerson, meta: Meta) -> list[PersonEvent]:
    """Nobody takes another name. Refusals: RENAMING_DISABLED."""
    raise Rejected("RENAMING_DISABLED", "renaming is disabled for this tenant")


def close(person: Person, command: ClosePerson, meta: Meta) -> list[PersonEvent]:
    """Names the accounts that are open: each is closed by a reaction. Refusals: PERSON_NOT_FOUND; then those of the reaction."""
    _refuse_unless_registered(person)
    return [] if person.closed else [PersonClosed(person_id=command.person_id, account_ids=person.account_ids)]


def attach_account(person: Person, event: AccountOpened, meta: Meta) -> list[PersonEvent]:
    """Follows the opening of an account, in its transaction.

    Refusals, in order of precedence: PERSON_NOT_FOUND, PERSON_CLOSED, TOO_MANY_ACCOUNTS.
    """
    _refuse_unless_active(person)
    if len(person.account_ids) >= ACCOUNTS_MAX:
        raise Rejected("TOO_MANY_ACCOUNTS", f"a person may have {ACCOUNTS_MAX} accounts")
    return [AccountAttached(person_id=event.owner_id, account_id=event.account_id)]


def detach_account(person: Person, event: AccountClosed, meta: Meta) -> list[PersonEvent]:
    """Follows the closing of an account, in its transaction. If the person was closed with it, there is nothing left to say."""
    return [] if person.closed else [AccountDetached(person_id=event.owner_id, account_id=event.account_id)]


def _refuse_unless_registered(person: Person) -> None:
    if not person.registered:
        raise NotFound("PERSON_NOT_FOUND", "there is no person with this id")


def _refuse_unless_active(person: Person) -> None:
    _refuse_unless_registered(person)
    if person.closed:
        raise Rejected("PERSON_CLOSED", "the person is no customer any more")


# Evolve


def evolve(person: Person, event: PersonEvent) -> Person:
    """The person after the event."""
    match event:
        case PersonRegistered():
            return replace(person, registered=True, name=event.name)
        case PersonRenamed():
            return replace(person, name=event.name)
        case AccountAttached():
            return replace(person, account_ids=(*person.account_ids, event.account_id))
        case AccountDetached():
            return replace(person, account_ids=tuple(each for each in person.account_ids if each != event.account_id))
        case PersonClosed():
            return replace(person, closed=True, account_ids=())
        case _:
            assert_never(event)


PERSON = Aggregate(category="person", initial=Person(), evolve=evolve, schema=2)
