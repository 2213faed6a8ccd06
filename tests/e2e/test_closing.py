"""Closing a person (scenario J): with all accounts or not at all, whatever happens at the same time."""

from __future__ import annotations

import asyncio

from bank.v1 import account_pb2, account_query_pb2, person_pb2, person_query_pb2
from deploy.bank_requests import close_person
from foldline.v1 import command_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, item, new_id, open_account, refused, tried

ACTIVE, CLOSED = person_query_pb2.PERSON_STATUS_ACTIVE, person_query_pb2.PERSON_STATUS_CLOSED
ROUNDS = 12


async def test_scenario_j_a_person_who_holds_money_is_not_closed(bank: Bank) -> None:
    """Refused with the account that holds it; neither the person nor any account has an event or a change."""
    alice, _ = await bank.register("Alice")
    blue, red, green = [(await bank.open(alice, name=name))[0] for name in ("blue", "red", "green")]
    before = (await bank.deposit(red, 1)).consistency_token
    told = await refused(bank.close_person(alice))
    assert (told.code, told.reason, told.facts["account_id"]) == ("FAILED_PRECONDITION", "PERSON_HOLDS_MONEY", red)
    assert len(await bank.stream("person", alice)) == 4
    assert [len(await bank.stream("account", account)) for account in (blue, red, green)] == [1, 2, 1]
    summary = await bank.person(alice, before)
    assert (summary.status, summary.open_account_count, summary.HasField("closed_at")) == (ACTIVE, 3, False)
    assert (await bank.account(blue, before)).status == account_query_pb2.ACCOUNT_STATUS_ACTIVE


async def test_a_person_is_closed_with_all_accounts(insider: Bank) -> None:
    """One event of the person, one of each account, at following positions; afterwards nothing more can be done."""
    alice, _ = await insider.register("Alice")
    blue, red, green = [(await insider.open(alice, name=name))[0] for name in ("blue", "red", "green")]
    await insider.deposit(blue, 5)
    await insider.withdraw(blue, 5)
    await insider.close(red)
    await insider.freeze(green)
    closed = await insider.close_person(alice)
    assert (closed.aggregate_id, closed.events_appended) == (alice, 3)

    *_, last = await insider.stream("person", alice)
    assert person_pb2.PersonClosed.FromString(last.payload).account_ids == [blue, green]
    ends = [last, (await insider.stream("account", blue))[-1], (await insider.stream("account", green))[-1]]
    assert [end.type for end in ends] == ["bank.v1.PersonClosed", "bank.v1.AccountClosed", "bank.v1.AccountClosed"]
    assert [end.position for end in ends] == [closed.position - 2, closed.position - 1, closed.position]
    assert {end.metadata.command_id for end in ends} == {closed.command_id}
    assert account_pb2.AccountClosed.FromString(ends[1].payload).owner_id == alice

    summary = await insider.person(alice, closed.consistency_token)
    assert (summary.status, summary.open_account_count, summary.version) == (CLOSED, 0, closed.version)
    assert summary.closed_at.ToNanoseconds() == last.recorded_at.ToNanoseconds()
    for account in (blue, red, green):
        assert (await insider.account(account, closed.consistency_token)).status == account_query_pb2.ACCOUNT_STATUS_CLOSED
    assert (await insider.close_person(alice)).events_appended == 0
    assert (await refused(insider.open(alice))).reason == "PERSON_CLOSED"
    assert (await refused(insider.rename(alice, "Alice Cooper"))).reason == "PERSON_CLOSED"
    assert (await refused(insider.deposit(blue, 1))).reason == "ACCOUNT_CLOSED"


async def test_as_many_accounts_as_a_person_may_have_are_closed_at_once(bank: Bank) -> None:
    """A thousand are within the limits of a command."""
    alice, _ = await bank.register("Alice")
    for _ in range(4):
        receipts = await bank.batch(*[item(open_account(new_id(), alice)) for _ in range(250)])
        assert {receipt.status for receipt in receipts} == {command_pb2.COMMAND_STATUS_COMPLETED}
    assert (await refused(bank.open(alice))).reason == "TOO_MANY_ACCOUNTS"
    closed = await bank.close_person(alice)
    assert closed.events_appended == 1001
    assert (await bank.person(alice, closed.consistency_token)).open_account_count == 0


