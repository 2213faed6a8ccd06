"""Summaries as they were, and why they are as they are, over gRPC."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import grpc.aio
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from bank.v1 import account_query_pb2
from deploy.bootstrap import Database
from foldline.v1 import as_of_pb2
from shared.platform.identity import Role
from tests.e2e.conftest import Caller
from tests.e2e.test_archive import box, unbox
from tests.support.clients.bank import Bank, query, refused
from tests.support.fakes.tables import Id, stepwise


async def asked(bank: Bank, rpc: str, name: str, **fields: Any) -> Any:
    """The answer of GetAccount and its like, or ExplainAccount."""
    method, request = query(bank, name, f"{rpc}{name.title()}")
    return await bank.call(method, request(**fields))


async def was(bank: Bank, which: Id, **when: Any) -> Message | None:
    """What is shown of an id as of then; None if there was none."""
    name, id_ = which
    try:
        answer = await asked(bank, "Get", name, **{f"{name}_id": id_, "as_of": as_of_pb2.AsOf(**when)})
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        raise
    shown: Message = getattr(answer, name)
    return shown


async def explained(bank: Bank, which: Id, size: int = 7, **more: Any) -> list[as_of_pb2.RowChange]:
    """All changes of an id, the newest first, page by page."""
    name, id_ = which
    found: list[as_of_pb2.RowChange] = []
    token = ""
    while True:
        answer = await asked(bank, "Explain", name, **{f"{name}_id": id_}, page_size=size, page_token=token, **more)
        assert not answer.stale
        found += answer.changes
        if not (token := answer.next_page_token):
            return found


def composed(kind: type[Message], changes: Sequence[as_of_pb2.RowChange]) -> Message:
    """The summary that changes, the newest first, come to."""
    fields: dict[str, Any] = {}
    for change in reversed(changes):
        for field in change.fields:
            assert fields.pop(field.field, "") == (json.loads(field.from_json) if field.from_json else "")
            if field.to_json:
                fields[field.field] = json.loads(field.to_json)
    return json_format.ParseDict(fields, kind())


async def some_history(bank: Bank, steps: int) -> list[Id]:
    """Lets a tenant do this and that, with transfers that succeed and fail, a registration, and boxes."""
    chance = random.Random(steps)
    people = [(await bank.register(name))[0] for name in ("Alice", "Bob", "Carol")]
    accounts = [(await bank.open(people[nth % 2], "USD" if nth < 3 else "EUR"))[0] for nth in range(4)]
    user, receipt = await bank.register_user(f"hatter-{steps}", "correct horse battery")
    transfers = []
    for account in accounts[:3]:
        await bank.deposit(account, 100)
    await bank.ended_registration((user, receipt))
    for nth in range(steps):
        one, other = chance.sample(accounts[:3], 2)
        doing = [
            lambda: bank.deposit(one, chance.randint(1, 50)),  # noqa: B023 - called in this turn
            lambda: bank.withdraw(one, chance.randint(1, 30)),  # noqa: B023
            lambda: bank.rename(chance.choice(people), f"Name {nth}"),  # noqa: B023
            lambda: bank.freeze(accounts[0]),
            lambda: bank.unfreeze(accounts[0]),
            lambda: bank.change_email(user, f"hatter{nth}@example.com"),  # noqa: B023
        ]
        if nth % 7 == 3:
            started = await bank.transfer(one, other, chance.randint(1, 60))
            transfers.append(started)
            if nth % 2:
                await bank.ended_transfer(started)
            continue
        try:
            await chance.choice(doing)()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
    for started in transfers:
        await bank.ended_transfer(started)
    await bank.close_person(people[2])
    await box(bank, "account", accounts[3])
    await box(bank, "person", people[2])
    await unbox(bank, "person", people[2])
    await box(bank, "person", people[0])
    names = (("person", people), ("account", accounts), ("transfer", [started[0] for started in transfers]), ("user", [user]))
    return [(name, id_) for name, ids in names for id_ in ids]


@pytest.mark.parametrize("steps", [12, pytest.param(80, marks=pytest.mark.long)])
async def test_what_was_is_what_the_tables_had(bank: Bank, caller: Caller, tenant: str, read_db: Database, steps: int) -> None:
    """At every position of a history, of every kind: also within a transaction, and of what is in the archive now."""
    ids = await some_history(bank, steps)
    operator = caller(user_id="olga", roles=[Role.OPERATOR, Role.READER])
    line = [envelope for envelope in await operator.line() if envelope.tenant == tenant]
    assert len(line) > steps
    async with stepwise(read_db, tenant) as (apply, shown):
        for envelope in line:
            await apply(envelope)
            expected = [await shown(which) for which in ids]
            told = await asyncio.gather(*(was(operator, which, position=envelope.position) for which in ids))
            assert list(told) == expected, (envelope.position, envelope.type)
    for which, message in zip(ids, expected, strict=True):
        assert message is not None
        assert composed(type(message), await explained(operator, which)) == message


async def statement(bank: Bank, account_id: str, order_by: str = "", **when: Any) -> list[account_query_pb2.Movement]:
    """What moved on an account up to then, the newest first unless told otherwise, page by page."""
    found: list[account_query_pb2.Movement] = []
    request = account_query_pb2.ListMovementsRequest(account_id=account_id, page_size=2, order_by=order_by)
    if when:
        request.as_of.CopyFrom(as_of_pb2.AsOf(**when))
    while True:
        answer = await bank.call(bank.account_queries.ListMovements, request)
        found += answer.movements
        if not answer.next_page_token:
            return found
        request.page_token = answer.next_page_token


async def test_a_statement_as_of_then(bank: Bank) -> None:
    """At the place of each receipt, and at each moment, the movements up to it: tables that are behind are waited for."""
    alice, _ = await bank.register("Alice")
    blue, opened = await bank.open(alice)
    receipts = [await bank.deposit(blue, nth) for nth in (1, 2, 3, 4, 5)]
    assert await statement(bank, blue, token=opened.consistency_token) == []
    for nth, receipt in enumerate(receipts, 1):
        moved = await statement(bank, blue, token=receipt.consistency_token)
        assert [movement.amount_minor for movement in moved] == list(range(nth, 0, -1))
        assert await statement(bank, blue, moment=moved[0].moved_at) == moved
        assert await statement(bank, blue, "moved_at", token=receipt.consistency_token) == moved[::-1]
    assert await statement(bank, blue) == moved


async def test_why_is_answered_for_a_field(bank: Bank) -> None:
    """The newest first, with the command and its sender; each change has the place behind which the row is as it says."""
    alice, _ = await bank.register("Alice")
    blue, _ = await bank.open(alice)
    deposited = await bank.deposit(blue, 69)
    frozen = await bank.freeze(blue)
    unfrozen = await bank.unfreeze(blue)
    changes = await explained(bank, ("account", blue), size=1, field="status")
    assert [(change.type, change.version, change.command_id, change.user_id) for change in changes] == [
        ("bank.v1.AccountUnfrozen", 4, unfrozen.command_id, "alice"),
        ("bank.v1.AccountFrozen", 3, frozen.command_id, "alice"),
        ("bank.v1.AccountOpened", 1, changes[-1].command_id, "alice"),
    ]
    assert [[(field.field, field.from_json, field.to_json) for field in change.fields] for change in changes] == [
        [("status", '"ACCOUNT_STATUS_FROZEN"', '"ACCOUNT_STATUS_ACTIVE"')],
        [("status", '"ACCOUNT_STATUS_ACTIVE"', '"ACCOUNT_STATUS_FROZEN"')],
        [("status", "", '"ACCOUNT_STATUS_ACTIVE"')],
    ]
    for change, status in zip(changes, ("ACTIVE", "FROZEN", "ACTIVE"), strict=True):
        then: Any = await was(bank, ("account", blue), token=change.origin.token)
        assert then.status == account_query_pb2.AccountStatus.Value(f"ACCOUNT_STATUS_{status}")
    then = as_of_pb2.AsOf(token=deposited.consistency_token)
    changes = await explained(bank, ("account", blue), as_of=then)
    assert [change.version for change in changes] == [2, 1]
    assert [field.field for field in changes[0].fields] == ["balance_minor", "version"]


async def test_a_role_learns_of_the_past_what_it_learns_of_now(bank: Bank, caller: Caller) -> None:
    """The same roles, the caller's tenant alone, no position but for operators, and nobody else's name for a user."""
    alice, registered = await bank.register("Alice")
    user, started = await bank.register_user("Hatter", "correct horse battery")
    await bank.ended_registration((user, started))
    then = {"as_of": as_of_pb2.AsOf(token=registered.consistency_token)}
    now = {"as_of": as_of_pb2.AsOf(token=started.consistency_token)}
    mallory = caller(user_id="mallory", roles=[Role.USER])
    assert (await asked(mallory, "Get", "person", person_id=alice, **then)).person.name == "Alice"
    for rpc in ("Get", "Explain"):
        told = await refused(asked(mallory, rpc, "user", user_id=user, **now))
        assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")
        told = await refused(asked(caller(roles=[Role.READER]), rpc, "person", person_id=alice, **then))
        assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")
        told = await refused(asked(mallory, rpc, "person", person_id=alice, as_of=as_of_pb2.AsOf(position=1)))
        assert (told.code, told.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")
        stranger = caller(tenant="another", roles=[Role.OPERATOR])
        head = (await caller(roles=[Role.READER]).line())[-1].position
        told = await refused(asked(stranger, rpc, "person", person_id=alice, as_of=as_of_pb2.AsOf(position=head)))
        assert (told.code, told.reason) == ("NOT_FOUND", "PERSON_NOT_FOUND")
        told = await refused(asked(stranger, rpc, "person", person_id=alice, **then))
        assert (told.code, told.reason) == ("INVALID_ARGUMENT", "CONSISTENCY_TOKEN_MALFORMED")
    [change] = await explained(mallory, ("person", alice))
    assert (change.user_id, change.origin.position) == ("", 0)
    [change] = await explained(caller(user_id="olga", roles=[Role.OPERATOR]), ("person", alice))
    assert change.user_id == "alice"
    assert change.origin.position > 0
