"""What a person may do, and what follows an account's opening."""

from __future__ import annotations

from tests.support.checks.scenario import given
from write_service.domain.account_types import AccountOpened
from write_service.domain.person import ACCOUNTS_MAX, PERSON, Person, attach_account, register, rename
from write_service.domain.person_types import AccountAttached, PersonRegistered, PersonRenamed, RegisterPerson, RenamePerson

registered = PersonRegistered(person_id="p1", name="Alice O'Wonderland")
renamed = PersonRenamed(person_id="p1", name="Alice Cooper")
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


def test_an_account_is_attached_to_its_owner() -> None:
    """The owner's stream says so."""
    attached = AccountAttached(person_id="p1", account_id="a1")
    given(PERSON, registered).when(attach_account, opened).then(attached)


def test_an_account_of_nobody_is_refused() -> None:
    """The owner must exist."""
    given(PERSON).when(attach_account, opened).then_refused("PERSON_NOT_FOUND")


def test_a_person_may_have_a_thousand_accounts_and_no_more() -> None:
    """The limit is exact."""
    attached = [AccountAttached(person_id="p1", account_id=f"other-{nth}") for nth in range(ACCOUNTS_MAX)]
    assert len(attached) == 1000
    almost = given(PERSON, registered, *attached[:-1])
    almost.when(attach_account, opened).then(AccountAttached(person_id="p1", account_id="a1"))
    given(PERSON, registered, *attached).when(attach_account, opened).then_refused("TOO_MANY_ACCOUNTS")


def test_the_state_is_the_fold_of_the_events() -> None:
    """Every event of the kind leaves its trace."""
    attached = AccountAttached(person_id="p1", account_id="a1"), AccountAttached(person_id="p1", account_id="a2")
    person = given(PERSON, registered, attached[0], renamed, attached[1]).state
    assert person == Person(registered=True, name="Alice Cooper", account_ids=("a1", "a2"))
