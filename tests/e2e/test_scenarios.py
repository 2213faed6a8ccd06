"""The reference scenarios, each from the outside, with the values given there."""

from __future__ import annotations

import pytest

from bank.v1 import account_query_pb2, person_pb2
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, new_id, open_account, refused

ACTIVE = account_query_pb2.ACCOUNT_STATUS_ACTIVE
FROZEN = account_query_pb2.ACCOUNT_STATUS_FROZEN


async def test_a_person_is_registered_and_renamed(bank: Bank) -> None:
    """A: the summary reads `Alice Cooper`, and the stream has 2 events."""
    alice, registered = await bank.register("Alice O'Wonderland")
    renamed = await bank.rename(alice, "Alice Cooper")
    assert (registered.version, registered.events_appended, renamed.version) == (1, 1, 2)

    summary = await bank.person(alice, renamed.consistency_token)
    assert (summary.person_id, summary.name, summary.version) == (alice, "Alice Cooper", 2)
    first, second = await bank.stream("person", alice)
    assert person_pb2.PersonRegistered.FromString(first.payload).name == "Alice O'Wonderland"
    assert person_pb2.PersonRenamed.FromString(second.payload).name == "Alice Cooper"
    assert [first.type, second.type] == ["bank.v1.PersonRegistered", "bank.v1.PersonRenamed"]
    assert first.recorded_at.ToNanoseconds() == summary.registered_at.ToNanoseconds()
    assert [first.metadata.user_id, first.metadata.command_id] == ["alice", registered.command_id]


async def test_an_account_for_nobody_leaves_nothing_of_either(bank: Bank) -> None:
    """J: the opening is refused with the owner's absence; neither the account nor the person has an event or a row."""
    await bank.register("Somebody else")
    nobody, account = new_id(), new_id()
    told = await refused(bank.call(bank.accounts.OpenAccount, open_account(account, nobody)))
    assert (told.code, told.reason) == ("NOT_FOUND", "PERSON_NOT_FOUND")
    token = told.facts["consistency_token"]
    for aggregate, aggregate_id in (("person", nobody), ("account", account)):
        assert (await refused(bank.stream(aggregate, aggregate_id))).reason == "STREAM_NOT_FOUND"
    assert (await refused(bank.person(nobody, token))).reason == "PERSON_NOT_FOUND"
    listed = await bank.call(bank.account_queries.ListAccounts, account_query_pb2.ListAccountsRequest(consistency_token=token))
    assert not listed.accounts


async def test_a_refused_opening_can_be_repeated_when_the_owner_is_there(bank: Bank) -> None:
    """The refusal is final for its command id alone: nothing of it stands in the way."""
    alice = new_id()
    assert (await refused(bank.open(alice))).reason == "PERSON_NOT_FOUND"
    await bank.register("Alice", alice)
    blue, opened = await bank.open(alice)
    assert (opened.aggregate_id, opened.version, opened.events_appended) == (blue, 1, 2)
    summary = await bank.person(alice, opened.consistency_token)
    assert (summary.open_account_count, summary.version) == (1, 2)


async def test_money(bank: Bank) -> None:
    """Bill's blue account and Ted's red one, 100 on each; 69 go from blue to red; 1000 more are refused."""
    bill, _ = await bank.register("Bill")
    ted, _ = await bank.register("Ted")
    blue, _ = await bank.open(bill, name="blue")
    red, _ = await bank.open(ted, name="red")
    await bank.deposit(blue, 100_00)
    await bank.deposit(red, 100_00)
    await bank.withdraw(blue, 69_00)
    last = await bank.deposit(red, 69_00)
    told = await refused(bank.withdraw(blue, 1000_00))
    assert (told.code, told.reason, told.facts["balance_minor"]) == ("FAILED_PRECONDITION", "INSUFFICIENT_FUNDS", "3100")

    token = last.consistency_token
    assert (await bank.account(blue, token)).balance_minor == 31_00
    assert (await bank.account(red, token)).balance_minor == 169_00
    person = await bank.person(bill, token)
    assert [(total.currency, total.total_minor) for total in person.total_balances] == [("USD", "3100")]
    request = account_query_pb2.ListMovementsRequest(account_id=blue, consistency_token=token)
    statement = (await bank.call(bank.account_queries.ListMovements, request)).movements
    assert [(m.amount_minor, m.balance_after_minor, m.version) for m in statement] == [(-69_00, 31_00, 3), (100_00, 100_00, 2)]


async def test_the_last_cent_and_the_last_bit(bank: Bank) -> None:
    """2^63 - 1 fits on an account, not a cent more; twice of it on two accounts is told exactly."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    red, _ = await bank.open(alice, name="red")
    await bank.deposit(blue, 2**63 - 1)
    assert (await refused(bank.deposit(blue, 2**63 - 1))).reason == "BALANCE_OVERFLOW"
    assert (await refused(bank.deposit(blue, 1))).reason == "BALANCE_OVERFLOW"
    last = await bank.deposit(red, 2**63 - 1)
    person = await bank.person(alice, last.consistency_token)
    assert [total.total_minor for total in person.total_balances] == ["18446744073709551614"]
    emptied = await bank.withdraw(blue, 2**63 - 1)
    assert (await bank.account(blue, emptied.consistency_token)).balance_minor == 0


async def test_a_frozen_account_keeps_its_money_until_it_is_unfrozen(bank: Bank) -> None:
    """Freezing stops money in both directions; freezing or unfreezing twice is accepted and leaves no event."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    await bank.deposit(blue, 5)
    frozen = await bank.freeze(blue)
    again = await bank.freeze(blue)
    assert (frozen.version, frozen.events_appended) == (3, 1)
    assert (again.version, again.events_appended, again.position) == (3, 0, 0)
    assert (await refused(bank.deposit(blue, 1))).reason == "ACCOUNT_FROZEN"
    assert (await refused(bank.withdraw(blue, 1))).reason == "ACCOUNT_FROZEN"
    assert (await bank.account(blue, frozen.consistency_token)).status == FROZEN

    unfrozen = await bank.unfreeze(blue)
    assert (await bank.unfreeze(blue)).events_appended == 0
    await bank.withdraw(blue, 5)
    assert unfrozen.version == 4
    assert (await bank.account(blue, unfrozen.consistency_token)).status == ACTIVE


