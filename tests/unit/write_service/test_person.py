"""What a person may do, and what follows an account's opening."""

from __future__ import annotations

from tests.support.checks.scenario import given
from write_service.domain.account_types import AccountClosed, AccountOpened
from write_service.domain.person import ACCOUNTS_MAX, PERSON, Person, attach_account, close, detach_account, register, rename
from write_service.domain.person_types import (
    AccountAttached,
    AccountDetached,
    ClosePerson,
    PersonClosed,
    PersonRegistered,
    PersonRenamed,
    RegisterPerson,
    RenamePerson,
)

registered = PersonRegistered(person_id="p1", name="Alice O'Wonderland")
renamed = PersonRenamed(person_id="p1", name="Alice Cooper")
attached = AccountAttached(person_id="p1", account_id="a1")
closed = PersonClosed(person_id="p1", account_ids=())
opened = AccountOpened(account_id="a1", owner_id="p1", currency="USD", name="blue")


def test_registering() -> None:
    """A new person gets the name that was asked for."""
    command = RegisterPerson(person_id="p1", name="Alice O'Wonderland")
    given(PERSON).when(register, command).then(registered)


def test_registering_twice_is_refused() -> None:
    """Even under the same name: another command id means another intention."""
    command = RegisterPerson(person_id="p1", name="Alice O'Wonderland")
    given(PERSON, registered).when(register, command).then_refused("PERSON_ALREADY_REGISTERED")


def test_renaming() -> None:
    """The event has the new name."""
    command = RenamePerson(person_id="p1", name="Alice Cooper")
    given(PERSON, registered).when(rename, command).then(renamed)


def test_renaming_to_the_name_one_has_changes_nothing() -> None:
    """A repeat is no error and no event, whether the name is the first or a later one."""
    given(PERSON, registered).when(rename, RenamePerson(person_id="p1", name="Alice O'Wonderland")).then()
    given(PERSON, registered, renamed).when(rename, RenamePerson(person_id="p1", name="Alice Cooper")).then()


def test_renaming_back_is_a_change() -> None:
    """It is compared with the name of now."""
    command = RenamePerson(person_id="p1", name="Alice O'Wonderland")
    event = PersonRenamed(person_id="p1", name="Alice O'Wonderland")
    given(PERSON, registered, renamed).when(rename, command).then(event)


def test_renaming_nobody_is_refused() -> None:
    """Also to the empty name, which an unregistered person's state has."""
    given(PERSON).when(rename, RenamePerson(person_id="p1", name="Alice Cooper")).then_refused("PERSON_NOT_FOUND")
    given(PERSON).when(rename, RenamePerson(person_id="p1", name="")).then_refused("PERSON_NOT_FOUND")


def test_an_account_is_attached_to_its_owner_and_detached() -> None:
    """The owner's stream says so."""
    given(PERSON, registered).when(attach_account, opened).then(attached)
    detached = AccountDetached(person_id="p1", account_id="a1")
    given(PERSON, registered, attached).when(detach_account, AccountClosed(account_id="a1", owner_id="p1")).then(detached)


def test_an_account_of_nobody_is_refused() -> None:
    """The owner must exist."""
    given(PERSON).when(attach_account, opened).then_refused("PERSON_NOT_FOUND")


def test_closing_names_the_accounts_that_are_open() -> None:
    """Each of them is closed by a reaction, which has its say about the money on it."""
    other = AccountAttached(person_id="p1", account_id="a2")
    gone = AccountDetached(person_id="p1", account_id="a2")
    person = given(PERSON, registered, attached, other, gone)
    person.when(close, ClosePerson(person_id="p1")).then(PersonClosed(person_id="p1", account_ids=("a1",)))
    given(PERSON, registered).when(close, ClosePerson(person_id="p1")).then(closed)


def test_closing_twice_changes_nothing_and_closing_nobody_is_refused() -> None:
    """A repeat is no error and no event."""
    given(PERSON, registered, closed).when(close, ClosePerson(person_id="p1")).then()
    given(PERSON).when(close, ClosePerson(person_id="p1")).then_refused("PERSON_NOT_FOUND")


def test_a_closed_person_is_left_alone() -> None:
    """No other name, not even the same, and no account; an account that is closed with its owner is not detached besides."""
    person = given(PERSON, registered, attached, PersonClosed(person_id="p1", account_ids=("a1",)))
    assert person.state == Person(registered=True, closed=True, name="Alice O'Wonderland", account_ids=())
    person.when(rename, RenamePerson(person_id="p1", name="Alice O'Wonderland")).then_refused("PERSON_CLOSED")
    person.when(attach_account, opened).then_refused("PERSON_CLOSED")
    person.when(register, RegisterPerson(person_id="p1", name="Alice")).then_refused("PERSON_ALREADY_REGISTERED")
    person.when(detach_account, AccountClosed(account_id="a1", owner_id="p1")).then()


def test_a_person_may_have_a_thousand_accounts_and_no_more() -> None:
    """The limit is exact."""
    others = [AccountAttached(person_id="p1", account_id=f"other-{nth}") for nth in range(ACCOUNTS_MAX)]
    assert len(others) == 1000
    given(PERSON, registered, *others[:-1]).when(attach_account, opened).then(attached)
    given(PERSON, registered, *others).when(attach_account, opened).then_refused("TOO_MANY_ACCOUNTS")


def test_the_state_is_the_fold_of_the_events() -> None:
    """Every event of the kind leaves its trace."""
    other = AccountAttached(person_id="p1", account_id="a2")
    person = given(PERSON, registered, attached, renamed, other).state
    assert person == Person(registered=True, name="Alice Cooper", account_ids=("a1", "a2"))
