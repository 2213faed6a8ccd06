"""Queries as their callers see them: lists, filters, pages, statements, and one's own writes read at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bank.v1 import account_query_pb2, person_query_pb2
from foldline.v1 import projection_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.support.clients.bank import Bank, deposit, item, new_id, open_account, refused, register, withdraw
from tests.support.system.sealing import place_of, token_with
from tests.support.system.stack import Stack

Page = Callable[..., Awaitable[Any]]


async def persons(bank: Bank, **fields: Any) -> person_query_pb2.ListPersonsResponse:
    """ListPersons."""
    request = person_query_pb2.ListPersonsRequest(**fields)
    listed: person_query_pb2.ListPersonsResponse = await bank.call(bank.person_queries.ListPersons, request)
    return listed


async def accounts(bank: Bank, **fields: Any) -> account_query_pb2.ListAccountsResponse:
    """ListAccounts."""
    request = account_query_pb2.ListAccountsRequest(**fields)
    listed: account_query_pb2.ListAccountsResponse = await bank.call(bank.account_queries.ListAccounts, request)
    return listed


async def movements(bank: Bank, **fields: Any) -> account_query_pb2.ListMovementsResponse:
    """ListMovements."""
    request = account_query_pb2.ListMovementsRequest(**fields)
    listed: account_query_pb2.ListMovementsResponse = await bank.call(bank.account_queries.ListMovements, request)
    return listed


async def all_pages(query: Page, rows: str, **fields: Any) -> list[list[Any]]:
    """The rows of every page, by following the tokens."""
    pages, token = [], ""
    while True:
        answer = await query(page_token=token, **fields)
        pages.append(list(getattr(answer, rows)))
        if not (token := answer.next_page_token):
            return pages


NAMES = ["Zoë", "alice", "Alice Cooper", "Ådam", "ALAN", "bob", "Émile"]


async def people_named(bank: Bank, names: list[str]) -> str:
    """Registers people, in this order; returns a token to see them by."""
    receipts = await bank.batch(*[item(register(new_id(), name)) for name in names])
    return receipts[-1].consistency_token


async def test_people_by_name_without_regard_to_case_and_accents(bank: Bank) -> None:
    """The default order of people, and its reverse."""
    token = await people_named(bank, NAMES)
    listed = await persons(bank, consistency_token=token)
    expected = ["Ådam", "ALAN", "alice", "Alice Cooper", "bob", "Émile", "Zoë"]
    assert [person.name for person in listed.persons] == expected
    assert listed.next_page_token == ""
    backwards = await persons(bank, order_by="name desc")
    assert [person.name for person in backwards.persons] == expected[::-1]


async def test_people_by_registration(bank: Bank) -> None:
    """Oldest or newest first; people of one batch have one moment, so their ids decide: what counts is the moments."""
    for name in NAMES[:3]:
        token = await people_named(bank, [name])
    listed = await persons(bank, order_by="registered_at", consistency_token=token)
    assert [person.name for person in listed.persons] == NAMES[:3]
    newest = await persons(bank, order_by="registered_at desc")
    assert [person.name for person in newest.persons] == NAMES[2::-1]


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("al", ["ALAN", "alice", "Alice Cooper"]),
        ("ALICE ", ["Alice Cooper"]),
        ("å", ["Ådam", "ALAN", "alice", "Alice Cooper"]),
        ("A\u030ad", ["Ådam"]),
        ("emile", ["Émile"]),
        ("%", []),
        ("_l", []),
        ("\U0010ffff", []),
        ("\0", []),
    ],
    ids=[
        "two letters",
        "a space",
        "an accent",
        "a letter written in two",
        "none of the accents",
        "percent",
        "underscore",
        "last",
        "NUL",
    ],
)
async def test_people_by_prefix(bank: Bank, prefix: str, found: list[str]) -> None:
    """Case, accents and ways of writing a letter do not count; what means something to LIKE means nothing here."""
    token = await people_named(bank, NAMES)
    listed = await persons(bank, filter={"name_prefix": prefix}, consistency_token=token)
    assert [person.name for person in listed.persons] == found


@pytest.mark.parametrize("order", ["", "name desc", "registered_at", "registered_at desc"])
@pytest.mark.parametrize("size", [1, 3, 7, 8])
async def test_pages_of_people_are_the_whole_list(bank: Bank, order: str, size: int) -> None:
    """Every person once, in order, whatever the size of a page; namesakes too."""
    names = ["Ann", "Bob", "Ann", "Ann", "Cid", "bob", "ANN"]
    token = await people_named(bank, names)
    whole = [person.person_id for person in (await persons(bank, order_by=order, consistency_token=token)).persons]
    pages = await all_pages(lambda **fields: persons(bank, **fields), "persons", order_by=order, page_size=size)
    assert [person.person_id for page in pages for person in page] == whole
    assert len(set(whole)) == 7
    assert [len(page) for page in pages] == {1: [1] * 7, 3: [3, 3, 1], 7: [7], 8: [7]}[size]


async def test_a_page_is_not_shifted_by_who_comes_between(bank: Bank) -> None:
    """Whoever registers between two pages makes nobody appear twice or not at all."""
    token = await people_named(bank, ["b", "d", "f"])
    first = await persons(bank, page_size=2, consistency_token=token)
    token = await people_named(bank, ["a", "c", "e"])
    second = await persons(bank, page_size=2, page_token=first.next_page_token, consistency_token=token)
    assert [person.name for person in first.persons] == ["b", "d"]
    assert [person.name for person in second.persons] == ["e", "f"]


async def test_accounts_by_owner_currency_and_status(bank: Bank) -> None:
    """Each filter alone and together; balances in both directions."""
    (ann, _), (bob, _) = await bank.register("Ann"), await bank.register("Bob")
    blue, _ = await bank.open(ann)
    red, _ = await bank.open(ann, "EUR", name="red")
    green, _ = await bank.open(bob, "EUR", name="green")
    await bank.deposit(blue, 5)
    await bank.deposit(green, 9, "EUR")
    token = (await bank.freeze(red)).consistency_token

    async def found(**fields: Any) -> list[str]:
        names = {blue: "blue", red: "red", green: "green"}
        return [names[one.account_id] for one in (await accounts(bank, consistency_token=token, **fields)).accounts]

    assert await found() == ["blue", "red", "green"]
    assert await found(order_by="opened_at desc") == ["green", "red", "blue"]
    assert await found(order_by="balance_minor") == ["red", "blue", "green"]
    assert await found(order_by="balance_minor desc") == ["green", "blue", "red"]
    assert await found(filter={"owner_id": ann.upper()}) == ["blue", "red"]
    assert await found(filter={"currency": "EUR"}) == ["red", "green"]
    assert await found(filter={"status": account_query_pb2.ACCOUNT_STATUS_FROZEN}) == ["red"]
    assert await found(filter={"owner_id": ann, "currency": "EUR", "status": "ACCOUNT_STATUS_ACTIVE"}) == []
    assert await found(filter={"owner_id": new_id()}) == []
    pages = await all_pages(
        lambda **fields: accounts(bank, **fields), "accounts", order_by="balance_minor", page_size=1, consistency_token=token
    )
    assert [[one.account_id for one in page] for page in pages] == [[red], [blue], [green]]
    summary = await bank.account(red, token)
    assert (summary.owner_id, summary.name, summary.currency, summary.version) == (ann, "red", "EUR", 2)


async def test_a_statement_has_every_movement_the_newest_first(bank: Bank) -> None:
    """120 movements in pages of 50; freezing is none; each says what was on the account after it."""
    ann, _ = await bank.register("Ann")
    blue, _ = await bank.open(ann)
    await bank.batch(*[item(deposit(blue, 10)) for _ in range(60)])
    await bank.freeze(blue)
    await bank.unfreeze(blue)
    receipts = await bank.batch(*[item(withdraw(blue, 4)) for _ in range(60)])
    token = receipts[-1].consistency_token
    pages = await all_pages(lambda **fields: movements(bank, **fields), "movements", account_id=blue, consistency_token=token)
    assert [len(page) for page in pages] == [50, 50, 20]
    statement = [movement for page in pages for movement in page]
    assert [movement.amount_minor for movement in statement] == [-4] * 60 + [10] * 60
    assert [movement.balance_after_minor for movement in statement] == [*range(360, 600, 4), *range(600, 0, -10)]
    assert statement[0].version == 123
    moments = [movement.moved_at.ToNanoseconds() for movement in statement]
    assert moments == sorted(moments, reverse=True)
    whole = await movements(bank, account_id=blue.upper(), page_size=500)
    assert list(whole.movements) == statement


async def test_an_account_without_movements_has_an_empty_statement(bank: Bank) -> None:
    """Which is not the same as no account."""
    ann, _ = await bank.register("Ann")
    blue, opened = await bank.open(ann)
    assert not (await movements(bank, account_id=blue, consistency_token=opened.consistency_token)).movements


async def test_one_reads_what_one_wrote(bank: Bank) -> None:
    """Fifty times in a row, on every query: with the receipt's token the answer has the command seen."""
    ann, _ = await bank.register("Ann")
    blue, _ = await bank.open(ann)
    for nth in range(1, 51):
        token = (await bank.deposit(blue, 1)).consistency_token
        request = person_query_pb2.GetPersonRequest(person_id=ann, consistency_token=token)
        account, person, listed, statement = await asyncio.gather(
            bank.account(blue, token),
            bank.call(bank.person_queries.GetPerson, request),
            accounts(bank, consistency_token=token),
            movements(bank, account_id=blue, page_size=1, consistency_token=token),
        )
        assert account.balance_minor == listed.accounts[0].balance_minor == statement.movements[0].balance_after_minor == nth
        assert person.person.total_balances[0].total_minor == str(nth)