async def test_the_same_command_again_gives_the_same_answer(bank: Bank) -> None:
    """A refusal too, even when the money has gone meanwhile: another command then closes."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    await bank.deposit(blue, 5)
    first, other = close_person(alice), close_person(alice)
    assert (await refused(bank.call(bank.people.ClosePerson, first))).reason == "PERSON_HOLDS_MONEY"
    await bank.withdraw(blue, 5)
    assert (await refused(bank.call(bank.people.ClosePerson, first))).reason == "PERSON_HOLDS_MONEY"
    receipt = await bank.call(bank.people.ClosePerson, other)
    assert await bank.call(bank.people.ClosePerson, other) == receipt


async def test_closing_while_money_arrives(bank: Bank) -> None:
    """Whoever is first: the money is on an open account of an active person, or refused by a closed account."""
    for _ in range(ROUNDS):
        alice, _ = await bank.register("Alice")
        blue, _ = await bank.open(alice)
        deposited, closed = await asyncio.gather(tried(bank.deposit(blue, 7)), tried(bank.close_person(alice)))
        assert (deposited, closed) in [("", "PERSON_HOLDS_MONEY"), ("ACCOUNT_CLOSED", "")]
        events = [event.type for event in await bank.stream("account", blue)]
        assert events == ["bank.v1.AccountOpened", "bank.v1.MoneyDeposited" if closed else "bank.v1.AccountClosed"]


async def test_closing_while_an_account_is_opened(bank: Bank) -> None:
    """No closed person has an open account: the new one is refused, or it is closed with the other."""
    for _ in range(ROUNDS):
        alice, _ = await bank.register("Alice")
        await bank.open(alice)
        opened, closed = await asyncio.gather(tried(bank.open(alice)), tried(bank.close_person(alice)))
        assert (opened, closed) in [("", ""), ("PERSON_CLOSED", "")]
        token = (await bank.close_person(alice)).consistency_token
        wanted = account_query_pb2.AccountFilter(owner_id=alice)
        request = account_query_pb2.ListAccountsRequest(filter=wanted, consistency_token=token)
        listed = await bank.call(bank.account_queries.ListAccounts, request)
        assert [account.status for account in listed.accounts] == [account_query_pb2.ACCOUNT_STATUS_CLOSED] * (1 if opened else 2)


async def test_a_user_closes_nobody(bank: Bank, caller: Caller) -> None:
    """It takes a tenant's administrator; a stranger's person is not there at all."""
    alice, _ = await bank.register("Alice")
    told = await refused(caller(roles=[Role.USER]).close_person(alice))
    assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")
    for who, person in ((caller(tenant="other"), alice), (bank, new_id())):
        assert (await refused(who.close_person(person))).reason == "PERSON_NOT_FOUND"


async def test_people_by_status(bank: Bank) -> None:
    """Those who are active, those who are closed, or all, page by page."""
    ids = {name: (await bank.register(name))[0] for name in ("Alice", "Bill", "Ted")}
    await bank.close_person(ids["Alice"])
    token = (await bank.close_person(ids["Ted"])).consistency_token

    async def listed(**wanted: object) -> list[str]:
        names: list[str] = []
        request = person_query_pb2.ListPersonsRequest(
            page_size=1,
            filter=person_query_pb2.PersonFilter(**wanted),  # type: ignore[arg-type]
            consistency_token=token,
        )
        while True:
            answer = await bank.call(bank.person_queries.ListPersons, request)
            names += [person.name for person in answer.persons]
            request.page_token = answer.next_page_token
            if not answer.next_page_token:
                return names

    assert await listed(status=ACTIVE) == ["Bill"]
    assert await listed(status=CLOSED) == ["Alice", "Ted"]
    assert await listed(status=CLOSED, name_prefix="t") == ["Ted"]
    assert await listed() == ["Alice", "Bill", "Ted"]
