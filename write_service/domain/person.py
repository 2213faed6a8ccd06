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
    name: str = ""
    account_ids: tuple[str, ...] = ()


# Decisions


def register(person: Person, command: RegisterPerson, meta: Meta) -> list[PersonEvent]:
    """Refusals: PERSON_ALREADY_REGISTERED."""
    if person.registered:
        raise AlreadyExists("PERSON_ALREADY_REGISTERED", "a person with this id is registered")
    return [PersonRegistered(person_id=command.person_id, name=command.name)]


def rename(person: Person, command: RenamePerson, meta: Meta) -> list[PersonEvent]:
    """Refusals: PERSON_NOT_FOUND."""
    _refuse_unless_registered(person)
    if person.name == command.name:
        return []
    return [PersonRenamed(person_id=command.person_id, name=command.name)]


def attach_account(person: Person, event: AccountOpened, meta: Meta) -> list[PersonEvent]:
    """Follows the opening of an account, in its transaction. Refusals: PERSON_NOT_FOUND, TOO_MANY_ACCOUNTS."""
    _refuse_unless_registered(person)
    if len(person.account_ids) >= ACCOUNTS_MAX:
        raise Rejected("TOO_MANY_ACCOUNTS", f"a person may have {ACCOUNTS_MAX} accounts")
    return [AccountAttached(person_id=event.owner_id, account_id=event.account_id)]


def detach_account(person: Person, event: AccountClosed, meta: Meta) -> list[PersonEvent]:
    """Follows the closing of an account, in its transaction."""
    return [AccountDetached(person_id=event.owner_id, account_id=event.account_id)]


def _refuse_unless_registered(person: Person) -> None:
    if not person.registered:
        raise NotFound("PERSON_NOT_FOUND", "there is no person with this id")


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
        case _:
            assert_never(event)


PERSON = Aggregate(category="person", initial=Person(), evolve=evolve)