async def test_one_reads_what_a_no_op_or_a_refusal_rested_on(caller: Caller, bank: Bank) -> None:
    """Somebody else's deposit makes one's own command a refusal; by the refusal's token one sees that deposit."""
    ann, _ = await bank.register("Ann")
    blue, _ = await bank.open(ann)
    other = caller(user_id="bob")
    for _ in range(20):
        await other.deposit(blue, 1)
        told = await refused(bank.withdraw(blue, 1000))
        balance_minor = (await bank.account(blue, told.facts["consistency_token"])).balance_minor
        assert str(balance_minor) == told.facts["balance_minor"]
    await other.freeze(blue)
    idle = await bank.freeze(blue)
    assert idle.events_appended == 0
    frozen = account_query_pb2.ACCOUNT_STATUS_FROZEN
    assert (await bank.account(blue, idle.consistency_token)).status == frozen
    [receipt] = await bank.batch(item(open_account(blue, ann)))
    assert receipt.HasField("error")
    assert (await bank.account(blue, receipt.consistency_token)).status == frozen


async def test_who_does_not_wait_long_enough_is_told_the_lag(shared_stack: Stack, bank: Bank, tenant: str) -> None:
    """A token of what is yet to come: within the deadline, NOT_YET_CONSISTENT with how far the tables are."""
    _, receipt = await bank.register("Ann")
    token, keys = receipt.consistency_token, shared_stack.seal_keys
    at = place_of(keys, tenant, token).position
    beyond = token_with(keys, tenant, token, position=at + 1_000_000)
    request = person_query_pb2.ListPersonsRequest(consistency_token=beyond)
    told = await refused(bank.call(bank.person_queries.ListPersons, request, timeout_s=3))
    assert (told.code, told.reason) == ("FAILED_PRECONDITION", "NOT_YET_CONSISTENT")
    assert told.retry_after_s is not None
    assert int(told.facts["lag"]) > 900_000
    assert not {"wanted", "reached"} & set(told.facts), "positions are of all tenants"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": "00000000-0000-4000-8000-000000000000/1"}, "TOKEN_OF_ANOTHER_HISTORY"),
        ({"position": 2**62}, "TOKEN_UNREACHABLE"),
    ],
    ids=["of another history", "beyond all lines"],
)
async def test_a_token_that_cannot_be_reached_is_refused_at_once(
    shared_stack: Stack, bank: Bank, tenant: str, changes: dict[str, Any], reason: str
) -> None:
    """However long the caller would wait, and nobody is told to ask again."""
    _, receipt = await bank.register("Ann")
    token = token_with(shared_stack.seal_keys, tenant, receipt.consistency_token, **changes)
    request = person_query_pb2.ListPersonsRequest(consistency_token=token)
    began = time.monotonic()
    told = await refused(bank.call(bank.person_queries.ListPersons, request, timeout_s=45))
    assert (told.code, told.reason, told.retry_after_s) == ("FAILED_PRECONDITION", reason, None)
    assert time.monotonic() - began < 20


async def test_an_operator_sees_how_far_the_tables_are(caller: Caller, bank: Bank) -> None:
    """ListProjections: running, and at the position that the last receipt names or beyond; for operators alone."""
    _, receipt = await bank.register("Ann")
    await persons(bank, consistency_token=receipt.consistency_token)
    operator = caller(tenant="operators", roles=[Role.OPERATOR])
    request = projection_pb2.ListProjectionsRequest()
    answer = await operator.call(operator.projections.ListProjections, request)
    assert [(it.name, it.shard) for it in answer.projections] == [
        (name, 1) for name in ("accounts", "people", "transfers", "users")
    ]
    people = answer.projections[1]
    assert (people.state, people.reason, people.parked) == (projection_pb2.PROJECTION_STATE_RUNNING, "", 0)
    assert people.position >= receipt.position
    assert (await refused(bank.call(bank.projections.ListProjections, request))).code == "PERMISSION_DENIED"
