"""The ids of processes' commands: a client can compute them, and neither take them beforehand nor meet them by chance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID, uuid5

import pytest

from bank.v1 import person_pb2, transfer_query_pb2, user_query_pb2
from foldline.v1 import command_pb2
from shared.folds.ids import step_id
from shared.platform.identity import Role
from tests.support.clients.bank import (
    Bank,
    item,
    new_id,
    options,
    packed,
    read_status,
    refused,
    start_registration,
    start_transfer,
)

TRANSFER_STEPS = ("debit", "credit", "refund", "suspend", "complete", "fail")
REGISTRATION_STEPS = ("reserve", "hold", "confirm", "release", "fail")


def steps_of(process_type: str, process_id: str, steps: tuple[str, ...]) -> list[str]:
    """The ids of all first and second attempts."""
    return [str(step_id(process_type, process_id, step, attempt)) for step in steps for attempt in (1, 2)]


def steps_of_an_earlier_release(process_type: str, process_id: str, steps: tuple[str, ...]) -> list[str]:
    """The same, as they were when anybody could take them."""
    return [str(uuid5(UUID(process_id), f"{process_type}/{step}/1")) for step in steps]


def any_command(command_id: str) -> person_pb2.RegisterPersonRequest:
    """Something that every user may send."""
    return person_pb2.RegisterPersonRequest(options=options(command_id), person_id=new_id(), name="Mallory")


async def try_all_ways(mallory: Bank, ids: list[str]) -> set[tuple[str, str]]:
    """Sends a command under each id by every RPC that takes commands; returns what came of it."""
    told: set[tuple[str, str]] = set()
    for command_id in (*ids, *(id_.upper() for id_ in ids)):
        for call in (
            mallory.call(mallory.people.RegisterPerson, any_command(command_id)),
            mallory.call(mallory.commands.Send, command_pb2.SendRequest(command=packed(any_command(command_id)))),
        ):
            refusal = await refused(call)
            told.add((refusal.code, refusal.reason))
    batch = command_pb2.SendBatchRequest(items=[item(any_command(command_id)) for command_id in ids])
    for receipt in (await mallory.call(mallory.commands.SendBatch, batch)).receipts:
        refusal = read_status(receipt.error)
        told.add((refusal.code, refusal.reason))
    return told


RESERVED = {("INVALID_ARGUMENT", "COMMAND_ID_RESERVED")}


async def test_no_step_of_a_transfer_can_be_taken(bank: Bank, caller: Callable[..., Bank]) -> None:
    """By no RPC; and a transfer whose steps' former ids are all taken completes, or is given back, all the same."""
    mallory = caller(user_id="mallory", roles=[Role.USER])
    alice = new_id()
    await bank.register("Alice", alice)
    for frozen in (False, True):
        blue, _ = await bank.open(alice)
        red, _ = await bank.open(alice)
        await bank.deposit(blue, 100)
        if frozen:
            await bank.freeze(red)
        transfer_id = new_id()
        assert await try_all_ways(mallory, steps_of("transfer", transfer_id, TRANSFER_STEPS)) == RESERVED
        for taken in steps_of_an_earlier_release("transfer", transfer_id, TRANSFER_STEPS):
            await mallory.call(mallory.people.RegisterPerson, any_command(taken))
        receipt = await bank.call(bank.transfers.StartTransfer, start_transfer(transfer_id, blue, red, 69))
        ended = await bank.ended_transfer((transfer_id, receipt))
        expected = transfer_query_pb2.TRANSFER_STATUS_FAILED if frozen else transfer_query_pb2.TRANSFER_STATUS_COMPLETED
        assert ended.status == expected
        balances = [(await bank.account(account, receipt.consistency_token)).balance_minor for account in (blue, red)]
        assert balances == ([100, 0] if frozen else [31, 69])


async def test_no_step_of_a_registration_can_be_taken(bank: Bank, caller: Callable[..., Bank]) -> None:
    """By no RPC; two registrations of one login with all former ids taken end as they should."""
    mallory = caller(user_id="mallory", roles=[Role.USER])
    started = []
    for _ in range(2):
        user_id = new_id()
        assert await try_all_ways(mallory, steps_of("registration", user_id, REGISTRATION_STEPS)) == RESERVED
        for taken in steps_of_an_earlier_release("registration", user_id, REGISTRATION_STEPS):
            await mallory.call(mallory.people.RegisterPerson, any_command(taken))
        request = start_registration(user_id, "Alice", "correct horse battery")
        started.append((user_id, await bank.call(bank.users.StartUserRegistration, request)))
    users = await asyncio.gather(*[bank.ended_registration(one) for one in started])
    assert sorted(user.status for user in users) == [
        user_query_pb2.REGISTRATION_STATUS_SUCCEEDED,
        user_query_pb2.REGISTRATION_STATUS_FAILED,
    ]


@pytest.mark.parametrize("roles", [[Role.USER], [Role.TENANT_ADMIN], [Role.OPERATOR]])
async def test_nobody_but_a_process_writes_there(caller: Callable[..., Bank], roles: list[Role]) -> None:
    """Whatever else the caller is."""
    assert await try_all_ways(caller(roles=roles), [str(step_id("transfer", new_id(), "debit"))]) == RESERVED
