"""The error table: what is refused, row by row, over gRPC from running services.

A row says the situation, how to get into it, and what the caller is then told: the status code, the reason in its
ErrorInfo, and the fields that its BadRequest names. Tokens have a table of their own, in test_tokens.py.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from google.protobuf.any_pb2 import Any as Packed

from foldline.v1 import command_pb2
from tests.e2e.errors.commands import ABSENT, AGAINST_A_RULE, PACKED, TOO_MUCH
from tests.e2e.errors.malformed import MALFORMED
from tests.e2e.errors.past import NOW, PAST, WATCHED
from tests.e2e.errors.queries import QUERIES
from tests.e2e.errors.rights import FORBIDDEN
from tests.e2e.errors.row import DEPOSIT, INT64_MAX, Row, newer
from tests.e2e.errors.schedules import AUDIT, SCHEDULES
from tests.e2e.errors.unknown_fields import UNKNOWN
from tests.e2e.scene import ACCOUNT_VERSION, NIL, Place, Scene, build
from tests.support.clients.bank import (
    Bank,
    Refused,
    channels,
    deposit,
    item,
    read_status,
    refused,
    register,
    rename,
    withdraw,
)
from tests.support.system.stack import Stack

ODDITIES = [
    Row("unknown method", lambda s, p: s.raw("bank.v1.AccountService/RobBank", b""), "UNIMPLEMENTED", ""),
    Row("unknown service", lambda s, p: s.raw("bank.v1.LoanService/Lend", b""), "UNIMPLEMENTED", ""),
    Row("a command sent to the read service", lambda s, p: s.raw(DEPOSIT, b"", channel=s.read), "UNIMPLEMENTED", ""),
    Row(
        "a deadline that has passed",
        lambda s, p: s.bank.call(s.bank.accounts.DepositMoney, deposit(NIL, 1), timeout_s=-1),
        "DEADLINE_EXCEEDED",
        "",
    ),
]

TABLE = [
    *MALFORMED,
    *SCHEDULES,
    *AUDIT,
    *WATCHED,
    *PAST,
    *ABSENT,
    *AGAINST_A_RULE,
    *PACKED,
    *FORBIDDEN,
    *TOO_MUCH,
    *UNKNOWN,
    *QUERIES,
    *ODDITIES,
]


@pytest.fixture(scope="session")
def place(shared_stack: Stack) -> Place:
    """What all rows of this worker find there. No row changes it."""
    return build(shared_stack)


@pytest.fixture
async def scene(shared_stack: Stack, place: Place) -> AsyncIterator[Scene]:
    """The place with channels to it."""
    async with channels(shared_stack) as (write, read):
        yield Scene(shared_stack, place, write, read)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.situation)
async def test_the_table_of_errors(scene: Scene, place: Place, row: Row) -> None:
    """Each situation is refused with its code, reason, fields and, where waiting helps, when to come back."""
    told = await refused(row.call(scene, place))
    assert (told.code, told.reason, told.fields) == (row.code, row.reason, row.fields)
    assert (told.retry_after_s is not None) == row.waiting_helps
    assert "Traceback" not in told.text


def test_every_situation_has_its_own_name() -> None:
    """A row that is named like another would be taken for it."""
    names = [row.situation for row in TABLE]
    assert len(names) == len(set(names))


async def test_a_stale_version_is_told_with_the_actual_one(scene: Scene, place: Place) -> None:
    """Expected and actual are in the metadata, so a caller can decide anew."""
    bank = scene.bank
    told = await refused(bank.call(bank.accounts.DepositMoney, deposit(place.blue, 1, expected_version=9)))
    assert (told.code, told.facts["expected"], told.facts["actual"]) == ("ABORTED", "9", str(ACCOUNT_VERSION))


@pytest.mark.parametrize(
    ("absent", "foreign"),
    [
        (lambda s, p: s.bank.deposit(NIL, 1), lambda s, p: s.bank.deposit(p.theirs, 1)),
        (lambda s, p: s.bank.rename(NIL, "Bob"), lambda s, p: s.bank.rename(p.foreigner, "Bob")),
        (lambda s, p: s.bank.close_person(NIL), lambda s, p: s.bank.close_person(p.foreigner)),
        (lambda s, p: s.bank.open(NIL), lambda s, p: s.bank.open(p.foreigner)),
        (lambda s, p: s.bank.command(NIL), lambda s, p: s.bank.command(p.their_command)),
        (lambda s, p: s.read_stream("person", NIL), lambda s, p: s.read_stream("person", p.foreigner)),
        (lambda s, p: s.describe("person", NIL), lambda s, p: s.describe("person", p.foreigner)),
        (lambda s, p: s.state("person", NIL), lambda s, p: s.state("person", p.foreigner)),
        (lambda s, p: s.bank.person(NIL), lambda s, p: s.bank.person(p.foreigner)),
        (lambda s, p: s.bank.account(NIL), lambda s, p: s.bank.account(p.theirs)),
        (lambda s, p: s.movements(account_id=NIL), lambda s, p: s.movements(account_id=p.theirs)),
        (lambda s, p: s.past("Get", "account", **NOW), lambda s, p: s.past("Get", "account", account_id=p.theirs, **NOW)),
        (lambda s, p: s.past("Explain", "person"), lambda s, p: s.past("Explain", "person", person_id=p.foreigner)),
    ],
    ids=[
        "deposit",
        "rename",
        "close",
        "open",
        "GetCommand",
        "ReadStream",
        "Describe",
        "GetAggregate",
        "GetPerson",
        "GetAccount",
        "ListMovements",
        "GetAccount as of now",
        "ExplainPerson",
    ],
)
async def test_another_tenants_thing_is_told_as_an_absent_one_is(
    scene: Scene,
    place: Place,
    absent: Callable[[Scene, Place], Awaitable[object]],
    foreign: Callable[[Scene, Place], Awaitable[object]],
) -> None:
    """Same code, reason, text and facts: nobody learns that another tenant has it."""
    one, other = await refused(absent(scene, place)), await refused(foreign(scene, place))
    assert _without_ids(one) == _without_ids(other)


async def test_a_refused_item_says_in_its_receipt_what_a_call_would_have_said(bank: Bank) -> None:
    """In a batch each row of the table travels in a receipt, beside those that were accepted."""
    alice, registered = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    receipts = await bank.batch(
        item(deposit(blue, 1)),
        item(withdraw(blue, INT64_MAX)),
        item(deposit(blue, 0)),
        command_pb2.BatchItem(command=Packed(type_url="type.googleapis.com/bank.v1.RobBank")),
        item(deposit(NIL, 1)),
        item(deposit(blue, 2, command_id=registered.command_id)),
        item(rename(alice, "x" * 64 * 1024)),
        item(register(alice, "Alice")),
        item(newer(deposit(blue, 1))),
        item(withdraw(blue, 1)),
    )
    told = [(one.code, one.reason, one.fields) for one in map(read_status, (receipt.error for receipt in receipts))]
    assert told == [
        ("OK", "", ()),
        ("FAILED_PRECONDITION", "INSUFFICIENT_FUNDS", ()),
        ("INVALID_ARGUMENT", "INVALID_REQUEST", ("items[2].command.amount_minor",)),
        ("INVALID_ARGUMENT", "UNKNOWN_COMMAND", ("items[3].command.type_url",)),
        ("NOT_FOUND", "ACCOUNT_NOT_FOUND", ()),
        ("INVALID_ARGUMENT", "COMMAND_ID_REUSED", ()),
        ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", ()),
        ("ALREADY_EXISTS", "PERSON_ALREADY_REGISTERED", ()),
        ("INVALID_ARGUMENT", "UNKNOWN_FIELD", ("items[8].command.999",)),
        ("OK", "", ()),
    ]


def _without_ids(told: Refused) -> Refused:
    """The refusal without what only repeats the question, and without the moment at which it was asked."""
    facts = {name: value for name, value in told.facts.items() if name != "consistency_token"}
    return replace(told, text=re.sub(r"[0-9a-f-]{36}", "<id>", told.text), facts=facts)