async def test_a_name_may_hold_what_people_write(bank: Bank) -> None:
    """Quotes, emoji, right-to-left, 200 characters of four bytes, and even NUL reach the summary or its stand-in."""
    for name, shown in (
        ("'; DROP TABLE people; --", "'; DROP TABLE people; --"),
        ("名前 🦄 اسم", "名前 🦄 اسم"),
        ("\U0001f984" * 200, "\U0001f984" * 200),
        ("a\0b", "a\N{REPLACEMENT CHARACTER}b"),
    ):
        person, receipt = await bank.register(name)
        assert (await bank.person(person, receipt.consistency_token)).name == shown


@pytest.mark.parametrize("letter", [str.upper, str.lower], ids=["upper", "lower"])
async def test_a_uuid_is_the_same_in_capitals(bank: Bank, letter: type[str]) -> None:
    """RFC 9562: on input the case of a UUID means nothing. It is one person, one account, one row, one stream."""
    alice, _ = await bank.register("Alice", letter(new_id()))
    assert (await refused(bank.register("Alice", alice.swapcase()))).reason == "PERSON_ALREADY_REGISTERED"
    renamed = await bank.rename(alice.swapcase(), "Alice Cooper")
    assert (renamed.aggregate_id, renamed.version) == (alice.lower(), 2)
    blue, opened = await bank.open(alice.swapcase())
    deposited = await bank.deposit(blue.upper(), 7)
    assert (opened.aggregate_id, deposited.aggregate_id, deposited.version) == (blue, blue, 2)

    token = deposited.consistency_token
    for asked in (alice.upper(), alice.lower()):
        summary = await bank.person(asked, token)
        assert (summary.person_id, summary.name, summary.open_account_count) == (alice.lower(), "Alice Cooper", 1)
        assert len(await bank.stream("person", asked)) == 3
    assert (await bank.account(blue.upper(), token)).owner_id == alice.lower()


async def test_tenants_do_not_meet(caller: Caller) -> None:
    """The same ids in two tenants are two people and two accounts."""
    one, other = caller(tenant="one-" + new_id()[:8]), caller(tenant="two-" + new_id()[:8])
    alice, _ = await one.register("Alice")
    await other.register("Alison", alice)
    blue, _ = await one.open(alice)
    assert (await refused(other.deposit(blue, 1))).reason == "ACCOUNT_NOT_FOUND"
    deposited = await one.deposit(blue, 1)
    renamed = await other.rename(alice, "Alison Cooper")
    assert (await one.person(alice, deposited.consistency_token)).name == "Alice"
    assert (await other.person(alice, renamed.consistency_token)).name == "Alison Cooper"
    assert (await refused(other.account(blue, renamed.consistency_token))).reason == "ACCOUNT_NOT_FOUND"
    listed = await other.call(other.account_queries.ListAccounts, account_query_pb2.ListAccountsRequest())
    assert not listed.accounts


async def test_renaming_is_disabled_for_umbrella(caller: Caller) -> None:
    """H: one event, the name is unchanged, and the caller is told why. Switched off, it is as usual."""
    ada = caller(tenant="umbrella", user_id="ada")
    alice, _ = await ada.register("Alice Abernathy")
    refusal = await refused(ada.rename(alice, "Alice Parks"))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RENAMING_DISABLED")
    assert [event.type for event in await ada.stream("person", alice)] == ["bank.v1.PersonRegistered"]
    assert (await ada.person(alice, refusal.facts["consistency_token"])).name == "Alice Abernathy"

    override = {each.name: each for each in await ada.list_overrides()}["renaming-disabled"]
    assert (override.name, override.type, override.on) == ("renaming-disabled", "bank.v1.RenamePersonRequest", True)
    switched = await ada.switch_override("renaming-disabled", False)
    assert (switched.aggregate_type, switched.events_appended) == ("overrides", 1)
    try:
        assert {each.name: each.on for each in await ada.list_overrides()}["renaming-disabled"] is False
        renamed = await ada.rename(alice, "Alice Parks")
        assert (await ada.person(alice, renamed.consistency_token)).name == "Alice Parks"
    finally:
        await ada.switch_override("renaming-disabled", True)
    assert (await refused(ada.rename(alice, "Alice"))).reason == "RENAMING_DISABLED"
    [logged] = (await ada.list_commands(1, type="foldline.v1.SwitchOverrideRequest")).commands
    assert (logged.user_id, logged.receipt.command_id != switched.command_id) == ("ada", True)
